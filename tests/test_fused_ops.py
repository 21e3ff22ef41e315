"""Fused ops are their parts, to the bit."""

from __future__ import annotations

import pytest
import torch

import ops
from tests.op_cases import (
    BF16,
    FP32,
    op_cases,
)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_fused_ops_are_their_parts_to_the_bit(dtype: torch.dtype) -> None:
    cases = op_cases(dtype)
    x, residual, norm, eps, *routing = cases["add_rms_norm_gate"]
    normed, total = ops.add_rms_norm(x, residual, norm, eps)
    parts = [*ops.moe_gate(normed, *routing), normed, total]
    for fused, part in zip(ops.add_rms_norm_gate(x, residual, norm, eps, *routing), parts, strict=True):
        assert torch.equal(fused, part)

    *new, k, v, start, length, eps, scale = cases["cached_attention"]
    caches, apart = (k.clone(), v.clone()), (k.clone(), v.clone())
    q = ops.rope_to_cache(*new, *apart, length, eps)
    expected = ops.attention(q, *apart, start, length, scale)
    assert torch.equal(ops.cached_attention(*new, *caches, start, length, eps, scale), expected)
    for one, other in zip(caches, apart, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
        assert not torch.equal(one.nan_to_num(), k.nan_to_num())

    for form, routed, shared in (("", 2, ""), ("_w8a8", 4, "_w8a8"), ("_w4a16", 4, ""), ("_fp8", 4, "_fp8")):
        args = cases[f"moe{form}"]
        own, everyones = args[: 3 + routed], args[3 + routed :]
        for first, count in ((0, 0), (3, 12)):
            part = getattr(ops, f"moe_experts{form}")(*own, first, count)
            part += getattr(ops, f"swiglu_mlp{shared}")(own[0], *everyones)
            assert torch.equal(getattr(ops, f"moe{form}")(*args, first, count), part)
