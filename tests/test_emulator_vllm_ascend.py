"""The emulated ops of vllm-ascend and of Ascend Transformer Boost, each against a formulation of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ascend.emulator.kernels import atb, attention, vllm_ascend
from ascend.emulator.limits import Refused
from ascend.emulator.vllm_ascend import SlotMapping
from tests.emulator_calls import BF16, FP32, bf16, call, grouped_swiglu_quant, int8, int32, swiglu_quant


def ours(op: str, *args: Any, **arguments: Any) -> Any:
    return vllm_ascend.KERNELS[f"_C_ascend::{op}"](*args, **arguments)


def theirs(op: str, *args: Any) -> None:
    atb.KERNELS[f"atb::{op}"](*args)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_names_are_those_of_the_ops() -> None:
    assert all(name == f"_C_ascend::{kernel.__name__}" for name, kernel in vllm_ascend.KERNELS.items())
    assert all(name == f"atb::{kernel.__name__}" for name, kernel in atb.KERNELS.items())


def test_gating_chooses_by_biased_sigmoids_of_the_two_best_groups_and_weighs_by_unbiased_ones() -> None:
    x, bias = bf16(5, 16), bf16(16)
    weight, expert, _ = ours("moe_gating_top_k", x, 3, 2, 4, 1, 1, 1, False, 2.5, 1e-20, bias)
    for t in range(5):
        score = [1 / (1 + math.exp(-v)) for v in x[t].tolist()]
        biased = [s + b for s, b in zip(score, bias.tolist(), strict=True)]
        groups = sorted(range(4), key=lambda g, b=biased: -sum(sorted(b[4 * g : 4 * g + 4])[-2:]))[:2]
        chosen = sorted((e for g in groups for e in range(4 * g, 4 * g + 4)), key=lambda e, b=biased: -b[e])[:3]
        assert expert[t].tolist() == chosen
        total = sum(score[e] for e in chosen)
        exact = torch.tensor([2.5 * score[e] / total for e in chosen])
        torch.testing.assert_close(weight[t].float(), exact, rtol=2**-8, atol=0)


def test_routing_sorts_the_slots_of_local_experts_and_counts_them() -> None:
    x, expert = bf16(6, 32), torch.stack([torch.randperm(8)[:3] for _ in range(6)]).int()
    flags = {"expert_num": 8, "active_expert_range": [2, 6], "expert_tokens_num_type": 1, "active_num": 18}
    rows, row, count, _ = ours(
        "npu_moe_init_routing_custom", x, expert, expert_tokens_num_flag=True, quant_mode=-1, **flags
    )
    slots = [(e, t, k) for t in range(6) for k, e in enumerate(expert[t].tolist()) if 2 <= e < 6]
    assert count.tolist() == [sum(e == local for e, _, _ in slots) for local in range(2, 6)]
    for place, (_, t, k) in enumerate(sorted(slots)):
        assert torch.equal(rows[place], x[t])
        assert row[3 * t + k] == place
    assert sorted(row.tolist()) == [-1] * (18 - len(slots)) + list(range(len(slots)))


@pytest.mark.parametrize("biased", [False, True])
def test_add_norm_is_the_norm_of_the_sum_plus_a_bias(biased: bool) -> None:
    x, y, gamma, beta = bf16(3, 64), bf16(3, 64), bf16(64), bf16(64) if biased else None
    out, rstd, total = ours("npu_add_rms_norm_bias", x, y, gamma, beta, 1e-5)
    assert torch.equal(total, x + y)
    exact = (x.double() + y.double()) * ((x.double() + y.double()).square().mean(-1, keepdim=True) + 1e-5) ** -0.5
    exact = exact * gamma.double() + (0 if beta is None else beta.double())
    torch.testing.assert_close(out.double(), exact, rtol=2**-6, atol=2**-7)
    assert rstd.shape == (3, 1)


def test_grouped_product_takes_cumulative_ends_and_activates_the_left_half() -> None:
    given = grouped_swiglu_quant()
    out, scale, _ = ours("grouped_matmul_swiglu_quant_weight_nz", **given)
    for group, (start, end) in enumerate([(0, 2), (2, 5)]):
        sums = given["x"][start:end].double() @ given["weight"][group].double()
        hidden = sums * given["weight_scale"][group].double() * given["x_scale"][start:end, None].double()
        exact = F.silu(hidden[:, :32]) * hidden[:, 32:]
        torch.testing.assert_close(scale[start:end].double(), exact.abs().amax(-1) / 127, rtol=1e-4, atol=0)
        assert ((out[start:end].double() * scale[start:end, None] - exact).abs() <= scale[start:end, None] * 0.51).all()
    assert scale[5:].isnan().all()  # past the last end nothing is written
    with pytest.raises(Refused, match="swiglu_limit is 7"):
        ours("grouped_matmul_swiglu_quant_weight_nz", **given, swiglu_limit=7.0)


@pytest.mark.parametrize("mode", [0, 1])
def test_dequantised_swiglu_halves_in_both_modes(mode: int) -> None:
    """The shared experts' call: mode 1, all rows one group, the scale of the weight without a dimension for groups."""
    x, weight_scale, scale_in = swiglu_quant()["x"], torch.rand(128), torch.rand(6)
    given = {"weight_scale": weight_scale, "activation_scale": scale_in, "quant_mode": 1}
    q, scale = ours("npu_dequant_swiglu_quant", x, **given, group_index=torch.tensor([6]), swiglu_mode=mode)
    hidden = x.double() * weight_scale.double() * scale_in[:, None].double()
    exact = F.silu(hidden[:, :64]) * hidden[:, 64:]
    assert ((q.double() * scale[:, None] - exact).abs() <= scale[:, None] * 0.51).all()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"clamp_limit": 7.0}, "clamp_limit, glu_alpha, glu_bias is"),
        ({"swiglu_mode": 2}, "swiglu_mode is 2"),
        ({"group_index": torch.tensor([5])}, "is not all 6 rows"),
        ({"quant_mode": 0}, "quant_mode is 0"),
    ],
)
def test_what_a_dequantised_swiglu_does_not_cover_is_refused(changed: dict[str, Any], words: str) -> None:
    given = {"weight_scale": torch.rand(128), "activation_scale": torch.rand(6), "quant_mode": 1} | changed
    with pytest.raises(Refused, match=words):
        ours("npu_dequant_swiglu_quant", swiglu_quant()["x"], **given)


def test_a_product_to_int32_is_the_bare_sums() -> None:
    x, weight = int8(5, 32), int8(32, 64)
    out = call("npu_quant_matmul", x1=x, x2=weight, scale=torch.rand(64), output_dtype=3)
    assert torch.equal(out, (x.long() @ weight.long()).int())
    with pytest.raises(Refused, match="pertoken_scale is given"):
        call("npu_quant_matmul", x1=x, x2=weight, scale=torch.rand(64), pertoken_scale=torch.rand(5), output_dtype=3)


def test_static_quantisation_rounds_to_even_and_saturates() -> None:
    x = torch.tensor([[0.5, 1.5, -100.0, 100.0]])
    arguments = {"scales": torch.tensor([1.0, 1.0, 2.0, 2.0]), "zero_points": torch.tensor([0.0, 1.0, 0.0, 0.0])}
    out = call("npu_quantize", input=x, **arguments, dtype=12, axis=-1, div_mode=False)
    assert (out.tolist(), out.dtype) == ([[0, 2, -128, 127]], torch.int8)


def test_cache_takes_keys_at_their_slots_also_from_a_fused_projection() -> None:
    qkv, caches = bf16(3, 2, 64), (bf16(2, 16, 2, 32), bf16(2, 16, 2, 32))
    before = caches[1].clone()
    key, value = qkv[..., :32], qkv[..., 32:]
    theirs("_npu_reshape_and_cache", key, value, *caches, int32(5, -1, 17))
    for cache, new in zip(caches, (key, value), strict=True):
        assert torch.equal(cache[0, 5], new[0])
        assert torch.equal(cache[1, 1], new[2])
    untouched = torch.ones(32, dtype=torch.bool)
    untouched[[5, 17]] = False
    assert torch.equal(caches[1].flatten(0, 1)[untouched], before.flatten(0, 1)[untouched])


def test_rotation_turns_pairs_as_complex_numbers() -> None:
    angle, positions = torch.rand(9, 32), torch.tensor([7, 0, 3])
    table = torch.cat((angle.cos(), angle.sin()), -1).to(BF16)
    query, key = bf16(3, 4 * 64), bf16(3, 2 * 64)
    exact = []
    for tensor in (query, key):
        halves = tensor.view(3, -1, 64).float()
        turn = torch.complex(*table[positions].float().chunk(2, -1))[:, None]
        turned = torch.complex(halves[..., :32], halves[..., 32:]) * turn
        exact.append(torch.cat((turned.real, turned.imag), -1).flatten(1).to(BF16))
    theirs("_npu_rotary_embedding", positions, query, key, 64, table, True)
    for out, expected in zip((query, key), exact, strict=True):
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-8)


def test_product_is_added_in_fp32() -> None:
    x, weight, total = bf16(5, 3), bf16(5, 4), torch.ones(3, 4)
    theirs("_npu_matmul_add_fp32", x, weight, total)
    torch.testing.assert_close(total, 1 + torch.einsum("tm,tn->mn", x.float(), weight.float()))
    assert total.dtype == FP32


def test_attention_into_given_results_leaves_the_place_of_a_sum_that_is_not_asked_for() -> None:
    q, k = bf16(1, 1, 2, 64), bf16(1, 9, 1, 64)
    heads: dict[str, Any] = {"num_heads": 2, "num_key_value_heads": 1, "scale": 0.1, "input_layout": "BSND"}
    out: list[Tensor] = [torch.zeros_like(q), torch.full((1,), 3.0, dtype=BF16)]
    attention.into(q, k, k, **heads, out=out)
    assert torch.equal(out[0], attention.npu_fused_infer_attention_score(q, k, k, **heads)[0])
    assert out[1].item() == 3.0


def test_slots_are_block_times_size_plus_place() -> None:
    """Two requests in blocks of 4: tokens 2 to 5 of the first, token 0 of the second; the rest is padding."""
    table, slots = int32(7, 3, 9, 5).view(2, 2), torch.full((8,), 99)
    context = {"TOTAL_CP_WORLD_SIZE": 1, "TOTAL_CP_RANK": 0, "CP_KV_CACHE_INTERLEAVE_SIZE": 1}
    arguments = (5, 8, int32(0, 4, 5), torch.tensor([2, 3, 4, 5, 0]), table, 2, 4, slots)
    SlotMapping()[(3,)](*arguments, **context, PAD_ID=-1, BLOCK_SIZE=1024)
    assert slots.tolist() == [30, 31, 12, 13, 36, -1, -1, -1]
    with pytest.raises(Refused, match="no context parallelism"):
        SlotMapping()[(3,)](*arguments, **context | {"TOTAL_CP_WORLD_SIZE": 2}, PAD_ID=-1, BLOCK_SIZE=1024)
