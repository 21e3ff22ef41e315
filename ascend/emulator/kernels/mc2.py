"""Dispatch of tokens to the ranks of their experts, and the combination of what comes back (MC2, full mesh).

Shapes: B tokens of this rank, K experts per token, H hidden_size, E experts of this rank, A rows reserved for arrivals.
Rows arrive by local expert, then source rank, then token; a token comes once per expert it chose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ascend.emulator.kernels.quant import quantised
from ascend.emulator.kernels.unwritten import unwritten
from ascend.emulator.limits import (
    Refused,
    require,
    require_absent,
    require_dim,
    require_dtype,
    require_nd,
    require_shape,
    require_value,
)

RANKS = range(2, 9)
"""EP sizes covered: 2 to 8, legal from CANN 9.0 on and always full mesh. 8.5 wants 8 and at most 24 experts a rank."""
INFO = 3
"""Leading int32 per row in ``assist_info_for_combine``: source rank, token, k. Its layout is nobody else's business."""


def by_name(name: str) -> Any:
    """The emulator's communicator of that HCCL name: ``rank``, ``size`` and ``all_to_all(tensors)``."""
    from ascend.emulator import communicator

    return communicator.by_name(name).claimed("MC2")


def npu_moe_distribute_dispatch_v2(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    scales: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expert_scales: Tensor | None = None,
    elastic_info: Tensor | None = None,
    performance_info: Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    y_dtype: int | None = None,
    x_dtype: int | None = None,
    scales_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send ``x[B, H]`` (fp16 or bf16) to the experts of ``expert_ids[B, K]``.

    Returns ``(rows [A, H], row scales fp32 [A], assist info, count per expert [E], receive counts, tp counts, weights
    [A])`` with ``A = global batch · min(E, K)``. ``quant_mode`` 2 sends int8 and its scales. Rows past the arrivals
    are unwritten, as are the scales without quantisation and the weights past them. The receive counts are prefix
    sums at ``expert · ranks + rank``; with ``expert_scales`` unwritten space follows them. Source: the op's page.
    """
    op = "npu_moe_distribute_dispatch_v2"
    require_absent(op, scales=scales, elastic_info=elastic_info, performance_info=performance_info)
    require_absent(op, y_dtype=y_dtype, x_dtype=x_dtype, scales_dtype=scales_dtype)
    _require_plain(op, group_tp, tp_world_size, tp_rank_id, expert_shard_type, shared_expert_num, comm_alg)
    others = (shared_expert_rank_num, zero_expert_num, copy_expert_num, const_expert_num)
    require_value(op, "numbers of shared, zero, copy and constant experts", others, ((0, 0, 0, 0),))
    require_value(op, "quant_mode", quant_mode, (0, 2))
    require_value(op, "expert_token_nums_type", expert_token_nums_type, (0, 1))
    require_dtype(op, "x", x, torch.float16, torch.bfloat16)
    require_dim(op, "x", x, 2)
    require_nd(op, x=x)
    B, H = x.shape
    K = _require_tokens(op, expert_ids, B, H, moe_expert_num, ep_world_size)
    active = _active(op, x_active_mask, B)
    if expert_scales is not None:
        require_dtype(op, "expert_scales", expert_scales, torch.float32)
        require_shape(op, "expert_scales", expert_scales, [B, K])
    masked, weighted = x_active_mask is not None, expert_scales is not None
    same = [H, K, moe_expert_num, quant_mode, global_bs, int(x.dtype == torch.bfloat16), int(weighted)]
    ranks, whole_batch = _meet(op, group_ep, ep_rank_id, ep_world_size, B, global_bs, masked, same)
    E = moe_expert_num // ep_world_size

    expert, order = expert_ids[:active].reshape(-1).long().sort(stable=True)
    token, choice = order // K, order % K
    count_RE = torch.bincount(expert, minlength=moe_expert_num).view(ep_world_size, E)
    split = count_RE.sum(1).tolist()
    info = torch.stack((torch.full_like(token, ep_rank_id), token, choice), dim=1).int()
    sent, sent_scale = quantised(x[token]) if quant_mode == 2 else (x[token], torch.empty(len(token)))
    weight = torch.empty(len(token)) if expert_scales is None else expert_scales[token, choice]

    arrived_RE = torch.stack(ranks.all_to_all([count.int() for count in count_RE]))
    label = torch.arange(E).repeat(ep_world_size).repeat_interleave(arrived_RE.flatten().long())
    into = label.sort(stable=True).indices

    def exchange(values: Tensor) -> Tensor:
        return torch.cat(ranks.all_to_all(list(values.split(split))))[into]

    rows = len(into)
    A = whole_batch * min(E, K)
    expand_x = unwritten((A, H), sent.dtype)
    dynamic_scales = unwritten((A,), torch.float32)
    assist_info = unwritten((max(B * K, A * 128),), torch.int32)
    expand_x[:rows] = exchange(sent)
    assist_info[: rows * INFO] = exchange(info).flatten()
    if quant_mode == 2:
        dynamic_scales[:rows] = exchange(sent_scale)
    receive_counts = arrived_RE.T.flatten().cumsum(0, dtype=torch.int32)
    expand_scales = torch.empty(0)
    if weighted:
        expand_scales = unwritten((A,), torch.float32)
        expand_scales[:rows] = exchange(weight)
        space = unwritten((whole_batch * 2 * K * (ep_world_size // 8),), torch.int32)
        receive_counts = torch.cat((receive_counts, space))
    count_E = arrived_RE.sum(0, dtype=torch.int64)
    count_E = count_E if expert_token_nums_type == 1 else count_E.cumsum(0)
    tp_counts = unwritten((tp_world_size,), torch.int32)
    return expand_x, dynamic_scales, assist_info, count_E, receive_counts, tp_counts, expand_scales


def npu_moe_distribute_combine_v2(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expand_scales: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    elastic_info: Tensor | None = None,
    ori_x: Tensor | None = None,
    const_expert_alpha_1: Tensor | None = None,
    const_expert_alpha_2: Tensor | None = None,
    const_expert_v: Tensor | None = None,
    performance_info: Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> Tensor:
    """Send the rows of `npu_moe_distribute_dispatch_v2` back and add them up: ``[B, H]`` in the dtype of the rows.

    ``out[b] = Σ_k expert_scales[b, k] · row`` in fp32, k in order, one rounding. ``expand_scales`` is demanded on A2
    though not used in the full mesh. Tokens that ``x_active_mask`` leaves out are unwritten. Source: the op's page.
    """
    op = "npu_moe_distribute_combine_v2"
    require_absent(op, shared_expert_x=shared_expert_x, elastic_info=elastic_info, ori_x=ori_x)
    require_absent(op, const_expert_alpha_1=const_expert_alpha_1, const_expert_alpha_2=const_expert_alpha_2)
    require_absent(op, const_expert_v=const_expert_v, performance_info=performance_info)
    _require_plain(op, group_tp, tp_world_size, tp_rank_id, expert_shard_type, shared_expert_num, comm_alg)
    others = (shared_expert_rank_num, zero_expert_num, copy_expert_num, const_expert_num)
    require_value(op, "numbers of shared, zero, copy and constant experts", others, ((0, 0, 0, 0),))
    require_value(op, "comm_quant_mode", comm_quant_mode, (0,))
    require_dtype(op, "expand_x", expand_x, torch.float16, torch.bfloat16)
    require_dim(op, "expand_x", expand_x, 2)
    require_nd(op, expand_x=expand_x)
    require(expand_scales is not None, op, "expand_scales is missing; A2 demands dispatch's last output")
    B, H = expert_ids.shape[0], expand_x.shape[1]
    K = _require_tokens(op, expert_ids, B, H, moe_expert_num, ep_world_size)
    active = _active(op, x_active_mask, B)
    require_dtype(op, "expert_scales", expert_scales, torch.float32)
    require_shape(op, "expert_scales", expert_scales, [B, K])
    require_dtype(op, "assist_info_for_combine", assist_info_for_combine, torch.int32)
    require_dtype(op, "ep_send_counts", ep_send_counts, torch.int32)
    E = moe_expert_num // ep_world_size
    require(ep_send_counts.numel() >= moe_expert_num, op, "ep_send_counts is not dispatch's fifth output")
    same = [H, K, moe_expert_num, global_bs, int(expand_x.dtype == torch.bfloat16)]
    masked = x_active_mask is not None
    ranks, whole_batch = _meet(op, group_ep, ep_rank_id, ep_world_size, B, global_bs, masked, same)
    A = whole_batch * min(E, K)
    require(expand_x.shape[0] >= A, op, f"expand_x has {expand_x.shape[0]} rows; dispatch made {A}")

    rows = int(ep_send_counts[moe_expert_num - 1])
    info = assist_info_for_combine[: rows * INFO].view(rows, INFO)
    source, order = info[:, 0].long().sort(stable=True)
    split = torch.bincount(source, minlength=ep_world_size).tolist()
    back = torch.cat(ranks.all_to_all(list(expand_x[:rows][order].split(split))))
    slot = torch.cat(ranks.all_to_all(list(info[order, 1:].split(split)))).long()
    returned = unwritten((active, K, H), torch.float32)
    returned[slot[:, 0], slot[:, 1]] = back.float()
    total = torch.zeros(active, H)
    for k in range(K):
        total = total + expert_scales[:active, k, None] * returned[:, k]
    out = unwritten((B, H), expand_x.dtype)
    out[:active] = total.to(expand_x.dtype)
    return out


def _require_plain(
    op: str, group_tp: str, tp_size: int, tp_rank: int, shard_type: int, shared_expert_num: int, comm_alg: str
) -> None:
    """No tensor parallel group, no shared experts, the full mesh: all that A2 has within one server."""
    require_value(op, "group_tp", group_tp, ("",))
    require_value(op, "tp_world_size", tp_size, (0, 1))
    require_value(op, "tp_rank_id", tp_rank, (0,))
    require_value(op, "expert_shard_type", shard_type, (0,))
    require_value(op, "shared_expert_num", shared_expert_num, (0, 1))
    require_value(op, "comm_alg", comm_alg, ("", "fullmesh"), "hierarchy is for 16 ranks and more")


def _require_tokens(op: str, expert_ids: Tensor, B: int, H: int, experts: int, ranks: int) -> int:
    """Check the batch against A2's ranges; return K."""
    require(ranks in RANKS, op, f"ep_world_size is {ranks}; covered are 2 to 8")
    require(0 < experts <= 1024 and experts % ranks == 0, op, f"{experts} experts (1 to 1024) on {ranks} ranks")
    require(0 < B <= 256, op, f"{B} tokens on this rank; the full mesh takes 1 to 256")
    require(0 < H <= 7168 and H % 32 == 0, op, f"H is {H}; a multiple of 32 up to 7168 is needed")
    require_dtype(op, "expert_ids", expert_ids, torch.int32)
    require_dim(op, "expert_ids", expert_ids, 2)
    K = expert_ids.shape[1]
    require(expert_ids.shape[0] == B and 0 < K <= min(16, experts), op, f"{K} experts per token; 1 to 16 are needed")
    inside = bool(((expert_ids >= 0) & (expert_ids < experts)).all())
    require(inside, op, f"an expert is not in 0..{experts - 1}")
    ordered = expert_ids.sort(dim=1).values
    require(not bool((ordered[:, 1:] == ordered[:, :-1]).any()), op, "a token has the same expert twice")
    return K


def _active(op: str, mask: Tensor | None, B: int) -> int:
    """How many leading tokens take part."""
    if mask is None:
        return B
    require_dtype(op, "x_active_mask", mask, torch.bool)
    require_shape(op, "x_active_mask", mask, [B])
    active = int(mask.sum())
    require(bool(mask[:active].all()), op, "x_active_mask has a true after a false; the trues come first")
    return active


def _meet(
    op: str, group: str, rank: int, size: int, B: int, global_bs: int, masked: bool, same: list[int]
) -> tuple[Any, int]:
    """The communicator, and the rows of the whole group's batch; refuse what differs between the ranks."""
    require(0 < len(group) < 128, op, "group_ep must be a name of 1 to 127 characters")
    ranks = by_name(group)
    require((ranks.rank, ranks.size) == (rank, size), op, f"rank {rank} of {size} is {ranks.rank} of {ranks.size}")
    told = ranks.all_to_all([torch.tensor([B, int(masked), *same])] * size)
    batches = [int(other[0]) for other in told]
    for peer, other in enumerate(told):
        if other[2:].tolist() != same:
            raise Refused(f"{op}: rank {peer} has other arguments ({other[2:].tolist()}) than rank {rank} ({same})")
    uneven = len(set(batches)) > 1
    require(not (uneven and any(int(other[1]) for other in told)), op, f"x_active_mask with uneven batches {batches}")
    require(not (uneven and global_bs == 0), op, f"global_bs is 0 with uneven batches {batches}")
    allowed = global_bs in (0, max(batches) * size) or (global_bs > max(batches) * size and global_bs % size == 0)
    require(allowed, op, f"global_bs is {global_bs}; 0 or the largest batch times {size} is needed ({batches})")
    return ranks, global_bs or B * size
