"""Placements: every expert has a slot, ranks are as even as promised, and tokens find their slots."""

from __future__ import annotations

import json
import stat
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.placement import Placement, balance, contiguous, physical, read_loads, record, write_loads

LOAD = st.one_of(st.integers(0, 9), st.floats(0, 1e6, width=32), st.just(0.0))


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[float], int, int]:
    """Loads, ranks, slots per rank: none or some spare, sometimes more than there is use for."""
    ranks = draw(st.integers(1, 6))
    loads = draw(st.lists(LOAD, min_size=1, max_size=24))
    fewest = -(-len(loads) // ranks)
    return loads, ranks, fewest + draw(st.integers(0, 3))


def zipf(num_experts: int, exponent: float = 1.0) -> list[float]:
    """Skewed loads, the heavy ones spread over the experts by a fixed stride."""
    return [1.0 / (1 + e * 37 % num_experts) ** exponent for e in range(num_experts)]


@settings(deadline=None, max_examples=300)
@given(job=jobs())
def test_balance_keeps_its_promises(job: tuple[list[float], int, int]) -> None:
    loads, ranks, slots_per_rank = job
    placement = balance(loads, ranks, slots_per_rank)
    assert placement == balance(list(loads), ranks, slots_per_rank)
    assert len(placement.slots) == ranks * slots_per_rank
    assert set(placement.slots) == set(range(len(loads)))
    assert sum(placement.load_per_rank(loads)) == pytest.approx(sum(loads))

    busiest, mean, margin = max(placement.load_per_rank(loads)), sum(loads) / ranks, 1e-9 * sum(loads)
    plain = None
    if len(loads) % ranks == 0:
        plain = max(contiguous(len(loads), ranks).load_per_rank(loads))
        assert busiest <= plain + margin
    if len(placement.slots) == len(loads):
        assert busiest <= mean + (1 - 1 / ranks) * max(loads) + margin
    if any(len(set(placement.on_rank(rank))) < slots_per_rank for rank in range(ranks)):
        # A second copy on one rank: there were too many slots, or it is the contiguous placement.
        assert len(placement.slots) > ranks * len(loads) or busiest == pytest.approx(plain)


@settings(deadline=None, max_examples=100)
@given(loads=st.lists(st.integers(0, 20), min_size=6, max_size=6))
def test_balance_is_near_the_best(loads: list[int]) -> None:
    """Six experts on two ranks, against every placement."""
    best = min(max(sum(order[:3]), sum(order[3:])) for order in permutations(loads))
    assert max(balance(loads, 2, 3).load_per_rank(loads)) <= 7 / 6 * best  # what LPT keeps on two machines (Graham)


def test_an_example() -> None:
    placement = balance([8, 1, 1, 2], ranks=2, slots_per_rank=3)
    assert placement.replicas == (2, 1, 1, 2)
    assert sorted(placement.load_per_rank([8, 1, 1, 2])) == [6, 6]


def test_spare_slots_help_where_loads_are_skewed() -> None:
    """256 experts on 8 ranks under Zipf's law: one expert alone outweighs a rank's share, so only a copy helps."""
    loads = zipf(256)
    mean = sum(loads) / 8
    moved, copied = balance(loads, 8, 32), balance(loads, 8, 34)
    lightest_with_it = max(loads) + sum(sorted(loads)[:31])
    assert contiguous(256, 8).imbalance(loads) > 1.5
    assert moved.imbalance(loads) == pytest.approx(lightest_with_it / mean)
    assert copied.imbalance(loads) < 1.001


def test_no_spare_slot_makes_it_worse() -> None:
    """Every copy would make a rank heavier here (5 and 1, 4 and 2 are even): spare slots stay at home."""
    assert balance([5, 1, 4, 2], 2, 3).load_per_rank([5, 1, 4, 2]) == [6, 6]


def test_no_load_at_all() -> None:
    assert balance([0.0] * 4, 2, 3).imbalance([0.0] * 4) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: contiguous(6, 4), "6 slots do not divide among 4 ranks"),
        (lambda: Placement((0, 0), 2, 1), "the slots hold 1 experts, not each of 0 to 1"),
        (lambda: Placement((0, 2), 2, 1), "not each of 0 to 1"),
        (lambda: balance([1, 1, 1], 2, 1), "3 experts do not fit in 2 ranks of 1 slots"),
        (lambda: balance([], 2, 1), "0 experts"),
        (lambda: balance([1, -1], 2, 1), "finite and not negative"),
        (lambda: balance([1, float("nan")], 2, 1), "finite and not negative"),
    ],
)
def test_what_cannot_be_placed_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Tokens to slots


@settings(deadline=None)
@given(job=jobs(), tokens=st.integers(0, 60), offset=st.integers(0, 7), seed=st.integers(0, 2**31))
def test_tokens_are_spread_over_the_copies(job: Any, tokens: int, offset: int, seed: int) -> None:
    placement = balance(*job)
    new = torch.Generator().manual_seed(seed)
    expert_TK = torch.randint(placement.num_experts, (tokens, 3), generator=new)
    slot_TK = physical(expert_TK, *placement.table(), offset)
    assert slot_TK.shape == expert_TK.shape
    assert torch.equal(torch.tensor(placement.slots)[slot_TK], expert_TK)
    assert torch.equal(slot_TK, physical(expert_TK, *placement.table(), offset))

    same = physical(torch.zeros(tokens, 1, dtype=torch.int64), *placement.table(), offset)
    used = Counter(same.flatten().tolist())
    counts = [used[slot] for slot, expert in enumerate(placement.slots) if expert == 0]
    assert max(counts) - min(counts) <= 1


def test_ranks_with_one_token_each_use_different_copies() -> None:
    table = Placement((0, 0, 0, 0), 1, 4).table()
    assert [physical(torch.zeros(1, 1, dtype=torch.int64), *table, rank).item() for rank in range(4)] == [0, 1, 2, 3]


@given(chosen=st.lists(st.integers(0, 8), max_size=40))
def test_record_counts(chosen: list[int]) -> None:
    for dtype in (torch.int64, torch.int32):
        counts = record(torch.tensor(chosen, dtype=dtype).view(-1, 1), 9)
        assert counts.tolist() == [chosen.count(expert) for expert in range(9)]


def test_host_waits_for_nothing() -> None:
    """Tensors without values: whoever asks for one fails."""
    expert_TK = torch.empty(5, 2, dtype=torch.int64, device="meta")
    slot_EF, copies_E = (part.to("meta") for part in contiguous(4, 2).table())
    assert physical(expert_TK, slot_EF, copies_E, 1).shape == (5, 2)
    assert record(expert_TK, 4).shape == (4,)


# Recorded loads


@given(loads=st.dictionaries(st.integers(0, 99), st.lists(LOAD, min_size=3, max_size=3)))
def test_loads_come_back(tmp_path_factory: pytest.TempPathFactory, loads: dict[int, list[float]]) -> None:
    path = tmp_path_factory.mktemp("loads") / "loads.json"
    write_loads(path, loads)
    assert read_loads(path, 3) == loads
    assert stat.S_IMODE(path.stat().st_mode) & 0o027 == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no expert loads"),
        ("[]", "holds no expert loads"),
        ("{}", "holds no expert loads"),
        ('{"expert_loads": [1]}', "holds no expert loads"),
        ('{"expert_loads": {"a": [1, 2]}}', "holds no expert loads"),
        ('{"expert_loads": {"1": ["x", 2]}}', "holds no expert loads"),
        ('{"expert_loads": {"1": [[1], 2]}}', "holds no expert loads"),
        ("\xff", "holds no expert loads"),
        (json.dumps({"expert_loads": {"1": [1, 2, 3]}}), "has loads of 3 experts in layer 1, the model has 2"),
        ('{"expert_loads": {"4": [1, NaN]}}', "a load in layer 4 that is negative or not finite"),
        ('{"expert_loads": {"4": [1, -2]}}', "a load in layer 4 that is negative"),
    ],
)
def test_bad_loads_are_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "loads.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as caught:
        read_loads(path, 2)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_loads_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read expert loads from .*none\.json: No such file"):
        read_loads(tmp_path / "none.json", 2)
