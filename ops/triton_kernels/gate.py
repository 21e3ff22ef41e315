"""The router in one launch: add, RMSNorm, logits, and the choice of experts by whoever finishes a tile's logits last.

Shapes: T tokens (of a tile, 1 to 16), E experts (of a tile), H hidden_size, K experts per token, G groups, J experts of
a group, padded to powers of two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ops.triton_kernels.launch import counters
from ops.triton_kernels.norm import add_rms_norm

DECODE_TOKENS = 128  # of more the logits are a matrix product of the library's
# By tokens up to which: tokens, experts and inputs of a tile. The fewer tokens, the fewer experts, so that the router's
# 4 MB are read by the whole card. Not tuned on a card: none was at hand.
TILES = ((1, (1, 2, 1024)), (2, (2, 2, 512)), (4, (4, 4, 256)), (8, (8, 4, 128)), (DECODE_TOKENS, (16, 8, 64)))
CHOICE_TOKENS = 8  # of a tile of the choice alone


@triton.jit
def _gate(
    x, residual, norm, normed, total, router, bias, logits, counter, mix, expert, tokens, eps, scaling,
    H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, NORM: tl.constexpr,
    BIASED: tl.constexpr, NORMALISE: tl.constexpr, GROUPS_2: tl.constexpr, PER_2: tl.constexpr, K_2: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    tile_t, tile_e = tl.program_id(0), tl.program_id(1)
    token_T, expert_E = tile_t * BLOCK_T + tl.arange(0, BLOCK_T), tile_e * BLOCK_E + tl.arange(0, BLOCK_E)
    in_T, in_E = token_T < tokens, expert_E < E
    scale_T = tl.zeros((BLOCK_T,), tl.float32)
    if NORM:
        square_TH = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        for h in tl.range(0, H, BLOCK_H, num_stages=4):
            sum_TH, _ = _stream(x, residual, token_T, in_T, h, NORM, H, BLOCK_H)
            square_TH += sum_TH * sum_TH
        scale_T = tl.rsqrt(tl.sum(square_TH, 1) / H + eps)
    product_ETH = tl.zeros((BLOCK_E, BLOCK_T, BLOCK_H), tl.float32)
    for h in tl.range(0, H, BLOCK_H, num_stages=4):
        h_H = h + tl.arange(0, BLOCK_H)
        x_TH, where_TH = _stream(x, residual, token_T, in_T, h, NORM, H, BLOCK_H)
        in_TH = in_T[:, None] & (h_H < H)[None, :]
        if NORM:
            norm_H = tl.load(norm + h_H, mask=h_H < H, other=0.0).to(tl.float32)
            normed_TH = (x_TH * scale_T[:, None]).to(x.dtype.element_ty).to(tl.float32)
            normed_TH = (normed_TH * norm_H[None, :]).to(x.dtype.element_ty)
            if tile_e == 0:
                tl.store(normed + where_TH, normed_TH, mask=in_TH)
                tl.store(total + where_TH, x_TH.to(x.dtype.element_ty), mask=in_TH)
            x_TH = normed_TH.to(tl.float32)
        in_EH = in_E[:, None] & (h_H < H)[None, :]
        router_EH = tl.load(router + expert_E[:, None] * H + h_H[None, :], mask=in_EH, other=0.0).to(tl.float32)
        product_ETH += router_EH[:, None, :] * x_TH[None, :, :]
    logit_ET = tl.sum(product_ETH, 2)
    tl.store(logits + token_T[None, :] * E + expert_E[:, None], logit_ET, mask=in_E[:, None] & in_T[None, :])
    tl.debug_barrier()  # all threads' logits are written before one of them says so
    if tl.atomic_add(counter + tile_t, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
        tl.debug_barrier()
        _choose(
            logits, bias, mix, expert, token_T, in_T, scaling, E, K, GROUPS, KEPT, BIASED, NORMALISE, GROUPS_2, PER_2,
            K_2, BLOCK_T,
        )  # fmt: skip
        tl.store(counter + tile_t, 0)


@triton.jit
def _stream(x, residual, token_T, in_T, h, NORM: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """``x + residual`` as it is rounded, in fp32 ``[T, H]``, and where it is."""
    h_H = h + tl.arange(0, BLOCK_H)
    where_TH = token_T.to(tl.int64)[:, None] * H + h_H[None, :]
    inside = in_T[:, None] & (h_H < H)[None, :]
    x_TH = tl.load(x + where_TH, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        x_TH += tl.load(residual + where_TH, mask=inside, other=0.0).to(tl.float32)
        x_TH = x_TH.to(x.dtype.element_ty).to(tl.float32)
    return x_TH, where_TH


@triton.jit
def _choose(
    logits, bias, mix, expert, token_T, in_T, scaling, E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, BIASED: tl.constexpr, NORMALISE: tl.constexpr, GROUPS_2: tl.constexpr, PER_2: tl.constexpr,
    K_2: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """`reference.moe_gate` from the logits on; of equals the lowest expert."""
    PER: tl.constexpr = E // GROUPS
    group_G, of_J = tl.arange(0, GROUPS_2), tl.arange(0, PER_2)
    expert_GJ = group_G[:, None] * PER + of_J[None, :]
    real_GJ = (group_G < GROUPS)[:, None] & (of_J < PER)[None, :]
    inside = in_T[:, None, None] & real_GJ[None, :, :]
    where = logits + token_T[:, None, None] * E + expert_GJ[None, :, :]
    score_TGJ = tl.sigmoid(tl.load(where, mask=inside, other=0.0, cache_modifier=".cg"))
    biased_TGJ = score_TGJ
    if BIASED:
        biased_TGJ += tl.load(bias + expert_GJ, mask=real_GJ, other=0.0).to(tl.float32)[None, :, :]
    biased_TGJ = tl.where(real_GJ[None, :, :], biased_TGJ, float("-inf"))
    if GROUPS > 1:
        group_TG = tl.max(biased_TGJ, 2)
        if PER > 1:
            best_TG = tl.argmax(biased_TGJ, 2)
            rest_TGJ = tl.where(of_J[None, None, :] == best_TG[:, :, None], float("-inf"), biased_TGJ)
            group_TG += tl.max(rest_TGJ, 2)
        group_TG = tl.where((group_G < GROUPS)[None, :], group_TG, float("-inf"))
        kept_TG = tl.zeros((BLOCK_T, GROUPS_2), tl.int32)
        for _ in tl.static_range(KEPT):
            best_T = tl.argmax(group_TG, 1)
            is_best_TG = group_G[None, :] == best_T[:, None]
            kept_TG = tl.where(is_best_TG, 1, kept_TG)
            group_TG = tl.where(is_best_TG, float("-inf"), group_TG)
        biased_TGJ = tl.where((kept_TG > 0)[:, :, None], biased_TGJ, float("-inf"))
    biased_TE = tl.reshape(biased_TGJ, (BLOCK_T, GROUPS_2 * PER_2))
    place_E, k_K = tl.arange(0, GROUPS_2 * PER_2), tl.arange(0, K_2)
    expert_TK = tl.zeros((BLOCK_T, K_2), tl.int32)
    for k in tl.static_range(K):
        best_T = tl.argmax(biased_TE, 1)
        is_best_TE = place_E[None, :] == best_T[:, None]
        chosen_T = best_T // PER_2 * PER + best_T % PER_2
        expert_TK = tl.where((k_K == k)[None, :], chosen_T[:, None], expert_TK)
        biased_TE = tl.where(is_best_TE, float("-inf"), biased_TE)
    inside = in_T[:, None] & (k_K < K)[None, :]
    logit_TK = tl.load(
        logits + token_T[:, None] * E + expert_TK, mask=inside, other=float("-inf"), cache_modifier=".cg"
    )
    mix_TK = tl.sigmoid(logit_TK)
    if NORMALISE:
        mix_TK = tl.div_rn(mix_TK, tl.broadcast_to((tl.sum(mix_TK, 1) + 1e-20)[:, None], BLOCK_T, K_2))
    where = token_T[:, None] * K + k_K[None, :]
    tl.store(mix + where, mix_TK * scaling, mask=inside)
    tl.store(expert + where, expert_TK.to(tl.int64), mask=inside)


@triton.jit
def _choice(
    logits, bias, mix, expert, tokens, scaling, E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, BIASED: tl.constexpr, NORMALISE: tl.constexpr, GROUPS_2: tl.constexpr, PER_2: tl.constexpr,
    K_2: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    _choose(
        logits, bias, mix, expert, token_T, token_T < tokens, scaling, E, K, GROUPS, KEPT, BIASED, NORMALISE, GROUPS_2,
        PER_2, K_2, BLOCK_T,
    )  # fmt: skip


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
    """`reference.moe_gate`."""
    weight_TK, expert_TK, _, _ = _run(
        x_TH, None, None, 0.0, weight_EH, bias_E, top_k, n_group, topk_group, normalise, scaling
    )
    return weight_TK, expert_TK


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
    """`fused.add_rms_norm_gate`."""
    return _run(x_TH, residual_TH, norm_H, eps, weight_EH, bias_E, top_k, n_group, topk_group, normalise, scaling)


def _run(
    x_TH: Tensor,
    residual_TH: Tensor | None,
    norm_H: Tensor | None,
    eps: float,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, H), E, groups = x_TH.shape, weight_EH.shape[0], max(n_group, 1)
    x_TH = x_TH.contiguous()
    weight_TK = x_TH.new_empty((T, top_k), dtype=torch.float32)
    expert_TK = x_TH.new_empty((T, top_k), dtype=torch.int64)
    choice = (E, top_k, groups, topk_group, bias_E is not None, normalise and top_k > 1)
    padded = tuple(map(triton.next_power_of_2, (groups, E // groups, top_k)))
    normed_TH = total_TH = x_TH
    if T > DECODE_TOKENS:
        if residual_TH is not None and norm_H is not None:
            normed_TH, total_TH = add_rms_norm(x_TH, residual_TH, norm_H, eps)
        logits_TE = F.linear(normed_TH.float(), weight_EH.float())
        _choice[(triton.cdiv(T, CHOICE_TOKENS),)](
            logits_TE, bias_E, weight_TK, expert_TK, T, scaling, *choice, *padded, CHOICE_TOKENS, num_warps=4
        )
    elif T:
        normed = residual_TH is not None
        if residual_TH is not None:
            residual_TH = residual_TH.contiguous()
            normed_TH, total_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
        logits_TE = x_TH.new_empty((T, E), dtype=torch.float32)
        tokens, experts, inputs = next(tile for limit, tile in TILES if limit >= T)
        inputs = min(inputs, triton.next_power_of_2(H))
        grid = (triton.cdiv(T, tokens), triton.cdiv(E, experts))
        _gate[grid](
            x_TH, residual_TH, norm_H, normed_TH, total_TH, weight_EH, bias_E,
            logits_TE, counters(x_TH.device, "gate", DECODE_TOKENS), weight_TK, expert_TK, T, eps, scaling, H,
            *choice[:4], normed, *choice[4:], *padded, tokens, experts, inputs, num_warps=4,
        )  # fmt: skip
    elif residual_TH is not None:
        normed_TH, total_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
    return weight_TK, expert_TK, normed_TH, total_TH
