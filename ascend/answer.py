"""What a batch has answered so far: tokens and their number per row, on the device, so that a graph can go on with it.

Shapes: B rows, N tokens at most, J tokens offered at once, S stop tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Answer:
    """Up to ``longest`` tokens per row; a row ends with the first of ``stop_token_ids``.

    count_B: tokens of each row, beyond ``longest`` where more were offered at the end. stop: stop tokens, if any.
    """

    def __init__(self, rows: int, longest: int, stop_token_ids: Sequence[int], device: torch.device) -> None:
        self.longest = longest
        stop = list(stop_token_ids)
        self.stop = torch.tensor(stop, dtype=torch.int64, device=device) if stop else None
        # The last column takes what is too much.
        self.token_BN = torch.zeros(rows, longest + 1, dtype=torch.int64, device=device)
        self.count_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.stopped_B = torch.zeros(rows, dtype=torch.bool, device=device)

    def clear(self) -> None:
        """Forget everything."""
        self.count_B.zero_()
        self.stopped_B.zero_()

    def append(self, token_BJ: Tensor, offered_B: Tensor | None = None) -> Tensor | None:
        """Take the first ``offered_B`` of the tokens (None: all), as far as the row is not over with them.

        Returns how many of them each row took, int64 ``[B]``; None: all rows took all.
        """
        column_BJ = self.count_B[:, None] + torch.arange(token_BJ.shape[1], device=token_BJ.device)
        taken_B = None
        if offered_B is not None or self.stop is not None:
            taken_B = self._taken(token_BJ, offered_B)
            column_BJ = column_BJ.masked_fill(column_BJ >= (self.count_B + taken_B)[:, None], self.longest)
        self.token_BN.scatter_(1, column_BJ.clamp_(max=self.longest), token_BJ)
        self.count_B += token_BJ.shape[1] if taken_B is None else taken_B
        return taken_B

    def _taken(self, token_BJ: Tensor, offered_B: Tensor | None) -> Tensor:
        J = token_BJ.shape[1]
        taken_B = (self.longest - self.count_B).clamp_(0, J)
        if offered_B is not None:
            taken_B = torch.minimum(taken_B, offered_B)
        taken_B = taken_B.masked_fill(self.stopped_B, 0)
        if self.stop is not None:
            j_J = torch.arange(J, device=token_BJ.device)
            stops_BJ = (token_BJ[:, :, None] == self.stop).any(-1) & (j_J < taken_B[:, None])
            first_B = torch.where(stops_BJ, j_J, J).amin(-1)
            taken_B = torch.minimum(taken_B, first_B + 1)
            self.stopped_B |= first_B < J
        return taken_B

    def left(self) -> int:
        """How many tokens the row that needs the most still needs; waits for the device."""
        return max(0, int((self.longest - self.count_B).masked_fill(self.stopped_B, 0).max()))

    def length(self) -> int:
        """Tokens of the longest row; waits for the device."""
        return min(self.longest, int(self.count_B.max()))

    def tokens(self, length: int) -> Tensor:
        """The first ``length`` tokens of each row, int64 ``[B, length]``; shorter rows repeat their last one."""
        column_BN = torch.arange(length, device=self.count_B.device).expand(len(self.count_B), -1)
        return self.token_BN.gather(1, torch.minimum(column_BN, (self.count_B - 1).clamp(min=0)[:, None]))
