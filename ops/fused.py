"""Ops that do several of the others in one launch, for the devices that gain by it; each is defined by its parts.

A device without a kernel of its own for one of them runs its kernels for the parts, one after the other; on the meta
device the parts give the shapes. Shapes as in `ops.reference` and `ops.reference_quantised`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_rms_norm_gate(
    x_TH: Tensor,
    residual_TH: Tensor,
    norm_H: Tensor,
    eps: float,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`add_rms_norm`, then `moe_gate` of what is normalised: ``(weight_TK, expert_TK, normed_TH, residual_TH)``."""
    normed_TH, residual_TH = torch.ops.ascend.add_rms_norm(x_TH, residual_TH, norm_H, eps)
    settings = (top_k, n_group, topk_group, normalise, scaling)
    weight_TK, expert_TK = torch.ops.ascend.moe_gate(normed_TH, weight_EH, bias_E, *settings)
    return weight_TK, expert_TK, normed_TH, residual_TH


def cached_attention(
    qkv_BTC: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    start_B: Tensor,
    length_B: Tensor,
    eps: float,
    scale: float,
    slots: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: list[int] | None = None,
) -> Tensor:
    """`rope_to_cache`, then `attention` over the caches that it wrote to; ``[B, T, N, D]``."""
    caches, tables = (k_BGSD, v_BGSD), (cos_BTR, sin_BTR)
    q = torch.ops.ascend.rope_to_cache(qkv_BTC, q_norm_D, k_norm_D, *tables, *caches, length_B, eps, slots)
    out_BTND: Tensor = torch.ops.ascend.attention(q, *caches, start_B, length_B, scale, mask, lengths)
    return out_BTND


def moe(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EIH: Tensor,
    down_EHI: Tensor,
    shared_gate_up_IH: Tensor,
    shared_down_HI: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """`moe_experts` plus the `swiglu_mlp` that every token goes through, each rounded before they are added."""
    shared_TH: Tensor = torch.ops.ascend.swiglu_mlp(x_TH, shared_gate_up_IH, shared_down_HI)
    return torch.ops.ascend.moe_experts(x_TH, weight_TK, expert_TK, gate_up_EIH, down_EHI, first, total) + shared_TH


def moe_w8a8(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EIH: Tensor,
    gate_up_scale_EI: Tensor,
    down_EHI: Tensor,
    down_scale_EH: Tensor,
    shared_gate_up_IH: Tensor,
    shared_gate_up_scale_I: Tensor,
    shared_down_HI: Tensor,
    shared_down_scale_H: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """`moe_experts_w8a8` plus `swiglu_mlp_w8a8`."""
    routed = (gate_up_EIH, gate_up_scale_EI, down_EHI, down_scale_EH)
    shared = (shared_gate_up_IH, shared_gate_up_scale_I, shared_down_HI, shared_down_scale_H)
    shared_TH: Tensor = torch.ops.ascend.swiglu_mlp_w8a8(x_TH, *shared)
    return torch.ops.ascend.moe_experts_w8a8(x_TH, weight_TK, expert_TK, *routed, first, total) + shared_TH


def moe_w4a16(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EIH: Tensor,
    gate_up_scale_EIS: Tensor,
    down_EHI: Tensor,
    down_scale_EHS: Tensor,
    shared_gate_up_IH: Tensor,
    shared_down_HI: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """`moe_experts_w4a16` plus a `swiglu_mlp` that is not quantised."""
    routed = (gate_up_EIH, gate_up_scale_EIS, down_EHI, down_scale_EHS)
    shared_TH: Tensor = torch.ops.ascend.swiglu_mlp(x_TH, shared_gate_up_IH, shared_down_HI)
    return torch.ops.ascend.moe_experts_w4a16(x_TH, weight_TK, expert_TK, *routed, first, total) + shared_TH


def moe_fp8(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EIH: Tensor,
    gate_up_scale_EPS: Tensor,
    down_EHI: Tensor,
    down_scale_EPS: Tensor,
    shared_gate_up_IH: Tensor,
    shared_gate_up_scale_PS: Tensor,
    shared_down_HI: Tensor,
    shared_down_scale_PS: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """`moe_experts_fp8` plus `swiglu_mlp_fp8`."""
    routed = (gate_up_EIH, gate_up_scale_EPS, down_EHI, down_scale_EPS)
    shared = (shared_gate_up_IH, shared_gate_up_scale_PS, shared_down_HI, shared_down_scale_PS)
    shared_TH: Tensor = torch.ops.ascend.swiglu_mlp_fp8(x_TH, *shared)
    return torch.ops.ascend.moe_experts_fp8(x_TH, weight_TK, expert_TK, *routed, first, total) + shared_TH
