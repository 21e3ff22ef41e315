"""Dynamic int8 quantisation of rows, alone and behind a SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend.emulator.kernels.activation import silu_times
from ascend.emulator.kernels.groups import COUNT, row_ranges
from ascend.emulator.kernels.int4 import pack_int4
from ascend.emulator.kernels.unwritten import unwritten
from ascend.emulator.limits import (
    FLOATS,
    Refused,
    dtype_of,
    require,
    require_absent,
    require_dim,
    require_dtype,
    require_nd,
    require_shape,
    require_value,
)

QINT8 = 12
"""`torch.qint8` as the number that the dispatcher passes."""


def quantised(x: Tensor, largest: int = 127) -> tuple[Tensor, Tensor]:
    """Symmetric integers of each row, in fp32: ``(rint(x · largest/amax) int8, amax/largest)``.

    What the device casts 0·∞ of an all-zero row to is not documented; it is 0 here, and so is the scale.
    """
    amax = x.float().abs().amax(dim=-1, keepdim=True)
    q = torch.round(x.float() * (largest / amax)).masked_fill(amax == 0, 0.0)
    return q.clamp(-largest - 1, largest).to(torch.int8), (amax / largest).squeeze(-1)


def npu_quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True
) -> Tensor:
    """``rint(input · scales + zero_points)`` as int8, saturated; covered is ``div_mode`` False over the last axis.

    ``scales`` is ``[H]`` or one number, ``zero_points`` of its shape. Source: aclnnAscendQuantV3's page; that a value
    beyond int8 saturates is guessed.
    """
    op = "npu_quantize"
    require_value(op, "dtype", dtype, (QINT8, torch.qint8))
    require_value(op, "div_mode", div_mode, (False,))
    require_value(op, "axis", axis, (-1, input.dim() - 1))
    require_dtype(op, "input", input, *FLOATS)
    require(list(scales.shape) in ([1], [input.shape[-1]]), op, f"scales has shape {list(scales.shape)}")
    y = input.float() * scales.float()
    if zero_points is not None:
        require_shape(op, "zero_points", zero_points, scales.shape)
        y = y + zero_points.float()
    return y.round().clamp(-128, 127).to(torch.int8)


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Each row of ``input`` to int8 (or quint4x2, eight to an int32) and its fp32 scale.

    Smooth scales ``[H]``, or ``[groups, H]`` with a CUMULATIVE int32 ``group_index`` that ends at the last row, in
    the dtype of the input: fp16 or bf16. Source: the op's page.
    """
    op = "npu_dynamic_quant"
    require_value(op, "quant_mode", quant_mode, ("pertoken",))
    require_value(op, "dst_type_max", dst_type_max, (0.0,))
    require_dtype(op, "input", input, torch.float16, torch.bfloat16)
    require_nd(op, input=input)
    require(input.dim() >= 2 and input.numel() > 0, op, f"input has shape {list(input.shape)}; 2-D or more is needed")
    dtype = torch.int8 if dst_type is None else dtype_of(op, "dst_type", dst_type)
    require_value(op, "dst_type", dtype, (torch.int8, torch.quint4x2))
    x, H = input.float(), input.shape[-1]
    if smooth_scales is not None:
        require_dtype(op, "smooth_scales", smooth_scales, input.dtype)
        x = x * _smooth_rows(op, smooth_scales, group_index, x.numel() // H, H).view(*x.shape[:-1], -1)
    else:
        require_absent(op, group_index=group_index)
    if dtype == torch.int8:
        return quantised(x)
    require(H % 8 == 0, op, f"the last dimension is {H}; for int4 it must be a multiple of 8")
    q, scale = quantised(x, largest=7)
    return pack_int4(q), scale


def _smooth_rows(op: str, smooth_scales: Tensor, group_index: Tensor | None, rows: int, H: int) -> Tensor:
    if group_index is None:
        require_shape(op, "smooth_scales", smooth_scales, [H])
        return smooth_scales.float().expand(rows, H)
    require_dtype(op, "group_index", group_index, torch.int32)
    require_dim(op, "group_index", group_index, 1)
    require_shape(op, "smooth_scales", smooth_scales, [group_index.numel(), H])
    count = torch.diff(group_index.long(), prepend=torch.zeros(1, dtype=torch.long))
    cumulative = bool((count >= 0).all()) and int(group_index[-1]) == rows
    require(cumulative, op, f"group_index {group_index.tolist()} is not cumulative up to {rows} rows")
    return smooth_scales.float().repeat_interleave(count, dim=0)


def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``x[T, 2H]`` (int32 sums, fp16 or bf16) dequantised, through SwiGLU, to int8 ``[T, H]`` and scales ``[T]``.

    By default the RIGHT half is the one activated. ``group_index`` (int64) counts the rows of each group, which has
    its row of ``weight_scale [groups, 2H]`` and of ``quant_scale [groups, H]``; rows past the groups are unwritten.
    Covered: dynamic quantisation (``quant_mode`` 1; the default is static) and the plain SwiGLU. Source: the page.
    """
    op = "npu_dequant_swiglu_quant"
    require_absent(op, bias=bias, quant_offset=quant_offset)
    require_value(op, "quant_mode", quant_mode, (1,), "0, static, is the default")
    require_value(op, "swiglu_mode", swiglu_mode, (0,))
    require_value(op, "dst_type", dst_type, (None, 1, torch.int8))
    require_value(op, "round_mode", round_mode, (None, 0))
    require_value(op, "activate_dim", activate_dim, (None, -1, 1))
    require_value(op, "clamp_limit, glu_alpha, glu_bias", (clamp_limit, glu_alpha, glu_bias), ((7.0, 1.702, 1.0),))
    require_dtype(op, "x", x, torch.int32, torch.float16, torch.bfloat16)
    require_dim(op, "x", x, 2)
    require_nd(op, x=x)
    T, width = x.shape
    require(width > 0 and width % 2 == 0, op, f"x is {width} wide; it must be even")
    H = width // 2
    groups = 1
    ranges = [(0, 0, T)]
    if group_index is not None:
        require(H <= 10496 and H % 64 == 0, op, f"H is {H}; with group_index a multiple of 64 up to 10496 is needed")
        groups = group_index.numel()
        ranges = row_ranges(op, group_index, COUNT, groups, T)
    values = x.float()
    if x.dtype == torch.int32:
        if weight_scale is None or activation_scale is None:
            raise Refused(f"{op}: x is int32 without weight_scale and activation_scale")
        require_dtype(op, "weight_scale", weight_scale, torch.float32)
        require_shape(op, "weight_scale", weight_scale, [groups, width])
        require_dtype(op, "activation_scale", activation_scale, torch.float32)
        require(activation_scale.shape in ((T,), (T, 1)), op, f"activation_scale has {list(activation_scale.shape)}")
    else:
        require_absent(op, activation_scale=activation_scale, weight_scale=weight_scale)
    if quant_scale is not None:
        require_dtype(op, "quant_scale", quant_scale, torch.float32, torch.float16, torch.bfloat16)
        require_shape(op, "quant_scale", quant_scale, [groups, H])
    out, scale = unwritten((T, H), torch.int8), unwritten((T,), torch.float32)
    for group, start, end in ranges:
        rows = values[start:end]
        if weight_scale is not None and activation_scale is not None:
            rows = rows * weight_scale[group] * activation_scale.view(T, 1)[start:end]
        rows = silu_times(rows if activate_left else rows.roll(H, dims=-1))
        if quant_scale is not None:
            rows = rows * quant_scale[group].float()
        out[start:end], scale[start:end] = quantised(rows)
    return out, scale
