"""`npu_grouped_matmul`: the rows of each expert times that expert's weight.

Shapes: M rows, E groups (experts), N output columns, K inner dimension, G quantisation groups along K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ascend.emulator.kernels.groups import row_ranges
from ascend.emulator.kernels.int4 import unpack_int4
from ascend.emulator.kernels.unwritten import unwritten
from ascend.emulator.limits import (
    FLOATS,
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
    short,
    transposed,
)

OP = "npu_grouped_matmul"
Product = Callable[[int, slice], Tensor]
"""The rows of a slice of x times the weight of an expert, before the rounding to the output's dtype."""


def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: list[Tensor] | None = None,
    scale: list[Tensor] | None = None,
    offset: list[Tensor] | None = None,
    antiquant_scale: list[Tensor] | None = None,
    antiquant_offset: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    group_list: Tensor | None = None,
    activation_input: list[Tensor] | None = None,
    activation_quant_scale: list[Tensor] | None = None,
    activation_quant_offset: list[Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: list[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    """``[out [M, N]]`` with ``out = x[0] @ weight[e]`` for the rows of each group e; the rest of the rows unwritten.

    Covered is the row split into one output (``group_type`` 0, ``split_item`` 2 or 3) of one ``x[M, K]`` by one
    ``weight[E, K, N]`` or a list of ``[K, N]``. ``group_list`` (int64) is cumulative (type 0, the default), counts
    (1) or pairs of group and count (2, int8 only). fp32 accumulation, one rounding. Three families of dtypes (the
    op's page, table 2 for A2): floats; int8 × int8 with ``scale`` and ``per_token_scale`` (or int32 out without);
    fp16 or bf16 with int8 or packed int4 weights as ``x @ ((weight + antiquant_offset) · antiquant_scale)``.
    ``tuning_config`` is a hint for the device's tiling alone.
    """
    require_absent(OP, offset=offset or None, activation_input=activation_input or None)
    require_absent(OP, activation_quant_scale=activation_quant_scale or None)
    require_absent(OP, activation_quant_offset=activation_quant_offset or None)
    require_absent(OP, x_dtype=x_dtype, weight_dtype=weight_dtype, scale_dtype=scale_dtype)
    require_absent(OP, per_token_scale_dtype=per_token_scale_dtype)
    require(group_type is not None, OP, "group_type is None; the device wants it given (0: the rows are grouped)")
    require_value(OP, "group_type", group_type, (0,))
    require_value(OP, "split_item", split_item, (2, 3), "one output tensor")
    require_value(OP, "act_type", act_type, (0, None))
    require(len(x) == 1, OP, f"x has {len(x)} tensors; covered is one")
    x_MK = x[0]
    require_dtype(OP, "x", x_MK, *FLOATS, torch.int8)
    require_dim(OP, "x", x_MK, 2)
    require_contiguous(OP, x=x_MK)
    require_nd(OP, x=x_MK)
    weights = _weights(weight)
    packed = weights[0].dtype == torch.int32
    K, N = weights[0].shape[0], weights[0].shape[1] * (8 if packed else 1)
    require(x_MK.shape[1] == K, OP, f"x has {x_MK.shape[1]} columns, weight {K} rows")
    require(max(K, N) < INNER_LIMIT, OP, f"K is {K}, N {N}; a last dimension must be below {INNER_LIMIT}")
    is_int8 = x_MK.dtype == torch.int8
    kind = group_list_type or 0
    require(kind != 2 or is_int8, OP, "group_list_type 2 is for int8 x and weight only")
    groups = row_ranges(OP, group_list, kind, len(weights), x_MK.shape[0])

    if is_int8:
        require_absent(OP, antiquant_scale=antiquant_scale or None, antiquant_offset=antiquant_offset or None)
        dtype, product = _int8(
            x_MK, weight, weights, bias or None, scale or None, per_token_scale or None, output_dtype
        )
    else:
        require_absent(OP, scale=scale or None, per_token_scale=per_token_scale or None)
        dtype = x_MK.dtype
        if output_dtype is not None:
            require_value(OP, "output_dtype", dtype_of(OP, "output_dtype", output_dtype), (dtype,), "that of x")
        if weights[0].dtype == dtype:
            require_absent(OP, antiquant_scale=antiquant_scale or None, antiquant_offset=antiquant_offset or None)
            product = _floating(x_MK, weight, weights, bias or None)
        else:
            product = _weight_only(x_MK, weight, weights, bias or None, antiquant_scale, antiquant_offset)
    out_MN = unwritten((x_MK.shape[0], N), dtype)
    for group, start, end in groups:
        if end > start:
            out_MN[start:end] = product(group, slice(start, end)).to(dtype)
    return [out_MN]


def _weights(weight: list[Tensor]) -> list[Tensor]:
    """One ``[K, N]`` (int4: ``[K, N/8]``) per expert, of a single 3-D tensor or up to 128 2-D ones."""
    require(len(weight) > 0, OP, "weight is an empty list")
    require_dtype(OP, "weight", weight[0], *FLOATS, torch.int8, torch.int32)
    require(len({(w.dtype, format_of(w), transposed(w)) for w in weight}) == 1, OP, "the weights differ in kind")
    for w in weight:
        require(w.is_contiguous() or transposed(w), OP, "weight is neither contiguous nor the transpose of such")
        require(w.is_contiguous() or (format_of(w) == ND and w.dtype != torch.int32), OP, "weight is transposed")
    if len(weight) == 1 and weight[0].dim() == 3:
        require(0 < weight[0].shape[0] <= 1024, OP, f"{weight[0].shape[0]} groups; the device takes 1 to 1024")
        return list(weight[0])
    require(len(weight) <= 128, OP, f"{len(weight)} weights; the device takes lists of at most 128")
    for w in weight:
        require_dim(OP, "weight", w, 2)
        require_shape(OP, "weight", w, weight[0].shape)
    return list(weight)


def _require_format(weight: Tensor, allowed: bool, scenario: str) -> None:
    """FRACTAL_NZ only where the page of aclnnGroupedMatmulV5 lists it, in whole blocks."""
    if format_of(weight) == ND:
        return
    require(format_of(weight) == FRACTAL_NZ and allowed, OP, f"weight is in format {format_of(weight)}; {scenario}")
    K, N = weight.shape[-2:]
    block = 32 if weight.dtype == torch.int8 else 16
    require(K % 16 == 0 and N % block == 0, OP, f"an NZ weight of {K} by {N} is not in whole blocks of 16 by {block}")


def _per_expert(name: str, given: list[Tensor], weights: list[Tensor], single: bool, *dtypes: torch.dtype) -> Tensor:
    """``[E, …]`` of a parameter that goes with the weights: one tensor for one 3-D weight, else a list."""
    require(len(given) == (1 if single else len(weights)), OP, f"{name} has {len(given)} tensors; weight has another")
    for tensor in given:
        require_dtype(OP, name, tensor, *dtypes)
    tensor = given[0] if single else torch.stack(given)
    require(tensor.shape[0] == len(weights), OP, f"{name} has shape {list(tensor.shape)} for {len(weights)} experts")
    return tensor


def _bias(bias: list[Tensor] | None, weights: list[Tensor], single: bool, N: int, dtype: torch.dtype) -> Tensor:
    """``[E, N]`` of zeros, or of ``bias`` of the one dtype the device takes (fp32 for bf16 inputs)."""
    if bias is None:
        return torch.zeros(len(weights), N, dtype=dtype)
    bias_EN = _per_expert("bias", bias, weights, single, dtype)
    require_shape(OP, "bias", bias_EN, [len(weights), N])
    return bias_EN


def _floating(x: Tensor, weight: list[Tensor], weights: list[Tensor], bias: list[Tensor] | None) -> Product:
    require_dtype(OP, "weight", weights[0], x.dtype)
    _require_format(weight[0], x.dtype != torch.float32, "fp32 weights are taken in ND only")
    bias_dtype = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    bias_EN = _bias(bias, weights, weight[0].dim() == 3, weights[0].shape[1], bias_dtype)
    return lambda e, rows: x[rows].float() @ weights[e].float() + bias_EN[e].float()


def _weight_only(
    x: Tensor,
    weight: list[Tensor],
    weights: list[Tensor],
    bias: list[Tensor] | None,
    scale: list[Tensor] | None,
    offset: list[Tensor] | None,
) -> Product:
    """The weight is expanded to the dtype of x (one rounding) before the product, as the cube takes no other."""
    require_dtype(OP, "weight", weights[0], x.dtype, torch.int8, torch.int32)
    require_dtype(OP, "x", x, torch.float16, torch.bfloat16)
    _require_format(weight[0], False, "weight-only quantisation takes ND only")
    single = weight[0].dim() == 3
    packed = weights[0].dtype == torch.int32
    K, N = weights[0].shape[0], weights[0].shape[1] * (8 if packed else 1)
    require(bool(scale), OP, "antiquant_scale is missing; weight-only quantisation needs it")
    scale_EGN = _per_expert("antiquant_scale", scale or [], weights, single, x.dtype)
    require(packed or scale_EGN.dim() == 2, OP, "antiquant_scale per group along K is for int4 weights only")
    require_dim(OP, "antiquant_scale", scale_EGN, 2, 3)
    require(scale_EGN.shape[-1] == N, OP, f"antiquant_scale has {scale_EGN.shape[-1]} columns, weight {N}")
    require(
        bool(offset) or (packed and single), OP, "antiquant_offset is missing; only one tensor of int4 goes without"
    )
    offset_EGN = _per_expert("antiquant_offset", offset, weights, single, x.dtype) if offset else scale_EGN * 0
    require_shape(OP, "antiquant_offset", offset_EGN, scale_EGN.shape)
    if scale_EGN.dim() == 2:
        scale_EGN, offset_EGN = scale_EGN[:, None], offset_EGN[:, None]
    else:
        require(not bool(offset_EGN.any()), OP, "antiquant_offset per group along K is not 0; the device is symmetric")
    G = scale_EGN.shape[1]
    require(G > 0 and K % G == 0, OP, f"{G} quantisation groups do not divide K {K}")
    bias_EN = _bias(bias, weights, single, N, torch.float32 if x.dtype == torch.bfloat16 else x.dtype)

    def product(e: int, rows: slice) -> Tensor:
        integers = (unpack_int4(weights[e]) if packed else weights[e]).float().unflatten(0, (G, K // G))
        expanded = (integers + offset_EGN[e].float()[:, None]) * scale_EGN[e].float()[:, None]
        return x[rows].float() @ expanded.flatten(0, 1).to(x.dtype).float() + bias_EN[e].float()

    return product


def _int8(
    x: Tensor,
    weight: list[Tensor],
    weights: list[Tensor],
    bias: list[Tensor] | None,
    scale: list[Tensor] | None,
    per_token_scale: list[Tensor] | None,
    output_dtype: int | None,
) -> tuple[torch.dtype, Product]:
    """Exact int32 sums, then ``· scale[n] · per_token_scale[m]`` in fp32; without scale the int32 sums themselves."""
    require(weight[0].dim() == 3, OP, "int8 takes weight as one tensor [E, K, N]")
    require_dtype(OP, "weight", weights[0], torch.int8)
    _require_format(weight[0], True, "ND or FRACTAL_NZ is taken")
    N = weights[0].shape[1]
    dtype = torch.int8 if output_dtype is None else dtype_of(OP, "output_dtype", output_dtype)
    bias_EN = _bias(bias, weights, True, N, torch.int32)
    if scale is None:
        require_absent(OP, per_token_scale=per_token_scale)
        require_value(OP, "output_dtype", dtype, (torch.int32,), "without scale; None means int8")
        return dtype, lambda e, rows: integer_product(x[rows], weights[e]) + bias_EN[e]
    scale_EN = _per_expert("scale", scale, weights, True, torch.float32, torch.bfloat16)
    require_shape(OP, "scale", scale_EN, [len(weights), N])
    wanted = torch.bfloat16 if scale_EN.dtype == torch.bfloat16 else torch.float16
    require_value(OP, "output_dtype", dtype, (wanted,), f"with {short(scale_EN.dtype)} scale; None means int8")
    per_token_M = torch.ones(x.shape[0])
    if per_token_scale is not None:
        per_token_M = per_token_scale[0]
        require_dtype(OP, "per_token_scale", per_token_M, torch.float32)
        require_shape(OP, "per_token_scale", per_token_M, [x.shape[0]])

    def product(e: int, rows: slice) -> Tensor:
        total = integer_product(x[rows], weights[e]) + bias_EN[e]
        return total.float() * scale_EN[e].float() * per_token_M[rows, None]

    return dtype, product


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of int8 matrices in int32. fp64 holds the sums exactly and is the fast way on a CPU."""
    return (a.double() @ b.double()).to(torch.int32)
