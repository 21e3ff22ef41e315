"""The verdict of `perf parity`: numbers in, PASS or FAIL out, with the reason and the likely cause. No tensors here.

Each layer is judged alone, on the same input on both sides, so that nothing accumulates. A choice of experts may differ
where the router's scores all but tie; what comes after such a flip is judged loosely. Whole pass and decode are
therefore run a second time on side a's experts, and judged strictly at every position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from perf.parity.limits import Limits


@dataclass(frozen=True)
class LayerNumbers:
    """How one layer differs between two sides that got the same input; the quantities of `Limits`.

    norm, norm_gain: of the MLP's input after the layer's own attention. mlp, mlp_gain and stream are over the tokens
    whose experts agree. first, first_gain: `attention` and its gain at position 0 of the rows.
    flips: tokens whose experts differ; unexplained: those of them that are no near-tie in a's scores; misrouted: tokens
    for which b took experts that its own scores do not choose.
    """

    name: str
    attention: float = 0.0
    attention_gain: float = 0.0
    first: float = 0.0
    first_gain: float = 0.0
    norm: float = 0.0
    norm_gain: float = 0.0
    mlp: float = 0.0
    mlp_gain: float = 0.0
    router: float = 0.0
    weights: float = 0.0
    scores: float = 0.0
    flips: int = 0
    unexplained: int = 0
    misrouted: int = 0
    stream: float = 0.0


@dataclass(frozen=True)
class LogitNumbers:
    """How logits differ over some positions.

    delta: largest |Δ| in standard deviations of a's logits. top1, top5: shares of positions whose best token agrees,
    and of the best five that are shared. margin: a's lead of its best token over b's, where another; the largest.
    """

    positions: int
    delta: float = 0.0
    kl_mean: float = 0.0
    kl_max: float = 0.0
    top1: float = 1.0
    top5: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True)
class DriftNumbers:
    """How far two whole passes are apart after one layer: norm of the residual streams' difference over a's norm.

    clean: over the tokens before any flip of their row; everything: over all; worst: the largest of one token alone.
    same_experts: share of all tokens that took the same experts, None in a layer without a router.
    """

    name: str
    clean: float
    everything: float
    worst: float
    same_experts: float | None = None


@dataclass(frozen=True)
class Divergence:
    """A position whose best token is another one on side b; in standard deviations of a's logits.

    lead: a's, of its best token over b's. moved: by how much these two logits differ between the sides, added up: the
    lead is never more; None where a server does not name both. after_flip: whether a token of the row took other
    experts by then.
    """

    where: str
    row: int
    position: int
    lead: float
    moved: float | None
    after_flip: bool

    def explained(self, limits: Limits) -> bool:
        """Whether rounding or a near-tie of the router accounts for it: two logits may each move by a limit."""
        return self.after_flip or self.lead <= 2 * limits.logits


@dataclass(frozen=True)
class Comparison:
    """All numbers of two sides. ``clean`` are the positions of ``whole`` or ``decode`` before any flip of their row.

    forced, forced_decode: the same passes, all positions, with side b made to take side a's experts.
    """

    embedding: float
    layers: list[LayerNumbers]
    drift: list[DriftNumbers]
    divergences: list[Divergence]
    head: LogitNumbers
    whole: LogitNumbers
    whole_clean: LogitNumbers
    decode: LogitNumbers
    decode_clean: LogitNumbers
    forced: LogitNumbers
    forced_decode: LogitNumbers


@dataclass(frozen=True)
class Check:
    """One number held against its limit: where it was seen, what it is, and what it points at if it is too large."""

    place: str
    what: str
    value: float
    limit: float
    cause: str

    @property
    def kept(self) -> bool:
        """Whether the limit is kept; what is not a number is out of every limit."""
        return abs(self.value) <= self.limit

    def __str__(self) -> str:
        return f"{self.place}: {self.what} {self.value:.2g}, limit {self.limit:.2g}"


@dataclass(frozen=True)
class Verdict:
    """``passed``, or the reasons why not in the order of the computation, and what the first of them points at."""

    reasons: list[str] = field(default_factory=list)
    cause: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing was out of its limit."""
        return not self.reasons


def judge(checks: list[Check]) -> Verdict:
    """Sum up the checks of `layer_checks`, `all_checks` or `perf.parity.judge_served`."""
    broken = [check for check in checks if not check.kept]
    return Verdict([str(check) for check in broken], broken[0].cause if broken else None)


def all_checks(numbers: Comparison, limits: Limits) -> list[Check]:
    """Hold all numbers of two sides against the limits, in the order of the computation."""
    tokens = "weights of the embedding, or the token ids"
    found = [Check("embedding", "largest difference", numbers.embedding, 0.0, tokens)]
    for layer in numbers.layers:
        found += layer_checks(layer, limits)
    found += _logit_checks("head", numbers.head, limits, "final norm or head")
    for number, drifted in enumerate(numbers.drift, 1):
        cause = f"what only the whole pass does up to {drifted.name}: mask, or how layers are chained"
        place = f"whole pass after {drifted.name}"
        found.append(Check(place, "drift of the stream", drifted.clean, limits.drift * math.sqrt(number), cause))
    depth = max(1.0, len(numbers.drift) / 8)  # rounding adds up like a random walk
    for place, forced, everything in (
        ("whole pass", numbers.forced, numbers.whole),
        ("decode", numbers.forced_decode, numbers.decode),
    ):
        cause = f"what only the {place} does: cache, mask, or how layers are chained"
        strict = f"{place} on a's experts"
        delta = limits.forced_logits * math.sqrt(depth)
        found.append(Check(strict, "logits' largest difference", forced.delta, delta, cause))
        found.append(Check(strict, "mean KL", forced.kl_mean, limits.forced_kl * depth, cause))
        found.append(Check(place, "mean KL", everything.kl_mean, limits.loose_kl, cause))
    return found


def layer_checks(layer: LayerNumbers, limits: Limits) -> list[Check]:
    """Hold one layer's numbers against the limits, each with its likely cause, in the order of the computation."""
    attention = "attention or its weights"
    if layer.first <= limits.part < layer.attention and abs(layer.first_gain) <= limits.gain:
        attention = "what positions or keys decide: rotary embedding, QK-norm, scale, mask, slots (position 0 agrees)"
    norm = "the norm after attention, or the residual addition before it"
    chosen = "how the router chooses: groups, bias, top-k"
    mlp = "the experts or the MLP, or their weights: routing agrees"
    rest = "the residual additions or a norm"
    rows = (
        ("attention", layer.attention, limits.part, attention),
        ("attention's size", layer.attention_gain, limits.gain, attention),
        ("MLP's input", layer.norm, limits.stream, norm),
        ("MLP's input's size", layer.norm_gain, limits.gain, norm),
        ("router", layer.router, limits.router, "the router's weight or bias"),
        ("misrouted tokens", layer.misrouted, 0.0, chosen),
        ("unexplained flips", layer.unexplained, 0.0, chosen),
        ("routing weights", layer.weights, limits.router, "routed_scaling_factor or norm_topk_prob"),
        ("MLP", layer.mlp, limits.part, mlp),
        ("MLP's size", layer.mlp_gain, limits.gain, mlp),
        ("router after attention", layer.scores, limits.scores, rest),
        ("stream", layer.stream, limits.stream, rest),
    )
    return [Check(layer.name, what, value, limit, cause) for what, value, limit, cause in rows]


def _logit_checks(place: str, numbers: LogitNumbers, limits: Limits, cause: str) -> list[Check]:
    rows = (
        ("logits' largest difference", numbers.delta, limits.logits),
        ("largest KL", numbers.kl_max, limits.kl),
        # Two logits may each move by the limit, so a lead of twice that may turn; a larger one may not.
        ("another best token against a's lead of", numbers.margin, 2 * limits.logits),
    )
    return [Check(place, what, value, limit, cause) for what, value, limit in rows]
