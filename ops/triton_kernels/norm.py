"""`rms_norm` and `add_rms_norm` in Triton: one program per row, each rounding where `ops.reference` rounds.

Shapes: rows of H values; a row's place in memory is given by two strides, so that a view of the heads of a fused
projection needs no copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES_PER_THREAD = 16  # two or more 16-byte loads in flight, few enough registers
WARPS = (1, 16)  # fewest and most per program


@triton.jit
def inverse_rms(x, width, eps):
    """``1 / sqrt(mean(x²) + eps)`` over the last axis, kept as an axis of one; what pads ``x`` must be 0."""
    x_fp32 = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x_fp32 * x_fp32, axis=-1, keep_dims=True) / width + eps)


@triton.jit
def scaled(x, inverse, weight):
    """``weight · (x · inverse)``, rounded to the dtype of ``x`` before the weight and after it."""
    normed = (x.to(tl.float32) * inverse).to(x.dtype)
    return (weight.to(tl.float32) * normed.to(tl.float32)).to(x.dtype)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    outer_stride,
    inner_stride,
    inner,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    width,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < width
    x = tl.load(x_ptr + row // inner * outer_stride + row % inner * inner_stride + column, mask=there, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * width + column, mask=there, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * width + column, x, mask=there)
    weight = tl.load(weight_ptr + column, mask=there, other=0.0)
    tl.store(out_ptr + row * width + column, scaled(x, inverse_rms(x, width, eps), weight), mask=there)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, None, weight, out, None, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`."""
    out, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _launch(x, residual.contiguous(), weight, out, total, eps)
    return out, total


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None, eps: float) -> None:
    if not x.numel():
        return
    width = x.shape[-1]
    x, outer_stride, inner_stride, inner = _rows(x)
    block = triton.next_power_of_2(width)
    warps = min(max(block // (32 * VALUES_PER_THREAD), WARPS[0]), WARPS[1])
    _rms_norm_kernel[(out.numel() // width,)](
        x,
        outer_stride,
        inner_stride,
        inner,
        residual,
        weight.contiguous(),
        out,
        total,
        width,
        eps,
        BLOCK=block,
        num_warps=warps,
    )


def _rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """``(x, outer stride, inner stride, rows per outer step)``; a copy where two strides cannot say where rows are."""
    levels: list[tuple[int, int]] = []  # size and stride of the leading dimensions, those merged that follow on
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2 or x.stride(-1) != 1:
        return x.contiguous(), 0, x.shape[-1], x.numel()
    outer, inner = [(1, 0), (1, 0), *levels][-2:]
    return x, outer[1], inner[1], inner[0]
