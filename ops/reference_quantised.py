"""The definition of the ops on quantised weights, in plain torch; how weights are rounded is in `ops.quantise`.

W8A8: weights int8 per output, tokens int8 as they come. W4A16: weights int4 in groups of inputs, experts alone. Scales
of weights have the model's dtype. Shapes as in `ops.reference`; S groups of inputs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ops.quantise import dequantised_int4, int8_tokens
from ops.reference import swiglu_mlp, weighted_sum


def _matmul_fp32(x: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """Quantise tokens, multiply integers, scale; fp32. fp32 sums of products of int8 are exact to 24 bits."""
    q, scale_T = int8_tokens(x)
    return F.linear(q.float(), weight_OI.float()) * scale_O.float() * scale_T.unsqueeze(-1)


def linear_w8a8(x: Tensor, weight_OI: Tensor, scale_O: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.linear` on int8 weights; the result is rounded before the bias is added."""
    out = _matmul_fp32(x, weight_OI, scale_O).to(x.dtype)
    return out if bias is None else out + bias


def linear_w8a8_meta(x: Tensor, weight_OI: Tensor, scale_O: Tensor, bias: Tensor | None) -> Tensor:
    """Shape of `linear_w8a8`."""
    return x.new_empty((*x.shape[:-1], scale_O.shape[0]))


def swiglu_mlp_w8a8(
    x_TH: Tensor, gate_up_IH: Tensor, gate_up_scale_I: Tensor, down_HI: Tensor, down_scale_H: Tensor
) -> Tensor:
    """`reference.swiglu_mlp` on int8 weights: the sums are rounded, SwiGLU is made in fp32 and rounded once."""
    gate_TI, up_TI = linear_w8a8(x_TH, gate_up_IH, gate_up_scale_I, None).float().chunk(2, dim=-1)
    return linear_w8a8((F.silu(gate_TI) * up_TI).to(x_TH.dtype), down_HI, down_scale_H, None)


def swiglu_mlp_w8a8_meta(
    x_TH: Tensor, gate_up_IH: Tensor, gate_up_scale_I: Tensor, down_HI: Tensor, down_scale_H: Tensor
) -> Tensor:
    """Shape of `swiglu_mlp_w8a8`."""
    return x_TH.new_empty(x_TH.shape)


def moe_experts_w8a8(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EIH: Tensor,
    gate_up_scale_EI: Tensor,
    down_EHI: Tensor,
    down_scale_EH: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """`reference.moe_experts` on int8 weights: between the two products everything is fp32 until it is quantised."""

    def run(expert: int, x: Tensor) -> Tensor:
        gate, up = _matmul_fp32(x, gate_up_EIH[expert], gate_up_scale_EI[expert]).chunk(2, dim=-1)
        return _matmul_fp32(F.silu(gate) * up, down_EHI[expert], down_scale_EH[expert]).to(x.dtype)

    return weighted_sum(x_TH, weight_TK, expert_TK - first, gate_up_EIH.shape[0], run)


def moe_experts_w8a8_meta(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EIH: Tensor,
    gate_up_scale_EI: Tensor,
    down_EHI: Tensor,
    down_scale_EH: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """Shape of `moe_experts_w8a8`."""
    return x_TH.new_empty(x_TH.shape)


def moe_experts_w4a16(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EIH: Tensor,
    gate_up_scale_EIS: Tensor,
    down_EHI: Tensor,
    down_scale_EHS: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """`reference.moe_experts` on int4 weights, eight to an int32 along the inputs."""

    def run(expert: int, x: Tensor) -> Tensor:
        gate_up = dequantised_int4(gate_up_EIH[expert], gate_up_scale_EIS[expert])
        return swiglu_mlp(x, gate_up, dequantised_int4(down_EHI[expert], down_scale_EHS[expert]))

    return weighted_sum(x_TH, weight_TK, expert_TK - first, gate_up_EIH.shape[0], run)


def moe_experts_w4a16_meta(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EIH: Tensor,
    gate_up_scale_EIS: Tensor,
    down_EHI: Tensor,
    down_scale_EHS: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """Shape of `moe_experts_w4a16`."""
    return x_TH.new_empty(x_TH.shape)
