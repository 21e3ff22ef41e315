"""The comparison itself: figures of every point, ratios of comparable systems, and which points nobody beats.

The first system is what the others are held against. What is derived: tokens per second of one card and of one watt,
and the share of the limit. Of `perf decode` that is the share of the bytes that its own run read; of `perf serve` the
share of the decode limit on paper (`ascend.roofline`): answers take prefill too, so it stays below what decode reaches.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ascend.cost import Sharding
from ascend.devices.facts import lookup
from ascend.errors import UserError
from ascend.model_shape import ModelShape
from ascend.precision import PRECISIONS
from ascend.roofline import Chip, decode_step
from perf.compare.intervals import Ratio, ratio
from perf.compare.rules import Judgement, judge
from perf.compare.systems import METRICS, Point, System


@dataclass(frozen=True)
class Figure:
    """One figure of a point: the median of its rounds or repeats, the least and the most."""

    median: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Line:
    """One point of one system. pareto: no system has both more tokens/s a card and a faster stream there."""

    system: int
    axis: str
    load: float
    figures: dict[str, Figure]
    per_card: float | None
    per_watt: float | None
    share_of_limit: float | None
    tokens_per_second_per_user: float | None
    pareto: bool = False


@dataclass(frozen=True)
class Pair:
    """System ``b`` against system ``a`` (indices); where they are comparable, b / a by (axis, load) and metric."""

    a: int
    b: int
    judgement: Judgement
    ratios: dict[tuple[str, float], dict[str, Ratio]]


@dataclass(frozen=True)
class Comparison:
    """All of it. ``across``: the differences that were named as what is compared."""

    systems: Sequence[System]
    lines: list[Line]
    pairs: list[Pair]
    across: tuple[str, ...]

    @property
    def comparable(self) -> bool:
        """Whether all pairs are."""
        return all(pair.judgement.comparable for pair in self.pairs)


def compare(systems: Sequence[System], across: Iterable[str] = ()) -> Comparison:
    """Compare all systems with the first."""
    named = tuple(across)
    labels = [system.label for system in systems]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise UserError(f"two systems are both called '{twice}'; name the files with --label, once for each file")
    pairs = [_pair(systems, other, named) for other in range(1, len(systems))]
    lines = [_line(number, system, point) for number, system in enumerate(systems) for point in system.points]
    pool = {0} | {pair.b for pair in pairs if pair.judgement.comparable}
    return Comparison(systems, _with_pareto(lines, pool), pairs, named)


def _pair(systems: Sequence[System], other: int, across: tuple[str, ...]) -> Pair:
    a, b = systems[0], systems[other]
    verdict = judge(a, b, across)
    ratios: dict[tuple[str, float], dict[str, Ratio]] = {}
    if verdict.comparable:
        paired = a.paired is not None and a.paired == b.paired
        levels_differ = a.settings.get("service level") != b.settings.get("service level")
        of_a = {(point.axis, point.load): point for point in a.points}
        for point in b.points:
            mine = of_a.get((point.axis, point.load))
            for key in METRICS if mine is not None else ():
                if key == "request_goodput" and levels_differ:
                    continue
                found = ratio(point.samples.get(key, ()), mine.samples.get(key, ()), paired) if mine else None
                if found is not None:
                    ratios.setdefault((point.axis, point.load), {})[key] = found
    return Pair(0, other, verdict, ratios)


def _line(number: int, system: System, point: Point) -> Line:
    figures = {
        key: Figure(statistics.median(values), min(values), max(values), len(values))
        for key, values in point.samples.items()
        if key in METRICS and values
    }
    speed, step = figures.get("output_throughput"), figures.get("median_tpot_ms")
    tokens = speed.median if speed else None
    emulated = system.run is not None and system.run.machine.emulated
    return Line(
        system=number,
        axis=point.axis,
        load=point.load,
        figures=figures,
        per_card=tokens / system.cards if tokens and system.cards else None,
        per_watt=tokens / point.watts if tokens and point.watts else None,
        share_of_limit=None if emulated else point.share_of_read_rate or _share_of_limit(system, point, tokens),
        tokens_per_second_per_user=1e3 / step.median if step and step.median and not emulated else None,
    )


def _share_of_limit(system: System, point: Point, tokens: float | None) -> float | None:
    """Return the share of the decode limit that ``tokens`` per second are, None where a figure for it is unknown."""
    run = system.run
    if run is None or tokens is None or point.axis != "concurrency" or run.model.shape is None:
        return None
    facts, precision = lookup(run.machine.device), PRECISIONS.get(run.model.precision)
    if precision is None or facts.bandwidth.value is None or system.lengths is None:
        return None
    peak = {name: figure.value for name, figure in facts.peak.items() if figure.value is not None}
    if not set(precision.dtypes) <= set(peak):
        return None
    shape, cards = ModelShape.from_config(run.model.shape), run.machine.cards
    context = int(system.lengths[0] + system.lengths[1] / 2)
    chip = Chip(facts.name, facts.bandwidth.value, peak, facts.memory.value)
    return tokens / decode_step(shape, precision, int(point.load), context, chip, Sharding(cards)).tokens_per_second


def _with_pareto(lines: list[Line], pool: set[int]) -> list[Line]:
    """Mark the points that no other of the systems in ``pool``, the comparable ones, beats in both figures."""

    def score(line: Line) -> tuple[float, float] | None:
        if line.system not in pool or line.per_card is None or line.tokens_per_second_per_user is None:
            return None
        return line.per_card, line.tokens_per_second_per_user

    def beaten(line: Line) -> bool:
        mine = score(line)
        others = [score(other) for other in lines if other is not line and other.axis == line.axis]
        return mine is None or any(
            other is not None and other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in others
        )

    return [Line(**{**vars(line), "pareto": not beaten(line)}) for line in lines]
