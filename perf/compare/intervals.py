"""How many times as large one measurement is as another, and between which bounds that is with 95 % confidence.

Both in logarithms, since a ratio and its inverse are the same statement: the mean of the paired differences where the
rounds were taken in turns, else the difference of the means (Welch), with Student's t. With one measurement a side
there are no bounds, and none are invented.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, 97.5 %, by degrees of freedom; beyond them the normal distribution's. Source: any table of the t
# distribution; computed with scipy.stats.t.ppf(0.975, n).
T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """``value`` times; low and high are the bounds, None where there are none."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def settled(self) -> bool:
        """Whether the bounds leave no doubt about which side is larger."""
        return self.low is not None and self.high is not None and (self.low > 1 or self.high < 1)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.2f} (no bounds)"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(a: Sequence[float], b: Sequence[float], paired: bool) -> Ratio | None:
    """Return ``a`` over ``b``; None where one has no value or one that is not positive."""
    if not a or not b or min(*a, *b) <= 0:
        return None
    log_a, log_b = [math.log(one) for one in a], [math.log(one) for one in b]
    if paired and len(a) == len(b):
        differences = [one - other for one, other in zip(log_a, log_b, strict=True)]
        middle, error, freedom = statistics.mean(differences), _error(differences), len(differences) - 1.0
    else:
        middle = statistics.mean(log_a) - statistics.mean(log_b)
        errors = [_error(one) ** 2 for one in (log_a, log_b)]
        error, freedom = math.sqrt(sum(errors)), _freedom(errors, (len(a), len(b)))
    if freedom < 1:
        return Ratio(math.exp(middle))
    reach = student_t(freedom) * error
    return Ratio(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach))


def student_t(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t; degrees of freedom are rounded down, which errs on the wide side."""
    whole = int(freedom)
    return T_975[whole - 1] if whole <= len(T_975) else 1.96 + 2.5 / whole


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _freedom(errors: Sequence[float], counts: Sequence[int]) -> float:
    """Welch's degrees of freedom; 0 where a side has a single value."""
    if min(counts) < 2:
        return 0.0
    if not sum(errors):
        return float(sum(counts) - 2)
    return float(sum(errors) ** 2 / sum(error**2 / (count - 1) for error, count in zip(errors, counts, strict=True)))
