"""Signed 4-bit integers, eight to an int32: the first in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend.emulator.limits import require, require_contiguous, require_dim, require_dtype, require_value

_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    """int32 ``[…, N]`` with values in -8..7 to int32 ``[…, N/8]``; 2-D or 3-D (op-plugin's source), contiguous."""
    op = "npu_convert_weight_to_int4pack"
    require_value(op, "inner_k_tiles", inner_k_tiles, (0,))
    require_dtype(op, "weight", weight, torch.int32)
    require_dim(op, "weight", weight, 2, 3)
    require_contiguous(op, weight=weight)
    require(weight.numel() > 0, op, "weight is empty")
    require(weight.shape[-1] % 8 == 0, op, f"the last dimension is {weight.shape[-1]}; it must be a multiple of 8")
    require(int(weight.min()) >= -8 and int(weight.max()) <= 7, op, "a value is outside -8..7; the device cuts it off")
    return pack_int4(weight)


def pack_int4(x: Tensor) -> Tensor:
    """``[…, N]`` of any integer type to int32 ``[…, N/8]``."""
    nibbles = (x.to(torch.int32) & 0xF).unflatten(-1, (-1, 8))
    return (nibbles << _SHIFTS).sum(-1, dtype=torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """int32 ``[…, N/8]`` to int8 ``[…, N]``, sign-extended."""
    nibbles = (packed.unsqueeze(-1) >> _SHIFTS) & 0xF
    return (nibbles - ((nibbles & 8) << 1)).to(torch.int8).flatten(-2)
