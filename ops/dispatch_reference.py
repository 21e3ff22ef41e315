"""The definition of dispatch and combine: which row ends on which rank, and in which order. Readable, not fast.

Shapes: T tokens of this rank, H hidden_size, K experts per token, A rows that this rank's experts get, S expert slots
per rank. Slot ids are global: slot ``s`` is the ``s % S``-th of rank ``s // S``. An expert with copies on several ranks
has several slots; which of them a token goes to is settled before (`ops.placement`).

**Order.** A rank's rows are sorted by its slots, then by the rank they came from, then by the token on that rank, then
by k. There is one row per (token, slot) pair: a token that chose three slots of a rank comes there three times. An id
outside ``[0, ranks · S)`` goes nowhere and adds nothing. This is the order of the MC2 kernels of the Ascend 910B
(``npu_moe_distribute_dispatch_v2``) and of a stable sort by slot after an all-gather.

**Padding.** There is none: A is the sum of the counts, and may be 0. A kernel that cannot know A beforehand returns
more rows (MC2: ranks · largest T · min(S, K)); what stands past the sum of the counts means nothing and may be NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ops.process_group import Group


@dataclass(frozen=True, eq=False)
class Dispatched:
    """The rows that this rank's experts work on, and where each came from."""

    group: Group
    rows_AH: Tensor
    counts_S: list[int]  # rows of each slot of this rank
    source_A: list[tuple[int, int, int]]  # rank, token on that rank, k


def dispatch(x_TH: Tensor, expert_TK: Tensor, group: Group, slots_per_rank: int) -> Dispatched:
    """Bring every token to the slots it chose; T may differ between ranks and may be 0."""
    x_of, expert_of = _gather_ragged(x_TH, group), _gather_ragged(expert_TK, group)
    rows: list[Tensor] = [x_TH[:0]]
    counts: list[int] = []
    source: list[tuple[int, int, int]] = []
    for slot in range(group.rank * slots_per_rank, (group.rank + 1) * slots_per_rank):
        before = len(source)
        for rank in range(group.size):
            for token, chosen in enumerate(expert_of[rank].tolist()):
                for k in range(len(chosen)):
                    if chosen[k] == slot:
                        rows.append(x_of[rank][token, None])
                        source.append((rank, token, k))
        counts.append(len(source) - before)
    return Dispatched(group, torch.cat(rows), counts, source)


def combine(rows_AH: Tensor, dispatched: Dispatched, weight_TK: Tensor) -> Tensor:
    """``out[t] = Σ_k weight[t, k] · row(t, k)``, in fp32 and in the order of k, rounded once; ``[T, H]`` at home."""
    group = dispatched.group
    rows_of = _gather_ragged(rows_AH, group)
    flat_source = torch.tensor(dispatched.source_A, dtype=torch.int64, device=rows_AH.device).view(-1, 3)
    source_of = _gather_ragged(flat_source, group)
    row_of = {
        (token, k): row
        for rows_RH, source in zip(rows_of, source_of, strict=True)
        for row, (home, token, k) in zip(rows_RH, source.tolist(), strict=True)
        if home == group.rank
    }
    out_TH = rows_AH.new_zeros((weight_TK.shape[0], rows_AH.shape[1]), dtype=torch.float32)
    for token, k in sorted(row_of):
        out_TH[token] += weight_TK[token, k] * row_of[token, k].float()
    return out_TH.to(rows_AH.dtype)


def _gather_ragged(x: Tensor, group: Group) -> list[Tensor]:
    """``x`` of every rank; the first dimension may differ."""
    counts = [count for (count,) in group.all_gather_ints([x.shape[0]])]
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: x.shape[0]] = x
    gathered = group.all_gather(padded).unflatten(0, (group.size, -1)) if max(counts) else [padded] * group.size
    return [rows[:count] for rows, count in zip(gathered, counts, strict=True)]
