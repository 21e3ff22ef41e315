"""Rotary position embedding in the half style: dimension i turns with dimension i + R/2 of the first R.

bf16 is computed in fp32 with one rounding, fp16 in fp16 with a rounding per product and sum (CANN's kernels).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend.emulator.limits import (
    FLOATS,
    require,
    require_absent,
    require_dim,
    require_dtype,
    require_nd,
    require_shape,
    require_value,
)

UNIFIED_BUFFER = 192 * 1024
"""Bytes of on-chip memory per vector core. Source: CANN runtime's platform files."""


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """``input · r1 + rotate_half(input) · r2`` with cosines r1 and sines r2 of input's whole width, in its dtype.

    r1 and r2 are broadcast over batch, heads, or both; another dtype is cast to the input's (op-plugin). Covered is
    the half style. Limits: the op's page (width even and below 896, batch and heads below 1000).
    """
    op = "npu_rotary_mul"
    require_value(op, "rotary_mode", rotary_mode, ("half",))
    require_absent(op, rotate=rotate)
    for name, tensor in (("input", input), ("r1", r1), ("r2", r2)):
        require_dtype(op, name, tensor, *FLOATS)
        require_dim(op, name, tensor, 3, 4)
        require_nd(op, **{name: tensor})
    D = input.shape[-1]
    require(0 < D < 896 and D % 2 == 0, op, f"the last dimension is {D}; it must be even and below 896")
    require_shape(op, "r2", r2, r1.shape)
    require(r1.dim() == input.dim() and r1.shape[-1] == D, op, f"r1 {list(r1.shape)} is not of input's width, {D}")
    whole = [a == b for a, b in zip(r1.shape, input.shape, strict=True)]
    fits = all(same or n == 1 for same, n in zip(whole, r1.shape, strict=True))
    require(fits and any(whole[:-1]), op, f"r1 {list(r1.shape)} does not broadcast to {list(input.shape)}")
    over = [n for n, same in zip(input.shape, whole, strict=True) if not same and n >= 1000]
    require(not over, op, f"batch or heads are {over}; both must be below 1000")
    return _turned(input, r1.to(input.dtype), r2.to(input.dtype))


def npu_apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """Turn the first ``cos.shape[-1]`` dimensions of ``query`` and ``key`` IN PLACE, and return the two.

    Layouts BSND and TND; cos and sin have one head, and all four one dtype. Widths, from the host code: head_dim 64
    or 128, cos 64 or 128 and not wider (narrower needs CANN 9.0). op-plugin takes an unknown layout for BSND.
    """
    op = "npu_apply_rotary_pos_emb"
    require_value(op, "layout", layout, ("BSND", "TND"))
    require_value(op, "rotary_mode", rotary_mode, ("half",))
    for name, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        require_dtype(op, name, tensor, *FLOATS)
        require(tensor.dtype == query.dtype, op, f"{name} is {tensor.dtype}, query {query.dtype}; one dtype is needed")
        require_dim(op, name, tensor, 3 if layout == "TND" else 4)
        require(tensor.numel() > 0, op, f"{name} is empty; the device takes no empty tensor")
    require_nd(op, query=query, key=key, cos=cos, sin=sin)
    D, width = query.shape[-1], cos.shape[-1]
    require(D in (64, 128) and key.shape[-1] == D, op, f"head_dim is {D} and {key.shape[-1]}; 64 or 128 is needed")
    require(width in (64, 128) and width <= D, op, f"cos is {width} wide for head_dim {D}; 64 or 128 is needed")
    require_shape(op, "key", key, [*query.shape[:-2], key.shape[-2], D])
    require_shape(op, "cos", cos, [*query.shape[:-2], 1, width])
    require_shape(op, "sin", sin, cos.shape)
    elements = (query.shape[-2] + key.shape[-2]) * width
    itemsize, cast = query.element_size(), query.dtype == torch.bfloat16
    needed = 5 * elements * (4 if cast else itemsize) + 4 * width * itemsize + (8 * width if cast else 0)
    require(needed <= UNIFIED_BUFFER, op, f"too many heads: {needed} bytes on chip for one token of {UNIFIED_BUFFER}")
    for tensor in (query, key):
        tensor[..., :width] = _turned(tensor[..., :width], cos, sin)
    return query, key


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = x.dtype
    if dtype == torch.bfloat16:
        x, cos, sin = x.float(), cos.float(), sin.float()
    left, right = x.chunk(2, -1)
    return (x * cos + torch.cat((-right, left), -1) * sin).to(dtype)
