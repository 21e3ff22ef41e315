"""int8 matrix products outside `npu_grouped_matmul`: the dense one, and the grouped one fused with a SwiGLU.

Shapes: M rows, K inner dimension, N output columns, E groups (experts).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend.emulator.kernels.activation import silu_times
from ascend.emulator.kernels.groups import COUNT, CUMULATIVE, row_ranges
from ascend.emulator.kernels.matmul import integer_product
from ascend.emulator.kernels.quant import quantised
from ascend.emulator.kernels.unwritten import unwritten
from ascend.emulator.limits import (
    FRACTAL_NZ,
    INNER_LIMIT,
    ND,
    dtype_of,
    format_of,
    require,
    require_absent,
    require_contiguous,
    require_dim,
    require_dtype,
    require_nd,
    require_shape,
    require_value,
    transposed,
)

WIDEST_SWIGLU = 10240
"""The N limit of the grouped products fused with a SwiGLU. Source: the page of npu_grouped_matmul_swiglu_quant_v2."""


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """``x1[…, M, K] @ x2[K, N] · scale · pertoken_scale + bias`` of int8, to bf16 or fp16; an int32 bias is scaled too.

    ``output_dtype`` None means int8, which is not covered. bf16: scale fp32 or bf16, fp32 ``pertoken_scale`` or none,
    bias int32, bf16 or fp32. fp16: fp32 scale and ``pertoken_scale``, bias int32, fp16 or fp32 (without it the device
    wants an int64 scale). int32: the bare sums with an int32 bias; that the scale, which must be given, does nothing
    there is guessed (vllm-ascend dequantises such sums itself). x2 in ND, also transposed, or in FRACTAL_NZ.
    Source: the op's page, table 2 for A2.
    """
    op = "npu_quant_matmul"
    require_absent(op, offset=offset, x1_dtype=x1_dtype, x2_dtype=x2_dtype, scale_dtype=scale_dtype)
    require_absent(op, pertoken_scale_dtype=pertoken_scale_dtype, group_sizes=group_sizes, y_scale=y_scale)
    require(
        output_dtype is not None, op, "output_dtype is None, which is int8 out; covered are bfloat16, float16, int32"
    )
    dtype = dtype_of(op, "output_dtype", output_dtype or 0)
    require_value(op, "output_dtype", dtype, (torch.bfloat16, torch.float16, torch.int32))
    require_dtype(op, "x1", x1, torch.int8)
    require_dtype(op, "x2", x2, torch.int8)
    require_dim(op, "x1", x1, *range(2, 7))
    require_dim(op, "x2", x2, 2)
    require_contiguous(op, x1=x1)
    require_nd(op, x1=x1)
    plain = format_of(x2) == ND and (x2.is_contiguous() or transposed(x2))
    require(plain or (format_of(x2) == FRACTAL_NZ and x2.is_contiguous()), op, "x2 is a view the device cannot read")
    K, N = x2.shape
    require(x1.shape[-1] == K and K > 0 and N > 0, op, f"x1 {list(x1.shape)} by x2 {list(x2.shape)} does not fit")
    require(max(K, N) < INNER_LIMIT, op, f"K is {K}, N {N}; both must be below {INNER_LIMIT}")
    half = dtype == torch.float16
    require_dtype(op, "scale", scale, torch.float32, *(() if half else (torch.bfloat16,)))
    require(list(scale.shape) in ([1], [N]), op, f"scale has shape {list(scale.shape)}; [1] or [{N}] is needed")
    require(pertoken_scale is not None or not half, op, "pertoken_scale is missing; float16 needs it (or int64 scale)")
    factor = scale.float()
    if pertoken_scale is not None:
        require_dtype(op, "pertoken_scale", pertoken_scale, torch.float32)
        require_shape(op, "pertoken_scale", pertoken_scale, [x1.shape[-2]])
    total = integer_product(x1, x2)
    if bias is not None:
        require_dtype(op, "bias", bias, torch.int32, torch.float32, dtype)
        require_shape(op, "bias", bias, [N])
        total = total + bias if bias.dtype == torch.int32 else total
    if dtype == torch.int32:
        require_absent(op, pertoken_scale=pertoken_scale)
        require(bias is None or bias.dtype == torch.int32, op, "a bias of int32 sums is int32")
        return total.int()
    out = total.float() * factor
    if pertoken_scale is not None:
        out = out * pertoken_scale[:, None]
    if bias is not None and bias.dtype != torch.int32:
        out = out + bias.float()
    return out.to(dtype)


def npu_grouped_matmul_swiglu_quant(
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor,
    *,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`npu_grouped_matmul_swiglu_quant_v2` with a CUMULATIVE ``group_list``; the third output is unwritten."""
    op = "npu_grouped_matmul_swiglu_quant"
    require_absent(op, bias=bias, offset=offset)
    out, scale = product_swiglu_quant(op, x, weight, weight_scale, x_scale, group_list, CUMULATIVE)
    return out, scale, unwritten((), torch.float32)


def npu_grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight: list[Tensor],
    weight_scale: list[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    *,
    smooth_scale: Tensor | None = None,
    weight_assist_matrix: list[Tensor] | None = None,
    bias: Tensor | None = None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 6,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 1,
    group_list_type: int | None = 0,
    tuning_config: list[int] | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    weight_scale_dtype: int | None = None,
    x_scale_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """int8 ``x[M, K] @ weight[E, K, N]`` per group, SwiGLU (LEFT half activated), int8 ``[M, N/2]`` and scales ``[M]``.

    The weight must lie in FRACTAL_NZ: the device reads any other as if it did. Rows past the last group are unwritten.
    ``group_list_type`` 0 is cumulative, 1 counts. Covered is A8W8. ``dequant_dtype`` fp32 is 0 on the op's page and 6
    as a torch dtype: op-plugin takes both, the 2.13.0 meta kernel 6 alone. ``quant_dtype`` int8: 0 there, 1 here.
    """
    op = "npu_grouped_matmul_swiglu_quant_v2"
    require_absent(op, smooth_scale=smooth_scale, weight_assist_matrix=weight_assist_matrix or None, bias=bias)
    require_absent(op, x_dtype=x_dtype, weight_dtype=weight_dtype)
    require_absent(op, weight_scale_dtype=weight_scale_dtype, x_scale_dtype=x_scale_dtype)
    require_value(op, "dequant_mode", dequant_mode, (0,))
    require_value(op, "dequant_dtype", dequant_dtype, (0, 6), "fp32")
    require_value(op, "quant_mode", quant_mode, (0,))
    require_value(op, "quant_dtype", quant_dtype, (0, 1), "int8")
    require_value(op, "group_list_type", group_list_type, (CUMULATIVE, COUNT))
    require(len(weight) == len(weight_scale) == 1, op, "weight and weight_scale are lists of one tensor")
    kind = group_list_type or CUMULATIVE
    return product_swiglu_quant(op, x, weight[0], weight_scale[0], x_scale, group_list, kind)


def product_swiglu_quant(
    op: str, x: Tensor, weight: Tensor, weight_scale: Tensor, x_scale: Tensor, group_list: Tensor, kind: int
) -> tuple[Tensor, Tensor]:
    """What the fused ops share: ``(int8 [M, N/2], scales [M])`` for the op of that name."""
    require_dtype(op, "x", x, torch.int8)
    require_dtype(op, "weight", weight, torch.int8)
    require_dim(op, "x", x, 2)
    require_dim(op, "weight", weight, 3)
    require_nd(op, x=x)
    nz = format_of(weight) == FRACTAL_NZ
    require(nz, op, "weight is in ND; the device reads it as FRACTAL_NZ, so cast it with npu_format_cast(weight, 29)")
    require_contiguous(op, weight=weight)
    M, (E, K, N) = x.shape[0], weight.shape
    require(x.shape[1] == K and K < INNER_LIMIT, op, f"x has {x.shape[1]} columns, weight {K} (below {INNER_LIMIT})")
    require(K % 16 == 0 and N % 32 == 0, op, f"an NZ weight of {K} by {N} is not in whole blocks of 16 by 32")
    require(N <= WIDEST_SWIGLU, op, f"N is {N}; the device takes at most {WIDEST_SWIGLU}")
    require(E <= 1024, op, f"{E} groups; the device takes at most 1024")
    require_dtype(op, "weight_scale", weight_scale, torch.float32, torch.float16, torch.bfloat16)
    require_shape(op, "weight_scale", weight_scale, [E, N])
    require_dtype(op, "x_scale", x_scale, torch.float32)
    require_shape(op, "x_scale", x_scale, [M])
    out, scale = unwritten((M, N // 2), torch.int8), unwritten((M,), torch.float32)
    for group, start, end in row_ranges(op, group_list, kind, E, M):
        if end > start:
            total = integer_product(x[start:end], weight[group]).float()
            hidden = total * weight_scale[group].float() * x_scale[start:end, None]
            out[start:end], scale[start:end] = quantised(silu_times(hidden))
    return out, scale
