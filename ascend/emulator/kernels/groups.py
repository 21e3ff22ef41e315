"""How the rows of a tensor fall into groups (experts): the three spellings of a ``group_list``."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend.emulator.limits import Refused, require, require_dim, require_dtype, require_shape, require_value

CUMULATIVE, COUNT, PAIRS = 0, 1, 2


def row_ranges(op: str, group_list: Tensor | None, kind: int, groups: int, rows: int) -> list[tuple[int, int, int]]:
    """``(group, start, end)`` of every group, from an int64 list that is cumulative, counted, or group-count pairs.

    The groups may end before the last row (what lies beyond is not written) but not after it.
    """
    if group_list is None:
        raise Refused(f"{op}: group_list is None; the device wants it to split the rows")
    require_value(op, "group_list_type", kind, (CUMULATIVE, COUNT, PAIRS))
    require_dtype(op, "group_list", group_list, torch.int64)
    require_dim(op, "group_list", group_list, 2 if kind == PAIRS else 1)
    require_shape(op, "group_list", group_list, [groups, 2] if kind == PAIRS else [groups])
    require(kind != COUNT or groups > 1, op, "group_list has length 1 as counts; the op's page forbids it")
    if kind == PAIRS:
        group, count = (column.tolist() for column in group_list.unbind(1))
    else:
        group = list(range(groups))
        count = (torch.diff(group_list, prepend=group_list.new_zeros(1)) if kind == CUMULATIVE else group_list).tolist()
    wrong = "decreases (is it counts? they are type 1)" if kind == CUMULATIVE else "has a negative count"
    require(min(count) >= 0, op, f"group_list {group_list.tolist()} {wrong}")
    require(sum(count) <= rows, op, f"group_list covers {sum(count)} rows of {rows}; is its type, {kind}, right?")
    ends = torch.tensor(count).cumsum(0).tolist()
    return [(g, end - n, end) for g, n, end in zip(group, count, ends, strict=True)]
