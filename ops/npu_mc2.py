"""MC2 on the Ascend 910B: dispatch and combine as two kernels that write into the other cards' memory themselves.

`npu_moe_distribute_dispatch_v2` and its `combine_v2`, full mesh, one server. The order of the rows is that of
`ops.dispatch_reference`. Legal for 2 to 8 ranks from CANN 9.0 on (8.5 takes 8 ranks of at most 24 experts). It needs a
communicator that nothing else uses, and HCCL_BUFFSIZE, in MB, of at least 2 · (ranks · tokens a rank · min(slots, K) ·
H · 2 bytes + 2 MB): with too little the kernel only warns, so larger steps go another way here (`fits`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ops.expert_parallel import Layout, Tokens

MOST_TOKENS = 256  # of a rank
MOST_RANKS = 8
MOST_EXPERTS = 16  # of a token
WIDEST = 7168
MB = 10**6  # whether HCCL means this or 2**20 is not said; this is the safe reading
DEFAULT_BUFFER = "200"


def _npu() -> Any:
    return torch.ops.npu


def why_never(layout: Layout) -> str:
    """Return why MC2 cannot serve these ranks at all; "" where it can."""
    size = layout.group.size
    reasons = (
        (layout.group.backend != "hccl", "it is for ranks on NPUs"),
        (layout.width_shards > 1, "it knows whole experts alone"),
        (size > MOST_RANKS, f"it takes 2 to {MOST_RANKS} ranks, not {size}"),
    )
    return "" if size == 1 else next((reason for holds, reason in reasons if holds), "")


def fits(layout: Layout, tokens: Tokens, most: int) -> bool:
    """Say whether MC2 takes such tokens, at most so many on a rank, with the communicator's buffer as it is."""
    (H, dtype), K = (tokens.x_TH.shape[1], tokens.x_TH.dtype), tokens.expert_TK.shape[1]
    arriving = layout.group.size * most * min(layout.slots, K) * H * dtype.itemsize
    return (
        dtype in (torch.bfloat16, torch.float16)
        and H % 32 == 0
        and H <= WIDEST
        and K <= MOST_EXPERTS
        and 0 < most <= MOST_TOKENS
        and 2 * (arriving + 2 * MB) <= int(os.environ.get("HCCL_BUFFSIZE", DEFAULT_BUFFER)) * MB
    )


def mc2(layout: Layout, tokens: Tokens, counts: Sequence[int] | None, experts: Any) -> Tensor:
    """The strategy: send each token to the experts it chose, run them on what arrived, and add up what comes back.

    ``counts`` holds the tokens of each rank; ``experts.rows(rows, tokens per slot)`` runs this rank's experts. All
    ranks pad to the largest count: what is padded takes no part.
    """
    group, (x_TH, weight_TK, expert_TK) = layout.group, tokens
    n, T = max(counts or (0,)), x_TH.shape[0]
    K = expert_TK.shape[1]
    active_T = torch.arange(n, device=x_TH.device) < T
    # A padded token names experts too, each only once, though nobody will look.
    nobody_TK = torch.arange(K, dtype=torch.int32, device=x_TH.device).expand(n - T, K)
    expert_TK = torch.cat([expert_TK.int(), nobody_TK])
    weight_TK = F.pad(weight_TK.float(), (0, 0, 0, n - T))
    common: dict[str, Any] = {
        "x_active_mask": active_T,
        "group_tp": "",
        "tp_world_size": 0,
        "tp_rank_id": 0,
        "expert_shard_type": 0,
        "shared_expert_num": 1,
        "shared_expert_rank_num": 0,
        "global_bs": n * group.size,
        "comm_alg": "fullmesh",
    }
    where = ((layout.mc2_group or group).hccl_name(), group.size, group.rank, layout.slots * group.size)
    rows, _, assist, count_E, arrived, _, scales = _npu().npu_moe_distribute_dispatch_v2(
        F.pad(x_TH, (0, 0, 0, n - T)),
        expert_TK,
        *where,
        scales=None,
        expert_scales=weight_TK,
        quant_mode=0,
        expert_token_nums_type=1,
        **common,
    )
    out_TH = _npu().npu_moe_distribute_combine_v2(
        experts.rows(rows, count_E),
        expert_TK,
        assist,
        arrived,
        weight_TK,
        *where,
        tp_send_counts=None,
        expand_scales=scales,
        shared_expert_x=None,
        comm_quant_mode=0,
        **common,
    )
    return out_TH[:T]
