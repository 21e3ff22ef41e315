"""Arguments of the ops at the size of AntAngelMed, without memory: tensors on the meta device.

Shapes: T tokens, B rows, S slots of the cache; the rest as in `ops.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import ops.cuda
from tests.triton.compiled import Launch, recording

H, I, E, K = 4096, 1024, 256, 8  # noqa: E741
N, G, D, R = 32, 4, 128, 32  # R rotated pairs
DENSE, S = 9216, 4096
TOKENS = (1, 8, 32, 128, 1024)
BF16, FP32, INT8, INT32, INT64 = torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.int64
E4M3 = torch.float8_e4m3fn


def _new(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight(form: str, *shape: int, matrices: int = 1) -> tuple[Tensor, ...]:
    """A weight ``[..., O, I]`` and its scales; ``matrices``: how many are fused in O."""
    *experts, rows, inputs = shape
    if form == "fp8":
        blocks = (matrices * -(-rows // matrices // 128), -(-inputs // 128))
        return _new(*shape, dtype=E4M3), _new(*experts, *blocks, dtype=FP32)
    if form == "w8a8":
        return _new(*shape, dtype=INT8), _new(*experts, rows, dtype=FP32)
    if form == "w4a16":
        return _new(*experts, rows, inputs // 8, dtype=INT32), _new(*experts, rows, inputs // 128)
    return (_new(*shape),)


def _mlp(form: str, width: int, *experts: int) -> tuple[Tensor, ...]:
    return *_weight(form, *experts, 2 * width, H, matrices=2), *_weight(form, *experts, H, width)


def cases(T: int) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Yield ``(label, op, arguments)`` of a step with T rows of one token, and of a verify step of 4.

    More than 128 tokens are the prompt of one row.
    """
    x, norm, eps = _new(T, H), _new(H), 1e-6
    routed = (x, _new(T, K, dtype=FP32), _new(T, K, dtype=INT64))
    routing = (_new(E, H, dtype=FP32), _new(E, dtype=FP32), K, 8, 4, True, 2.5)
    yield "rms_norm", "rms_norm", (x, norm, eps)
    yield "add_rms_norm", "add_rms_norm", (x, x, norm, eps)
    yield "moe_gate", "moe_gate", (x, *routing)
    yield "add_rms_norm_gate", "add_rms_norm_gate", (x, x, norm, eps, *routing)
    for form in ("fp8", "w8a8"):
        yield f"linear_{form}", f"linear_{form}", (x, *_weight(form, (N + 2 * G) * D, H), None)
    for form in ("", "fp8", "w8a8"):
        op = f"swiglu_mlp_{form}".rstrip("_")
        yield f"{op}, dense layer", op, (x, *_mlp(form, DENSE))
        yield f"{op}, shared expert", op, (x, *_mlp(form, I))
    for form in ("", "fp8", "w8a8", "w4a16"):
        op = f"moe_experts_{form}".rstrip("_")
        yield op, op, (*routed, *_mlp(form, I, E))
        op = f"moe_{form}".rstrip("_")
        yield op, op, (*routed, *_mlp(form, I, E), *_mlp("" if form == "w4a16" else form, I))
    yield "expert_rows", "expert_rows", (_new(T * K, H), _new(E, dtype=INT64), *_mlp("", I, E))
    for cached in (BF16, E4M3):
        for B, new in ((T, 1), (T, 4)) if T <= 128 else ((1, T),):
            caches = (_new(B, G, S, D, dtype=cached), _new(B, G, S, D, dtype=cached))
            turns = (_new(D), _new(D), _new(B, new, R, dtype=FP32), _new(B, new, R, dtype=FP32))
            rows = (_new(B, dtype=INT64), _new(B, dtype=INT64))
            qkv = _new(B, new, (N + 2 * G) * D)
            label = f"{'bf16' if cached == BF16 else 'fp8'} cache, {new} new"
            yield f"rope_to_cache, {label}", "rope_to_cache", (qkv, *turns, *caches, rows[1], eps)
            yield f"attention, {label}", "attention", (_new(B, new, N, D), *caches, *rows, D**-0.5)
            yield f"cached_attention, {label}", "cached_attention", (qkv, *turns, *caches, *rows, eps, D**-0.5)


def launches(op: str, arguments: tuple[Any, ...]) -> list[Launch]:
    """Return what the CUDA implementation of an op launches."""
    with recording() as caught:
        ops.cuda.KERNELS[op](*arguments)
    return caught
