"""Device memory that an op leaves as it found it: NaN, or an integer that no index survives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unwritten(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of what uninitialised memory may hold: NaN in floats, 0xAA in every byte of integers (negative)."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype)
    garbage = torch.empty(shape, dtype=dtype)
    garbage.view(-1).view(torch.uint8).fill_(0xAA)
    return garbage
