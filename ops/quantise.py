"""Rounding weights and activations to few bits: pure functions, the one definition for every device and file format.

Shapes: O rows (outputs), I columns (inputs), T tokens, S scales per row (of int4: I / group; of FP8: ⌈I / 128⌉), P rows
of scales of an FP8 weight.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_BLOCK = 128
INT8_MAX = 127
INT4_MAX = 7
INT4_RANGE = 7.5  # half of -8 … 7, as compressed-tensors divides: 5 % less error (RMS) than 7, the largest is clamped
INT4_GROUP = 128
TINY = torch.finfo(torch.float32).tiny
_PER_WORD = 8  # 4-bit values in one int32


def _fp32_copy(weight: Tensor) -> Tensor:
    """What is worked on in place: about twice as fast as new tensors, while a part of a weight fits the cache."""
    return weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _divisor(scale: Tensor) -> Tensor:
    """The scale in fp32; where it is 0, because all weights are or are too small for its dtype, they become 0."""
    return scale.float().clamp(min=TINY).masked_fill(scale == 0, math.inf)


def int8_weight(weight_OI: Tensor, scale_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per output row: ``(weight int8 [..., O, I], scale [..., O])``, the scale in the weight's dtype.

    The scale is rounded to that dtype (or to ``scale_dtype``) first, and the weights to multiples of the rounded scale.
    """
    steps = _fp32_copy(weight_OI)
    scale_O = (steps.abs().amax(-1) / INT8_MAX).to(scale_dtype or weight_OI.dtype)
    steps.div_(_divisor(scale_O).unsqueeze(-1))  # a scale rounded down must not push weights beyond the range
    return steps.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale_O


def int8_tokens(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per token: ``(x int8 [T, I], scale fp32 [T])``; a token of zeros has the scale 0."""
    x_fp32 = x_TI.float()
    scale_T = x_fp32.abs().amax(-1) / INT8_MAX
    steps = x_fp32 / scale_T.clamp(min=TINY).unsqueeze(-1)
    return steps.round().to(torch.int8), scale_T


def int4_weight(
    weight_OI: Tensor, group: int = INT4_GROUP, scale_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric int4 per output row and ``group`` inputs: ``(packed int32 [..., O, I/8], scale [..., O, S])``.

    Eight values to a word, the first input in the lowest bits, each stored as value + 8: the layout that
    compressed-tensors calls pack-quantized. The scale has the weight's dtype, or ``scale_dtype``. Raises `ValueError`
    if ``group`` does not divide the inputs.
    """
    if weight_OI.shape[-1] % group or group % _PER_WORD:
        raise ValueError(f"{weight_OI.shape[-1]} inputs do not divide into groups of {group}, or these into words of 8")
    steps = _fp32_copy(weight_OI).unflatten(-1, (-1, group))
    scale_OS = (steps.abs().amax(-1) / INT4_RANGE).to(scale_dtype or weight_OI.dtype)
    steps.div_(_divisor(scale_OS).unsqueeze(-1))
    value = steps.round_().clamp_(-INT4_MAX - 1, INT4_MAX).add_(8).to(torch.int8).flatten(-2)
    # Eight bytes are an int64, the first the lowest: halve the distance between their nibbles three times.
    word = value.view(torch.int64)
    word = (word | word >> 4) & 0x00FF00FF00FF00FF
    word = (word | word >> 8) & 0x0000FFFF0000FFFF
    return (word | word >> 16).to(torch.int32), scale_OS


def int4_values(packed: Tensor) -> Tensor:
    """The values of `int4_weight`'s words: int32 ``[..., O, I]`` in -8 … 7."""
    return int4_bytes(packed).int()


def int4_bytes(packed: Tensor) -> Tensor:
    """`int4_values` in int8: the words' nibbles moved apart until each has a byte."""
    word = packed.to(torch.int64) & 0xFFFFFFFF
    word = (word | word << 16) & 0x0000FFFF0000FFFF
    word = (word | word << 8) & 0x00FF00FF00FF00FF
    word = (word | word << 4) & 0x0F0F0F0F0F0F0F0F
    return word.view(torch.int8) - 8


def dequantised_int4(packed: Tensor, scale_OS: Tensor) -> Tensor:
    """The weight that `int4_weight` stands for, in the dtype of its scales."""
    value = int4_values(packed)
    grouped = value.unflatten(-1, (scale_OS.shape[-1], -1)).to(scale_OS.dtype)
    return (grouped * scale_OS.unsqueeze(-1)).flatten(-2)


def fp8_values(x: Tensor) -> Tensor:
    """``x`` in e4m3, to the nearest (a tie to the even one); what is beyond ±448 becomes ±448, NaN stays NaN.

    The clamp is needed: whether torch's own cast saturates or makes NaN of it depends on its version and device.
    """
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def fp8_weight(weight_OI: Tensor, matrices: int = 1) -> tuple[Tensor, Tensor]:
    """FP8 in blocks of 128 × 128: ``(weight e4m3 [..., O, I], scale fp32 [..., P, S])``, ``weight ≈ value · scale``.

    The scale is the block's largest magnitude / 448, the `weight_scale_inv` of DeepSeek's and this family's
    checkpoints; the last blocks may be partial. ``matrices`` is how many of equal height stand in the rows (2 in a
    fused gate_up): each has blocks of its own, and P is ``matrices · ⌈O / matrices / 128⌉``.
    """
    rows, columns = weight_OI.shape[-2] // matrices, weight_OI.shape[-1]
    steps = _fp32_copy(weight_OI)
    blocks = steps.unflatten(-2, (matrices, -1))
    if rows % FP8_BLOCK or columns % FP8_BLOCK:
        blocks = F.pad(blocks, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = blocks.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))  # [..., matrices, P, 128, S, 128]
    scale = blocks.abs().amax(-3).amax(-1) / FP8_MAX
    blocks = blocks.div_(scale.clamp(min=TINY)[..., :, None, :, None])
    values = blocks.flatten(-2).flatten(-3, -2)[..., :rows, :columns].flatten(-3, -2)
    return fp8_values(values), scale.flatten(-3, -2)


def fp8_scales(scale_PS: Tensor, shape: tuple[int, ...], matrices: int = 1) -> Tensor:
    """The scale of each element of a weight of this shape ``[..., O, I]``, from those of its blocks."""
    rows, columns = shape[-2:]
    by_row = scale_PS.unflatten(-2, (matrices, -1)).repeat_interleave(FP8_BLOCK, -2)[..., : rows // matrices, :]
    return by_row.flatten(-3, -2).repeat_interleave(FP8_BLOCK, -1)[..., :columns]


def dequantised_fp8(weight_OI: Tensor, scale_PS: Tensor, matrices: int = 1) -> Tensor:
    """The weight that `fp8_weight` stands for, in fp32."""
    return weight_OI.float() * fp8_scales(scale_PS, weight_OI.shape, matrices)


def fp8_as_half(x: Tensor) -> Tensor:
    """Finite e4m3 values / 256 as float16, exactly: the bits moved into place, 5 times as fast as torch's cast here."""
    bits = x.view(torch.int8).to(torch.int16)  # the sign goes all the way up: bits 7 to 15
    return (bits << 7).bitwise_and_(-0x4001).view(torch.float16)


def fp8_tokens(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 per token and 128 inputs: ``(x e4m3 [T, I], scale fp32 [T, S])``, the scale the largest magnitude / 448.

    The last inputs of a token may be fewer. Where all are 0 the scale is 0.
    """
    x_fp32 = x_TI.float()
    padded = F.pad(x_fp32, (0, -x_fp32.shape[-1] % FP8_BLOCK))
    scale_TS = padded.unflatten(-1, (-1, FP8_BLOCK)).abs().amax(-1) / FP8_MAX
    spread = scale_TS.clamp(min=TINY).repeat_interleave(FP8_BLOCK, -1)
    return fp8_values(x_fp32 / spread[..., : x_fp32.shape[-1]]), scale_TS
