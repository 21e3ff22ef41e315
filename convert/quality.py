"""The quality report: what rounding did to the weights, per class and for the worst tensors, with a histogram.

Errors are relative, so that tensors of any scale compare: *mean* is ``‖rounded - weight‖ / ‖weight‖`` (root mean
squares over all values), *max* is the largest error over the largest weight of the tensor. Figures are rounded to four
digits: the report of the same weights is the same text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.classes import CLASSES
from convert.plan import Plan
from convert.rounding import Errors

WORST = 10
REPORT, PLOT = "conversion.json", "conversion.svg"
ERROR_KEYS = ("mean_relative_error", "max_relative_error")
BINS = 50


@dataclass
class ClassQuality:
    """One class of tensors: how many, what they weighed and weigh, and their errors by name."""

    tensors: int = 0
    parameters: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    formats: set[str] = field(default_factory=set)
    errors: dict[str, Errors] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values; errors only where something was rounded."""
        described: dict[str, Any] = {
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "formats": sorted(self.formats),
        }
        if self.errors:
            squares = math.fsum(one.squares for one in self.errors.values())
            squared_error = math.fsum(one.squared_error for one in self.errors.values())
            described["mean_relative_error"] = digits(ratio(squared_error, squares) ** 0.5)
            described["max_relative_error"] = digits(max(map(max_error, self.errors.values())))
        return described


def mean_error(errors: Errors) -> float:
    """Root mean square of a tensor's error over that of its weights."""
    return ratio(errors.squared_error, errors.squares) ** 0.5


def max_error(errors: Errors) -> float:
    """A tensor's largest error over its largest weight."""
    return ratio(errors.largest_error, errors.largest)


def ratio(part: float, whole: float) -> float:
    """Their quotient; 0 for nothing of nothing."""
    return part / whole if whole else 0.0


def digits(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def by_class(plan: Plan, errors: Mapping[str, Errors]) -> dict[str, ClassQuality]:
    """Add up a plan's tensors by class, with the errors of those that were rounded; without errors, the plan alone."""
    found: dict[str, ClassQuality] = {}
    for item in plan.items():
        one = found.setdefault(item.kind, ClassQuality())
        one.tensors += 1
        one.parameters += math.prod(item.source.shape)
        one.bytes_before += item.source.nbytes
        one.bytes_after += item.nbytes
        one.formats.add(f"{item.outputs[0].dtype}")
        if item.source.name in errors:
            one.errors[item.source.name] = errors[item.source.name]
    return {name: found[name] for name in (*CLASSES, "other") if name in found}


def report(
    plan: Plan, errors: Mapping[str, Errors], left_out: Mapping[str, str], notes: Sequence[str]
) -> dict[str, Any]:
    """Return the report as plain values."""
    worst = sorted(errors, key=lambda name: (-mean_error(errors[name]), name))[:WORST]
    return {
        "request": plan.request.as_json(),
        "classes": {name: one.as_json() for name, one in by_class(plan, errors).items()},
        "worst": [
            {
                "tensor": name,
                "mean_relative_error": digits(mean_error(errors[name])),
                "max_relative_error": digits(max_error(errors[name])),
            }
            for name in worst
        ],
        "left_out": dict(left_out),
        "notes": list(notes),
    }


def table(classes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the classes of a report (or of a plan) as text, a line each."""
    sizes = f"{'before':>10}{'after':>10}"
    lines = [f"{'class':<15}{'tensors':>8}{'parameters':>16}{sizes}  {'stored as':<12}{'mean err':>9}{'max err':>9}"]
    for name, one in classes.items():
        stored = "/".join(one["formats"])
        errors = [f"{one[key]:9.2%}" if key in one else f"{'-':>9}" for key in ERROR_KEYS]
        sizes = f"{gigabytes(one['bytes_before']):>10}{gigabytes(one['bytes_after']):>10}"
        lines.append(f"{name:<15}{one['tensors']:>8}{one['parameters']:>16,}{sizes}  {stored:<12}{''.join(errors)}")
    return "\n".join(lines)


def gigabytes(nbytes: float) -> str:
    """A size in the unit that suits it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} B"


def plot(file: Path, classes: Mapping[str, ClassQuality]) -> None:
    """Draw how the tensors' mean errors are spread, a line per class; the same errors give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    found = {
        name: [mean_error(errors) for errors in one.errors.values()] for name, one in classes.items() if one.errors
    }
    margins = {"left": 0.09, "right": 0.98, "top": 0.92, "bottom": 0.12}
    with pyplot.rc_context({"svg.hashsalt": "antangelmed", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), gridspec_kw=margins)
        axes.hist(list(found.values()), BINS, histtype="step", log=True, linewidth=1.5, label=_labels(found))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter("{x:g}")  # a power of ten would be a formula, which takes long to set
        axes.set_xlabel("error of a tensor's values over their size (root mean squares)")
        axes.set_ylabel("tensors")
        axes.set_title("What rounding did to the weights")
        axes.legend()
        figure.savefig(file, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def _labels(found: Mapping[str, list[float]]) -> list[str]:
    return [f"{name} ({len(errors)})" for name, errors in found.items()]
