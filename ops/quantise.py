"""Rounding weights and activations to integers: pure functions, the one definition for every device and file format.

Shapes: O rows (outputs), I columns (inputs), T tokens, S = I / group scales per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX = 127
INT4_MAX = 7
INT4_GROUP = 128
_PER_WORD = 8  # 4-bit values in one int32


def int8_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per output row: ``(weight int8 [..., O, I], scale [..., O])``, the scale in the weight's dtype.

    The scale is rounded to that dtype first, and the weights to multiples of the rounded scale.
    """
    scale_O = (weight_OI.abs().amax(-1).float() / INT8_MAX).to(weight_OI.dtype)
    # A row of zeros has no scale; and a scale rounded down must not push the largest weight beyond the range.
    steps = weight_OI.float() / scale_O.float().clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return steps.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale_O


def int8_tokens(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per token: ``(x int8 [T, I], scale fp32 [T])``; a token of zeros has the scale 0."""
    x_fp32 = x_TI.float()
    scale_T = x_fp32.abs().amax(-1) / INT8_MAX
    steps = x_fp32 / scale_T.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return steps.round().to(torch.int8), scale_T


def int4_weight(weight_OI: Tensor, group: int = INT4_GROUP) -> tuple[Tensor, Tensor]:
    """Symmetric int4 per output row and ``group`` inputs: ``(packed int32 [..., O, I/8], scale [..., O, S])``.

    Eight values to a word, the first input in the lowest bits, each stored as value + 8: the layout that
    compressed-tensors calls pack-quantized. The scale has the weight's dtype. Raises `ValueError` if ``group`` does
    not divide the inputs.
    """
    if weight_OI.shape[-1] % group or group % _PER_WORD:
        raise ValueError(f"{weight_OI.shape[-1]} inputs do not divide into groups of {group}, or these into words of 8")
    grouped = weight_OI.unflatten(-1, (-1, group))
    scale_OS = (grouped.abs().amax(-1).float() / INT4_MAX).to(weight_OI.dtype)
    steps = grouped.float() / scale_OS.float().clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    value = steps.round().clamp(-INT4_MAX - 1, INT4_MAX).to(torch.int32).flatten(-2) + 8
    shift = torch.arange(0, 32, 4, dtype=torch.int32, device=value.device)
    return (value.unflatten(-1, (-1, _PER_WORD)) << shift).sum(-1, dtype=torch.int32), scale_OS


def int4_values(packed: Tensor) -> Tensor:
    """The values of `int4_weight`'s words: int32 ``[..., O, I]`` in -8 … 7."""
    shift = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1) >> shift & 15) - 8).flatten(-2)


def dequantised_int4(packed: Tensor, scale_OS: Tensor) -> Tensor:
    """The weight that `int4_weight` stands for, in the dtype of its scales."""
    value = int4_values(packed)
    grouped = value.unflatten(-1, (scale_OS.shape[-1], -1)).to(scale_OS.dtype)
    return (grouped * scale_OS.unsqueeze(-1)).flatten(-2)
