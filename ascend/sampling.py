"""How the next token is chosen from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Greedy at ``temperature`` 0; else a draw from softmax(logits / temperature), cut in this order:

    to the ``top_k`` likeliest tokens (0: all), then to the smallest set of those, likeliest first, whose probabilities
    reach ``top_p``. The same ``seed`` on the same device gives the same draws; None draws anew each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}, it must be 0 (greedy) or above")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}, it must be 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, it must be above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}, it must be at least 0 and below 2**64")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A random generator for `pick`; None where none is needed."""
        if not self.temperature:
            return None
        generator = torch.Generator(device=device)
        generator.seed() if self.seed is None else generator.manual_seed(self.seed)
        return generator

    def pick(self, logits_BV: Tensor, generator: torch.Generator | None) -> Tensor:
        """Choose one token per row: int64 ``[B]`` from fp32 ``[B, V]``."""
        if generator is None:
            return logits_BV.argmax(-1)
        logits_BV = logits_BV / max(self.temperature, 1e-6)  # smaller ones overflow, and this is greedy already
        if not self.top_k and self.top_p == 1:
            return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
        kept = min(self.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
        value_BK, token_BK = logits_BV.topk(kept, dim=-1)
        probability_BK = value_BK.softmax(-1)
        # A token stays while those before it have not yet reached top_p, so the likeliest always stays.
        before_BK = probability_BK.cumsum(-1) - probability_BK
        probability_BK = probability_BK.masked_fill(before_BK >= self.top_p, 0.0)
        return token_BK.gather(-1, torch.multinomial(probability_BK, 1, generator=generator))[:, 0]
