"""Attention over a key-value cache, contiguous or in blocks.

Shapes: B sequences, S new tokens of each (at most), T new tokens of all, L keys of a sequence, N query heads, G
key-value heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ascend.emulator.kernels.kv import contiguous_kv, paged_kv, per_sequence
from ascend.emulator.kernels.masks import sequence_masks
from ascend.emulator.kernels.unwritten import unwritten
from ascend.emulator.limits import (
    Refused,
    require,
    require_absent,
    require_contiguous,
    require_dim,
    require_dtype,
    require_nd,
    require_value,
)

OP = "npu_fused_infer_attention_score"


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    query_padding_size: Tensor | None = None,
    kv_padding_size: Tensor | None = None,
    key_shared_prefix: Tensor | None = None,
    value_shared_prefix: Tensor | None = None,
    actual_shared_prefix_len: list[int] | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    key_rope_antiquant_scale: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    antiquant_mode: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale · q kᵀ) v`` per sequence, fp16 or bf16: ``(out like query, log-sum-exp fp32 or [0])``.

    ``scale`` is 1.0 unless given. Layouts BSH, BSND, BNSD and TND (head_dim 128 or 192). In TND the query lengths
    are cumulative and end at T; the key lengths are cumulative too, but per sequence with a ``block_table``. In the
    others both are per sequence, and new tokens past a length are unwritten. ``sparse_mode`` 0: all keys but those
    where ``atten_mask`` is not 0; 3: causal, the last query on the last key, with the fixed 2048 × 2048 mask. A
    query all of whose keys are masked gets 0 in mode 3 and with ``inner_precise`` 2; otherwise garbage. Softmax in
    fp32, its weights rounded to the dtype before the product with v, one rounding of the sum. Limits: the op's page.
    """
    require_absent(OP, pse_shift=pse_shift, dequant_scale1=dequant_scale1, quant_scale1=quant_scale1)
    require_absent(OP, dequant_scale2=dequant_scale2, quant_scale2=quant_scale2, quant_offset2=quant_offset2)
    require_absent(OP, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset)
    require_absent(OP, key_antiquant_scale=key_antiquant_scale, key_antiquant_offset=key_antiquant_offset)
    require_absent(OP, value_antiquant_scale=value_antiquant_scale, value_antiquant_offset=value_antiquant_offset)
    require_absent(OP, query_padding_size=query_padding_size, kv_padding_size=kv_padding_size)
    require_absent(OP, key_shared_prefix=key_shared_prefix, value_shared_prefix=value_shared_prefix)
    require_absent(OP, actual_shared_prefix_len=actual_shared_prefix_len, query_rope=query_rope, key_rope=key_rope)
    require_absent(OP, key_rope_antiquant_scale=key_rope_antiquant_scale)
    require_value(OP, "antiquant modes", (antiquant_mode, key_antiquant_mode, value_antiquant_mode), ((0, 0, 0),))
    require_value(OP, "input_layout", input_layout, ("BSH", "BSND", "BNSD", "TND"))
    require_value(OP, "sparse_mode", sparse_mode, (0, 3))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_dtype(OP, name, tensor, torch.float16, torch.bfloat16)
        require(tensor.dtype == query.dtype, OP, f"{name} is {tensor.dtype}, query {query.dtype}; the same is needed")
    require_contiguous(OP, query=query, key=key, value=value, atten_mask=atten_mask, block_table=block_table)
    require_nd(OP, query=query, key=key, value=value)
    N, G = num_heads, num_key_value_heads or num_heads
    require(0 < N <= 256 and N % G == 0 and N // G <= 64, OP, f"num_heads {N} by {G} key-value heads is not allowed")

    q = _by_token(query, input_layout, N)
    D = q.shape[-1]
    require(0 < D <= 512 and D % 16 == 0, OP, f"head_dim is {D}; a multiple of 16 up to 512 is needed")
    tnd = input_layout == "TND"
    require(not tnd or D in (128, 192), OP, f"head_dim is {D}; layout TND takes 128 or 192")
    spans = _query_spans(q, actual_seq_lengths, tnd)
    single = not tnd and q.shape[1] == 1
    allowed = {0, 1, 2, 3} if query.dtype == torch.bfloat16 else {0, 2}  # 1 and 3 compute fp16 in lower precision
    allowed &= {0} if tnd else {0, 1} if single else {0, 1, 2, 3}
    require_value(OP, "inner_precise", inner_precise, sorted(allowed))
    if block_table is None:
        pairs = contiguous_kv(OP, key, value, input_layout, len(spans), G, D, actual_seq_lengths_kv)
    else:
        lengths = actual_seq_lengths_kv
        pairs = paged_kv(OP, key, value, input_layout, len(spans), G, D, lengths, block_table, block_size, single)
    sizes = [(len(q[span]), len(k)) for span, (k, _) in zip(spans, pairs, strict=True)]
    if atten_mask is not None and sparse_mode == 0:
        widest = min(pre_tokens, next_tokens)
        require(widest >= max(max(size) for size in sizes), OP, "pre_tokens and next_tokens cut; not covered")
    keys = block_table.shape[1] * block_size if block_table is not None else max(L for _, L in sizes)
    masks = sequence_masks(OP, atten_mask, sparse_mode, sizes, None if tnd else (q.shape[1], keys))

    out = unwritten(q.shape, query.dtype)
    lse = unwritten((*q.shape[:-1], 1), torch.float32)
    for span, (k, v), mask in zip(spans, pairs, masks, strict=True):
        out[span], lse[span] = _attend(q[span], k, v, mask, scale, zero=sparse_mode == 3 or inner_precise >= 2)
    if not softmax_lse_flag:
        lse = torch.empty(0)
    elif not tnd:
        lse = lse.transpose(1, 2).contiguous()
    if input_layout == "BNSD":
        return out.transpose(1, 2).contiguous(), lse
    return out.view(query.shape), lse


def _by_token(query: Tensor, layout: str, heads: int) -> Tensor:
    """``query`` as ``[B, S, N, D]`` or ``[T, N, D]``."""
    require_dim(OP, "query", query, 3 if layout in ("BSH", "TND") else 4)
    if layout == "BSH":
        require(query.shape[-1] % heads == 0, OP, f"H {query.shape[-1]} is not num_heads {heads} by head_dim")
        query = query.unflatten(-1, (heads, -1))
    elif layout == "BNSD":
        query = query.transpose(1, 2)
    require(query.shape[-2] == heads, OP, f"num_heads is {heads}, query has {query.shape[-2]}")
    return query


Span = slice | tuple[int, slice]
"""Where the new tokens of one sequence lie: rows of ``[T, N, D]``, or a sequence and its first rows of a batch."""


def _query_spans(q: Tensor, lengths: list[int] | None, tnd: bool) -> list[Span]:
    if not tnd:
        B, S = q.shape[:2]
        if lengths is None or S == 1:
            lengths = [S]
        return [(b, slice(0, n)) for b, n in enumerate(per_sequence(OP, "actual_seq_lengths", lengths, B, S))]
    if lengths is None or not 0 < len(lengths) <= 4096:
        raise Refused(f"{OP}: actual_seq_lengths is missing or not of 1 to 4096 sequences; layout TND needs it")
    starts = [0, *lengths[:-1]]
    rising = all(start <= end for start, end in zip(starts, lengths, strict=True))
    require(rising, OP, f"actual_seq_lengths {lengths} decreases; in layout TND it is cumulative")
    require(lengths[-1] == len(q), OP, f"actual_seq_lengths ends at {lengths[-1]}; in layout TND it is T, {len(q)}")
    return [slice(start, end) for start, end in zip(starts, lengths, strict=True)]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, zero: bool) -> tuple[Tensor, Tensor]:
    """One sequence: ``q [S, N, D]``, ``k`` and ``v`` ``[L, G, D]``, ``mask [S, L]`` True where left out."""
    S, N = q.shape[:2]
    if S == 0 or len(k) == 0:
        return torch.zeros_like(q), torch.full((S, N, 1), float("inf"))
    q_GXD = q.float().unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).flatten(1, 2)
    score = (q_GXD @ k.float().permute(1, 2, 0)).unflatten(1, (-1, S)) * scale
    if mask is not None:
        score = score.masked_fill(mask, float("-inf"))
    best = score.amax(-1, keepdim=True)
    weight = torch.exp(score - best)
    total = weight.sum(-1, keepdim=True)
    out = (weight.to(q.dtype).float() @ v.float().transpose(0, 1)[:, None]) / total
    if mask is not None and zero:
        out = out.masked_fill(mask.all(-1)[:, None], 0.0)
    lse = best + total.log()
    return out.flatten(0, 1).transpose(0, 1).to(q.dtype), lse.flatten(0, 1).transpose(0, 1)


def into(*arguments: Any, workspace: Tensor | None = None, out: list[Tensor], **keywords: Any) -> tuple[Tensor, ...]:
    """The overload ``.out``, which graph capture uses: writes the two results into ``out``.

    Without ``softmax_lse_flag`` there is no second result, and its place of any shape (vllm-ascend's is ``[1]``) is
    left as it is.
    """
    for place, result in zip(out, npu_fused_infer_attention_score(*arguments, **keywords), strict=True):
        if place.numel() and result.numel():
            place.copy_(result)
    return tuple(out)
