"""Arguments for every op, and how near a kernel must come to `ops.reference`.

Tolerance: |kernel − exact| ≤ unit · roundings · magnitude, element by element. ``exact`` is the reference in fp32 on
the same inputs, ``magnitude`` what the sum would be if nothing in it cancelled, ``unit`` 2⁻⁸ in bf16 (half a unit in
the last place) and 10⁻⁵ in fp32. The kernels round the result once, and the inner activations, where there are any,
once before; the reference in bf16 rounds at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ops
from ops import cpu, fused, quantise, reference

BF16, FP32 = torch.bfloat16, torch.float32
UNIT = {BF16: 2.0**-8, FP32: 1e-5}


def make(seed: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return a maker of normal random tensors: `new(*shape, scale)`."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, scale=1.0: (torch.randn(shape, generator=generator) * scale).to(dtype)


def check(actual: Tensor, exact: Tensor, magnitude: Tensor, roundings: int = 1) -> None:
    """Each element within the tolerance of the file's head; NaN and infinity are never within it."""
    assert actual.shape == exact.shape
    bound = (UNIT[actual.dtype] * roundings * 1.005 + 1e-6) * magnitude.abs().float() + 1e-30
    excess = ((actual.float() - exact.float()).abs() - bound).max()
    assert excess <= 0, f"off by {excess} beyond the bound"


def kernels_used(dtype: torch.dtype) -> bool:
    return cpu._table[dtype] is not None


def cache_case(
    seed: int, dtype: torch.dtype, tokens: int, groups: int, per_group: int, dim: int, rows: list[tuple[int, int]]
) -> tuple[Any, ...]:
    """Arguments of `attention`; ``rows`` has (start, slots seen by the last token); all other slots are NaN."""
    new, batch = make(seed, dtype), len(rows)
    start = torch.tensor([first for first, _ in rows])
    length = torch.tensor([first + seen for first, seen in rows])
    slots = int(length.max()) + 3
    k, v = new(batch, groups, slots, dim), new(batch, groups, slots, dim)
    slot = torch.arange(slots)
    k[:, :, :] = k.masked_fill((slot >= length[:, None])[:, None, :, None], float("nan"))
    v[:, :, :] = v.masked_fill((slot >= length[:, None])[:, None, :, None], float("nan"))
    return new(batch, tokens, groups * per_group, dim), k, v, start, length, dim**-0.5


def check_attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float) -> None:
    exact = reference.attention(q.float(), k.float(), v.float(), start, length, scale)
    magnitude = reference.attention(q.float(), k.float(), v.float().abs(), start, length, scale)
    check(ops.attention(q, k, v, start, length, scale), exact, magnitude)


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def op_cases(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Small arguments for each op."""
    new = make(7, dtype)
    q, k, v, start, length, scale = cache_case(7, dtype, 2, 2, 3, 16, [(0, 9), (2, 5)])
    router, angle = make(8, FP32)(8, 32), make(9, FP32)(2, 2, 4)
    weight, chosen = reference.moe_gate(new(5, 32), router, None, 3, 4, 2, True, 2.5)
    gate_up, down = new(8, 2 * 8, 32, scale=0.2), new(8, 32, 8)
    int8, int4, fp8 = quantise.int8_weight, partial(quantise.int4_weight, group=8), quantise.fp8_weight
    fp8_pair = partial(quantise.fp8_weight, matrices=2)
    routed, shared = (new(5, 32), weight, chosen), (gate_up[0], down[0])
    routing = (router, router[:, 0].contiguous(), 3, 4, 2, True, 2.5)
    qkv = (new(2, 2, 10 * 16), new(16), new(16), angle.cos(), angle.sin(), k, v)
    return {
        "linear_fp8": (new(5, 160), *fp8(new(150, 160)), new(150)),
        "swiglu_mlp_fp8": (new(5, 32), *fp8_pair(gate_up[0]), *fp8(down[0])),
        "moe_experts_fp8": (*routed, *fp8_pair(gate_up), *fp8(down)),
        "add_rms_norm_gate": (new(5, 32), new(5, 32), new(32), 1e-6, *routing),
        "cached_attention": (*qkv, start, length, 1e-6, scale),
        "moe": (*routed, gate_up, down, *shared),
        "moe_w8a8": (*routed, *int8(gate_up), *int8(down), *int8(shared[0]), *int8(shared[1])),
        "moe_w4a16": (*routed, *int4(gate_up), *int4(down), *shared),
        "moe_fp8": (*routed, *fp8_pair(gate_up), *fp8(down), *fp8_pair(shared[0]), *fp8(shared[1])),
        "linear_w8a8": (new(5, 32), *int8(new(7, 32)), new(7)),
        "swiglu_mlp_w8a8": (new(5, 32), *int8(gate_up[0]), *int8(down[0])),
        "moe_experts_w8a8": (new(5, 32), weight, chosen, *int8(gate_up), *int8(down)),
        "moe_experts_w4a16": (new(5, 32), weight, chosen, *int4(gate_up), *int4(down)),
        "rms_norm": (new(5, 32), new(32), 1e-6),
        "add_rms_norm": (new(5, 32), new(5, 32), new(32), 1e-6),
        "linear": (new(5, 32), new(7, 32), new(7)),
        "swiglu_mlp": (new(5, 32), new(2 * 6, 32, scale=0.2), new(32, 6)),
        "moe_gate": (new(5, 32), *routing),
        "expert_rows": (new(5, 32), torch.tensor([2, 0, 3, 0, 0, 0, 0, 0]), gate_up, down),
        "moe_experts": (new(5, 32), weight, chosen, new(8, 2 * 6, 32, scale=0.2), new(8, 32, 6)),
        "rope_to_cache": (*qkv, length, 1e-6),
        "attention": (q, k, v, start, length, scale),
    }


def run(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """What an op returns, and for the one that writes, what it wrote; the arguments are left alone."""
    writes = name in ("rope_to_cache", "cached_attention")
    if writes:
        args = (*args[:5], args[5].clone(), args[6].clone(), *args[7:])
    results = flat(function(*args))
    return [*results, args[5], args[6]] if writes else results


def same(name: str, args: tuple[Any, ...], dtype: torch.dtype) -> None:
    """The op gives what the reference gives in fp32 for the same arguments, as whole tensors, to two roundings."""
    wide = tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    definition = getattr(reference, name, None) or getattr(fused, name)
    for actual, exact in zip(run(name, getattr(ops, name), args), run(name, definition, wide), strict=True):
        assert actual.shape == exact.shape
        assert torch.equal(actual.isnan(), exact.isnan())
        distance = (actual.float() - exact).nan_to_num().norm()
        assert (
            distance <= {BF16: 2.0**-7, FP32: 1e-5, torch.float16: 2.0**-9}[dtype] * exact.nan_to_num().float().norm()
        )
