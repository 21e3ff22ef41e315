"""How fast a plan can be at most (`ascend.roofline`), and whether whole experts on each card cost or save bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ascend.cost import Sharding, decode_work
from ascend.model_shape import ModelShape
from ascend.precision import PRECISIONS
from ascend.roofline import Chip, decode_step, prefill
from ascend.routing import Routing
from serve.planning.cards import Cards
from serve.planning.memory import Division

if TYPE_CHECKING:
    from ascend.cost import Model

# Of the limit, what is planned with where a time is promised. An assumption: published decode steps of MoE models on
# H20 and 910B reach 8 to 62 % of theirs.
PLANNED_SHARE = 0.25
CONTEXT = 2048  # tokens in the cache of each sequence, for the limits


SAMPLED_UP_TO = 256  # tokens of a step: from there on every expert is hit, and no card reads more than another


class Steps(Routing):
    """Uniform routing, the imbalance of which is sampled for small steps alone; large ones would take seconds."""

    def imbalance(self, config: Model, tokens: int, blocks: int) -> float:
        """As `Routing.imbalance`, 1 for large steps."""
        return 1.0 if tokens > SAMPLED_UP_TO else super().imbalance(config, tokens, blocks)


class Rate(NamedTuple):
    """Decode at the limit. sequences: in all; per_sequence and total: tokens a second; seconds: of a step."""

    sequences: int
    per_sequence: float
    total: float
    seconds: float


@dataclass(frozen=True)
class Limits:
    """The most there can be, at `CONTEXT` tokens per sequence; None where a figure of the card is unknown.

    prefill: tokens of prompts a second, of all cards.
    """

    single: Rate | None = None
    full: Rate | None = None
    prefill: float | None = None


def chip_of(cards: Cards, precision: str) -> Chip | None:
    """Return the card as `ascend.roofline` takes it, None where its bandwidth or a peak is unknown."""
    facts, wanted = cards.facts, PRECISIONS[precision].dtypes
    peaks = {dtype: facts.peak[dtype].value for dtype in wanted if dtype in facts.peak}
    known = {dtype: value for dtype, value in peaks.items() if value is not None}
    if facts.bandwidth.value is None or len(known) < len(wanted):
        return None
    return Chip(facts.name, facts.bandwidth.value, known, cards.memory)


def rate(
    shape: ModelShape, precision: str, chip: Chip, division: Division, sequences: int, kv_bytes: float, context: int
) -> Rate:
    """Return the limit for ``sequences`` in all. Stages of a pipeline take turns: each has its share in work."""
    in_stage = max(1, sequences // division.pipeline)
    step = decode_step(
        shape, PRECISIONS[precision], in_stage, min(CONTEXT, context), chip, division.sharding, kv_bytes, Steps()
    )
    return Rate(sequences, 1 / step.seconds, sequences / step.seconds, step.seconds)


def limits(
    shape: ModelShape, precision: str, cards: Cards, division: Division, sequences: int, kv_bytes: float, context: int
) -> Limits:
    """Return the limits of a plan for one sequence and for ``sequences`` in all."""
    chip = chip_of(cards, precision)
    if chip is None:
        return Limits()
    single, full = (rate(shape, precision, chip, division, count, kv_bytes, context) for count in (1, sequences))
    per_card = prefill(shape, PRECISIONS[precision], min(CONTEXT, context), chip).tokens_per_second
    return Limits(single, full, per_card * division.cards)


class ExpertBytes(NamedTuple):
    """Bytes that the busiest card reads in a step: with every expert divided over all cards, and with whole experts."""

    divided: float
    whole: float


def expert_bytes(shape: ModelShape, precision: str, division: Division, sequences: int, kv_bytes: float) -> ExpertBytes:
    """Return both for ``sequences`` in all, one token each."""
    found = []
    for blocks in (1, division.tensor * division.data):
        sharding = Sharding(division.tensor, blocks, division.data)
        imbalance = Steps().imbalance(shape, sequences, blocks)
        work = decode_work(shape, PRECISIONS[precision], sequences, CONTEXT, sharding, kv_bytes, imbalance=imbalance)
        found.append(sum(part.nbytes for part in work.values()))
    return ExpertBytes(*found)
