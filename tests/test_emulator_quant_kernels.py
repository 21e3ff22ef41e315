"""The emulated int8 and int4 ops, against integer arithmetic and against one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.emulator_calls import (
    BF16,
    FP16,
    FP32,
    bf16,
    call,
    grouped_int8,
    grouped_swiglu_quant,
    int8,
    int32,
    nz,
    swiglu_quant,
)

SEEDS = st.integers(0, 2**31)
RANGES = [(0, 3), (3, 3), (3, 5), (5, 9)]
"""The rows of the four groups of `tests.emulator_calls.grouped`."""


def is_quantised(q: Tensor, scale: Tensor, exact: Tensor, largest: int = 127) -> None:
    """``q · scale`` is ``exact`` to half a step, and the largest value of a row takes the whole range."""
    torch.testing.assert_close(scale.double(), exact.abs().amax(-1) / largest, rtol=1e-5, atol=0)
    assert ((q.double() * scale[..., None] - exact).abs() <= scale[..., None] * 0.501).all()
    assert (q.int().abs().amax(-1) == largest).all()


def garbage(q: Tensor, scale: Tensor) -> bool:
    return bool((q == -86).all() and scale.isnan().all())


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, rows=st.integers(1, 5), width=st.integers(1, 40), dtype=st.sampled_from([BF16, FP16]))
def test_dynamic_quant(seed: int, rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    x, smooth = torch.randn(rows, 2, width).to(dtype), torch.rand(width).to(dtype) + 0.1
    q, scale = call("npu_dynamic_quant", input=x)
    assert (q.dtype, scale.dtype, scale.shape) == (torch.int8, FP32, (rows, 2))
    is_quantised(q, scale, x.double())
    is_quantised(*call("npu_dynamic_quant", input=x, smooth_scales=smooth), x.double() * smooth.double())


def test_dynamic_quant_per_group_and_of_zeros() -> None:
    x, smooth = bf16(5, 16), torch.rand(3, 16).to(BF16) + 0.1
    q, scale = call("npu_dynamic_quant", input=x, smooth_scales=smooth, group_index=int32(2, 2, 5))
    is_quantised(q, scale, x.double() * smooth[[0, 0, 2, 2, 2]].double())
    zero, zero_scale = call("npu_dynamic_quant", input=torch.zeros(1, 8, dtype=BF16))
    assert not zero.any()
    assert not zero_scale.any()


def unpacked(packed: Tensor) -> Tensor:
    """Eight 4-bit two's complement numbers of each int32, the lowest bits first."""
    digits = [[(value >> 4 * i) & 15 for i in range(8)] for value in packed.flatten().tolist()]
    values = torch.tensor([[d - 16 if d > 7 else d for d in row] for row in digits])
    return values.view(*packed.shape[:-1], -1)


def test_int4_is_packed_low_bits_first() -> None:
    weight = torch.randint(-8, 8, (2, 3, 24)).int()
    packed = call("npu_convert_weight_to_int4pack", weight=weight)
    assert (packed.dtype, packed.shape) == (torch.int32, (2, 3, 3))
    assert torch.equal(unpacked(packed), weight)


def test_dynamic_quant_to_int4() -> None:
    x = bf16(3, 16)
    packed, scale = call("npu_dynamic_quant", input=x, dst_type=16)
    assert (packed.dtype, packed.shape) == (torch.int32, (3, 2))
    is_quantised(unpacked(packed), scale, x.double(), largest=7)


# Grouped products


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(("scale_dtype", "code", "dtype"), [(BF16, 15, BF16), (FP32, 5, FP16)])
def test_grouped_matmul_of_int8(scale_dtype: torch.dtype, code: int, dtype: torch.dtype, per_token: bool) -> None:
    arguments = grouped_int8()
    scale, bias = (torch.rand(4, 64) / 999).to(scale_dtype), torch.randint(-999, 999, (4, 64)).int()
    arguments.update({"scale": [scale], "output_dtype": code, "bias": [bias], "weight": [nz(arguments["weight"][0])]})
    if not per_token:
        arguments["per_token_scale"] = None
    (out,) = call("npu_grouped_matmul", **arguments)
    assert out.dtype == dtype
    for e, (start, end) in enumerate(RANGES):
        total = arguments["x"][0][start:end].long() @ arguments["weight"][0][e].long() + bias[e]
        token = arguments["per_token_scale"][0][start:end, None].double() if per_token else 1.0
        exact = total.double() * scale[e].double() * token
        torch.testing.assert_close(out[start:end].double(), exact, rtol=2**-8, atol=1e-6)


def test_int8_sums_are_exact_beyond_fp32() -> None:
    x, weight = torch.full((1, 4096), -127, dtype=torch.int8), torch.full((1, 4096, 16), 127, dtype=torch.int8)
    x[0, 0] = 1
    flags: dict[str, Any] = {"group_list": torch.tensor([1]), "group_type": 0, "split_item": 2, "output_dtype": 3}
    (out,) = call("npu_grouped_matmul", x=[x], weight=[weight], **flags)
    assert out.dtype == torch.int32
    assert (out == 127 - 127 * 127 * 4095).all()


@pytest.mark.parametrize("kind", ["int8", "int4", "int4 per group", "int4 symmetric", "int4 list"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_weight_only_grouped_matmul(dtype: torch.dtype, kind: str) -> None:
    x = torch.randn(9, 32).to(dtype)
    groups = 2 if kind == "int4 per group" else 1
    integers = torch.randint(-8, 8, (4, 32, 64)).int() if "int4" in kind else int8(4, 32, 64).int()
    scale = torch.rand(4, groups, 64).to(dtype) / 8
    symmetric = kind in ("int4 per group", "int4 symmetric")
    offset = torch.zeros_like(scale) if symmetric else torch.randint(-3, 4, scale.shape).to(dtype)
    weight = call("npu_convert_weight_to_int4pack", weight=integers) if "int4" in kind else integers.to(torch.int8)
    shape = scale.shape if kind == "int4 per group" else (4, 64)
    parameters: dict[str, Any] = {"weight": weight, "antiquant_scale": scale.view(shape)}
    if kind != "int4 symmetric":
        parameters["antiquant_offset"] = offset.view(shape)
    listed = {name: list(value) if kind == "int4 list" else [value] for name, value in parameters.items()}
    flags = {"group_list": torch.tensor([3, 0, 2, 4]), "group_list_type": 1, "group_type": 0, "split_item": 3}
    (out,) = call("npu_grouped_matmul", x=[x], **listed, **flags)
    assert out.dtype == dtype
    rows = 32 // groups
    for e, (start, end) in enumerate(RANGES):
        per_row = [(integers[e, r] + offset[e, r // rows]).double() * scale[e, r // rows].double() for r in range(32)]
        exact = x[start:end].double() @ torch.stack(per_row).to(dtype).double()
        torch.testing.assert_close(out[start:end].double(), exact, rtol=2**-7, atol=2**-7)


def test_fused_swiglu_quant_is_the_product_then_dequant_swiglu_quant() -> None:
    fused = grouped_swiglu_quant()
    q, scale, third = call("npu_grouped_matmul_swiglu_quant", **fused)
    assert (q.dtype, q.shape, third.shape) == (torch.int8, (7, 32), ())
    assert third.isnan()
    assert garbage(q[5:], scale[5:])
    flags = {"group_list": fused["group_list"], "group_type": 0, "split_item": 2, "output_dtype": 3}
    (total,) = call("npu_grouped_matmul", x=[fused["x"]], weight=[fused["weight"]], **flags)
    for e, (start, end) in enumerate([(0, 2), (2, 5)]):
        hidden = total[start:end].double() * fused["weight_scale"][e] * fused["x_scale"][start:end, None]
        a, b = hidden.chunk(2, -1)
        is_quantised(q[start:end], scale[start:end], F.silu(a) * b)

    counted = {**fused, "group_list": torch.tensor([2, 3])}
    lists = {"weight": [fused["weight"]], "weight_scale": [fused["weight_scale"]]}
    again = call("npu_grouped_matmul_swiglu_quant_v2", **{**counted, **lists}, group_list_type=1)
    assert torch.equal(again[0], q)
    assert torch.equal(again[1][:5], scale[:5])


@pytest.mark.parametrize("left", [True, False])
def test_dequant_swiglu_quant(left: bool) -> None:
    arguments = swiglu_quant()
    smooth = torch.rand(2, 64) + 0.1
    arguments.update({"activate_left": left, "quant_scale": smooth})
    q, scale = call("npu_dequant_swiglu_quant", **arguments)
    values = (
        arguments["x"][:5].double() * arguments["weight_scale"][[0, 0, 1, 1, 1]] * arguments["activation_scale"][:5]
    )
    a, b = values.chunk(2, -1) if left else values.chunk(2, -1)[::-1]
    is_quantised(q[:5], scale[:5], F.silu(a) * b * smooth[[0, 0, 1, 1, 1]])
    assert garbage(q[5:], scale[5:])


def test_dequant_swiglu_quant_activates_the_right_half_by_default() -> None:
    x = bf16(3, 16)
    a, b = x.double().chunk(2, -1)
    is_quantised(*call("npu_dequant_swiglu_quant", x=x, quant_mode=1), F.silu(b) * a)


@pytest.mark.parametrize("bias", [None, torch.int32, FP32, "out"])
@pytest.mark.parametrize(("code", "dtype"), [(15, BF16), (5, FP16)])
@pytest.mark.parametrize("layout", ["nd", "transposed", "nz"])
def test_quant_matmul(layout: str, code: int, dtype: torch.dtype, bias: Any) -> None:
    x1, x2, scale, token = int8(2, 5, 32), int8(32, 64), torch.rand(64) / 99, torch.rand(5)
    weight = {"nd": x2, "transposed": x2.mT.contiguous().mT, "nz": nz(x2)}[layout]
    added = None if bias is None else torch.randint(-99, 99, (64,)).to(dtype if bias == "out" else bias)
    out = call("npu_quant_matmul", x1=x1, x2=weight, scale=scale, pertoken_scale=token, bias=added, output_dtype=code)
    total = (x1.long() @ x2.long()).double()
    if added is not None and added.dtype == torch.int32:
        total = total + added
    exact = total * scale * token[:, None]
    if added is not None and added.dtype != torch.int32:
        exact = exact + added.double()
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("smooth", [None, 1, 3])
def test_init_routing_quantises(smooth: int | None) -> None:
    x, expert = bf16(4, 16), torch.tensor([[2, 7], [4, 3], [2, 4], [0, 1]]).int()
    factor = None if smooth is None else torch.rand(smooth, 16) + 0.1
    q, index, _, scale = call(
        "npu_moe_init_routing_v2",
        x=x,
        expert_idx=expert,
        expert_num=8,
        active_expert_range=[2, 5],
        quant_mode=1,
        row_idx_type=1,
        scale=factor,
    )
    assert index[:5].tolist() == [0, 4, 3, 2, 5]
    exact = x[index[:5].long() // 2].double()
    if factor is not None:
        exact = exact * (factor if smooth == 1 else factor[[0, 0, 1, 2, 2]])
    is_quantised(q[:5], scale[:5], exact)
    assert garbage(q[5:], scale[5:])
