"""The definition of every op, in plain torch: readable first. All other implementations are tested against this file.

Shapes: B sequences, T new tokens (flattened over the batch where B is absent), S cache slots, H hidden_size, N query
heads, G key/value heads, D head_dim, C = (N + 2G)·D, R = half the rotary dimensions, E experts, K experts per token,
I intermediate width (2·I rows in a fused gate_up: all gate rows first, then all up rows).

Each op ``f`` has a ``f_meta`` beside it that gives the shapes and dtypes of its outputs and computes nothing. The ops
on quantised weights are in `ops.reference_quantised`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.quantise import FP8, fp8_values


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension, the mean and the root in fp32; dtype of ``x``."""
    x_fp32 = x.float()
    normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rms_norm_meta(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Shape of `rms_norm`."""
    return torch.empty_like(x)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``(rms_norm(x + residual), x + residual)``."""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


def add_rms_norm_meta(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Shapes of `add_rms_norm`."""
    return torch.empty_like(x), torch.empty_like(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., in] @ weight[out, in].T + bias``."""
    return F.linear(x, weight, bias)


def linear_meta(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shape of `linear`."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def swiglu_mlp(x_TH: Tensor, gate_up_IH: Tensor, down_HI: Tensor) -> Tensor:
    """``down(silu(gate(x)) · up(x))`` with gate and up fused as ``[2·I, H]``; returns ``[T, H]``."""
    gate_TI, up_TI = F.linear(x_TH, gate_up_IH).chunk(2, dim=-1)
    return F.linear(F.silu(gate_TI) * up_TI, down_HI)


def swiglu_mlp_meta(x_TH: Tensor, gate_up_IH: Tensor, down_HI: Tensor) -> Tensor:
    """Shape of `swiglu_mlp`."""
    return torch.empty_like(x_TH)


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
    """Group-limited sigmoid routing, all of it in fp32.

    The experts form ``n_group`` equal groups; a group's score is the sum of its two best biased experts (of its one
    expert, where a group has no more); the ``topk_group`` best groups stay, and of their experts the ``top_k`` best.
    The bias only chooses: the weights are the unbiased sigmoids of the chosen, normalised to sum to one unless
    ``normalise`` is off or ``top_k`` is 1, times ``scaling``. Source: the model authors' `BailingMoeV2Gate`.

    Returns ``(weight_TK fp32, expert_TK int64)`` (int32 on an NPU), best biased expert first.
    """
    score_TE = torch.sigmoid(F.linear(x_TH.float(), weight_EH.float()))
    biased_TE = score_TE if bias_E is None else score_TE + bias_E.float()
    if n_group > 1:
        grouped = biased_TE.unflatten(-1, (n_group, -1))
        group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(group_score, dtype=torch.bool)
        kept.scatter_(-1, group_score.topk(topk_group, dim=-1).indices, True)
        biased_TE = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    expert_TK = biased_TE.topk(top_k, dim=-1).indices
    weight_TK = score_TE.gather(-1, expert_TK)
    if normalise and top_k > 1:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return weight_TK * scaling, expert_TK


def moe_gate_meta(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Shapes of `moe_gate`."""
    shape = (x_TH.shape[0], top_k)
    return x_TH.new_empty(shape, dtype=torch.float32), x_TH.new_empty(shape, dtype=torch.int64)


def moe_experts(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EIH: Tensor,
    down_EHI: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """Sum over each token's experts of ``weight · down(silu(gate(x)) · up(x))``; the sum in fp32, returns ``[T, H]``.

    The weights are those of the experts ``first … first + E - 1``, of ``total`` in all (0: there are no others); an
    index elsewhere, or -1, adds nothing, as on a rank of an expert-parallel group. Only experts that some token chose
    are read.
    """

    def run(expert: int, x: Tensor) -> Tensor:
        return swiglu_mlp(x, gate_up_EIH[expert], down_EHI[expert])

    return weighted_sum(x_TH, weight_TK, expert_TK - first, gate_up_EIH.shape[0], run)


def weighted_sum(
    x_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor, E: int, run: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Sum what ``run(expert, its tokens)`` gives over the experts ``[0, E)``, weighted, in fp32; dtype of ``x_TH``."""
    out_TH = torch.zeros_like(x_TH, dtype=torch.float32)
    for expert in expert_TK.unique().tolist():
        if not 0 <= expert < E:
            continue
        token, k = (expert_TK == expert).nonzero(as_tuple=True)
        out_TH.index_add_(0, token, weight_TK[token, k, None] * run(expert, x_TH[token]).float())
    return out_TH.to(x_TH.dtype)


def moe_experts_meta(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EIH: Tensor,
    down_EHI: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """Shape of `moe_experts`."""
    return torch.empty_like(x_TH)


def expert_rows(x_MH: Tensor, count_E: Tensor, gate_up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """``down(silu(gate(x)) · up(x))`` of rows sorted by expert, ``count_E`` (int64) of each; ``[M, H]``.

    What stands beyond the counts comes back undefined.
    """
    out_MH = torch.empty_like(x_MH)
    parts = zip(
        x_MH.split([*count_E.tolist(), int(x_MH.shape[0] - count_E.sum())]), gate_up_EIH, down_EHI, strict=False
    )
    done = [swiglu_mlp(*part) for part in parts]
    out_MH[: sum(map(len, done))] = torch.cat(done)
    return out_MH


def expert_rows_meta(x_MH: Tensor, count_E: Tensor, gate_up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """Shape of `expert_rows`."""
    return torch.empty_like(x_MH)


def rope_to_cache(
    qkv_BTC: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    length_B: Tensor,
    eps: float,
    slots: Tensor | None = None,
) -> Tensor:
    """Split a fused ``[q heads | k heads | v heads]`` projection, normalise, rotate, and store keys and values.

    Queries and keys get an RMSNorm per head (where its weight is given), then rotary embedding in the half style on
    their first ``2·R`` dimensions, in fp32. Keys and values of row ``b`` go to the slots ``length_B[b] - T …
    length_B[b] - 1`` of the caches, in place; an FP8 cache takes what is nearest to them, within ±448 and without a
    scale. ``slots`` says the same for devices that want it said so (`ops.layout`). Returns the queries
    ``[B, T, N, D]``.
    """
    B, T, C = qkv_BTC.shape
    G, D = k_BGSD.shape[1], k_BGSD.shape[3]
    q, k, v = qkv_BTC.view(B, T, C // D, D).split([C // D - 2 * G, G, G], dim=2)
    if q_norm_D is not None and k_norm_D is not None:
        q, k = rms_norm(q, q_norm_D, eps), rms_norm(k, k_norm_D, eps)
    slot_BT = length_B[:, None] - T + torch.arange(T, device=qkv_BTC.device)
    row_B1 = torch.arange(B, device=qkv_BTC.device)[:, None]
    k_BGSD.transpose(1, 2)[row_B1, slot_BT] = _stored(_rotate(k, cos_BTR, sin_BTR), k_BGSD.dtype)
    v_BGSD.transpose(1, 2)[row_B1, slot_BT] = _stored(v, v_BGSD.dtype)
    return _rotate(q, cos_BTR, sin_BTR)


def _rotate(x: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    R = cos_BTR.shape[-1]
    cos, sin = cos_BTR.unsqueeze(2), sin_BTR.unsqueeze(2)
    first, second, rest = x.split([R, R, x.shape[-1] - 2 * R], dim=-1)
    first, second = first.float(), second.float()
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated.to(x.dtype), rest], dim=-1)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    return fp8_values(x) if dtype is FP8 else x


def rope_to_cache_meta(
    qkv_BTC: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    length_B: Tensor,
    eps: float,
    slots: Tensor | None = None,
) -> Tensor:
    """Shape of `rope_to_cache`."""
    B, T, C = qkv_BTC.shape
    G, D = k_BGSD.shape[1], k_BGSD.shape[3]
    return qkv_BTC.new_empty((B, T, C // D - 2 * G, D))


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
    """Causal grouped-query attention of the last T tokens of each row over the row's cache; softmax in fp32.

    Row ``b`` holds keys in the slots ``start_B[b] … length_B[b] - 1`` (what lies before ``start`` is left padding), the
    T queries belong to its last T slots, and each sees the slots up to its own. A query that sees no slot (padding)
    gives 0. Returns ``[B, T, N, D]`` in the dtype of ``q``.

    ``mask`` (`ops.layout`) and ``lengths`` (``length_B`` on the host, given only if every ``start_B`` is 0) say the
    same for devices that want it said so.
    """
    B, T, N, D = q_BTND.shape
    G, S = k_BGSD.shape[1:3]
    q_BTGJD = q_BTND.view(B, T, G, N // G, D)
    score = torch.einsum("btgjd,bgsd->bgjts", q_BTGJD.float(), k_BGSD.float()) * scale
    slot_S = torch.arange(S, device=q_BTND.device)
    last_BT = length_B[:, None] - T + torch.arange(T, device=q_BTND.device)
    seen_BTS = (slot_S >= start_B[:, None, None]) & (slot_S <= last_BT[:, :, None])
    score = score.masked_fill(~seen_BTS[:, None, None], float("-inf"))
    weight = torch.softmax(score, dim=-1).masked_fill(~seen_BTS[:, None, None], 0.0)
    # An unwritten slot may hold NaN, and 0 · NaN is NaN.
    v = v_BGSD.float().masked_fill((slot_S >= length_B[:, None])[:, None, :, None], 0.0)
    return torch.einsum("bgjts,bgsd->btgjd", weight, v).reshape(B, T, N, D).to(q_BTND.dtype)


def attention_meta(
    q_BTND: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    start_B: Tensor,
    length_B: Tensor,
    scale: float,
    mask: Tensor | None = None,
    lengths: list[int] | None = None,
) -> Tensor:
    """Shape of `attention`."""
    return torch.empty_like(q_BTND, memory_format=torch.contiguous_format)
