"""What `perf compare` prints, and the JSON document that says the same."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from perf.compare.comparison import Comparison, Line, Pair
from perf.compare.intervals import Ratio
from perf.compare.systems import AXES, METRICS, System
from perf.result import finite

NOT_COMPARABLE = "NOT COMPARABLE"


def show(comparison: Comparison) -> None:
    """Print every system with its points, then each pair."""
    for number, system in enumerate(comparison.systems):
        print(f"{letter(number)}  {system.label}")
        print(f"   {facts(system)}")
        _points([line for line in comparison.lines if line.system == number], system)
    for pair in comparison.pairs:
        print()
        _pair(comparison, pair)


def letter(number: int) -> str:
    """Name a system in a table: A, B, … Z, then 27, 28, …"""
    return chr(ord("A") + number) if number < 26 else str(number + 1)


def facts(system: System) -> str:
    """Say in one line what measured the system, and on what."""
    run = system.run
    if run is None:
        return f"{system.engine}; {system.tool}, {system.source}; device and model unknown"
    emulated = "EMULATED: no card took part, times mean nothing; " if run.machine.emulated else ""
    cards = f"{run.machine.cards} x " if run.machine.cards > 1 else ""
    weights = "random weights" if system.weights == "random" else "checkpoint"
    model = f"{run.model.name} ({weights}, {run.model.precision})"
    return f"{emulated}{cards}{run.machine.device}; {system.engine}; {model}; {system.tool}, {run.date}"


def _points(lines: list[Line], system: System) -> None:
    keys = [key for key in METRICS if any(key in line.figures for line in lines)][:6]
    head = "".join(f"{METRICS[key].label:>16}" for key in keys)
    print(f"   {'load':<18}{head}{'per card':>10}{'per W':>8}{'of limit':>10}{'Pareto':>8}")
    for line in lines:
        cells = "".join(
            f"{line.figures[key].median:>16.{places(line.figures[key].median)}f}"
            if key in line.figures
            else f"{'-':>16}"
            for key in keys
        )
        ends = f"{_or_dash(line.per_card, 10, 1)}{_or_dash(line.per_watt, 8, 2)}"
        share = f"{line.share_of_limit:>10.0%}" if line.share_of_limit is not None else f"{'-':>10}"
        print(f"   {load(line.axis, line.load):<18}{cells}{ends}{share}{'*' if line.pareto else '':>8}")


def load(axis: str, value: float) -> str:
    """Name a load."""
    return f"{axis} {value:g}"


def places(value: float) -> int:
    """Return how many decimals show a figure to about three digits."""
    return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2


def side(key: str, found: Ratio) -> str:
    """Say whether a ratio of a metric is ``better`` or ``worse`` than 1, nothing where its bounds leave that open."""
    if not found.settled:
        return ""
    return "better" if (found.value > 1) == METRICS[key].more_is_better else "worse"


def _open(found: Ratio) -> str:
    return "" if found.low is None else "not settled"


def _or_dash(value: float | None, width: int, decimals: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{decimals}f}"


def _pair(comparison: Comparison, pair: Pair) -> None:
    names = f"{letter(pair.b)} against {letter(pair.a)}"
    if not pair.judgement.comparable:
        print(f"{names}: {NOT_COMPARABLE}")
    else:
        across = f", across {', '.join(comparison.across)}" if pair.judgement.allowed else ""
        print(f"{names}{across}: how many times as much, with 95 % bounds")
    for finding in pair.judgement.refused:
        across = f"; if that is what you compare: --across {finding.across}" if finding.across else ""
        print(f"   {finding}{across}")
    for finding in pair.judgement.allowed:
        print(f"   differs as asked: {finding}")
    for remark in pair.judgement.remarks:
        print(f"   note: {remark}")
    for (axis, value), ratios in pair.ratios.items():
        for key, found in ratios.items():
            verdict = side(key, found) or _open(found)
            print(f"   {load(axis, value):<18}{METRICS[key].label:<35}{found!s:<26}{verdict}".rstrip())
    if pair.judgement.comparable and not pair.ratios:
        print("   no load that both were measured under")


def as_document(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as one JSON document."""
    document = {
        "across": comparison.across,
        "axes": AXES,
        "systems": [
            {"name": letter(number), **{key: value for key, value in asdict(system).items() if key != "points"}}
            for number, system in enumerate(comparison.systems)
        ],
        "points": [asdict(line) | {"system": letter(line.system)} for line in comparison.lines],
        "pairs": [
            {
                "a": letter(pair.a),
                "b": letter(pair.b),
                "comparable": pair.judgement.comparable,
                "refused": [asdict(one) for one in pair.judgement.refused],
                "allowed": [asdict(one) for one in pair.judgement.allowed],
                "remarks": pair.judgement.remarks,
                "ratios": [
                    {"axis": axis, "load": value, "metric": key, **asdict(found)}
                    for (axis, value), ratios in pair.ratios.items()
                    for key, found in ratios.items()
                ],
            }
            for pair in comparison.pairs
        ],
    }
    made: dict[str, Any] = finite(document)
    return made
