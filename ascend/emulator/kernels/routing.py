"""Choice of the experts of each token.

Shapes: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Group-limited choice of ``k`` of the experts ``x[T, E]`` scores: ``(weight [T, k], expert int32, norm [T, E])``.

    In fp32: sigmoid (``norm_type`` 1) or softmax (0); plus bias; a group's score is its best expert
    (``group_select_mode`` 0) or the sum of its two best (1); of the ``k_group`` best groups the ``k`` best experts,
    equal ones in order of index. Their weights are the unbiased norms times ``routed_scaling_factor``, divided by
    their sum where the norm is the sigmoid (``renorm`` does nothing there) or ``renorm`` is 1. The third output is
    written only with ``out_flag``. Limits: the op's page, and CANN 9.1's tiling for ``renorm`` and group sizes.
    """
    op = "npu_moe_gating_top_k"
    require_absent(op, input_ids=input_ids, tid2eid=tid2eid)
    require_dim(op, "x", x, 2)
    require_dtype(op, "x", x, *FLOATS)
    require_nd(op, x=x, bias=bias)
    T, E = x.shape
    if bias is not None:
        require(bias.dtype == x.dtype, op, f"bias is {bias.dtype}, x {x.dtype}; the same is needed")
        require_shape(op, "bias", bias, [E])
    require_value(op, "norm_type", norm_type, (0, 1))
    require_value(op, "renorm", renorm, (0, 1))
    require_value(op, "group_select_mode", group_select_mode, (0, 1))
    require(E <= 2048, op, f"{E} experts; the device takes at most 2048")
    require(group_count > 0 and E % group_count == 0, op, f"group_count {group_count} does not divide {E} experts")
    per_group = E // group_count
    padded = group_count * (-(-per_group // 32) * 32)
    require(padded <= 2048, op, f"{group_count} groups aligned to 32 experts are {padded}; the limit is 2048")
    require(1 <= k_group <= group_count, op, f"k_group is {k_group}; it must be in 1..{group_count}")
    require(1 <= k <= k_group * per_group, op, f"k is {k}; {k_group} groups of {per_group} experts allow 1 to that")
    if group_select_mode == 1:
        require(per_group >= 2, op, "group_select_mode 1 adds the two best of a group; there is one expert per group")

    scores_TE = x.float()
    norm_TE = torch.sigmoid(scores_TE) if norm_type == 1 else torch.softmax(scores_TE, dim=-1)
    biased_TE = norm_TE if bias is None else norm_TE + bias.float()
    if group_count > 1:
        grouped = biased_TE.view(T, group_count, per_group)
        best = 1 if group_select_mode == 0 else 2
        group_score = grouped.topk(best, dim=-1).values.sum(-1)
        order = group_score.sort(dim=-1, descending=True, stable=True).indices
        dropped = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, order[:, :k_group], False)
        biased_TE = grouped.masked_fill(dropped[..., None], float("-inf")).view(T, E)
    expert_TK = biased_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weight_TK = norm_TE.gather(1, expert_TK)
    if norm_type == 1 or renorm == 1:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + eps)
    weight_TK = (weight_TK * routed_scaling_factor).to(x.dtype)
    return weight_TK, expert_TK.int(), norm_TE if out_flag else unwritten((T, E), torch.float32)
