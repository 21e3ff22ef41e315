"""A report as one HTML page, to be printed and signed: no script, no network, nothing of a prompt but its hash."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ascend import __version__
from perf.parity.chart import bars, lines
from perf.parity.judge import Check, Comparison, layer_checks
from perf.parity.judge_served import ServedNumbers
from perf.parity.report import Report, ServerInfo
from perf.parity.side import SideInfo
from perf.parity.terminal import explanation
from perf.result import write_text

TEMPLATE = Path(__file__).with_name("page.html.jinja")
DIVERGED = 12  # diverged positions that are listed


@dataclass(frozen=True)
class Criterion:
    """One limit: the check that came nearest to it (or is furthest beyond), of so many."""

    worst: Check
    checks: int


def write_page(report: Report, file: Path) -> None:
    """Write the page, mode 0640, whole or not at all. Raises `UserError` if it cannot be written."""
    write_text(file, page(report))


def page(report: Report) -> str:
    """Return the page's HTML; all that comes from outside is escaped."""
    from jinja2 import Environment, StrictUndefined  # comes with torch

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "percent": lambda share: f"{share:.1%}"}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        version=__version__,
        sides=[_facts(report.a), _facts(report.b)],
        criteria=criteria(report.checks),
        diverged=_diverged(report),
        served=isinstance(report.numbers, ServedNumbers),
        layers=_layers(report),
        charts=_charts(report),
    )


def criteria(checks: list[Check]) -> list[Criterion]:
    """Of each kind of check the one nearest to its limit, in the order of the computation."""

    def kind(check: Check) -> tuple[str, str]:
        layer = check.place.startswith(("layer", "MTP"))
        return "layer" if layer else check.place.partition(" after")[0], check.what

    found: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        found.setdefault(kind(check), []).append(check)
    return [Criterion(max(group, key=_strain), len(group)) for group in found.values()]


def _strain(check: Check) -> float:
    if math.isnan(check.value):
        return math.inf
    return abs(check.value) / check.limit if check.limit else abs(check.value) * 1e30


def _facts(side: SideInfo | ServerInfo) -> dict[str, str]:
    """What is known of a side, by name."""
    if isinstance(side, ServerInfo):
        return {
            "Platform": side.side,
            "Model served": side.model,
            "Software": f"vLLM {side.version}" if side.version else "not named",
            "Log-probabilities": f"{side.top} a position",
            "Date (UTC)": side.date,
        }
    software = [f"{name} {version}" for name, version in side.software.items()]
    software += [f"torch {side.torch}"] + ([f"torch_npu {side.torch_npu}"] if side.torch_npu else [])
    return {
        "Platform": side.side,
        "Device": f"{side.device_name} — EMULATED, no card took part" if side.emulated else side.device_name,
        "Host": side.host,
        "Software": ", ".join(software),
        "Commit": side.commit or "not a checkout",
        "Weights, SHA-256 of samples": side.weights_sha256,
        "Date (UTC)": side.date,
    }


def _diverged(report: Report) -> list[tuple[Any, str]]:
    found = [(one, explanation(one, report.limits)) for one in report.numbers.divergences]
    return sorted(found, key=lambda pair: (pair[1].startswith(("rounding", "after")), -pair[0].lead))[:DIVERGED]


def _layers(report: Report) -> list[dict[str, Any]]:
    """One row per layer: its own numbers, and where the whole pass is after it."""
    if isinstance(report.numbers, ServedNumbers):
        return []
    drifted = {one.name: one for one in report.numbers.drift}
    return [
        {
            "own": layer,
            "gain": max((layer.attention_gain, layer.norm_gain, layer.mlp_gain), key=abs),
            "bad": [check.what for check in layer_checks(layer, report.limits) if not check.kept],
            "drift": drifted.get(layer.name),
        }
        for layer in report.numbers.layers
    ]


def _charts(report: Report) -> list[tuple[str, Markup]]:
    """Captions and pictures."""
    numbers = report.numbers
    if isinstance(numbers, ServedNumbers):
        names = [f"{row.share:.0%}" for row in numbers.quantiles]
        rows = {
            "server": [row.distance for row in numbers.quantiles],
            "rounding": [row.yardstick for row in numbers.quantiles],
        }
        return [("Distance from side a that so many of the positions stay within", lines(names, rows))]
    return _drift_charts(numbers, report.limits.drift)


def _drift_charts(numbers: Comparison, limit: float) -> list[tuple[str, Markup]]:
    names = [layer.name.removeprefix("layer ") for layer in numbers.drift]
    rows = {
        "before any flip": [layer.clean for layer in numbers.drift],
        "all tokens": [layer.everything for layer in numbers.drift],
        "limit": [limit * math.sqrt(number) for number in range(1, len(names) + 1)],
    }
    found = [("Drift: how far the streams of the whole pass are apart after each layer", lines(names, rows))]
    routed = [layer for layer in numbers.drift if layer.same_experts is not None]
    if routed:
        shares = [float(layer.same_experts or 0) for layer in routed]
        labels = [layer.name.removeprefix("layer ") for layer in routed]
        found.append(("Routing: share of tokens that take the same experts in the whole pass", bars(labels, shares)))
    return found


def _number(value: float) -> str:
    return f"{value:.2g}" if 1e-2 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"
