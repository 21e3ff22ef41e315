"""CPU kernels that stand in for vllm-ascend's own ops, `torch.ops._C_ascend`, as far as BailingMoeV2 uses them.

Most are CANN's ops under other defaults. What the source of vllm-ascend 0.23.0 (csrc) says is said so; nothing else
of these ops is documented.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ascend.emulator.kernels import norm, permutation, quant, quant_matmul, routing
from ascend.emulator.kernels.groups import CUMULATIVE
from ascend.emulator.kernels.unwritten import unwritten
from ascend.emulator.limits import require, require_absent, require_value


def moe_gating_top_k(
    x: Tensor,
    k: int,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
    bias_opt: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`npu_moe_gating_top_k`; ``norm_type`` 2, a softplus, is vllm-ascend's own and not covered."""
    return routing.npu_moe_gating_top_k(
        x,
        k,
        bias=bias_opt,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=group_select_mode,
        renorm=renorm,
        norm_type=norm_type,
        out_flag=out_flag,
        routed_scaling_factor=routed_scaling_factor,
        eps=eps,
    )


def npu_moe_init_routing_custom(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = 0,
    active_expert_range: list[int] | None = None,
    row_idx_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`npu_moe_init_routing_v2`; the default ``quant_mode`` is 0, static, which is not covered."""
    return permutation.npu_moe_init_routing_v2(
        x,
        expert_idx,
        scale=scale,
        offset=offset,
        active_num=active_num,
        expert_capacity=expert_capacity,
        expert_num=expert_num,
        drop_pad_mode=drop_pad_mode,
        expert_tokens_num_type=expert_tokens_num_type,
        expert_tokens_num_flag=expert_tokens_num_flag,
        quant_mode=quant_mode,
        active_expert_range=active_expert_range or None,
        row_idx_type=row_idx_type,
    )


def npu_add_rms_norm_bias(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor | None = None, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """`npu_add_rms_norm` with ``beta`` added before the last rounding. Source: csrc/moe/add_rms_norm_bias."""
    return norm.add_rms_norm("npu_add_rms_norm_bias", x1, x2, gamma, beta, epsilon)


def grouped_matmul_swiglu_quant_weight_nz(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor,
    group_list: Tensor,
    *,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
    swiglu_limit: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`npu_grouped_matmul_swiglu_quant`: a CUMULATIVE ``group_list``; not covered is a clamp (``swiglu_limit``)."""
    op = "grouped_matmul_swiglu_quant_weight_nz"
    require_absent(op, bias=bias, offset=offset)
    require_value(op, "swiglu_limit", swiglu_limit, (0.0,))
    arguments = (op, x, weight, weight_scale, x_scale, group_list, CUMULATIVE)
    return *quant_matmul.product_swiglu_quant(*arguments), unwritten((), torch.float32)


def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = True,
    quant_mode: int = 0,
    swiglu_mode: int = 0,
    clamp_limit: float = 0.0,
    glu_alpha: float = 1.0,
    glu_bias: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`npu_dequant_swiglu_quant` of torch_npu with other defaults, and ``swiglu_mode`` 1 without its extras.

    CANN's page calls mode 1 an odd-even split with a clamp, a factor and an addend. The kernel that vllm-ascend 0.23.0
    brings (csrc/moe/dequant_swiglu_quant/op_kernel, ``SwiGluGate``) splits into halves in both modes: at clamp 0,
    factor 1 and addend 0 mode 1 is mode 0. Whether the card runs that kernel or CANN's depends on the installation.
    A single group as counts is taken here (its host code does): the shared experts come so.
    """
    op = "_C_ascend.npu_dequant_swiglu_quant"
    require_value(op, "swiglu_mode", swiglu_mode, (0, 1))
    extras = (clamp_limit, glu_alpha, glu_bias)
    require_value(op, "clamp_limit, glu_alpha, glu_bias", extras, ((0.0, 1.0, 0.0),))
    if group_index is not None and group_index.numel() == 1:
        whole = group_index.dtype == torch.int64 and group_index.tolist() == [x.shape[0]]
        require(whole, op, f"the one group of group_index {group_index.tolist()} is not all {x.shape[0]} rows")
        group_index = None
    if weight_scale is not None and weight_scale.dim() == 1:
        weight_scale = weight_scale[None]
    return quant.npu_dequant_swiglu_quant(
        x,
        weight_scale=weight_scale,
        activation_scale=activation_scale,
        bias=bias,
        quant_scale=quant_scale,
        quant_offset=quant_offset,
        group_index=group_index,
        activate_left=activate_left,
        quant_mode=quant_mode,
    )


def _gating_shapes(x: Tensor, k: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    T, E = x.shape
    return x.new_empty(T, k), x.new_empty(T, k, dtype=torch.int32), x.new_empty(T, E, dtype=torch.float32)


def _routing_shapes(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int = -1,
    expert_num: int = -1,
    quant_mode: int = 0,
    active_expert_range: list[int] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = expert_idx.numel()
    R = min(active_num, slots) if active_num > 0 else slots
    start, end = active_expert_range or (0, expert_num)
    return (
        x.new_empty(R, x.shape[1], dtype=torch.int8 if quant_mode == 1 else x.dtype),
        x.new_empty(slots, dtype=torch.int32),
        x.new_empty(end - start, dtype=torch.int64),
        x.new_empty(R, dtype=torch.float32),
    )


def _norm_shapes(x1: Tensor, x2: Tensor, gamma: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = x1.shape[: x1.dim() - gamma.dim()]
    rstd = x1.new_empty(*rows, *[1] * gamma.dim(), dtype=torch.float32)
    return torch.empty_like(x1), rstd, torch.empty_like(x1)


def _product_shapes(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    M, N = x.shape[0], weight.shape[-1]
    return x.new_empty(M, N // 2), x.new_empty(M, dtype=torch.float32), x.new_empty((), dtype=torch.float32)


def _swiglu_shapes(x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    *rows, width = x.shape
    return x.new_empty(*rows, width // 2, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)


SHAPES: dict[str, Callable[..., Any]] = {
    "grouped_matmul_swiglu_quant_weight_nz": _product_shapes,
    "moe_gating_top_k": _gating_shapes,
    "npu_add_rms_norm_bias": _norm_shapes,
    "npu_dequant_swiglu_quant": _swiglu_shapes,
    "npu_moe_init_routing_custom": _routing_shapes,
}
"""Meta kernels: the extension's own are compiled for the tensors of torch 2.10 and misread those of 2.13."""

KERNELS: dict[str, Callable[..., Any]] = {
    f"_C_ascend::{kernel.__name__}": kernel
    for kernel in (
        grouped_matmul_swiglu_quant_weight_nz,
        moe_gating_top_k,
        npu_add_rms_norm_bias,
        npu_dequant_swiglu_quant,
        npu_moe_init_routing_custom,
    )
}
"""The kernels by the name of their op."""
