"""Expert outputs back to their tokens, weighted and added up.

Shapes: N tokens, K experts per token, H hidden_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend.emulator.limits import (
    FLOATS,
    Refused,
    require,
    require_absent,
    require_dim,
    require_dtype,
    require_nd,
    require_shape,
    require_value,
)


def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    """``out[t] = Σ_k probs[t, k] · permuted_tokens[sorted_indices[t·K + k]]``: fp32, k in order, one rounding.

    A slot is left out, so that NaN in its row stays away, when its probability is 0 or its index lies past the last
    row. At another slot with a negative index the device reads foreign memory: refused. Source: the kernel of
    ops-transformer (its page says bf16 only; the kernel takes the three floats, probs may be fp32 with bf16 rows).
    """
    op = "npu_moe_token_unpermute"
    require_value(op, "padded_mode", padded_mode, (False,))
    require_absent(op, restore_shape=restore_shape)
    require_dim(op, "permuted_tokens", permuted_tokens, 2)
    require_dim(op, "sorted_indices", sorted_indices, 1)
    require_dtype(op, "permuted_tokens", permuted_tokens, *FLOATS)
    require_dtype(op, "sorted_indices", sorted_indices, torch.int32, torch.int64)
    require_nd(op, permuted_tokens=permuted_tokens, probs=probs)
    rows, H = permuted_tokens.shape
    if probs is None:
        index_TK = sorted_indices.long().reshape(-1, 1)
        prob_TK = torch.ones(index_TK.shape)
    else:
        require_dtype(op, "probs", probs, *FLOATS)
        require_dim(op, "probs", probs, 2)
        require(0 < probs.shape[1] <= 512, op, f"{probs.shape[1]} experts per token; the device takes 1 to 512")
        require(probs.numel() == sorted_indices.numel(), op, "probs and sorted_indices differ in length")
        index_TK = sorted_indices.long().reshape(probs.shape)
        prob_TK = probs.float()
    taken_TK = (prob_TK != 0) & (index_TK < rows)
    require(not bool((taken_TK & (index_TK < 0)).any()), op, "a negative index has a probability other than 0")
    out_TH = torch.zeros(index_TK.shape[0], H)
    for k in range(index_TK.shape[1]):
        token = taken_TK[:, k].nonzero().flatten()
        out_TH[token] += prob_TK[token, k, None] * permuted_tokens[index_TK[token, k]].float()
    return out_TH.to(permuted_tokens.dtype)


def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """``out[n] = skip1 + skip2 + Σ_k scales[n, k] · (rows[j] + bias[expert])``: fp32, k in order, one rounding.

    j is ``index[k·N + n]`` with ``drop_pad_mode`` 0, the default (column-major), and ``index[n·K + k]`` with 2, which
    goes with `npu_moe_init_routing_v2`. In these two modes -1 is no index: the device multiplies stale data. The
    padded modes 1 and 3 are not covered. scales: the dtype of the rows, or fp32 with bf16 rows (CANN 8.5 and later).
    """
    op = "npu_moe_finalize_routing"
    require_value(op, "drop_pad_mode", drop_pad_mode, (0, 2))
    require_value(op, "k", k, (1,))
    rows, index = expanded_permuted_rows, expanded_src_to_dst_row
    require_dtype(op, "expanded_permuted_rows", rows, *FLOATS)
    require_dim(op, "expanded_permuted_rows", rows, 2)
    require_nd(op, expanded_permuted_rows=rows)
    require_dtype(op, "expanded_src_to_dst_row", index, torch.int32)
    require_dim(op, "expanded_src_to_dst_row", index, 1)
    K = 1 if scales is None else scales.shape[-1]
    require(K > 0 and index.numel() % K == 0, op, f"{index.numel()} indices are not of {K} experts per token")
    N, H = index.numel() // K, rows.shape[1]
    out = torch.zeros(N, H)
    require(skip2 is None or skip1 is not None, op, "skip2 is given without skip1")
    for name, skip in (("skip1", skip1), ("skip2", skip2)):
        if skip is not None:
            require_dtype(op, name, skip, rows.dtype)
            require_shape(op, name, skip, [N, H])
            out = out + skip.float()
    weight_NK = torch.ones(N, K)
    if scales is not None:
        require_dtype(op, "scales", scales, rows.dtype, *((torch.float32,) if rows.dtype == torch.bfloat16 else ()))
        require_shape(op, "scales", scales, [N, K])
        weight_NK = scales.float()
    inside = bool(((index >= 0) & (index < len(rows))).all())
    require(inside, op, f"an index is outside the {len(rows)} rows (-1: a partial expert range)")
    index_NK = index.long().view(N, K) if drop_pad_mode == 2 else index.long().view(K, N).T
    if bias is not None:
        require_dtype(op, "bias", bias, rows.dtype)
        if export_for_source_row is None:
            raise Refused(f"{op}: bias is given without export_for_source_row")
        require_dtype(op, "export_for_source_row", export_for_source_row, torch.int32)
        require_shape(op, "export_for_source_row", export_for_source_row, [N, K])
    for choice in range(K):
        row = rows[index_NK[:, choice]].float()
        if bias is not None and export_for_source_row is not None:
            row = row + bias[export_for_source_row[:, choice].long()].float()
        out = out + weight_NK[:, choice, None] * row
    return out.to(rows.dtype)
