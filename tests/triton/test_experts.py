"""Experts of a decode step and of a prompt against their definition; and that each weight is read once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ops import layout, quantise, reference, reference_quantised
from ops.triton_kernels import experts, grouped
from ops.triton_kernels.experts import Weights
from tests.op_cases import BF16, FP32, make
from tests.triton.cases import DTYPES, FP16, SEEDS, examples
from tests.triton.checker import in_any_order, reads

# Of ‖Δ‖ / ‖definition‖. A quantised token may fall to the other side of a rounding when what it comes from differs by
# a bit, which in bf16 and fp16 it does.
LIMIT = {FP32: 1e-5, BF16: 2e-2, FP16: 3e-3}
FORMATS = ["plain", "fp8", "int8", "int4"]
DEFINITION = {
    "plain": reference.moe_experts,
    "fp8": reference_quantised.moe_experts_fp8,
    "int8": reference_quantised.moe_experts_w8a8,
    "int4": reference_quantised.moe_experts_w4a16,
}
MLP = {
    "plain": reference.swiglu_mlp,
    "fp8": reference_quantised.swiglu_mlp_fp8,
    "int8": reference_quantised.swiglu_mlp_w8a8,
    "int4": reference.swiglu_mlp,  # the experts alone are quantised
}


def stored(form: str, gate_up: Tensor, down: Tensor) -> list[Tensor]:
    """The weights in a format, as the definition takes them."""
    if form == "fp8":
        return [*quantise.fp8_weight(gate_up, matrices=2), *quantise.fp8_weight(down)]
    if form == "int8":
        return [*quantise.int8_weight(gate_up), *quantise.int8_weight(down)]
    if form == "int4":
        return [part for one in (gate_up, down) for part in quantise.int4_weight(one, min(128, one.shape[-1]))]
    return [gate_up, down]


def weights(form: str, parts: list[Tensor], device: str) -> Weights:
    """The same as the kernels take them."""
    if len(parts) == 2:
        return Weights(parts[0].to(device), None, parts[1].to(device), None, "plain")
    if form == "int4":
        parts = [
            layout.interleaved_int4(one, parts[i + 1].shape[-1]) if i in (0, 2) else one for i, one in enumerate(parts)
        ]
    return Weights(*(one.to(device) for one in parts), form)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == dtype
    assert not found.isnan().any()
    assert (found.cpu().float() - wanted.float()).norm() <= LIMIT[dtype] * wanted.float().norm() + 1e-12


ROUTINGS: dict[str, Callable[[int, int, int, torch.Generator], Tensor]] = {
    "as a router": lambda T, K, E, g: torch.rand(T, E, generator=g).argsort(-1)[:, :K],
    "all to one": lambda T, K, E, g: torch.full((T, K), E // 2),
    "some elsewhere": lambda T, K, E, g: torch.randint(-2, E + 2, (T, K), generator=g),
    "all elsewhere": lambda T, K, E, g: torch.full((T, K), E),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@examples
@given(
    seed=SEEDS,
    dtype=DTYPES,
    tokens=st.sampled_from([0, 1, 2, 7, 9, 17, 40]),
    hidden=st.sampled_from([32, 96, 160]),
    width=st.sampled_from([8, 40, 64]),
    count=st.integers(3, 9),
    top_k=st.integers(1, 3),
    first=st.integers(0, 2),
    routing=st.sampled_from(sorted(ROUTINGS)),
    shared=st.sampled_from([0, 1, 2]),
)
def test_decode(
    device: str,
    form: str,
    seed: int,
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    width: int,
    count: int,
    top_k: int,
    first: int,
    routing: str,
    shared: int,
) -> None:
    if form == "int4" and hidden == 160:
        hidden = 256  # whole groups
    new = make(seed, dtype)
    x, mix = new(tokens, hidden), make(seed + 1, FP32)(tokens, top_k).sigmoid()
    chosen = ROUTINGS[routing](tokens, top_k, count, torch.Generator().manual_seed(seed)) + first
    gate_up = new(count, 2 * width, hidden, scale=hidden**-0.5)
    parts = stored(form, gate_up, new(count, hidden, width, scale=width**-0.5))
    exact = DEFINITION[form](x.float(), mix, chosen, *map(_wide, parts), first)
    extra = None
    if shared:
        gate_up = new(2 * shared * width, hidden, scale=hidden**-0.5)
        own = stored("plain" if form == "int4" else form, gate_up, new(hidden, shared * width))
        exact = exact + MLP[form](x.float(), *map(_wide, own))
        extra = weights(form, own, device)
    args = (x.to(device), mix.to(device), chosen.to(device), weights(form, parts, device), extra, first)
    close(experts._moe(*args), exact, dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (BF16, FP16) else tensor


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_programs_in_any_order_give_the_same_bits(device: str, form: str) -> None:
    new = make(3, BF16)
    parts, own = (stored(form, new(*lead, 2 * 64, 128, scale=0.1), new(*lead, 128, 64)) for lead in ((6,), ()))
    own = own if form != "int4" else stored("plain", new(2 * 64, 128, scale=0.1), new(128, 64))
    chosen = ROUTINGS["as a router"](9, 3, 6, torch.Generator().manual_seed(1)).to(device)
    mix = make(4, FP32)(9, 3).to(device)
    run = partial(
        experts._moe, new(9, 128).to(device), mix, chosen, weights(form, parts, device), weights(form, own, device), 0
    )
    in_any_order(run)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_each_weight_of_a_hit_expert_is_read_once_and_no_other(device: str, form: str, tokens: int) -> None:
    if device != "cpu":
        pytest.skip("loads are counted by the interpreter")
    new, H = make(3, BF16), 256 if form in ("int4", "fp8") else 64
    routed = weights(form, stored(form, new(8, 2 * 40, H, scale=0.1), new(8, H, 40)), device)
    shared_form = "plain" if form == "int4" else form
    own = weights(form, stored(shared_form, new(2 * 40, H, scale=0.1), new(H, 40)), device)
    chosen = ROUTINGS["as a router"](tokens, 2, 8, torch.Generator().manual_seed(tokens))
    hit = torch.zeros(8, dtype=torch.int64)
    hit[chosen.unique()] = 1
    with (
        reads(routed.gate_up) as one,
        reads(routed.down) as two,
        reads(own.gate_up) as three,
        reads(own.down) as four,
    ):
        experts._moe(new(tokens, H), make(4, FP32)(tokens, 2), chosen, routed, own, 0)
    for counted in (one, two):
        assert torch.equal(counted.count, hit[:, None, None].expand_as(counted.count))
    assert three.count.eq(1).all()
    assert four.count.eq(1).all()


def test_many_tokens_of_one_expert_are_tiled(device: str) -> None:
    new = make(5, FP32)
    gate_up, down, x = new(4, 2 * 24, 64, scale=0.1), new(4, 64, 24), new(100, 64)
    chosen = torch.full((100, 1), 2)
    mix = make(6, FP32)(100, 1)
    found = experts.moe_experts(*(one.to(device) for one in (x, mix, chosen, gate_up, down)))
    close(found, reference.moe_experts(x, mix, chosen, gate_up, down), FP32)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("routing", ["as a router", "some elsewhere", "all to one"])
def test_prompt(device: str, form: str, dtype: torch.dtype, routing: str) -> None:
    new, T = make(7, dtype), experts.DECODE_TOKENS + 21
    x, mix = new(T, 128), make(8, FP32)(T, 2).sigmoid()
    chosen = ROUTINGS[routing](T, 2, 7, torch.Generator().manual_seed(2)) + 1
    parts = stored(form, new(7, 2 * 64, 128, scale=0.1), new(7, 128, 64))
    own = stored("plain" if form == "int4" else form, new(2 * 64, 128, scale=0.1), new(128, 64))
    exact = DEFINITION[form](x.float(), mix, chosen, *map(_wide, parts), 1) + MLP[form](x.float(), *map(_wide, own))
    tokens = (one.to(device) for one in (x, mix, chosen))
    close(experts._moe(*tokens, weights(form, parts, device), weights(form, own, device), 1), exact, dtype)


@pytest.mark.parametrize("form", ["plain", "fp8", "int8"])
@pytest.mark.parametrize("tokens", [1, 20, experts.DECODE_TOKENS + 3])
def test_dense_mlp_in_parts(device: str, form: str, tokens: int) -> None:
    new = make(9, BF16)
    parts, x = stored(form, new(2 * 512, 128, scale=0.1), new(128, 512, scale=0.05)), new(tokens, 128)
    assert experts.part_width(512) == 256
    found = experts._mlp(x.to(device), weights(form, parts, device))
    close(found, MLP[form](x.float(), *map(_wide, parts)), BF16)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_expert_rows_of_counts(device: str, dtype: torch.dtype) -> None:
    new = make(11, dtype)
    x, count, gate_up, down = new(11, 64), torch.tensor([2, 0, 5, 1]), new(4, 2 * 24, 64, scale=0.1), new(4, 64, 24)
    found = grouped.expert_rows(*(one.to(device) for one in (x, count, gate_up, down)))
    close(found[:8], reference.expert_rows(x.float(), count, gate_up.float(), down.float())[:8], dtype)
