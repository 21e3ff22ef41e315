"""The definition of the ops on quantised weights, in plain torch; how weights are rounded is in `ops.quantise`.

W8A8: weights int8 per output, tokens int8 as they come. W4A16: weights int4 in groups of inputs, experts alone. Scales
of both have the model's dtype. FP8: weights e4m3 in blocks of 128 × 128, tokens e4m3 per 128 inputs as they come, all
scales fp32. Shapes as in `ops.reference`; S groups (blocks) of inputs, P blocks of outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.quantise import FP8_BLOCK, dequantised_int4, fp8_scales, fp8_tokens, int8_tokens
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


def _matmul_fp8(x: Tensor, weight_OI: Tensor, scale_PS: Tensor, matrices: int = 1) -> Tensor:
    """Quantise tokens; the products of each 128 inputs are summed in fp32, then scaled, then the blocks added; fp32."""
    q, scale_TS = fp8_tokens(x)
    outputs = weight_OI.shape[0]
    scale_OS = fp8_scales(scale_PS, weight_OI.shape, matrices)[:, ::FP8_BLOCK]
    out = torch.zeros((*x.shape[:-1], outputs), dtype=torch.float32, device=x.device)
    blocks = zip(q.float().split(FP8_BLOCK, -1), weight_OI.float().split(FP8_BLOCK, -1), strict=True)
    for s, (q_block, weight_block) in enumerate(blocks):
        out += F.linear(q_block, weight_block) * scale_TS[..., s : s + 1] * scale_OS[:, s]
    return out


def linear_fp8(x: Tensor, weight_OI: Tensor, scale_PS: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.linear` on FP8 weights; the result is rounded before the bias is added."""
    out = _matmul_fp8(x, weight_OI, scale_PS).to(x.dtype)
    return out if bias is None else out + bias


def linear_fp8_meta(x: Tensor, weight_OI: Tensor, scale_PS: Tensor, bias: Tensor | None) -> Tensor:
    """Shape of `linear_fp8`."""
    return x.new_empty((*x.shape[:-1], weight_OI.shape[0]))


def swiglu_mlp_fp8(
    x_TH: Tensor, gate_up_IH: Tensor, gate_up_scale_PS: Tensor, down_HI: Tensor, down_scale_PS: Tensor
) -> Tensor:
    """`reference.swiglu_mlp` on FP8 weights: between the two products everything is fp32 until it is quantised."""
    gate, up = _matmul_fp8(x_TH, gate_up_IH, gate_up_scale_PS, matrices=2).chunk(2, dim=-1)
    return _matmul_fp8(F.silu(gate) * up, down_HI, down_scale_PS).to(x_TH.dtype)


def swiglu_mlp_fp8_meta(
    x_TH: Tensor, gate_up_IH: Tensor, gate_up_scale_PS: Tensor, down_HI: Tensor, down_scale_PS: Tensor
) -> Tensor:
    """Shape of `swiglu_mlp_fp8`."""
    return x_TH.new_empty(x_TH.shape)


def moe_experts_fp8(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EIH: Tensor,
    gate_up_scale_EPS: Tensor,
    down_EHI: Tensor,
    down_scale_EPS: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """`reference.moe_experts` on FP8 weights; each expert's result is rounded before it is weighted."""

    def run(expert: int, x: Tensor) -> Tensor:
        gate_up = (gate_up_EIH[expert], gate_up_scale_EPS[expert])
        return swiglu_mlp_fp8(x, *gate_up, down_EHI[expert], down_scale_EPS[expert])

    return weighted_sum(x_TH, weight_TK, expert_TK - first, gate_up_EIH.shape[0], run)


def moe_experts_fp8_meta(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EIH: Tensor,
    gate_up_scale_EPS: Tensor,
    down_EHI: Tensor,
    down_scale_EPS: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """Shape of `moe_experts_fp8`."""
    return x_TH.new_empty(x_TH.shape)
