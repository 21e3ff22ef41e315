"""The plots of `perf compare`. Bars on a point reach from the least to the most that was seen."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure as Canvas

from perf.compare.comparison import Comparison, Line
from perf.compare.systems import AXES, METRICS
from perf.compare.table import letter, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people who see red and green alike can tell apart; markers repeat less often.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SIZE = (7.2, 4.2)  # inches
STYLE: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}


def draw(comparison: Comparison) -> dict[str, Canvas]:
    """Return the figures that the data allow, by name."""
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, plot in PLOTS.items():
            canvas = Canvas(figsize=SIZE, layout="constrained")
            if plot(comparison, canvas.subplots()):
                drawn[name] = canvas
    return drawn


def svg(canvas: Canvas, name: str) -> str:
    """Return a figure as an SVG element to stand in a page: no prolog, no metadata, ids of its own."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        canvas.savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    element = re.sub(r"<metadata>.*?</metadata>", "", whole[whole.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", element)


def _throughput(comparison: Comparison, axes: Axes) -> bool:
    axis = _axis(comparison)
    for number, lines in _by_system(comparison, axis, "output_throughput"):
        figures = [line.figures["output_throughput"] for line in lines]
        spread = [[one.median - one.low for one in figures], [one.high - one.median for one in figures]]
        options = _style(comparison, number)
        axes.errorbar([line.load for line in lines], [one.median for one in figures], spread, capsize=3, **options)
    axes.set(xlabel=AXES[axis], ylabel="output tokens per second", title="Throughput under load")
    return _finish(axes, logarithmic=axis != "rate")


def _pareto(comparison: Comparison, axes: Axes) -> bool:
    for number in range(len(comparison.systems)):
        lines = [line for line in comparison.lines if line.system == number and line.per_card]
        lines = [line for line in lines if line.tokens_per_second_per_user is not None]
        if lines:
            x: Any = [line.tokens_per_second_per_user for line in lines]
            y: Any = [line.per_card for line in lines]
            axes.plot(x, y, **_style(comparison, number))
            for line in lines:
                at: Any = (line.tokens_per_second_per_user, line.per_card)
                axes.annotate(f"{line.load:g}", at, textcoords="offset points", xytext=(5, 4), fontsize=8)
    best = sorted(
        (line.tokens_per_second_per_user, line.per_card) for line in comparison.lines if line.pareto and line.per_card
    )
    if len(best) > 1:
        axes.plot(
            *zip(*best, strict=True), color="0.5", linewidth=5, alpha=0.3, zorder=0, label="nobody is better here"
        )
    axes.set(
        xlabel="tokens per second of one stream (1 / median TPOT)",
        ylabel="output tokens per second and card",
        title="Speed of one stream against throughput; numbers: load",
    )
    return _finish(axes)


def _latency(key: str, title: str) -> Callable[[Comparison, Axes], bool]:
    def plot(comparison: Comparison, axes: Axes) -> bool:
        axis = _axis(comparison)
        for number, lines in _by_system(comparison, axis, f"p99_{key}_ms"):
            style = _style(comparison, number)
            x = [line.load for line in lines]
            axes.plot(x, [line.figures[f"p99_{key}_ms"].median for line in lines], **style)
            if all(f"median_{key}_ms" in line.figures for line in lines):
                medians = [line.figures[f"median_{key}_ms"].median for line in lines]
                axes.plot(x, medians, **(style | {"linestyle": ":", "label": None}))
        axes.set(xlabel=AXES[axis], ylabel="milliseconds", title=f"{title}: p99, and the median dotted")
        return _finish(axes, logarithmic=axis != "rate")

    return plot


def _ratios(comparison: Comparison, axes: Axes) -> bool:
    key, rows = "output_throughput", []
    for pair in comparison.pairs:
        for (axis, value), ratios in pair.ratios.items():
            if key in ratios:
                rows.append((f"{letter(pair.b)} / {letter(pair.a)}, {load(axis, value)}", pair.b, ratios[key]))
    for place, (_, number, found) in enumerate(rows):
        low, high = (found.value if bound is None else bound for bound in (found.low, found.high))
        spread = [[found.value - low], [high - found.value]]
        style = _style(comparison, number) | {"linestyle": "none", "label": None}
        axes.errorbar([found.value], [place], xerr=spread, capsize=4, **style)
    if rows:
        axes.axvline(1, color="0.3", linewidth=1)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.invert_yaxis()
        axes.set(xlabel=f"times as many {METRICS[key].label}, with 95 % bounds", title="Ratios")
    return bool(rows)


def _shares(comparison: Comparison, axes: Axes) -> bool:
    rows = [line for line in comparison.lines if line.share_of_limit is not None]
    for place, line in enumerate(rows):
        axes.barh([place], [100 * (line.share_of_limit or 0)], color=COLOURS[line.system % len(COLOURS)])
    if rows:
        axes.set_yticks(range(len(rows)), [f"{letter(line.system)}, {load(line.axis, line.load)}" for line in rows])
        axes.invert_yaxis()
        axes.set(xlabel="per cent of what memory and arithmetic allow", title="Share of the limit")
    return bool(rows)


PLOTS: dict[str, Callable[[Comparison, Axes], bool]] = {
    "throughput": _throughput,
    "pareto": _pareto,
    "ratios": _ratios,
    "ttft": _latency("ttft", "Time to first token"),
    "tpot": _latency("tpot", "Time per output token"),
    "share": _shares,
}


def _axis(comparison: Comparison) -> str:
    """Return the kind of load that most points have."""
    kinds = [line.axis for line in comparison.lines]
    return max(dict.fromkeys(kinds), key=kinds.count)


def _by_system(comparison: Comparison, axis: str, key: str) -> list[tuple[int, list[Line]]]:
    found = []
    for number in range(len(comparison.systems)):
        lines = [
            line for line in comparison.lines if (line.system, line.axis) == (number, axis) and key in line.figures
        ]
        if lines:
            found.append((number, lines))
    return found


def _style(comparison: Comparison, number: int) -> dict[str, Any]:
    label = f"{letter(number)}  {comparison.systems[number].label}"
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "label": label}


def _finish(axes: Axes, logarithmic: bool = False) -> bool:
    if not axes.get_legend_handles_labels()[0]:
        return False
    axes.set_ylim(bottom=0)
    if logarithmic:
        axes.set_xscale("log", base=2)
        ticks = sorted({float(x) for line in axes.get_lines() for x in line.get_xdata() if float(x) > 0})  # type: ignore[union-attr,arg-type]
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
    axes.legend(fontsize=8)
    return True
