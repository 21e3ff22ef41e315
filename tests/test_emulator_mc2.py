"""Dispatch and combine of the emulated NPU on 2, 4 and 8 ranks (threads), against the mixture of experts itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ascend.emulator.kernels import mc2
from ascend.emulator.limits import Refused
from tests.emulator_calls import BF16, FP16, FP32, call

EXPERTS, HIDDEN = 16, 32


class Ranks:
    """An all-to-all among threads: what the emulator's communicator does among processes."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=10)
        self.posted: list[list[Tensor]] = [[] for _ in range(size)]

    def run(self, body: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(body, range(self.size)))


class OneRank:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank, self.size = ranks, rank, ranks.size

    def all_to_all(self, tensors: list[Tensor]) -> list[Tensor]:
        self.ranks.posted[self.rank] = [tensor.clone() for tensor in tensors]
        self.ranks.barrier.wait()
        received = [posted[self.rank] for posted in self.ranks.posted]
        self.ranks.barrier.wait()
        return received


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Ranks]:
    def make(size: int) -> Ranks:
        ranks = Ranks(size)
        monkeypatch.setattr(mc2, "by_name", lambda name: OneRank(ranks, int(name)))
        return ranks

    return make


def expert_of(rows: Tensor, expert: int) -> Tensor:
    """A different linear function for each expert, exact in bf16."""
    return rows * (2.0 ** (expert % 3)) + expert


def mixture(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    out = torch.zeros(x.shape)
    for t in range(len(x)):
        for e, w in zip(expert[t].tolist(), weight[t], strict=True):
            out[t] += w * expert_of(x[t], e).to(x.dtype).float()
    return out


def through_experts(dispatched: tuple[Tensor, ...], first: int) -> Tensor:
    rows, scale, _, count = dispatched[:4]
    if rows.dtype == torch.int8:
        rows = (rows.float() * scale[:, None]).to(BF16)
    out, start = torch.full_like(rows, float("nan")), 0
    for e, n in enumerate(count.tolist()):
        out[start : start + n] = expert_of(rows[start : start + n], first + e)
        start += n
    return out


def layer(rank: int, size: int, x: Tensor, expert: Tensor, weight: Tensor, **flags: Any) -> tuple[Any, Tensor]:
    common = {"group_ep": str(rank), "ep_world_size": size, "ep_rank_id": rank, "moe_expert_num": EXPERTS}
    shared = {"expert_ids": expert, "expert_scales": weight, **common}
    quant_mode = flags.pop("quant_mode", 0)
    sent = call("npu_moe_distribute_dispatch_v2", x=x, quant_mode=quant_mode, **shared, **flags)
    out = call(
        "npu_moe_distribute_combine_v2",
        expand_x=through_experts(sent, rank * EXPERTS // size),
        assist_info_for_combine=sent[2],
        ep_send_counts=sent[4],
        expand_scales=sent[6],
        **shared,
        **flags,
    )
    return sent, out


def batch(seed: int, tokens: int, k: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    expert = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)]).int()
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    return x, expert, torch.rand(tokens, k, generator=generator)


@pytest.mark.parametrize("size", [2, 4, 8])
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), k=st.integers(1, 5), data=st.data())
def test_combine_of_dispatch_is_the_mixture(
    group: Callable[[int], Ranks], size: int, seed: int, k: int, data: st.DataObject
) -> None:
    tokens = data.draw(st.lists(st.integers(1, 6), min_size=size, max_size=size))
    batches = [batch(seed + rank, n, k) for rank, n in enumerate(tokens)]
    flags = {"global_bs": max(tokens) * size}
    results = group(size).run(lambda rank: layer(rank, size, *batches[rank], **flags))
    reserved = max(tokens) * size * min(EXPERTS // size, k)
    for rank, ((rows, scale, info, count, received, _, weights), out) in enumerate(results):
        exact = mixture(*batches[rank])
        torch.testing.assert_close(out.float(), exact, rtol=2**-7, atol=2**-6)
        assert rows.shape == (reserved, HIDDEN)
        assert info.shape == (max(tokens[rank] * k, reserved * 128),)
        assert rows[int(count.sum()) :].isnan().all()
        assert weights[int(count.sum()) :].isnan().all()
        assert scale.isnan().all()
        assert received[EXPERTS - 1] == count.sum()
        expected = [
            (e, source, t)
            for e in range(rank * EXPERTS // size, (rank + 1) * EXPERTS // size)
            for source in range(size)
            for t in range(tokens[source])
            if e in batches[source][1][t].tolist()
        ]
        for row, (e, source, t) in enumerate(expected):
            assert torch.equal(rows[row], batches[source][0][t])
            assert weights[row] == batches[source][2][t, batches[source][1][t].tolist().index(e)]


def test_receive_counts_are_prefix_sums_by_expert_then_rank(group: Callable[[int], Ranks]) -> None:
    expert = torch.tensor([[0, 9], [9, 1]]).int()
    flags = {"expert_token_nums_type": 0}
    x = torch.zeros(2, HIDDEN, dtype=FP16)

    def body(rank: int) -> Any:
        common = {"group_ep": str(rank), "ep_world_size": 2, "ep_rank_id": rank, "moe_expert_num": EXPERTS}
        return call("npu_moe_distribute_dispatch_v2", x=x, expert_ids=expert, **common, **flags)

    first, second = group(2).run(body)
    assert first[4].tolist() == [1, 2, 3, 4] + [4] * 12
    assert second[4].tolist() == [0, 0, 2, 4] + [4] * 12
    assert first[3].tolist() == [2, 4, 4, 4, 4, 4, 4, 4]
    assert (first[5].numel(), first[6].numel()) == (0, 0)


def test_int8_dispatch_sends_scales(group: Callable[[int], Ranks]) -> None:
    batches = [batch(rank, 4, 3) for rank in range(2)]
    results = group(2).run(lambda rank: layer(rank, 2, *batches[rank], quant_mode=2))
    for (sent, out), own in zip(results, batches, strict=True):
        assert sent[0].dtype == torch.int8
        assert sent[1].dtype == FP32
        total = int(sent[3].sum())
        assert not sent[1][:total].isnan().any()
        assert sent[1][total:].isnan().all()
        torch.testing.assert_close(out.float(), mixture(*own), rtol=0.05, atol=0.2)


def test_masked_tokens_are_not_sent_and_not_written(group: Callable[[int], Ranks]) -> None:
    batches = [batch(rank, 4, 2) for rank in range(2)]
    masks = [torch.tensor([True, True, False, False]), torch.tensor([False] * 4)]

    def body(rank: int) -> Any:
        flags = {"x_active_mask": masks[rank]}
        return layer(rank, 2, *batches[rank], **flags)

    (first, out), (second, none) = group(2).run(body)
    assert int(first[3].sum() + second[3].sum()) == 4
    torch.testing.assert_close(out[:2].float(), mixture(*batches[0])[:2], rtol=2**-7, atol=2**-6)
    assert out[2:].isnan().all()
    assert none.isnan().all()


# Refusals


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(3, HIDDEN)}, "x is float32; the device takes float16, bfloat16"),
    ({"x": torch.zeros(3, 24, dtype=BF16)}, "H is 24"),
    ({"expert_ids": torch.zeros(3, 2, dtype=torch.int64)}, "expert_ids is int64"),
    ({"expert_ids": torch.zeros(3, 2).int()}, "the same expert twice"),
    ({"expert_ids": torch.tensor([[0, 16]] * 3).int()}, "not in 0..15"),
    ({"ep_world_size": 1}, "covered are 2 to 8"),
    ({"ep_world_size": 16}, "covered are 2 to 8"),
    ({"ep_world_size": 3}, "16 experts (1 to 1024) on 3 ranks"),
    ({"ep_rank_id": 1}, "is 0 of 2"),
    ({"x_active_mask": torch.tensor([False, True, True])}, "the trues come first"),
    ({"comm_alg": "hierarchy"}, "comm_alg is 'hierarchy'"),
    ({"quant_mode": 4}, "quant_mode is 4"),
    ({"shared_expert_rank_num": 1}, "shared"),
    ({"tp_world_size": 2}, "tp_world_size is 2"),
    ({"scales": torch.ones(16, HIDDEN)}, "scales is given"),
    ({"group_ep": ""}, "group_ep must be a name"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_dispatch_is_refused(group: Callable[[int], Ranks], change: dict[str, Any], words: str) -> None:
    group(2)
    x, expert, _ = batch(0, 3, 2)
    common = {"group_ep": "0", "ep_world_size": 2, "ep_rank_id": 0, "moe_expert_num": EXPERTS}
    with pytest.raises(Refused) as refusal:
        call("npu_moe_distribute_dispatch_v2", **{"x": x, "expert_ids": expert, **common, **change})
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("tokens", "flags", "words"),
    [
        ((3, 2), [{}, {}], "global_bs is 0 with uneven batches"),
        ((3, 2), [{"global_bs": 4}, {"global_bs": 4}], "global_bs is 4"),
        ((3, 2), [{"global_bs": 6, "x_active_mask": torch.ones(3) > 0}, {"global_bs": 6}], "with uneven batches"),
        ((2, 2), [{"quant_mode": 2}, {}], "has other arguments"),
    ],
)
def test_ranks_that_disagree_all_refuse(
    group: Callable[[int], Ranks], tokens: tuple[int, int], flags: list[dict[str, Any]], words: str
) -> None:
    batches = [batch(rank, n, 2) for rank, n in enumerate(tokens)]

    def body(rank: int) -> str:
        with pytest.raises(Refused) as refusal:
            layer(rank, 2, *batches[rank], **flags[rank])
        return str(refusal.value)

    assert all(words in message for message in group(2).run(body))


def test_combine_demands_the_expanded_scales(group: Callable[[int], Ranks]) -> None:
    group(2)
    _, expert, weight = batch(0, 3, 2)
    common = {"group_ep": "0", "ep_world_size": 2, "ep_rank_id": 0, "moe_expert_num": EXPERTS}
    nothing = torch.zeros(EXPERTS).int()
    with pytest.raises(Refused, match="expand_scales is missing"):
        call(
            "npu_moe_distribute_combine_v2",
            expand_x=torch.zeros(12, HIDDEN, dtype=BF16),
            expert_ids=expert,
            assist_info_for_combine=nothing,
            ep_send_counts=nothing,
            expert_scales=weight,
            **common,
        )
