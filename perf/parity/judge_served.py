"""An endpoint's numbers and the limits they are held against. No tensors here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from perf.parity.judge import Check, Divergence
from perf.parity.limits import Limits


@dataclass(frozen=True)
class QuantileNumbers:
    """A share of the positions is at most this far from side a: on the server, and in side a's twins."""

    share: float
    distance: float
    yardstick: float

    @property
    def factor(self) -> float:
        """How many times as far the server is."""
        return self.distance / max(self.yardstick, 1e-30)


@dataclass(frozen=True)
class ServedNumbers:
    """How a server differs from side a; distances as `perf.parity.served` has them.

    positions: of all prompts; settled: those of them before any near-tie of side a's routers, settled_max the largest
    distance of these; judged: those that the quantiles are of. begin_median: of the prompts' first tokens, which attend
    to nothing but themselves. given: |Δ log-probability| of the prompt's next token, in nats. kl_mean: KL(a‖b) in nats
    of the tokens that the server names and of all others as one, a lower bound of the whole.
    """

    positions: int
    settled: int
    settled_max: float
    judged: int
    quantiles: list[QuantileNumbers]
    begin_median: float
    decode_positions: int
    decode_median: float
    given_median: float
    given_max: float
    kl_mean: float
    top1: float
    top5: float
    divergences: list[Divergence]

    @property
    def first(self) -> float:
        """Factor of the first quantile: of positions that no other choice of experts has moved, if there are any."""
        return self.quantiles[0].factor

    @property
    def middle(self) -> float:
        """Geometric mean of the quartiles' factors."""
        return math.prod(row.factor for row in self.quantiles[1:-1]) ** (1 / len(self.quantiles[1:-1]))

    @property
    def tail(self) -> float:
        """Factor of the last quantile."""
        return self.quantiles[-1].factor

    @property
    def begin(self) -> float:
        """How many times as far the first tokens' median is as the upper quartile of the twins."""
        return self.begin_median / max(self.quantiles[-2].yardstick, 1e-30)

    @property
    def decode(self) -> float:
        """How many times as far the decode steps' median is as the upper quartile of the twins."""
        return self.decode_median / max(self.quantiles[-2].yardstick, 1e-30)


def served_checks(numbers: ServedNumbers, limits: Limits) -> list[Check]:
    """Hold a server's numbers against the limits. No layer can be named: a server shows its last numbers alone."""
    if numbers.begin <= limits.middle:
        cause = (
            "what positions or keys decide: rotary embedding (YaRN: is truncate the model's?), QK-norm, scale, mask, "
            "slots (the first tokens of the prompts agree)"
        )
    else:
        cause = "another checkpoint or precision, or a fault"
    cause += "; a server shows no layers, run `parity check` on its device"
    rows = (
        ("prompt", "distance over rounding's, first tenth of the positions,", numbers.first, limits.first),
        ("prompt", "distance over rounding's, middle half of the positions,", numbers.middle, limits.middle),
        ("prompt", "distance over rounding's, last tenth of the positions,", numbers.tail, limits.tail),
        ("prompt", "largest distance before any near-tie,", numbers.settled_max, limits.logits),
        ("decode", "distance over rounding's, median of the steps,", numbers.decode, limits.tail),
    )
    return [Check(*row, cause) for row in rows]
