"""Tokens into expert order.

Shapes: T tokens, K experts per token, R rows in expert order, A of them written (slots whose expert is local), H
hidden_size. The flat slot of a token's k-th choice is ``token · K + k`` (row-major) unless a kernel says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend.emulator.kernels.quant import quantised
from ascend.emulator.kernels.unwritten import unwritten
from ascend.emulator.limits import (
    FLOATS,
    require,
    require_absent,
    require_dim,
    require_dtype,
    require_nd,
    require_shape,
    require_value,
)


def npu_moe_init_routing_v2(
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
    quant_mode: int = -1,
    active_expert_range: list[int] | None = None,
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copy ``x[T, H]`` into the order of its experts: ``(rows [R, H], row_idx int32 [T·K], tokens int64, scale [R])``.

    The sort by expert is stable and slots outside ``active_expert_range`` come last. Only the first A rows (at most
    ``active_num``, which counts rows) and as many scales are written. ``row_idx_type`` 0: the row of each flat slot,
    -1 where its expert is not local; 1: the flat slot of each row, unwritten from A on. ``tokens`` per local expert
    is cumulative (type 0) or counted (1), or pairs of expert and count (2, ``[expert_num, 2]``, unwritten after one
    pair of zeros); without ``expert_tokens_num_flag`` it is an unwritten 0-dim tensor. ``quant_mode`` 1: int8 rows
    and their scales, after a smooth scale; -1 with ``scale[T]``: the scales of already quantised tokens.
    Not covered: ``drop_pad_mode`` 1 and static quantisation. Source: the op's page and its reference code.
    """
    op = "npu_moe_init_routing_v2"
    require_value(op, "drop_pad_mode", drop_pad_mode, (0,), "the emulator is dropless")
    require_value(op, "quant_mode", quant_mode, (-1, 1), "FP8, FP4 and HiF8 modes need a 950, static is not covered")
    require_value(op, "row_idx_type", row_idx_type, (0, 1))
    require_value(op, "expert_tokens_num_type", expert_tokens_num_type, (0, 1, 2))
    require_absent(op, offset=offset, x_dtype=x_dtype)
    require(active_num >= -1, op, f"active_num is {active_num}; it must be -1 or more")
    most = 5120 if expert_tokens_num_type == 2 else 10240
    require(0 < expert_num <= most, op, f"expert_num is {expert_num}; it must be given, in 1..{most}")
    start, end = active_expert_range or (0, expert_num)
    require(0 <= start < end <= expert_num, op, f"active_expert_range [{start}, {end}] is not in [0, {expert_num}]")
    require_dim(op, "x", x, 2)
    require_dtype(op, "x", x, *FLOATS, *((torch.int8,) if quant_mode == -1 else ()))
    require_dtype(op, "expert_idx", expert_idx, torch.int32)
    require_dim(op, "expert_idx", expert_idx, 2)
    require_nd(op, x=x, expert_idx=expert_idx, scale=scale)
    T, H = x.shape
    K = expert_idx.shape[1]
    require(expert_idx.shape[0] == T, op, f"expert_idx has {expert_idx.shape[0]} rows, x has {T}")
    expert = expert_idx.reshape(-1).long()
    if expert.numel():
        require(int(expert.min()) >= 0 and int(expert.max()) < expert_num, op, f"an expert is not in 0..{expert_num}")

    local = (expert >= start) & (expert < end)
    order = expert.masked_fill(~local, 2**31).sort(stable=True).indices[: int(local.sum())]
    R = min(active_num, T * K) if active_num > 0 else T * K
    written = order[:R]
    if row_idx_type == 0:
        row_idx = torch.full((T * K,), -1, dtype=torch.int32)
        row_idx[order] = torch.arange(order.numel(), dtype=torch.int32)
    else:
        row_idx = unwritten((T * K,), torch.int32)
        row_idx[: order.numel()] = order.int()

    rows = unwritten((R, H), torch.int8 if quant_mode == 1 else x.dtype)
    scales = unwritten((R,), torch.float32)
    if quant_mode == 1:
        smoothed = x[written // K].float()
        if scale is not None:
            require_dtype(op, "scale", scale, torch.float32)
            require(scale.shape in ((end - start, H), (1, H)), op, f"scale has shape {list(scale.shape)}")
            smoothed = smoothed * (scale if scale.shape[0] == 1 else scale[expert[written] - start])
        rows[: len(written)], scales[: len(written)] = quantised(smoothed)
    else:
        rows[: len(written)] = x[written // K]
        if scale is not None:
            require_dtype(op, "scale", scale, torch.float32)
            require_shape(op, "scale", scale, [T])
            scales[: len(written)] = scale[written // K]

    count = torch.bincount(expert[local] - start, minlength=end - start)
    if not expert_tokens_num_flag:
        tokens = unwritten((), torch.int64)
    elif expert_tokens_num_type == 2:
        tokens = unwritten((expert_num, 2), torch.int64)
        used = count.nonzero().flatten()
        tokens[: len(used)] = torch.stack((used + start, count[used]), dim=1)
        tokens[len(used) : len(used) + 1] = 0
    else:
        tokens = count.cumsum(0) if expert_tokens_num_type == 0 else count
    return rows, row_idx, tokens, scales


def npu_moe_re_routing(
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    *,
    per_token_scales: Tensor | None = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
    tokens_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows that arrived rank by rank (each by expert) into expert order: ``(rows, scales, source int32, count [E])``.

    ``expert_token_num_per_rank`` is ``[ranks, E]``, int32 or int64, and adds up to the rows. fp16, bf16 or int8; the
    scales are unwritten where none came in. Source: the op's page.
    """
    op = "npu_moe_re_routing"
    require_absent(op, tokens_dtype=tokens_dtype)
    require_value(op, "expert_token_num_type", expert_token_num_type, (1,))
    require_value(op, "idx_type", idx_type, (0,))
    require_dtype(op, "tokens", tokens, torch.float16, torch.bfloat16, torch.int8)
    require_dim(op, "tokens", tokens, 2)
    require_nd(op, tokens=tokens)
    A, H = tokens.shape
    require(0 < H < 16384, op, f"the tokens are {H} wide; below 16384 is needed")
    count = expert_token_num_per_rank
    require_dtype(op, "expert_token_num_per_rank", count, torch.int32, torch.int64)
    require_dim(op, "expert_token_num_per_rank", count, 2)
    require(not bool((count < 0).any()), op, "expert_token_num_per_rank has a negative count")
    require(int(count.sum()) == A, op, f"expert_token_num_per_rank adds up to {int(count.sum())}, not to {A} tokens")
    ranks, E = count.shape
    expert = torch.arange(E).repeat(ranks).repeat_interleave(count.flatten().long())
    source = expert.sort(stable=True).indices
    scales = unwritten((A,), torch.float32)
    if per_token_scales is not None:
        require_dtype(op, "per_token_scales", per_token_scales, torch.float32)
        require_shape(op, "per_token_scales", per_token_scales, [A])
        scales = per_token_scales[source]
    return tokens[source], scales, source.int(), count.sum(0, dtype=count.dtype)
