"""SwiGLU over a fused ``[a | b]`` tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend.emulator.limits import FLOATS, require, require_contiguous, require_dtype, require_nd


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """``a · sigmoid(a) · b`` in fp32 with one rounding; a is the LEFT half of ``dim``. Contiguous, not empty."""
    op = "npu_swiglu"
    require_dtype(op, "input", input, *FLOATS)
    require(1 <= input.dim() <= 8 and input.numel() > 0, op, "input is empty or has no or over 8 dimensions")
    require(-input.dim() <= dim < input.dim(), op, f"dim {dim} is out of range for {input.dim()} dimensions")
    require(input.shape[dim] % 2 == 0, op, f"dimension {dim} is {input.shape[dim]}; it must be even")
    require_contiguous(op, input=input)
    require_nd(op, input=input)
    return silu_times(input, dim).to(input.dtype)


def silu_times(x: Tensor, dim: int = -1) -> Tensor:
    """``a / (1 + exp(-a)) · b`` of the two halves, in fp32 and unrounded."""
    a, b = x.float().chunk(2, dim)
    return a / (1.0 + torch.exp(-a)) * b
