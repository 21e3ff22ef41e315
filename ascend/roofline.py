"""How fast a card can be at most: bytes over bandwidth or FLOPs over peak, whichever takes longer, part by part.

    seconds of a step = Σ over routed experts, other matmuls, head, attention of max(bytes / bandwidth, FLOPs / peak)

Parts do not overlap, are divided perfectly over the cards, and nothing else takes time: no kernel launches, no
communication (unless a latency is given), no sampling. So it is a limit and predicts nothing. It is passed only by
reading less than was reckoned: real routing is skewed and hits fewer experts than `Routing`, uniform, assumes, which
matters from two tokens per step on. What is read and counted is in `ascend.cost`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ascend.cost import (
    ONE_CARD,
    Sharding,
    active_parameters,
    decode_work,
    kv_bytes_per_card,
    weight_bytes,
    weight_bytes_per_card,
)
from ascend.errors import UserError
from ascend.precision import Precision
from ascend.routing import Routing

if TYPE_CHECKING:
    from ascend.cost import Model

# Of a card's memory, what an engine fills with weights and KV cache: vLLM's default `gpu_memory_utilization`
# (vllm/config/cache.py, 0.32). The rest is for activations, graphs and the runtime.
USABLE_MEMORY = 0.92
# Weights of the EAGLE3 draft head that AQ-MedAI publishes for Ling-flash-2.0 (SpecForge's ling-flash-2.0-eagle3.json).
EAGLE3_PARAMETERS = 0.425e9
# That a draft is right if those before it are: fits the mean acceptance lengths that SpecBundle publishes for EAGLE3 on
# Ling-flash-2.0 over seven sets, 2.84 with 3 drafts (here 2.83), 3.44 with 5 (3.46) and 3.79 with 7 (3.84).
TYPICAL_ACCEPTANCE = (0.773,)


@dataclass(frozen=True)
class Chip:
    """What one card can do: bandwidth in B/s, peak in FLOP/s (OP/s) by dtype, memory in bytes (None: unknown)."""

    name: str
    bandwidth: float
    peak: Mapping[str, float] = field(hash=False)
    memory: float | None = None


@dataclass(frozen=True)
class StepLimit:
    """The least time of one decode step.

    seconds: of all of it. parts: by name, what each takes of it; communication among them. compute_bound: the parts
    whose FLOPs take longer than their bytes. tokens_per_second: of all sequences together, one token each.
    """

    seconds: float
    parts: Mapping[str, float] = field(hash=False)
    compute_bound: tuple[str, ...]
    tokens_per_second: float


@dataclass(frozen=True)
class Memory:
    """Bytes that a card is asked to hold, and what it offers to an engine (None: unknown)."""

    weights: float
    kv: float
    usable: float | None

    @property
    def verdict(self) -> str:
        """``fits``, ``weights do not fit``, ``KV does not fit`` or ``unknown``."""
        if self.usable is None:
            return "unknown"
        if self.weights > self.usable:
            return "weights do not fit"
        return "fits" if self.weights + self.kv <= self.usable else "KV does not fit"


def decode_step(
    config: Model,
    precision: Precision,
    batch: int,
    context: int,
    chip: Chip,
    sharding: Sharding = ONE_CARD,
    kv_bytes: float = 2,
    routing: Routing | None = None,
    drafts: int = 0,
    all_reduce: float = 0.0,
) -> StepLimit:
    """The limit of a decode step of ``batch`` sequences with ``context`` tokens each; see `ascend.cost.decode_work`.

    drafts: tokens verified beside each sequence's own; ``tokens_per_second`` still counts one token a sequence.
    all_reduce: seconds of one exchange between cards; 0 leaves communication out. A layer has one after attention,
    where that is divided, and one after the MLP (or there a dispatch and a combine, taken for one).
    """
    routing = routing or Routing()
    tokens = batch * (drafts + 1)
    distinct, imbalance = routing.distinct(config, tokens), routing.imbalance(config, tokens, sharding.experts)
    work = decode_work(config, precision, batch, context, sharding, kv_bytes, drafts, distinct, imbalance)
    reading = {name: part.nbytes / chip.bandwidth for name, part in work.items()}
    computing = {name: part.flops / chip.peak[part.compute] for name, part in work.items()}
    parts = {name: max(reading[name], computing[name]) for name in work}
    parts["communication"] = all_reduce * config.num_hidden_layers * ((sharding.tensor > 1) + (sharding.cards > 1))
    seconds = sum(parts.values())
    bound = tuple(name for name in work if computing[name] > reading[name])
    return StepLimit(seconds, parts, bound, batch / seconds)


def memory(
    config: Model,
    precision: Precision,
    batch: int,
    context: int,
    installed: float | None,
    sharding: Sharding = ONE_CARD,
    kv_bytes: float = 2,
) -> Memory:
    """What the fullest card holds for ``batch`` sequences of ``context`` tokens, against its installed bytes."""
    return Memory(
        weight_bytes_per_card(config, precision, sharding),
        kv_bytes_per_card(config, batch, context, sharding, kv_bytes),
        None if installed is None else installed * USABLE_MEMORY,
    )


@dataclass(frozen=True)
class Speculation:
    """Speculative decoding at the limit. cost: one speculative step in plain ones; speedup: acceptance / cost."""

    cost: float
    speedup: float
    tokens_per_second: float


def speculation(
    plain: StepLimit,
    verify: StepLimit,
    drafts: int,
    acceptance: float,
    batch: int,
    chip: Chip,
    sharding: Sharding = ONE_CARD,
    draft_parameters: float = EAGLE3_PARAMETERS,
) -> Speculation:
    """What ``drafts`` draft tokens and one verification cost against a ``plain`` step.

    acceptance: tokens gained per step on average, the model's own included: 1 to drafts + 1. The draft head runs
    ``drafts`` times with ``batch`` tokens, in BF16, divided over the cards; its keys and values are not counted.
    """
    reading = draft_parameters * 2 / chip.bandwidth
    computing = 2 * draft_parameters * batch / chip.peak["bf16"]
    cost = (verify.seconds + drafts * max(reading, computing) / sharding.cards) / plain.seconds
    return Speculation(cost, acceptance / cost, plain.tokens_per_second * acceptance / cost)


def tokens_per_step(drafts: int, acceptance: Sequence[float]) -> float:
    """Tokens that a step gains on average: 1 + p1 + p1·p2 + …, where p_n says how likely draft n is right after others.

    The last of ``acceptance`` holds for all further drafts. Raises `UserError` for what is no probability.
    """
    if not acceptance or not all(0 <= p <= 1 for p in acceptance):
        raise UserError(f"acceptance is {list(acceptance)}, it must be probabilities from 0 to 1, one or more")
    gained, reached = 1.0, 1.0
    for n in range(drafts):
        reached *= acceptance[min(n, len(acceptance) - 1)]
        gained += reached
    return gained


@dataclass(frozen=True)
class PrefillLimit:
    """tokens_per_second: of one card. compute_bound_chunk: tokens in a chunk from which on compute is the limit."""

    tokens_per_second: float
    compute_bound_chunk: float


def prefill(config: Model, precision: Precision, length: int, chip: Chip) -> PrefillLimit:
    """The limit of reading a prompt of ``length`` tokens, at 100 % of the dense peak; the weights are read for free.

    A token costs two FLOPs per active weight and attention over half the prompt on average (causal), the latter in the
    plain dtype; the head only runs for the last token and is left out. A chunk is compute-bound where the matmuls of
    its tokens take longer than reading all weights but the embedding once.
    """
    matmuls = 2 * active_parameters(config) / chip.peak[precision.matmuls.compute]
    scores = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length / 2
    seconds = matmuls + scores / chip.peak[precision.plain.compute]
    stored = weight_bytes(config, precision)
    read = stored.total - (stored.embedding if stored.head else 0)
    return PrefillLimit(1 / seconds, read / chip.bandwidth / matmuls)
