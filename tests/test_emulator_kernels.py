"""The emulated NPU ops for routing, permutation, expert products and norms, each against a formulation of its own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ascend.emulator.kernels import KERNELS
from ascend.emulator.limits import FRACTAL_NZ, ND, VECTOR_CORES, format_of
from tests.emulator_calls import BF16, FP16, FP32, bf16, call, int8, nz

SEEDS = st.integers(0, 2**31)
examples = settings(max_examples=25, deadline=None)


def test_names_are_those_of_the_ops() -> None:
    assert all(name == f"npu::{kernel.__name__}" for name, kernel in KERNELS.items())


def test_format_is_read_from_the_tensor() -> None:
    assert format_of(torch.zeros(2)) == ND
    assert format_of(nz(torch.zeros(2))) == FRACTAL_NZ


# Routing


@examples
@given(
    seed=SEEDS,
    tokens=st.integers(0, 5),
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.integers(2, 9),
    mode=st.integers(0, 1),
    norm_type=st.integers(0, 1),
    renorm=st.integers(0, 1),
    data=st.data(),
)
def test_gating_top_k(
    seed: int, tokens: int, groups: int, per_group: int, mode: int, norm_type: int, renorm: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    kept = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, kept * per_group))
    x, bias = torch.randn(tokens, groups * per_group), torch.randn(groups * per_group)
    weight, expert, norm = call(
        "npu_moe_gating_top_k",
        x=x,
        k=k,
        bias=bias,
        k_group=kept,
        group_count=groups,
        group_select_mode=mode,
        renorm=renorm,
        norm_type=norm_type,
        out_flag=True,
        routed_scaling_factor=2.5,
    )
    assert expert.dtype == torch.int32
    for t in range(tokens):
        logits = x[t].tolist()
        if norm_type == 1:
            score = [1 / (1 + math.exp(-v)) for v in logits]
        else:
            score = [math.exp(v) / sum(math.exp(w) for w in logits) for v in logits]
        torch.testing.assert_close(norm[t], torch.tensor(score))
        biased = [s + b for s, b in zip(score, bias.tolist(), strict=True)]
        members = [range(g * per_group, (g + 1) * per_group) for g in range(groups)]
        best = [sum(sorted(biased[e] for e in group)[-1 - mode :]) for group in members]
        order = sorted(range(groups), key=lambda g, best=best: -best[g])[:kept]
        candidates = [e for g in order for e in members[g]]
        chosen = sorted(candidates, key=lambda e, biased=biased: -biased[e])[:k]
        assert expert[t].tolist() == chosen
        total = sum(score[e] for e in chosen) if norm_type == 1 or renorm == 1 else 1.0
        torch.testing.assert_close(weight[t], torch.tensor([2.5 * score[e] / total for e in chosen]))


def test_gating_keeps_the_dtype_and_leaves_the_third_output() -> None:
    weight, _, norm = call("npu_moe_gating_top_k", x=bf16(4, 8), k=2)
    assert weight.dtype == BF16
    assert norm.shape == (4, 8)
    assert norm.dtype == FP32
    assert norm.isnan().all()


def test_gating_takes_the_lower_index_of_equal_experts() -> None:
    _, expert, _ = call("npu_moe_gating_top_k", x=torch.zeros(1, 8), k=3, norm_type=1)
    assert expert.tolist() == [[0, 1, 2]]


# Permutation


def routed(seed: int, tokens: int, k: int, experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)]
    return torch.stack(rows).int() if rows else torch.empty(0, k, dtype=torch.int32)


@examples
@given(
    seed=SEEDS,
    tokens=st.integers(0, 12),
    k=st.integers(1, 4),
    bounds=st.tuples(st.integers(0, 5), st.integers(6, 8)),
    active=st.sampled_from([-1, 0, 3, 100]),
)
def test_init_routing(seed: int, tokens: int, k: int, bounds: tuple[int, int], active: int) -> None:
    start, end = bounds
    expert = routed(seed, tokens, k, 8)
    x, scale = torch.randn(tokens, 4), torch.rand(tokens)
    shared = {"x": x, "expert_idx": expert, "expert_num": 8, "active_num": active, "active_expert_range": [start, end]}
    shared["expert_tokens_num_flag"] = True
    flat = expert.flatten().tolist()
    slots = [slot for e in range(start, end) for slot in range(tokens * k) if flat[slot] == e]
    count = [flat.count(e) for e in range(start, end)]

    rows, gather, cumulative, _ = call("npu_moe_init_routing_v2", **shared)
    size = min(active, tokens * k) if active > 0 else tokens * k
    written = min(size, len(slots))
    assert rows.shape == (size, 4)
    assert torch.equal(rows[:written], x[[slot // k for slot in slots[:written]]])
    assert rows[written:].isnan().all()
    assert gather.dtype == torch.int32
    assert gather.tolist() == [slots.index(slot) if slot in slots else -1 for slot in range(tokens * k)]
    assert cumulative.tolist() == torch.tensor(count).cumsum(0).tolist()

    _, scatter, counted, scales = call(
        "npu_moe_init_routing_v2", **shared, row_idx_type=1, expert_tokens_num_type=1, scale=scale
    )
    assert scatter[: len(slots)].tolist() == slots
    assert (scatter[len(slots) :] < -1).all()
    assert counted.tolist() == count
    assert counted.dtype == torch.int64
    assert torch.equal(scales[:written], scale[[slot // k for slot in slots[:written]]])
    assert scales[written:].isnan().all()

    pairs = call("npu_moe_init_routing_v2", **shared, expert_tokens_num_type=2)[2]
    used = [[e, n] for e, n in zip(range(start, end), count, strict=True) if n]
    assert pairs.shape == (8, 2)
    assert pairs[: len(used)].tolist() == used


def test_init_routing_counts_only_when_asked() -> None:
    tokens = call("npu_moe_init_routing_v2", x=bf16(3, 4), expert_idx=routed(0, 3, 2, 8), expert_num=8)[2]
    assert tokens.shape == ()
    assert tokens.dtype == torch.int64
    assert tokens < -1


def experts_of_rank(x: Tensor, weight: Tensor, expert: Tensor, first: int, up: Tensor, down: Tensor) -> Tensor:
    """One rank's share of a mixture of experts, the way it is composed on A2."""
    rows, index, count, _ = call(
        "npu_moe_init_routing_v2",
        x=x,
        expert_idx=expert,
        expert_num=8,
        active_expert_range=[first, first + len(up)],
        expert_tokens_num_flag=True,
        expert_tokens_num_type=1,
    )
    groups = {"group_list": count, "group_list_type": 1, "group_type": 0, "split_item": 2}
    hidden = call("npu_swiglu", input=call("npu_grouped_matmul", x=[rows], weight=[up], **groups)[0])
    out = call("npu_grouped_matmul", x=[hidden], weight=[down], **groups)[0]
    local = (index >= 0).view(weight.shape)
    return call(
        "npu_moe_token_unpermute",
        permuted_tokens=out,
        sorted_indices=index.abs(),
        probs=weight.masked_fill(~local, 0.0),
    )


@examples
@given(seed=SEEDS, tokens=st.integers(1, 12), k=st.integers(1, 4), ranks=st.sampled_from([1, 2, 4]))
def test_ranks_add_up_to_the_mixture_of_experts(seed: int, tokens: int, k: int, ranks: int) -> None:
    torch.manual_seed(seed)
    x, expert, weight = torch.randn(tokens, 16), routed(seed, tokens, k, 8), torch.rand(tokens, k)
    up, down = torch.randn(8, 16, 24) / 4, torch.randn(8, 12, 16) / 4
    shares = [
        experts_of_rank(x, weight, expert, first, up[first : first + 8 // ranks], down[first : first + 8 // ranks])
        for first in range(0, 8, 8 // ranks)
    ]
    for t in range(tokens):
        exact = torch.zeros(16, dtype=torch.float64)
        for w, e in zip(weight[t].double(), expert[t].tolist(), strict=True):
            a, b = (x[t].double() @ up[e].double()).chunk(2)
            exact += w * (F.silu(a) * b) @ down[e].double()
        torch.testing.assert_close(torch.stack(shares)[:, t].sum(0), exact.float())


def test_unpermute_leaves_out_what_has_no_weight_or_no_row() -> None:
    rows = torch.stack((torch.full((4,), float("nan")), torch.ones(4), torch.full((4,), 2.0)))
    index, probs = torch.tensor([0, 1, 2, 9, -1, 1]).int(), torch.tensor([[0.0, 0.5], [1.0, 1.0], [0.0, 0.25]])
    out = call("npu_moe_token_unpermute", permuted_tokens=rows, sorted_indices=index, probs=probs)
    assert out[:, 0].tolist() == [0.5, 2.0, 0.25]
    leaking = call("npu_moe_token_unpermute", permuted_tokens=rows, sorted_indices=index[:2], probs=probs[:1] + 1)
    assert leaking.isnan().all()


@pytest.mark.parametrize("mode", [0, 2])
def test_finalize_routing(mode: int) -> None:
    rows, skip, bias = torch.randn(6, 4), torch.randn(2, 3, 4), torch.randn(5, 4)
    scales, index, expert = torch.rand(3, 2), torch.randperm(6).int(), torch.randint(0, 5, (3, 2)).int()
    out = call(
        "npu_moe_finalize_routing",
        expanded_permuted_rows=rows,
        skip1=skip[0],
        skip2=skip[1],
        bias=bias,
        scales=scales,
        expanded_src_to_dst_row=index,
        export_for_source_row=expert,
        drop_pad_mode=mode,
    )
    for n in range(3):
        exact = skip[0, n] + skip[1, n]
        for k in range(2):
            j = index[k * 3 + n] if mode == 0 else index[n * 2 + k]
            exact = exact + scales[n, k] * (rows[j] + bias[expert[n, k]])
        torch.testing.assert_close(out[n], exact)


@examples
@given(counts=st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=4))
def test_re_routing(counts: list[list[int]]) -> None:
    table = torch.tensor(counts)
    origin = [(e, r) for r, row in enumerate(counts) for e, n in enumerate(row) for _ in range(n)]
    tokens, scales = bf16(len(origin), 8), torch.rand(len(origin))
    rows, row_scales, source, count = call(
        "npu_moe_re_routing", tokens=tokens, expert_token_num_per_rank=table, per_token_scales=scales
    )
    assert [origin[i] for i in source.tolist()] == sorted(origin)
    assert torch.equal(rows, tokens[source.long()])
    assert torch.equal(row_scales, scales[source.long()])
    assert (source.dtype, count.dtype, count.tolist()) == (torch.int32, table.dtype, table.sum(0).tolist())
    without = call("npu_moe_re_routing", tokens=tokens, expert_token_num_per_rank=table)[1]
    assert without.isnan().all()


# Norms and activation


@pytest.mark.parametrize(
    ("dtype", "gamma_dtype"), [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32)]
)
@pytest.mark.parametrize("normed", [1, 2])
def test_rms_norm(dtype: torch.dtype, gamma_dtype: torch.dtype, normed: int) -> None:
    x, gamma = torch.randn(2, 3, 4, 8).to(dtype), torch.randn((4, 8)[-normed:]).to(gamma_dtype)
    y, rstd = call("npu_rms_norm", input=x, gamma=gamma, epsilon=1e-5)
    exact = F.rms_norm(x.double(), gamma.shape, gamma.double(), 1e-5)
    tolerance = {FP32: 1e-6, BF16: 2**-8, FP16: 2**-10}[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=1e-6)
    assert y.dtype == dtype
    assert rstd.shape == (2, 3, *((4, 1) if normed == 1 else (1, 1)))
    dims = tuple(range(-normed, 0))
    torch.testing.assert_close(rstd, (x.float().square().mean(dims, keepdim=True) + 1e-5).rsqrt())


def test_rms_norm_rounds_bf16_once() -> None:
    x, gamma = bf16(64, 256), bf16(256)
    exact = F.rms_norm(x.double(), (256,), gamma.double(), 1e-6)
    y = call("npu_rms_norm", input=x, gamma=gamma)[0]
    assert (y != exact.to(BF16)).float().mean() < 0.001
    twice = F.rms_norm(x.double(), (256,), None, 1e-6).to(BF16) * gamma
    assert (y != twice).float().mean() > 0.1


def test_add_rms_norm_rounds_by_the_number_of_rows() -> None:
    x1, x2, gamma = bf16(VECTOR_CORES + 1, 256), bf16(VECTOR_CORES + 1, 256), bf16(256)
    few, _, few_sum = call("npu_add_rms_norm", x1=x1[:-1], x2=x2[:-1], gamma=gamma)
    many, rstd, total = call("npu_add_rms_norm", x1=x1, x2=x2, gamma=gamma)
    assert torch.equal(total, x1 + x2)
    assert torch.equal(few_sum, total[:-1])
    assert rstd.shape == (VECTOR_CORES + 1, 1)

    def normed(x: Tensor) -> Tensor:
        return F.rms_norm(x.double(), (256,), None, 1e-6).to(BF16) * gamma

    assert (few != normed((x1 + x2)[:-1])).float().mean() < 0.001
    assert (many != normed(x1.double() + x2.double())).float().mean() < 0.001
    assert 0.05 < (many[:-1] != few).float().mean() < 0.5


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("dim", [-1, 0])
def test_swiglu(dtype: torch.dtype, dim: int) -> None:
    x = (torch.randn(6, 8) * 3).to(dtype)
    out = call("npu_swiglu", input=x, dim=dim)
    a, b = x.double().chunk(2, dim)
    exact = a * torch.sigmoid(a) * b
    if dtype == FP32:
        torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(out, exact.to(dtype))


# Grouped products of floats


GROUPS = {0: torch.tensor([3, 3, 5, 8]), 1: torch.tensor([3, 0, 2, 3])}


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("layout", ["nd", "transposed", "nz", "list"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_grouped_matmul(dtype: torch.dtype, layout: str, kind: int) -> None:
    if layout == "nz" and dtype == FP32:
        dtype = BF16  # fp32 lies in ND only: among the refusals
    x, weight = torch.randn(10, 32).to(dtype), torch.randn(4, 32, 64).to(dtype)
    bias = torch.randn(4, 64).to(FP32 if dtype == BF16 else dtype)
    given = {"nd": [weight], "nz": [nz(weight)], "list": list(weight)}
    given["transposed"] = [weight.mT.contiguous().mT]
    flags = {"group_list": GROUPS[kind], "group_list_type": kind, "group_type": 0, "split_item": 3}
    biases = list(bias) if layout == "list" else [bias]
    (out,) = call("npu_grouped_matmul", x=[x], weight=given[layout], bias=biases, **flags)
    assert out.shape == (10, 64)
    assert out.dtype == dtype
    for e, (start, end) in enumerate([(0, 3), (3, 3), (3, 5), (5, 8)]):
        exact = x[start:end].double() @ weight[e].double() + bias[e].double()
        if dtype == FP32:
            torch.testing.assert_close(out[start:end].double(), exact, rtol=1e-5, atol=1e-5)
        else:
            assert (out[start:end] != exact.to(dtype)).sum() <= 0.02 * exact.numel()
    assert out[8:].isnan().all()


def test_grouped_matmul_of_pairs() -> None:
    x, weight = int8(6, 16), int8(3, 16, 32)
    flags = {"group_type": 0, "split_item": 2, "output_dtype": 3}
    pairs = torch.tensor([[2, 4], [0, 1], [1, 0]])
    (out,) = call("npu_grouped_matmul", x=[x], weight=[weight], group_list=pairs, group_list_type=2, **flags)
    assert torch.equal(out[:4], x[:4].int() @ weight[2].int())
    assert torch.equal(out[4:5], x[4:5].int() @ weight[0].int())
    assert (out[5:] < -(2**30)).all()
