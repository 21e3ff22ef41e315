"""The plots of `perf compare`. Bars on a point reach from the least to the most that was seen."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.font_manager import get_font_names

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
SIZE = (7.2, 4.2)  # inches, without the legend
ENTRY = 0.19  # inches of a line of the legend
ROW = 0.24  # inches of a row of a plot that has one for each point
LONGEST = 80  # characters of a label; the page has the whole of it
# Labels may be Chinese, and matplotlib's own font is not: the first of these that are installed stand in.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei")
STYLE: Any = {"svg.fonttype": "none", "font.size": 10, "axes.spines.top": False, "text.parse_math": False}
STYLE |= {"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}
STYLE |= {"axes.axisbelow": True, "font.family": [name for name in FONTS if name in get_font_names()]}


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
    save(canvas, text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    element = re.sub(r"<metadata>.*?</metadata>", "", whole[whole.index("<svg") :], flags=re.DOTALL)
    # In tags alone: a label may read like one.
    return re.sub(r"<[^>]+>", lambda tag: re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", tag[0]), element)


def save(canvas: Canvas, target: Any, **options: Any) -> None:
    """Save a figure, the same bytes each time. A letter that no font here has stays a box, and is not complained of."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "perf"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        canvas.savefig(target, **options)


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
            last = (-1.0, -1.0)
            for line, at in zip(lines, zip(x, y, strict=True), strict=True):
                if abs(at[0] - last[0]) / max(x) + abs(at[1] - last[1]) / max(y) > 0.05:  # else they would overlap
                    axes.annotate(f"{line.load:g}", at, textcoords="offset points", xytext=(5, 4), fontsize=8)
                    last = at
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
        axes.figure.set_figheight(_height(len(rows)))  # type: ignore[union-attr]
        axes.axvline(1, color="0.3", linewidth=1)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.invert_yaxis()
        axes.set(xlabel=f"times as many {METRICS[key].label}, with 95 % bounds", title="Ratios")
    return bool(rows)


def _shares(comparison: Comparison, axes: Axes) -> bool:
    rows = [line for line in comparison.lines if line.share_of_limit is not None]
    for place, line in enumerate(rows):
        bar = axes.barh([place], [100 * (line.share_of_limit or 0)], color=COLOURS[line.system % len(COLOURS)])
        axes.bar_label(bar, fmt="%.0f %%", padding=3, fontsize=8)
    if rows:
        axes.figure.set_figheight(_height(len(rows)))  # type: ignore[union-attr]
        axes.margins(x=0.08)
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
    system = comparison.systems[number]
    emulated = "EMULATED, " if system.run is not None and system.run.machine.emulated else ""
    label = f"{letter(number)}  {emulated}{system.label}"
    label = label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "label": label}


def _height(rows: int) -> float:
    return max(SIZE[1], 1.2 + ROW * rows)


def _finish(axes: Axes, logarithmic: bool = False) -> bool:
    entries = len(axes.get_legend_handles_labels()[0])
    if not entries:
        return False
    axes.set_ylim(bottom=0)
    if logarithmic:
        axes.set_xscale("log", base=2)
        ticks = sorted({float(x) for line in axes.get_lines() for x in line.get_xdata() if float(x) > 0})  # type: ignore[union-attr,arg-type]
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
    axes.figure.set_figheight(SIZE[1] + ENTRY * entries)  # type: ignore[union-attr]
    axes.figure.legend(loc="outside lower left", fontsize=8)  # never over the data, however long the labels are
    return True
