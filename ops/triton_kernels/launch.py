"""What the launches of this folder share: counters that programs meet at, and how wide the card is."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

MULTIPROCESSORS = 132  # of an H100 or H200: for tensors that are not on a card, as under Triton's interpreter


@lru_cache(maxsize=64)
def counters(device: torch.device, purpose: str, count: int) -> Tensor:
    """Return int32 zeros ``[count]`` that stay where they are; kernels leave them zero, so a graph can be replayed.

    One launch at a time may use them: the work of a process runs on one stream. Raises `RuntimeError` in a capture,
    which would not make them zero but only note that they should be: a kernel must have run once before.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"the counters of {purpose} cannot be made in a graph: run the step once before its capture")
    return torch.zeros(count, dtype=torch.int32, device=device)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors the card has."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def check_whole(*weights: Tensor | None) -> None:
    """Raise `ValueError` for a weight or scale that is a part of another: the kernels read them as one block."""
    for weight in weights:
        if weight is not None and not weight.is_contiguous():
            raise ValueError(f"a weight of shape {list(weight.shape)} is not contiguous: give a copy of its own")
