"""Attention masks, one ``[S, L]`` per sequence, True where a key is left out. S new tokens, L keys."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ascend.emulator.limits import Refused, require, require_dtype

CAUSAL_SIDE = 2048
"""The side of the one mask that `sparse_mode` 3 takes for every length: 1 above the diagonal."""


def sequence_masks(
    op: str,
    mask: Tensor | None,
    sparse_mode: int,
    sizes: list[tuple[int, int]],
    batch: tuple[int, int] | None,
) -> list[Tensor | None]:
    """The masks of sequences of the ``sizes`` ``(S, L)``; ``batch`` is the ``(S, L)`` of a full mask, None in TND."""
    if mask is not None:
        require_dtype(op, "atten_mask", mask, torch.bool, torch.int8, torch.uint8)
    if sparse_mode == 3:
        if batch is not None and batch[0] == 1:
            return [None] * len(sizes)  # with one new token the device ignores the mode, and all keys count
        _require_causal(op, mask)
        return [_bottom_right(S, L) for S, L in sizes]
    if mask is None:
        return [None] * len(sizes)
    require(batch is not None, op, "atten_mask in layout TND is not covered with sparse_mode 0; causal is 3")
    S, L = batch or (0, 0)
    rows, keys = mask.shape[-2:]
    if S == 1 and mask.dim() == 2:
        full = mask[:, None]
        fits = rows == len(sizes)
    else:
        full = mask.flatten(0, -3) if mask.dim() > 2 else mask[None]
        fits = rows == S and full.shape[0] in (1, len(sizes)) and (mask.dim() < 4 or mask.shape[1] == 1)
    require(fits and keys >= L, op, f"atten_mask has shape {list(mask.shape)} for {len(sizes)} of {S} by {L}")
    full = full.expand(len(sizes), -1, -1) != 0
    return [one[:s, :k] for one, (s, k) in zip(full, sizes, strict=True)]


def _require_causal(op: str, mask: Tensor | None) -> None:
    shapes = [(1,) * extra + (CAUSAL_SIDE, CAUSAL_SIDE) for extra in range(3)]
    if mask is None or tuple(mask.shape) not in shapes:
        got = None if mask is None else list(mask.shape)
        raise Refused(f"{op}: atten_mask is {got}; sparse_mode 3 takes the fixed {CAUSAL_SIDE} by {CAUSAL_SIDE} mask")
    right = torch.equal(mask.view(CAUSAL_SIDE, CAUSAL_SIDE).view(torch.int8), _above_diagonal())
    require(right, op, "atten_mask is not 1 above the diagonal and 0 elsewhere; sparse_mode 3 needs exactly that")


@cache
def _above_diagonal() -> Tensor:
    return torch.ones(CAUSAL_SIDE, CAUSAL_SIDE, dtype=torch.int8).triu(1)


def _bottom_right(S: int, L: int) -> Tensor:
    """Causal, with the last new token on the last key."""
    return torch.arange(L) > torch.arange(S)[:, None] + (L - S)
