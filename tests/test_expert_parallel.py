"""Every strategy on 2, 4 and 8 gloo ranks gives what one process gives, whatever the routing and the token counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ops
from ascend.devices.facts import TABLE
from ops import reference
from ops.dispatch_reference import combine, dispatch
from ops.expert_parallel import STRATEGIES, ExpertParallel
from ops.parallel_policy import LINK, SETUP_SECONDS, bytes_per_rank, choose, ranks_per_token
from ops.process_group import Group
from tests.ranks import Ranks

pytestmark = pytest.mark.beside

PORTABLE = [name for name in STRATEGIES if name != "mc2"]  # that one is tried in tests/npu
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest value
H, I = 12, 8  # noqa: E741


@dataclass(frozen=True)
class Case:
    """One step on R ranks. All that is random comes from the seed, so that every rank knows the whole."""

    seed: int
    dtype: torch.dtype
    strategy: str
    replicated: bool
    counts: tuple[int, ...]  # tokens of each rank; the first where they are replicated
    told: bool  # the ranks are told the counts
    slots: int
    top_k: int
    used: int  # how many of the slots are chosen at all
    width_shards: int = 1
    shared: bool = False
    outside: bool = False  # some ids are below or above those of the slots

    def tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor, list[Tensor]]:
        """By rank: x, weight, expert ids; the weights of all slots; by rank: what its shared experts give."""
        ranks = len(self.counts)
        counts = [self.counts[0]] if self.replicated else self.counts
        new = torch.Generator().manual_seed(self.seed)
        slots = ranks // self.width_shards * self.slots

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=new).to(self.dtype)

        gate_up, down = normal(slots, 2 * I, H) / 3, normal(slots, H, I) / 3
        chosen = torch.randperm(slots, generator=new)[: max(self.used, self.top_k)]
        x = [normal(count, H) for count in counts]
        weight = [torch.rand(count, self.top_k, generator=new) for count in counts]
        order = [torch.rand(count, len(chosen), generator=new).argsort(1) for count in counts]
        expert = [chosen[of_rank[:, : self.top_k]] for of_rank in order]
        for ids in expert if self.outside else []:
            where = torch.rand(ids.shape, generator=new)
            ids[where < 0.2] = -1
            ids[where > 0.8] = slots
        times = ranks if self.replicated else 1
        shared = [normal(counts[0], H) for _ in range(ranks)]
        return x * times, weight * times, expert * times, gate_up, down, shared


def _experts_of(group: Group, case: Case, gate_up: Tensor, down: Tensor) -> Any:
    """This rank's experts, of whose width it holds a part."""
    block, shard = divmod(group.rank, case.width_shards)
    mine = slice(block * case.slots, (block + 1) * case.slots)
    part = slice(shard * I // case.width_shards, (shard + 1) * I // case.width_shards)
    gate, up = gate_up[mine].chunk(2, dim=1)
    held = torch.cat([gate[:, part], up[:, part]], 1), down[mine][:, :, part]

    def experts(x: Tensor, weight: Tensor, expert: Tensor, shared: Any = None) -> Tensor:
        routed = reference.moe_experts(x, weight, expert, *held, block * case.slots)
        return routed if shared is None else routed + shared(x)

    return experts


def _error(group: Group, case: Case) -> float:
    """The largest difference to one process with all experts, in parts of the largest value."""
    x, weight, expert, gate_up, down, shared = case.tensors()
    r = group.rank
    expected = reference.moe_experts(x[r].float(), weight[r], expert[r], gate_up.float(), down.float())
    if case.shared:
        expected = expected + sum(part.float() for part in shared)
    parallel = ExpertParallel(group, case.slots, case.width_shards, case.strategy)
    out = parallel(
        x[r],
        weight[r],
        expert[r],
        _experts_of(group, case, gate_up, down),
        case.replicated,
        case.counts if case.told else None,
        (lambda _: shared[r]) if case.shared else None,
    )
    assert out.shape == x[r].shape
    assert out.dtype == case.dtype
    if not out.numel():
        return 0.0
    return ((out.float() - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()


@st.composite
def cases(draw: st.DrawFn, ranks: int, width_shards: int = 1) -> Case:
    replicated = draw(st.booleans())
    slots = draw(st.integers(1, 5))
    total = slots * ranks // width_shards
    top_k = draw(st.integers(1, min(total, 6)))
    counts = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 5, 9, 17]), min_size=ranks, max_size=ranks))
    return Case(
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        strategy=draw(st.sampled_from([*PORTABLE, "auto"])),
        replicated=replicated,
        counts=tuple(counts),
        told=draw(st.booleans()),
        slots=slots,
        top_k=top_k,
        used=draw(st.integers(top_k, total)),
        width_shards=width_shards,
        shared=replicated and draw(st.booleans()),
        outside=draw(st.booleans()),
    )


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def eight() -> Iterator[Ranks]:
    with Ranks(8) as ranks:
        yield ranks


def _check(ranks: Ranks, case: Case) -> None:
    assert max(ranks.call(_error, case)) <= TOLERANCE[case.dtype]


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.slow
@examples(60)
@given(case=cases(2))
def test_two_ranks(two: Ranks, case: Case) -> None:
    _check(two, case)


@pytest.mark.slow
@examples(60)
@given(case=cases(4))
def test_four_ranks(four: Ranks, case: Case) -> None:
    _check(four, case)


@examples(30)
@given(case=cases(4, width_shards=2))
def test_two_by_two_ranks(four: Ranks, case: Case) -> None:
    _check(four, case)


@pytest.mark.slow
@examples(40)
@given(case=st.one_of(cases(8), cases(8, width_shards=4)))
def test_eight_ranks(eight: Ranks, case: Case) -> None:
    _check(eight, case)


# Where a row goes


def _where(group: Group, case: Case) -> None:
    x, weight, expert, gate_up, down, _ = case.tensors()
    r, S = group.rank, case.slots
    for rank, x_TH in enumerate(x):
        x_TH[:, 0] = torch.arange(len(x_TH)) + 100 * rank  # says whose row it is
    due = [
        (slot - r * S, rank, token, k)
        for rank, ids in enumerate(expert)
        for token, chosen in enumerate(ids.tolist())
        for k, slot in enumerate(chosen)
        if slot // S == r
    ]
    dispatched = dispatch(x[r], expert[r], group, S)
    assert dispatched.source_A == [(rank, token, k) for _, rank, token, k in sorted(due)]
    assert dispatched.counts_S == [sum(slot == s for slot, *_ in due) for s in range(S)]
    assert dispatched.rows_AH[:, 0].tolist() == [100 * rank + token for _, rank, token, _ in sorted(due)]

    experts = _experts_of(group, case, gate_up, down)
    slot_A = torch.arange(r * S, (r + 1) * S).repeat_interleave(torch.tensor(dispatched.counts_S))
    rows_AH = experts(dispatched.rows_AH, torch.ones(len(slot_A), 1), slot_A[:, None])
    expected = reference.moe_experts(x[r], weight[r], expert[r], gate_up, down)
    scale = expected.abs().max().clamp(min=1.0) if expected.numel() else 1.0
    assert ((combine(rows_AH, dispatched, weight[r]) - expected).abs() <= 1e-5 * scale).all()

    seen: list[tuple[int, int]] = []

    def record(x_AH: Tensor, weight_AK: Tensor, expert_AK: Tensor) -> Tensor:
        for row, slots in zip(x_AH[:, 0].tolist(), expert_AK.tolist(), strict=True):
            mine = [slot - r * S for slot in slots if slot // S == r]
            assert mine or strategy != "all_to_all", "a row came to a rank that holds none of its experts"
            seen.extend((slot, int(row)) for slot in mine)
        return experts(x_AH, weight_AK, expert_AK)

    for strategy in PORTABLE:
        ExpertParallel(group, S, strategy=strategy)(x[r], weight[r], expert[r], record, replicated=False)
        assert sorted(seen) == sorted((slot, 100 * rank + token) for slot, rank, token, _ in due)
        seen.clear()


@pytest.mark.slow
@examples(25)
@given(case=cases(4).filter(lambda case: not case.replicated))
def test_dispatch_and_strategies_agree_on_who_computes_what(four: Ranks, case: Case) -> None:
    four.call(_where, replace(case, dtype=torch.float32))


# What the host must not wait for


class MetaGroup(Group):
    """Rank 1 of four, on tensors that have shapes and no values: whoever asks for a value fails."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.ranks, self.size = 1, (0, 1, 2, 3), 4
        self.calls: list[str] = []

    def all_reduce(self, x: Tensor) -> Tensor:
        self.calls.append("all_reduce")
        return torch.empty_like(x)

    def all_gather(self, x: Tensor) -> Tensor:
        self.calls.append("all_gather")
        return x.new_empty((4 * x.shape[0], *x.shape[1:]))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self.calls.append("reduce_scatter")
        return x.new_empty((x.shape[0] // 4, *x.shape[1:]))

    def all_gather_ints(self, values: Any) -> Any:
        raise AssertionError("the host waits")


@pytest.mark.parametrize(
    ("strategy", "replicated", "calls"),
    [
        ("auto", True, ["all_reduce"]),
        ("auto", False, ["all_gather", "reduce_scatter"]),
        ("all_reduce", False, ["all_gather", "all_reduce"]),
        ("all_gather", True, ["all_gather", "reduce_scatter", "all_gather"]),
    ],
)
def test_host_does_not_wait(strategy: str, replicated: bool, calls: list[str]) -> None:
    group, counts = MetaGroup(), [3, 5, 0, 1]
    x = torch.empty(5, H, dtype=torch.bfloat16, device="meta")
    weight, expert = torch.empty(5, 4, device="meta"), torch.empty(5, 4, dtype=torch.int64, device="meta")
    gate_up, down = x.new_empty(2, 2 * I, H), x.new_empty(2, H, I)
    parallel = ExpertParallel(group, 2, strategy=strategy)
    out = parallel(
        x,
        weight,
        expert,
        lambda x, weight, expert: ops.moe_experts(x, weight, expert, gate_up, down),
        replicated,
        None if replicated else counts,
    )
    assert out.shape == x.shape
    assert group.calls == calls


def test_all_to_all_makes_the_host_wait() -> None:
    x = torch.empty(5, H, device="meta")
    weight, expert = torch.empty(5, 4, device="meta"), torch.empty(5, 4, dtype=torch.int64, device="meta")
    with pytest.raises(NotImplementedError, match="meta"):
        ExpertParallel(MetaGroup(), 2, strategy="all_to_all")(x, weight, expert, ops.moe_experts, False, [5] * 4)


def test_one_rank() -> None:
    x, weight, expert = torch.randn(3, H), torch.rand(3, 2), torch.tensor([[0, 1], [1, 0], [2, 1]])
    gate_up, down = torch.randn(3, 2 * I, H), torch.randn(3, H, I)
    expected = reference.moe_experts(x, weight, expert, gate_up, down)
    for strategy in ["auto", *PORTABLE]:
        for replicated in [True, False]:
            parallel = ExpertParallel(Group(), 3, strategy=strategy)
            out = parallel(x, weight, expert, lambda *a: reference.moe_experts(*a, gate_up, down), replicated)
            assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width_shards": 3}, "4 ranks do not divide into blocks of 3"),
        ({"strategy": "mc2"}, "mc2 cannot be used here: it is for ranks on NPUs"),
        ({"strategy": "alltoall"}, "unknown expert-parallel strategy 'alltoall': use auto, all_reduce, all_gather"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertParallel(MetaGroup(), 2, **arguments)


def test_wrong_arguments_are_refused() -> None:
    x, weight, expert = torch.ones(2, H), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64)
    parallel = ExpertParallel(MetaGroup(), 2)
    with pytest.raises(ValueError, match=r"rank 1 has 2 tokens, tokens_per_rank says \[2, 3, 2, 2\]"):
        parallel(x, weight, expert, ops.moe_experts, False, [2, 3, 2, 2])
    with pytest.raises(ValueError, match="need replicated tokens"):
        parallel(x, weight, expert, ops.moe_experts, False, [2] * 4, lambda x: x)


# The policy


def test_bytes_follow_the_collectives() -> None:
    """Against counting, row by row, what each rank receives when every choice of experts happens once."""
    ranks, top_k, H_b, packed = 4, 2, 100 * 2, 100 * 2 + 8 * 2
    routes = list(product(range(ranks), repeat=top_k))
    received = [0] * ranks
    for home in range(ranks):
        for route in routes:
            for rank in set(route) - {home}:
                received[rank] += packed
                received[home] += H_b
    tokens = ranks * len(routes)
    formula = {
        (name, replicated): bytes_per_rank(name, tokens, ranks, replicated, None, 100, top_k, 2)
        for name in PORTABLE
        for replicated in (True, False)
    }
    assert formula["all_to_all", False] == pytest.approx(received[0])
    assert len(set(received)) == 1
    rows = tokens * 3 // 4
    assert formula["all_gather", False] == rows * (packed + H_b)
    assert formula["all_reduce", True] == 2 * rows * H_b
    assert formula["all_reduce", False] == rows * (packed + 2 * H_b)
    assert formula["all_gather", True] == rows * (packed + 2 * H_b)
    assert formula["all_to_all", True] == pytest.approx(received[0] + rows * H_b)


def test_ranks_per_token() -> None:
    assert ranks_per_token(1) == 1
    assert ranks_per_token(8, 1) == 1
    assert ranks_per_token(8, 8) == pytest.approx(5.251, abs=1e-3)


@given(tokens=st.integers(0, 10**6), ep_size=st.sampled_from([1, 2, 4, 8, 16]), card=st.sampled_from([None, *TABLE]))
def test_policy(tokens: int, ep_size: int, card: str | None) -> None:
    facts = TABLE[card] if card else None
    assert choose(tokens, ep_size, True, facts) == "all_reduce"
    name = choose(tokens, ep_size, False, facts)
    if card not in LINK or ep_size == 1:
        assert name == "all_gather"
        return
    gather, exchange = (
        bytes_per_rank(each, tokens, ep_size, False) / LINK[card] for each in ("all_gather", "all_to_all")
    )
    if gather != pytest.approx(exchange + SETUP_SECONDS):
        assert name == ("all_gather" if gather < exchange + SETUP_SECONDS else "all_to_all")


def test_policy_on_eight_910b() -> None:
    """Decode never pays for split sizes, a prefill of many long prompts does."""
    for tokens, expected in [(1, "all_gather"), (64, "all_gather"), (2048, "all_gather"), (16384, "all_to_all")]:
        assert choose(tokens, 8, False, TABLE["910B3"]) == expected


def test_links_are_of_known_cards() -> None:
    assert set(LINK) <= set(TABLE)
