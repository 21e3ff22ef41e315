"""The ops on an Ascend 910B (Atlas A2, CANN 8.5 to 9.2) through torch_npu.

In: the tensors of an op as `ops.reference` defines it, weights and step in the layout of `ops.layout`. Out: the same
result. Nothing here waits for the device: no value, count or mask is read on the host, so that a decode step can be
captured. Every call spells out the arguments whose defaults differ between torch-npu releases or bite (`group_type`,
`group_list_type`, `cache_mode`, `scale`). Sources of the limits and of the semantics: op-plugin's documentation for A2
and CANN's kernels; the emulator's kernels (`ascend/emulator/kernels`) hold them again, independently.

Attention takes fp16 and bf16 on this device; an fp32 model runs it as plain torch.

Shapes as in `ops.reference`; M = T·K rows of expert work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import layout, reference

WHOLE = 2147483647  # no limit on how far a query looks
CAUSAL_MASK = 2048  # the side of the fixed mask of sparse_mode 3
NO_QUANT, DYNAMIC_INT8 = -1, 1
RUNNING_SUMS, COUNTS = 0, 1  # expert_tokens_num_type and group_list_type: tokens per expert, not their running sum
GATHER = 0  # row_idx_type: for each token and k its row
ROTATED_TOGETHER = (64, 128)  # head dimensions of the op that rotates queries and keys at once
FEWEST_PER_GROUP = 2  # experts: a group's score is the sum of its two best


def _npu() -> Any:
    return torch.ops.npu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`; rounded once, after the weight."""
    return _npu().npu_rms_norm(x.contiguous(), weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`; with more rows than vector cores the norm sees the sum before it is rounded."""
    normed, _, total = _npu().npu_add_rms_norm(x.contiguous(), residual.contiguous(), weight, eps)
    return normed, total


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.linear`."""
    return F.linear(x, weight, bias)


def swiglu_mlp(x_TH: Tensor, gate_up_IH: Tensor, down_HI: Tensor) -> Tensor:
    """`reference.swiglu_mlp`; SwiGLU in fp32, rounded once."""
    return F.linear(_npu().npu_swiglu(F.linear(x_TH, gate_up_IH), dim=-1), down_HI)


def moe_gate(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """`reference.moe_gate`; experts as int32. The op always normalises: without it plain torch chooses."""
    E = weight_EH.shape[0]
    n_group = max(n_group, 1)
    if not normalise or top_k == 1 or E // n_group < FEWEST_PER_GROUP or not x_TH.numel():
        weight, expert = reference.moe_gate(x_TH, weight_EH, bias_E, top_k, n_group, topk_group, normalise, scaling)
        return weight, expert.int()
    logits_TE = F.linear(x_TH.float(), weight_EH.float())
    weight_TK, expert_TK, _ = _npu().npu_moe_gating_top_k(
        logits_TE,
        top_k,
        bias=None if bias_E is None else bias_E.float(),
        k_group=topk_group,
        group_count=n_group,
        group_select_mode=1,  # a group's score is the sum of its two best
        renorm=0,
        norm_type=1,  # sigmoid
        out_flag=False,
        routed_scaling_factor=scaling,
        eps=1e-20,
    )
    return weight_TK, expert_TK


def moe_experts(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EHI: Tensor,
    down_EIH: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """`reference.moe_experts`; weights ``[E, in, out]``."""
    if not x_TH.shape[0]:
        return x_TH.new_empty(x_TH.shape)
    E = gate_up_EHI.shape[0]
    rows_MH, row_M, counts_E, _ = dispatch_rows(x_TH, expert_TK, E, first, total, NO_QUANT)
    return combine_rows(expert_rows(rows_MH, counts_E, gate_up_EHI, down_EIH), row_M, weight_TK, total <= E)


def expert_rows(x_MH: Tensor, count_E: Tensor, gate_up_EHI: Tensor, down_EIH: Tensor) -> Tensor:
    """`reference.expert_rows`; weights ``[E, in, out]``."""
    hidden_MI = _npu().npu_swiglu(grouped(x_MH, gate_up_EHI, count_E), dim=-1)
    return grouped(hidden_MI, down_EIH, count_E)


def dispatch_rows(
    x_TH: Tensor, expert_TK: Tensor, E: int, first: int, total: int, quant_mode: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copy each token once per expert of ``[first, first + E)`` that it chose, sorted by expert.

    Returns the rows ``[M, H]`` (beyond the last local one undefined), for each token and k its row (-1 where the expert
    is elsewhere), tokens per expert int64 ``[E]``, and the scale of each row if they are quantised. An expert may be
    -1, nobody's; the op itself wants one that exists.
    """
    expert_TK = expert_TK.int()
    if total > E:
        expert_TK = expert_TK.masked_fill(expert_TK < 0, 0 if first else E)
    rows_MH, row_M, counts_E, scale_M = _npu().npu_moe_init_routing_v2(
        x_TH.contiguous(),
        expert_TK,
        scale=None,
        offset=None,
        active_num=expert_TK.numel(),  # rows here, not tokens
        expert_capacity=-1,
        expert_num=max(total, first + E),
        drop_pad_mode=0,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        quant_mode=quant_mode,
        active_expert_range=[first, first + E],
        row_idx_type=GATHER,
    )
    return rows_MH, row_M, counts_E, scale_M


def grouped(x_MI: Tensor, weight_EIO: Tensor, counts_E: Tensor, **quantised: Any) -> Tensor:
    """Multiply the rows of each expert with its weight: ``[M, O]``, rows beyond the last expert's undefined."""
    # Counts of a single expert are refused; its count is its running sum.
    kind = COUNTS if weight_EIO.shape[0] > 1 else RUNNING_SUMS
    return _npu().npu_grouped_matmul(
        [x_MI], [weight_EIO], group_list=counts_E, split_item=3, group_type=0, group_list_type=kind, **quantised
    )[0]


def combine_rows(rows_MH: Tensor, row_M: Tensor, weight_TK: Tensor, all_here: bool) -> Tensor:
    """Sum each token's rows by its weights, in fp32; unless ``all_here``, a row may be -1, which adds nothing."""
    if not all_here:
        # The op leaves out a row beyond the last (and, in newer releases, one of weight 0). No row is sure to have been
        # written, and 0 · NaN is NaN: so |-1| will not do.
        elsewhere_M = row_M < 0
        row_M = row_M.masked_fill(elsewhere_M, rows_MH.shape[0])
        weight_TK = weight_TK.masked_fill(elsewhere_M.view_as(weight_TK), 0.0)
    return _npu().npu_moe_token_unpermute(rows_MH, row_M, probs=weight_TK, padded_mode=False, restore_shape=None)


def rope_to_cache(
    qkv_BTC: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    length_B: Tensor,
    eps: float,
    slots: Tensor | None = None,
) -> Tensor:
    """`reference.rope_to_cache`; heads, tables, caches and ``slots`` as `ops.layout` lays them out."""
    B, T, C = qkv_BTC.shape
    G, S, D = k_BGSD.shape[1:]
    q, k, v = qkv_BTC.view(B, T, C // D, D).split([C // D - 2 * G, G, G], dim=2)
    if q_norm_D is not None and k_norm_D is not None:
        q, k = rms_norm(q, q_norm_D, eps), rms_norm(k, k_norm_D, eps)
    else:  # copies, since one op rotates in place
        q, k = q.clone(memory_format=torch.contiguous_format), k.clone(memory_format=torch.contiguous_format)
    if D in ROTATED_TOGETHER:
        q, k = _npu().npu_apply_rotary_pos_emb(q, k, cos, sin, layout="BSND", rotary_mode="half")
    else:
        q, k = (_npu().npu_rotary_mul(one, cos, sin, rotary_mode="half") for one in (q, k))
    if slots is None:
        slot_BT = length_B[:, None] - T + torch.arange(T, device=qkv_BTC.device)
        slots = (slot_BT + torch.arange(B, device=qkv_BTC.device)[:, None] * S).flatten()
    _store(k, k_BGSD, v, v_BGSD, slots)
    return q


def _store(k_BTGD: Tensor, k_BGSD: Tensor, v_BTGD: Tensor, v_BGSD: Tensor, slots: Tensor) -> None:
    k_cache, v_cache = k_BGSD.transpose(1, 2), v_BGSD.transpose(1, 2)
    if k_cache.dtype is torch.float32:  # the op is for fp16, bf16 and int8 on this device
        for cache, new in ((k_cache, k_BTGD), (v_cache, v_BTGD)):
            cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, new.flatten(0, 1))
        return
    _npu().npu_scatter_pa_kv_cache(
        k_BTGD.flatten(0, 1),
        v_BTGD.contiguous().flatten(0, 1),
        k_cache,
        v_cache,
        slots,
        compress_lens=None,
        compress_seq_offsets=None,
        seq_lens=None,
        cache_mode="Norm",
    )


def attention(
    q_BTND: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    start_B: Tensor,
    length_B: Tensor,
    scale: float,
    mask: Tensor | None = None,
    lengths: list[int] | None = None,
) -> Tensor:
    """`reference.attention`. With ``lengths`` no slot beyond them is read; else ``mask`` says what is seen."""
    if q_BTND.dtype is torch.float32:
        return reference.attention(q_BTND, k_BGSD, v_BGSD, start_B, length_B, scale)
    B, T, N, _ = q_BTND.shape
    how: dict[str, Any] = {"atten_mask": None, "sparse_mode": 0, "actual_seq_lengths_kv": lengths}
    if lengths is None:
        how["atten_mask"] = layout.unseen(start_B, length_B, T, k_BGSD.shape[2]) if mask is None else mask
    elif T > 1:
        how |= {"atten_mask": _causal_mask(q_BTND.device), "sparse_mode": 3, "actual_seq_lengths": [T] * B}
    out_BTND, _ = _npu().npu_fused_infer_attention_score(
        q_BTND.contiguous(),
        k_BGSD.transpose(1, 2).contiguous(),
        v_BGSD.transpose(1, 2).contiguous(),
        num_heads=N,
        num_key_value_heads=k_BGSD.shape[1],
        scale=scale,
        input_layout="BSND",
        pre_tokens=WHOLE,
        next_tokens=WHOLE,
        inner_precise=0,
        softmax_lse_flag=False,
        **how,
    )
    if how["atten_mask"] is not None and lengths is None and T > 1:
        # What the op gives for a query that sees nothing is not defined: that of left padding.
        unseen_BT = how["atten_mask"].all(-1).squeeze(1)
        out_BTND = out_BTND.masked_fill(unseen_BT[:, :, None, None], 0.0)
    return out_BTND


@lru_cache(maxsize=16)
def _causal_mask(device: torch.device) -> Tensor:
    return torch.ones((CAUSAL_MASK, CAUSAL_MASK), dtype=torch.bool, device=device).triu(1)


# INT8 weights and activations (W8A8): weights per output, tokens per row. Scales of weights have the model's dtype.


def linear_w8a8(x: Tensor, weight_IO: Tensor, scale_O: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.linear_w8a8`; weight ``[in, out]``, scales fp32."""
    x_TI = x.reshape(-1, x.shape[-1])
    q_TI, scale_T = _npu().npu_dynamic_quant(x_TI, smooth_scales=None, group_index=None, dst_type=torch.int8)
    out_TO = _npu().npu_quant_matmul(
        q_TI, weight_IO, scale_O, offset=None, pertoken_scale=scale_T, bias=None, output_dtype=x.dtype
    )
    out = out_TO.view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def swiglu_mlp_w8a8(
    x_TH: Tensor, gate_up_HI: Tensor, gate_up_scale: Tensor, down_IH: Tensor, down_scale: Tensor
) -> Tensor:
    """`reference.swiglu_mlp_w8a8`."""
    gate_up = linear_w8a8(x_TH, gate_up_HI, gate_up_scale, None)
    return linear_w8a8(_npu().npu_swiglu(gate_up, dim=-1), down_IH, down_scale, None)


def moe_experts_w8a8(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EHI: Tensor,
    gate_up_scale_EI: Tensor,
    down_EIH: Tensor,
    down_scale_EH: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """`reference.moe_experts_w8a8`: tokens are quantised with their dispatch, activations with SwiGLU."""
    if not x_TH.shape[0]:
        return x_TH.new_empty(x_TH.shape)
    E = gate_up_EHI.shape[0]
    rows_MH, row_M, counts_E, scale_M = dispatch_rows(x_TH, expert_TK, E, first, total, DYNAMIC_INT8)
    sums_MI = grouped(rows_MH, gate_up_EHI, counts_E, output_dtype=torch.int32)
    hidden_MI, hidden_scale_M = _npu().npu_dequant_swiglu_quant(
        sums_MI,
        weight_scale=gate_up_scale_EI,
        activation_scale=scale_M,
        bias=None,
        quant_scale=None,
        quant_offset=None,
        group_index=counts_E,
        activate_left=True,
        quant_mode=1,
    )
    out_MH = grouped(
        hidden_MI,
        down_EIH,
        counts_E,
        scale=[down_scale_EH],
        per_token_scale=[hidden_scale_M],
        output_dtype=x_TH.dtype,
    )
    return combine_rows(out_MH, row_M, weight_TK, total <= E)


# INT4 weights (W4A16), experts alone.


def moe_experts_w4a16(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EHI: Tensor,
    gate_up_scale_ESI: Tensor,
    down_EIH: Tensor,
    down_scale_ESH: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """`reference.moe_experts_w4a16`; eight outputs to a word."""
    if not x_TH.shape[0]:
        return x_TH.new_empty(x_TH.shape)
    E = gate_up_EHI.shape[0]
    rows_MH, row_M, counts_E, _ = dispatch_rows(x_TH, expert_TK, E, first, total, NO_QUANT)
    sums_MI = grouped(rows_MH, gate_up_EHI, counts_E, **_int4(gate_up_scale_ESI))
    hidden_MI = _npu().npu_swiglu(sums_MI, dim=-1)
    return combine_rows(grouped(hidden_MI, down_EIH, counts_E, **_int4(down_scale_ESH)), row_M, weight_TK, total <= E)


def _int4(scale_ESO: Tensor) -> dict[str, list[Tensor]]:
    offset_ESO = _zeros(scale_ESO.shape, scale_ESO.dtype, scale_ESO.device)
    return {"antiquant_scale": [scale_ESO], "antiquant_offset": [offset_ESO]}


@lru_cache(maxsize=16)
def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


KERNELS: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "linear": linear,
    "swiglu_mlp": swiglu_mlp,
    "moe_gate": moe_gate,
    "moe_experts": moe_experts,
    "expert_rows": expert_rows,
    "rope_to_cache": rope_to_cache,
    "attention": attention,
    "linear_w8a8": linear_w8a8,
    "swiglu_mlp_w8a8": swiglu_mlp_w8a8,
    "moe_experts_w8a8": moe_experts_w8a8,
    "moe_experts_w4a16": moe_experts_w4a16,
}
