"""The report of `perf compare`: one HTML page with everything in it, to be opened without a network and printed."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

from ascend.errors import UserError
from perf.compare.comparison import Comparison
from perf.compare.figures import draw, save, svg
from perf.compare.systems import METRICS
from perf.compare.table import facts, letter, load, places, side
from perf.machine import commit

SHOWN = (
    "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "p99_itl_ms",
    "p99_e2el_ms", "request_goodput",
)  # fmt: skip
DOTS_PER_INCH = 160


def render(comparison: Comparison, argv: Sequence[str]) -> str:
    """Return the page. Everything in it is escaped but the plots, which are this program's own."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["figure"] = lambda value: "-" if value is None else f"{value:,.{places(value)}f}"
    return environment.get_template("page.html.jinja").render(
        comparison=comparison,
        systems=[_system(number, comparison) for number in range(len(comparison.systems))],
        pairs=[
            {"name": f"{letter(pair.b)} against {letter(pair.a)}", "pair": pair, "used": _used(pair.ratios.values())}
            for pair in comparison.pairs
        ],
        metrics=METRICS,
        used=_used(line.figures for line in comparison.lines),
        side=side,
        letter=letter,
        load=load,
        plots={name: jinja2.filters.do_mark_safe(svg(canvas, name)) for name, canvas in draw(comparison).items()},
        command=shlex.join(["python", "-m", "perf", "compare", *argv]),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit(),
    )


def save_plots(comparison: Comparison, folder: Path) -> None:
    """Write each plot as SVG and as PNG. Raises `UserError` where it cannot be written."""
    try:
        for name, canvas in draw(comparison).items():
            for kind in ("svg", "png"):
                file = folder / f"{name}.{kind}"
                save(canvas, file, dpi=DOTS_PER_INCH, metadata={"Date": None} if kind == "svg" else None)
                file.chmod(0o640)
    except OSError as error:
        raise UserError(f"--plots {folder}: cannot be written ({error.strerror})") from None


def _system(number: int, comparison: Comparison) -> dict[str, Any]:
    system = comparison.systems[number]
    run = system.run
    return {
        "name": letter(number),
        "label": system.label,
        "facts": facts(system),
        "source": Path(system.source).name,
        "run": run,
        "settings": system.settings,
        "versions": "" if run is None else ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        "software": "" if run is None else ", ".join(f"{name} {one}" for name, one in run.machine.software.items()),
        "lines": [line for line in comparison.lines if line.system == number],
    }


def _used(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the figures of `SHOWN` that any point has."""
    having = [set(one) for one in found]
    return [key for key in SHOWN if any(key in one for one in having)]
