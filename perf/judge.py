"""The verdict of `perf parity`: numbers in, PASS or FAIL out, with the reason and the likely cause. No tensors here.

Each layer is judged alone, on the same input on both sides, so that nothing accumulates. A choice of experts may differ
where the router's scores all but tie; what comes after such a flip is judged loosely, everything else strictly.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """What two correct implementations may differ by; see `LIMITS`.

    part: what attention or the MLP gives on the same input, stream: the residual stream after the layer; the largest
    |Δ| / (|a| + root mean square of the token). gain: of a part, the regression slope of Δ on a: rounding averages out
    in it, a factor that is wrong stays. router: on the same input, its biased scores, |Δ|, and the weights of the
    chosen experts, |Δ| / a. scores: its biased scores after the layer's own attention, |Δ|: how near a tie must be.
    logits: |Δ| in standard deviations of a position's logits, with nothing flipped before it.
    kl: the same positions, KL(a‖b) in nats. loose_kl: the mean over all positions, those after a flip among them.
    """

    part: float
    stream: float
    gain: float
    router: float
    scores: float
    logits: float
    kl: float
    loose_kl: float


# About three times the largest that was seen between the CPU and emulated cards, whose ops are written apart from this
# project's and round where the device's documentation says. 20 runs for each precision and each of two shapes: 4 seeds
# of the weights, hidden size 128 and 512, 3 and 6 layers, 8 and 32 experts, rows x length 2 x 48, 1 x 16, 3 x 96,
# 2 x 16 and 1 x 48, with 4 decode steps:
#   python -m perf parity --a cpu --b npu-emulated --model DIR --rows 2 --prompt-length 48 --seed 0 --json
# No real card has been measured.
LIMITS: dict[str, Limits] = {
    # Order of addition alone. Seen: part 6.8e-6, stream 4.1e-6, gain 6.9e-8, router 5.8e-7, scores 7.2e-7, logits
    # 1.0e-5, KL 1.3e-10, no flips. More room, since a sum's error grows with the root of its terms (8 times those of
    # the larger shape) and the logits' with depth: 5 to 15 times what was seen; logits 100 times.
    "fp32": Limits(part=5e-5, stream=5e-5, gain=1e-6, router=1e-5, scores=1e-5, logits=1e-3, kl=1e-6, loose_kl=1e-2),
    # A unit in the last place is up to 2^-7 = 7.8e-3 of a value, and one side may keep what the other rounds. Seen:
    # part 2.9e-2 (the largest of 10^5 values), stream 2.7e-2, gain 4.6e-4, scores 4.0e-3, logits 7.8e-2, KL 6.8e-3,
    # mean KL after flips 0.60 (with random weights, another expert means other answers). The router computes in fp32 on
    # the same input: 3.8e-7, as in fp32.
    "bf16": Limits(part=8e-2, stream=8e-2, gain=1.5e-3, router=1e-5, scores=1.2e-2, logits=0.25, kl=2e-2, loose_kl=2.0),
    # An activation near the middle between two of its 255 steps may go to either; a step is 1/127 of the token's
    # largest value. Seen: part 5.4e-2, stream 6.7e-2, gain 4.6e-4, router 3.8e-7, scores 6.3e-3, logits 0.23, KL
    # 3.2e-2, mean KL after flips 0.84.
    "w8a8": Limits(part=0.16, stream=0.2, gain=1.5e-3, router=1e-5, scores=2e-2, logits=0.7, kl=0.1, loose_kl=2.5),
    # The weights are the same on both sides, activations and sums as in bf16. Seen: part 2.7e-2, stream 2.8e-2, gain
    # 7.4e-4, router 4.1e-7, scores 4.7e-3, logits 8.9e-2, KL 7.3e-3, mean KL after flips 0.52.
    "w4a16": Limits(part=8e-2, stream=8e-2, gain=2e-3, router=1e-5, scores=1.4e-2, logits=0.25, kl=2e-2, loose_kl=2.0),
}


@dataclass(frozen=True)
class LayerNumbers:
    """How one layer differs between two sides that got the same input; the quantities of `Limits`.

    mlp, mlp_gain and stream are over the tokens whose experts agree. first: `attention` at position 0 of the rows.
    flips: tokens whose experts differ; unexplained: those of them that are no near-tie in a's scores; misrouted: tokens
    for which b took experts that its own scores do not choose.
    """

    name: str
    attention: float = 0.0
    attention_gain: float = 0.0
    first: float = 0.0
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
    and of the best five that are shared. margin: a's lead of its best token, where b's is another; the largest.
    """

    positions: int
    delta: float = 0.0
    kl_mean: float = 0.0
    kl_max: float = 0.0
    top1: float = 1.0
    top5: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """All numbers of two sides. ``clean`` are the positions of ``whole`` or ``decode`` before any flip of their row."""

    embedding: float
    layers: list[LayerNumbers]
    head: LogitNumbers
    whole: LogitNumbers
    whole_clean: LogitNumbers
    decode: LogitNumbers
    decode_clean: LogitNumbers


@dataclass(frozen=True)
class Verdict:
    """``passed``, or the reasons why not in the order of the computation, and what the first of them points at."""

    reasons: list[str] = field(default_factory=list)
    cause: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing was out of its limit."""
        return not self.reasons


def judge(numbers: Comparison, limits: Limits) -> Verdict:
    """Hold all numbers against the limits; what is not a number is out of every limit."""
    found: list[tuple[str, str]] = []
    if numbers.embedding != 0:
        found.append((f"embedding: differs by {numbers.embedding:.2g}", "weights of the embedding, or the token ids"))
    for layer in numbers.layers:
        found += [(f"{layer.name}: {what}", cause) for what, cause in judge_layer(layer, limits)]
    found += [(f"head: {what}", "final norm or head") for what in _judge_logits(numbers.head, limits)]
    for name, clean, everything in (
        ("whole pass", numbers.whole_clean, numbers.whole),
        ("decode", numbers.decode_clean, numbers.decode),
    ):
        cause = f"what only the {name} does: cache, mask, or how layers are chained"
        found += [(f"{name}: {what}", cause) for what in _judge_logits(clean, limits)]
        if not everything.kl_mean <= limits.loose_kl:
            found.append((f"{name}: mean KL {everything.kl_mean:.2g}, limit {limits.loose_kl:.2g}", cause))
    return Verdict([what for what, _ in found], found[0][1] if found else None)


def judge_layer(layer: LayerNumbers, limits: Limits) -> list[tuple[str, str]]:
    """Return what is out of its limit in one layer, each with its likely cause, in the order of the computation."""
    attention = "attention or its weights"
    if layer.first <= limits.part:
        attention = "positions: attention agrees at position 0 alone (rotary embedding, mask, or slots)"
    rows = (
        ("attention", layer.attention, limits.part, attention),
        ("attention's size", layer.attention_gain, limits.gain, attention),
        ("router", layer.router, limits.router, "the router's weight or bias"),
        ("misrouted tokens", layer.misrouted, 0, "how the router chooses: groups, bias, top-k"),
        ("unexplained flips", layer.unexplained, 0, "how the router chooses: groups, bias, top-k"),
        ("routing weights", layer.weights, limits.router, "routed_scaling_factor or norm_topk_prob"),
        ("MLP", layer.mlp, limits.part, "the experts or the MLP, or their weights: routing agrees"),
        ("MLP's size", layer.mlp_gain, limits.gain, "the experts or the MLP, or their weights: routing agrees"),
        ("router after attention", layer.scores, limits.scores, "the residual additions or a norm"),
        ("stream", layer.stream, limits.stream, "the residual additions or a norm"),
    )
    return [
        (f"{what} {value:.2g}, limit {limit:.2g}", cause)
        for what, value, limit, cause in rows
        if not abs(value) <= limit
    ]


def _judge_logits(clean: LogitNumbers, limits: Limits) -> list[str]:
    rows = (
        ("logits differ by {} standard deviations", clean.delta, limits.logits),
        ("KL {}", clean.kl_max, limits.kl),
        # Two logits may each move by the limit, so a lead of twice that may turn; a larger one may not.
        ("another best token where a's lead is {}", clean.margin, 2 * limits.logits),
    )
    return [f"{what.format(f'{value:.2g}')}, limit {limit:.2g}" for what, value, limit in rows if not value <= limit]
