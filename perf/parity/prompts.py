"""The prompts of `perf parity`: random tokens in batches, one row of them padded on the left.

Shapes: B rows, T padded length, N real tokens of all batches, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together: int64 ``[B, T]``, the first ``start_B`` slots of a row padding."""

    ids_BT: Tensor
    start_B: Tensor

    @property
    def real(self) -> Tensor:
        """Where there is a token, bool ``[B, T]``."""
        return torch.arange(self.ids_BT.shape[1]) >= self.start_B[:, None]

    @property
    def position(self) -> Tensor:
        """Positions, int64 ``[B, T]``; 0 in the padding."""
        return (torch.arange(self.ids_BT.shape[1]) - self.start_B[:, None]).clamp(min=0)


def random_batches(vocab_size: int, rows: int, length: int, seed: int) -> list[Batch]:
    """Random prompts: so many full rows, and one row alone that is padded on the left for a third of its length.

    Two batches, since a device attends with a mask where a row is padded, and without one where none is.
    """
    ids = torch.randint(vocab_size, (rows + 1, length), generator=torch.Generator().manual_seed(seed))
    padding = length // 3
    ids[rows, :padding] = 0
    full = Batch(ids[:rows], torch.zeros(rows, dtype=torch.int64))
    return [full, Batch(ids[rows:], torch.tensor([padding]))]


def restored_batches(token_N: Tensor, shapes: Sequence[Sequence[int]]) -> list[Batch]:
    """Return the batches whose real tokens these are; ``shapes`` has rows, padded length and padding of each.

    Raises `UserError` if they do not fit.
    """
    if sum(rows * (length - padding) for rows, length, padding in shapes) != len(token_N):
        raise UserError("the file of side a is damaged: its tokens do not fill its batches")
    batches, done = [], 0
    for rows, length, padding in shapes:
        ids = token_N[done : done + rows * (length - padding)].view(rows, length - padding)
        batches.append(Batch(F.pad(ids, (padding, 0)), torch.full((rows,), padding)))
        done += ids.numel()
    return batches
