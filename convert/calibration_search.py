"""Which factors make the rounded weights of a matrix err less, given what its input channels are like.

Factors are ``(root mean square of a channel / that of the median channel)^α``; α is what gives the least error on a
grid from 0, no factor, to 1. The error is that of the weights, squared, weighted with the second moment of the inputs:
that of the outputs, if channels were uncorrelated.

Shapes: O outputs, I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convert.rounding import restored, rounded

ALPHAS = [step / 20 for step in range(21)]  # AWQ's grid, its end included
MOST_DOUBLINGS = 4  # of a factor, either way: a channel that these texts happen not to excite may matter to others
SAMPLED_ROWS = 256  # of a matrix: its rows err alike, the rest would only take time


@dataclass(frozen=True)
class Candidate:
    """Factors to try."""

    alpha: float
    factor_I: Tensor


@dataclass(frozen=True)
class Weighted:
    """Sums over some matrices: of the weighted squares of the weights, and of their errors for each candidate."""

    signal: float
    errors: tuple[float, ...]

    @classmethod
    def of(
        cls,
        weight_OI: Tensor,
        moment_I: Tensor,
        candidates: Sequence[Candidate],
        group: int,
        scale_dtype: torch.dtype,
    ) -> Weighted:
        """Round some rows of a weight to INT4 with each candidate; ``moment_I`` are sums of squares of the inputs."""
        rows_OI = weight_OI[:: max(1, len(weight_OI) // SAMPLED_ROWS)]
        errors = []
        for one in candidates:
            scaled_OI = rows_OI * one.factor_I
            error_OI = restored("w4a16", rounded(scaled_OI, "w4a16", scale_dtype, group)).sub_(scaled_OI)
            errors.append(_weighted_squares(error_OI, moment_I / one.factor_I.square()))
        return cls(_weighted_squares(rows_OI, moment_I), tuple(errors))

    def __add__(self, other: Weighted) -> Weighted:
        both = zip(self.errors, other.errors, strict=True)
        return Weighted(self.signal + other.signal, tuple(a + b for a, b in both))

    def best(self, candidates: Sequence[Candidate]) -> Found:
        """Choose the candidate with the least error, the first of equals."""
        least = min(range(len(candidates)), key=self.errors.__getitem__)
        return Found(candidates[least], self.signal, self.errors[0], self.errors[least])


@dataclass(frozen=True)
class Found:
    """The factors found best, with the sums of `Weighted`: for the weights, their error without and with factors."""

    candidate: Candidate
    signal: float
    before: float
    after: float

    @property
    def is_scaled(self) -> bool:
        """Whether they beat none."""
        return self.candidate.alpha > 0


def candidate(moment_I: Tensor, alpha: float, powers_of_two: bool = False) -> Candidate:
    """Return the factors for an α; ``moment_I`` are sums of squares of the channels.

    Where half the channels are 0 all the time there is no measure, and the factors say little, but stay in range.
    """
    doublings_I = (moment_I / moment_I.median()).log2().div_(2).nan_to_num(0, MOST_DOUBLINGS, -MOST_DOUBLINGS)
    exponent_I = doublings_I.mul_(alpha).clamp_(-MOST_DOUBLINGS, MOST_DOUBLINGS)
    return Candidate(alpha, torch.exp2(exponent_I.round_() if powers_of_two else exponent_I))


def candidates(moment_I: Tensor, powers_of_two: bool = False) -> list[Candidate]:
    """Return the factors for each α, the first of them all one; those that are as for a smaller α left out."""
    found: list[Candidate] = []
    for alpha in ALPHAS:
        one = candidate(moment_I, alpha, powers_of_two)
        if not found or not torch.equal(one.factor_I, found[-1].factor_I):
            found.append(one)
    return found


def cross_validated(weight_OI: Tensor, input_NI: Tensor, group: int, scale_dtype: torch.dtype) -> Found:
    """Find the factors for the inputs of a matrix, of which few may be known.

    Factors from the first half of the inputs are judged by the second, which they were not made from: the α that wins
    is the smaller the more they are chance, and the errors are those to expect on other texts. The factors returned
    are for that α, from all inputs.
    """
    fitted_I, judging_I = (half.square().sum(0) for half in input_NI.tensor_split(2))
    tried = candidates(fitted_I)
    found = Weighted.of(weight_OI, judging_I, tried, group, scale_dtype).best(tried)
    return replace(found, candidate=candidate(fitted_I + judging_I, found.candidate.alpha))


def _weighted_squares(values_OI: Tensor, moment_I: Tensor) -> float:
    return float(values_OI.square().sum(0).double() @ moment_I.double())
