"""How sure the ratios of `perf compare` are."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.compare.intervals import T_975, Ratio, ratio, student_t

# How sure a ratio is.


def quantile_of_t(freedom: int) -> float:
    """97.5 % quantile by integrating the density (Gosset's) over a fine grid."""
    x = np.linspace(0, 40, 400_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(x**2 / freedom))
    below = 0.5 + np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * (x[1] - x[0]))])
    return float(x[np.searchsorted(below, 0.975)])


def test_the_table_is_students() -> None:
    assert len(T_975) == 30
    for freedom in range(1, 31):
        assert student_t(freedom) == T_975[freedom - 1] == pytest.approx(quantile_of_t(freedom), abs=2e-4)
        assert student_t(freedom + 0.999) == T_975[freedom - 1], "rounded down"
    for freedom in (31, 40, 60, 120, 1000, 10**6):
        assert quantile_of_t(freedom) < student_t(freedom) < 1.005 * quantile_of_t(freedom), "never on the narrow side"


def draws(seed: int, count: int, middle: float, spread: float) -> list[float]:
    draw = random.Random(seed)
    return [middle * draw.lognormvariate(0, spread) for _ in range(count)]


@pytest.mark.parametrize(
    ("counts", "spreads", "paired"),
    [
        ((5, 5), (0.05, 0.05), True),
        ((5, 5), (0.05, 0.05), False),
        ((3, 3), (0.02, 0.02), False),
        ((4, 10), (0.02, 0.1), False),
        pytest.param((40, 40), (0.2, 0.2), True, marks=pytest.mark.slow),
    ],
)
def test_bounds_hold_the_truth_95_times_in_100(
    counts: tuple[int, int], spreads: tuple[float, float], paired: bool
) -> None:
    held, times, truth = 0, 1000, 1.7
    for seed in range(times):
        a, b = draws(2 * seed, counts[0], 1.7, spreads[0]), draws(2 * seed + 1, counts[1], 1.0, spreads[1])
        if paired:  # what a round has in common with all of it falls out
            rounds = draws(10**6 + seed, counts[0], 1.0, 0.5)
            a, b = ([one * r for one, r in zip(side, rounds, strict=True)] for side in (a, b))
        found = ratio(a, b, paired)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    # Welch's with degrees of freedom rounded down is on the wide side with few values.
    assert 0.93 < held / times < (0.97 if paired else 0.985)


def test_bounds_by_hand() -> None:
    """A textbook's formulas, in numpy."""
    a, b = np.array([3.0, 3.3, 2.9, 3.6]), np.array([1.5, 1.4, 1.7, 1.6])
    difference = np.log(a) - np.log(b)
    found = ratio(a.tolist(), b.tolist(), True)
    error = difference.std(ddof=1) / 2
    assert found is not None
    assert found.value == pytest.approx(math.exp(difference.mean()))
    assert (found.low, found.high) == pytest.approx(
        tuple(math.exp(difference.mean() + sign * 3.1824 * error) for sign in (-1, 1))
    )
    c = np.array([1.5, 1.9])
    errors = [np.log(side).var(ddof=1) / len(side) for side in (a, c)]
    freedom = sum(errors) ** 2 / (errors[0] ** 2 / 3 + errors[1] ** 2 / 1)
    assert 1 < freedom < 2, "rounded down to 1"
    for swapped in (False, True):
        found = ratio(*((c.tolist(), a.tolist()) if swapped else (a.tolist(), c.tolist())), paired=True)
        middle = (np.log(a).mean() - np.log(c).mean()) * (-1 if swapped else 1)
        assert found is not None
        reach = 12.7062 * math.sqrt(sum(errors))
        assert (found.value, found.low, found.high) == pytest.approx(
            tuple(math.exp(middle + sign * reach) for sign in (0, -1, 1))
        )


POSITIVE = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6)


@given(a=POSITIVE, b=POSITIVE, paired=st.booleans(), unit=st.floats(1e-3, 1e3))
def test_a_ratio_and_its_inverse_say_the_same(a: list[float], b: list[float], paired: bool, unit: float) -> None:
    there, back = ratio(a, b, paired), ratio([unit * one for one in b], [unit * one for one in a], paired)
    assert there is not None
    assert back is not None
    assert there.value * back.value == pytest.approx(1)
    assert (there.low is None) == (there.high is None) == (back.low is None)
    assert (there.low is None) == (min(len(a), len(b)) < 2)
    if there.low is not None and there.high is not None and back.low is not None and there.high < 1e100:
        assert there.high * back.low == pytest.approx(1)
        assert there.low <= there.value * (1 + 1e-12)
        assert there.value <= there.high * (1 + 1e-12)


def test_no_bounds_are_invented() -> None:
    assert ratio([], [1.0], False) is ratio([1.0], [], True) is None
    assert ratio([1.0, 0.0], [1.0], False) is ratio([1.0], [1.0, -2.0], False) is None
    assert ratio([2.0], [1.0], True) == ratio([2.0], [1.0], False) == Ratio(2.0)
    assert ratio([2.0, 2.0], [1.0], False) == Ratio(2.0)
    assert ratio([2.0, 2.0], [1.0, 1.0], False) == Ratio(2.0, 2.0, 2.0)
    assert str(Ratio(2.0)) == "2.00 (no bounds)"
    assert str(Ratio(2.0, 1.5, 2.5)) == "2.00 (1.50 to 2.50)"


@pytest.mark.parametrize(
    ("bounds", "settled"), [((1.1, 2), True), ((0.5, 0.9), True), ((0.9, 1.1), False), ((1.0, 2), False), ((), False)]
)
def test_settled(bounds: Sequence[float], settled: bool) -> None:
    assert Ratio(1.05, *bounds).settled == settled
