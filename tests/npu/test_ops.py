"""Every op of `ops.npu` on an emulated card against `ops.reference` in fp32 on the CPU.

Sizes are such as the card takes: groups of at least two experts, quantised widths in 64s.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ops
from ascend.emulator import log
from ops import fused, layout, quantise, reference, reference_quantised
from ops.npu import KERNELS
from tests.op_cases import BF16, FP32, UNIT, make

FP16 = torch.float16
CARD = "npu:0"
DTYPES = st.sampled_from([BF16, FP32])
SEEDS = st.integers(0, 2**31)
TOKENS = st.one_of(st.integers(1, 9), st.sampled_from([33, 41, 64]))
examples = settings(max_examples=20, deadline=None)


def there(*values: Any) -> list[Any]:
    return [one.to(CARD) if isinstance(one, Tensor) else one for one in values]


def close(actual: Tensor, exact: Tensor, roundings: float = 2.0) -> None:
    """Within a few roundings of the largest value of each row: sums of many terms cancel."""
    assert str(actual.device) == CARD
    assert actual.shape == exact.shape
    bound = roundings * UNIT.get(actual.dtype, 2.0**-8) * exact.abs().amax(-1, keepdim=True).clamp(min=1e-3)
    assert ((actual.cpu().float() - exact).abs() <= bound).all()


def wide(*values: Any) -> list[Any]:
    return [one.float() if isinstance(one, Tensor) and one.is_floating_point() else one for one in values]


def test_every_op_has_a_kernel() -> None:
    """But those that run the kernels of their parts, and FP8, which the card has not."""
    expected = {name for name in ops.SCHEMAS if not hasattr(fused, name) and not name.endswith("_fp8")}
    assert set(KERNELS) == expected


@examples
@given(seed=SEEDS, dtype=DTYPES, rows=TOKENS, width=st.sampled_from([16, 64, 4096]))
def test_norms(seed: int, dtype: torch.dtype, rows: int, width: int) -> None:
    new = make(seed, dtype)
    x, residual, weight = new(rows, width), new(rows, width), new(width)
    close(ops.rms_norm(*there(x, weight), 1e-6), reference.rms_norm(*wide(x, weight), 1e-6))
    normed, total = ops.add_rms_norm(*there(x, residual, weight), 1e-6)
    assert torch.equal(total.cpu(), x + residual)
    close(normed, reference.add_rms_norm(*wide(x, residual, weight), 1e-6)[0], roundings=4)


@examples
@given(seed=SEEDS, dtype=DTYPES, tokens=TOKENS)
def test_dense(seed: int, dtype: torch.dtype, tokens: int) -> None:
    new = make(seed, dtype)
    x, gate_up, down, bias = new(tokens, 64), new(2 * 32, 64, scale=0.2), new(64, 32, scale=0.2), new(64)
    close(ops.linear(*there(x, gate_up, bias)), reference.linear(*wide(x, gate_up, bias)))
    close(ops.swiglu_mlp(*there(x, gate_up, down)), reference.swiglu_mlp(*wide(x, gate_up, down)), roundings=4)


@examples
@given(
    seed=SEEDS,
    dtype=DTYPES,
    tokens=TOKENS,
    shape=st.sampled_from([(8, 4, 2, 3), (256, 8, 4, 8), (16, 1, 1, 4), (8, 8, 4, 2), (12, 2, 1, 1)]),
    biased=st.booleans(),
    normalise=st.booleans(),
)
def test_gate(
    seed: int, dtype: torch.dtype, tokens: int, shape: tuple[int, int, int, int], biased: bool, normalise: bool
) -> None:
    experts, groups, kept, top_k = shape
    x, weight, bias = (
        make(seed, dtype)(tokens, 32),
        make(seed + 1, FP32)(experts, 32, scale=0.2),
        make(seed + 2, FP32)(experts),
    )
    how = (top_k, groups, kept, normalise, 2.5)
    expected, chosen = reference.moe_gate(x, weight, bias if biased else None, *how)
    actual, actual_chosen = ops.moe_gate(*there(x, weight, bias if biased else None), *how)
    assert actual.dtype == FP32
    assert torch.equal(actual_chosen.cpu().long(), chosen)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-6)


FORMS = ("whole", "w8a8", "w4a16")


def expert_case(seed: int, dtype: torch.dtype, tokens: int, form: str, skewed: bool, first: int) -> tuple[Any, ...]:
    """Tokens, weights and choices among 12 experts, of which 6 from ``first`` are here."""
    new = make(seed, dtype)
    x, gate_up, down = new(tokens, 64), new(6, 2 * 64, 64, scale=0.2), new(6, 64, 64, scale=0.2)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, 12, generator=generator) + (torch.arange(12) == 3) * skewed
    chosen = scores.topk(4).indices
    weight = torch.rand(tokens, 4, generator=generator)
    if form == "whole":
        return x, weight, chosen, [gate_up, down], first, 12
    rounded = quantise.int8_weight if form == "w8a8" else lambda one: quantise.int4_weight(one, 32)
    return x, weight, chosen, [*rounded(gate_up), *rounded(down)], first, 12


def experts_there(form: str, weights: list[Tensor]) -> list[Tensor]:
    placed = there(*weights)
    if form == "whole":
        return list(layout.experts(*placed))
    if form == "w4a16":
        return [*layout.experts_int4(*placed[:2]), *layout.experts_int4(*placed[2:])]
    return list(layout.experts_int8(*placed))


@examples
@given(
    seed=SEEDS,
    dtype=DTYPES,
    tokens=TOKENS,
    form=st.sampled_from(FORMS),
    skewed=st.booleans(),
    first=st.sampled_from([0, 3, 6]),
)
def test_experts(seed: int, dtype: torch.dtype, tokens: int, form: str, skewed: bool, first: int) -> None:
    if form != "whole" and dtype is FP32:
        dtype = FP16  # integers are scaled to sixteen bits there
    x, weight, chosen, weights, *where = expert_case(seed, dtype, tokens, form, skewed, first)
    name = "moe_experts" if form == "whole" else f"moe_experts_{form}"
    definition = getattr(reference if form == "whole" else reference_quantised, name)
    exact = definition(*wide(x, weight, chosen, *weights), *where)
    actual = getattr(ops, name)(*there(x, weight, chosen.int()), *experts_there(form, weights), *where)
    close(actual, exact, roundings=12 if form == "w8a8" else 4)
    elsewhere = ((chosen < first) | (chosen >= first + 6)).all(-1)
    assert not actual.cpu()[elsewhere].any()


@pytest.mark.parametrize("form", FORMS)
def test_no_token_and_no_local_token(form: str) -> None:
    x, weight, chosen, weights, *_ = expert_case(0, BF16, 5, form, False, 0)
    op = getattr(ops, "moe_experts" if form == "whole" else f"moe_experts_{form}")
    placed = experts_there(form, weights)
    assert op(*there(x[:0], weight[:0], chosen[:0].int()), *placed, 0, 12).shape == (0, 64)
    nobody = op(*there(x, weight, torch.full_like(chosen, 11).int()), *placed, 0, 12)
    assert not nobody.cpu().any()


@examples
@given(seed=SEEDS, tokens=TOKENS, dtype=st.sampled_from([BF16, FP16]))
def test_w8a8_dense(seed: int, tokens: int, dtype: torch.dtype) -> None:
    new = make(seed, dtype)
    x, bias = new(2, tokens, 64), new(128)
    gate_up, scale = quantise.int8_weight(new(128, 64, scale=0.2))
    down, down_scale = quantise.int8_weight(new(64, 64, scale=0.2))
    placed = [*layout.matrix_int8(*there(gate_up, scale)), *layout.matrix_int8(*there(down, down_scale))]
    exact = reference_quantised.linear_w8a8(*wide(x, gate_up, scale, bias))
    close(ops.linear_w8a8(x.to(CARD), *placed[:2], bias.to(CARD)), exact)
    exact = reference_quantised.swiglu_mlp_w8a8(*wide(x[0], gate_up, scale, down, down_scale))
    actual = ops.swiglu_mlp_w8a8(x[0].to(CARD), *placed)
    close(actual, exact, roundings=12)  # a step of int8 is two of bf16


def attention_case(
    seed: int, dtype: torch.dtype, tokens: int, head_dim: int, rows: list[tuple[int, int]]
) -> dict[str, Any]:
    """A fused projection and caches filled up to each row's length; row = (first slot, tokens after this step)."""
    new, batch = make(seed, dtype), len(rows)
    start = torch.tensor([first for first, _ in rows])
    length = torch.tensor([first + max(seen, tokens) for first, seen in rows])
    slots, heads, groups = int(length.max()) + 3, 4, 2
    angle = make(seed + 1, FP32)(batch, tokens, head_dim // 4)
    return {
        "qkv": new(batch, tokens, (heads + 2 * groups) * head_dim),
        "norm": [new(head_dim), new(head_dim)],
        "angle": [angle.cos(), angle.sin()],
        "k": new(batch, groups, slots, head_dim),
        "v": new(batch, groups, slots, head_dim),
        "start": start,
        "length": length,
        "scale": head_dim**-0.5,
    }


def run_there(case: dict[str, Any], normed: bool, by_lengths: bool) -> Tensor:
    """Both attention ops on the card, weights and caches laid out as the loader lays them out."""
    B, T, _ = case["qkv"].shape
    G, S, D = case["k"].shape[1:]
    rotated = (case["qkv"].shape[-1] // D - G) * D
    qkv = case["qkv"].to(CARD)
    # The loader reorders the rows of the projection; here the projection is made already.
    turned = layout.heads(qkv[..., :rotated].flatten(0, 1).T.contiguous(), D, D // 2).T.unflatten(0, (B, T))
    qkv = torch.cat([turned, qkv[..., rotated:]], -1)
    norms = [layout.heads(one.to(CARD), D, D // 2) if normed else None for one in case["norm"]]
    k, v = (layout.cache((B, G, S, D), qkv.dtype, qkv.device) for _ in range(2))
    k_turned = layout.heads(case["k"].to(CARD).movedim(-1, 0).contiguous(), D, D // 2).movedim(0, -1)
    k.copy_(k_turned), v.copy_(case["v"].to(CARD))
    start, length = there(case["start"], case["length"])
    masked = None if by_lengths else (start, length)
    shared = layout.step(*there(*case["angle"]), length, S, masked, D, qkv.dtype)
    q = ops.rope_to_cache(qkv, *norms, shared.cos, shared.sin, k, v, length, 1e-6, shared.slots)
    lengths = case["length"].tolist() if by_lengths else None
    return ops.attention(q, k, v, start, length, case["scale"], shared.mask, lengths)


def run_here(case: dict[str, Any], normed: bool) -> Tensor:
    qkv, k, v, cos, sin = wide(case["qkv"], case["k"].clone(), case["v"].clone(), *case["angle"])
    norms = wide(*case["norm"]) if normed else [None, None]
    q = reference.rope_to_cache(qkv, *norms, cos, sin, k, v, case["length"], 1e-6)
    return reference.attention(q, k, v, case["start"], case["length"], case["scale"])


@examples
@given(
    seed=SEEDS,
    dtype=DTYPES,
    tokens=st.sampled_from([1, 2, 7]),
    head_dim=st.sampled_from([32, 64, 128]),
    rows=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    normed=st.booleans(),
)
def test_attention_by_lengths(
    seed: int, dtype: torch.dtype, tokens: int, head_dim: int, rows: list[int], normed: bool
) -> None:
    case = attention_case(seed, dtype, tokens, head_dim, [(0, seen) for seen in rows])
    close(run_there(case, normed, by_lengths=True), run_here(case, normed), roundings=6)


@examples
@given(
    seed=SEEDS,
    dtype=DTYPES,
    tokens=st.sampled_from([1, 2, 7]),
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20)), min_size=1, max_size=3),
)
def test_attention_by_a_mask(seed: int, dtype: torch.dtype, tokens: int, rows: list[tuple[int, int]]) -> None:
    case = attention_case(seed, dtype, tokens, 64, rows)
    close(run_there(case, normed=True, by_lengths=False), run_here(case, normed=True), roundings=6)


def test_slots_that_are_not_given_are_worked_out() -> None:
    case = attention_case(0, BF16, 3, 64, [(0, 9), (2, 5)])
    G, S, D = case["k"].shape[1:]
    qkv, length = case["qkv"].to(CARD), case["length"].to(CARD)
    shared = layout.step(*there(*case["angle"]), length, S, None, D, BF16)
    assert shared.slots is not None
    written = []
    for slots in (shared.slots, None):
        k, v = (layout.cache((2, G, S, D), BF16, qkv.device) for _ in range(2))
        ops.rope_to_cache(qkv, None, None, shared.cos, shared.sin, k, v, length, 1e-6, slots)
        written.append((k.cpu(), v.cpu()))
    assert written[0][0].any()
    assert all(torch.equal(given, found) for given, found in zip(*written, strict=True))


def test_padding_gives_zero_and_unwritten_slots_do_not_leak() -> None:
    case = attention_case(0, BF16, 4, 64, [(0, 9), (6, 2)])
    case["length"][1] = 8  # two of the four queries lie before the row's first token
    actual, exact = run_there(case, normed=True, by_lengths=False), run_here(case, normed=True)
    assert not exact[1, :2].any()
    close(actual, exact, roundings=6)


def test_no_op_waits_for_the_device() -> None:
    case = attention_case(0, BF16, 1, 64, [(0, 9), (2, 5)])
    placed = {
        form: (*there(*expert_case(0, BF16, 7, form, False, 3)[:2]), expert_case(0, BF16, 7, form, False, 3))
        for form in FORMS
    }
    weights = {form: experts_there(form, placed[form][2][3]) for form in FORMS}
    chosen = placed["whole"][2][2].int().to(CARD)
    router = make(1, FP32)(8, 64).to(CARD)
    with log.recording() as prepared:
        run_there(case, normed=True, by_lengths=False)
    assert all("between host and device" in one for one in prepared.syncs)  # the case itself is carried over
    with log.recording() as seen:
        for form in FORMS:
            name = "moe_experts" if form == "whole" else f"moe_experts_{form}"
            getattr(ops, name)(placed[form][0], placed[form][1], chosen, *weights[form], 3, 12)
        ops.moe_gate(placed["whole"][0], router, None, 2, 4, 2, True, 2.5)
        ops.moe_gate(placed["whole"][0], router, None, 2, 4, 2, False, 2.5)
    assert seen.syncs == []
