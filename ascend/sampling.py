"""How the next token is chosen from logits, on the device: nothing here waits for it, so a graph may hold it all.

Random numbers are a hash of (state, row, token) in whole numbers, the state a counter on the device: a replayed graph
draws anew each time, and a seed gives the same draws captured or not.

Shapes: B rows, V vocabulary, K tokens kept of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend.errors import UserError

MASK_32 = 0xFFFFFFFF


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

    def pick(self, logits_BV: Tensor, state: Tensor) -> Tensor:
        """Choose one token per row: int64 ``[B]`` from fp32 ``[B, V]``. ``state`` (`new_state`) moves on."""
        if not self.temperature:
            return logits_BV.argmax(-1)
        logits_BV = logits_BV / max(self.temperature, 1e-6)  # smaller ones overflow, and this is greedy already
        if not self.top_k and self.top_p == 1:
            return _draw(logits_BV, state)
        kept = min(self.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
        value_BK, token_BK = logits_BV.topk(kept, dim=-1)
        if self.top_p < 1:
            probability_BK = value_BK.softmax(-1)
            # A token stays while those before it have not yet reached top_p, so the likeliest always stays.
            before_BK = probability_BK.cumsum(-1) - probability_BK
            value_BK = value_BK.masked_fill(before_BK >= self.top_p, float("-inf"))
        return token_BK.gather(-1, _draw(value_BK, state)[:, None])[:, 0]


def new_state(seed: int, device: torch.device) -> Tensor:
    """The state of a stream of random numbers, int64 ``[1]``; every use moves it on by one.

    Seeds start far from one another in the counter's range (the finaliser of SplitMix64, Steele et al., OOPSLA 2014).
    """
    x = (seed + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return torch.tensor([(x ^ (x >> 31)) >> 1], dtype=torch.int64, device=device)


def random_bits(rows: int, columns: int, state: Tensor) -> Tensor:
    """Whole numbers drawn evenly from 0 … 2**32 - 1: int64 ``[rows, columns]``; ``state`` moves on."""
    row_B = torch.arange(rows, device=state.device)
    key_B = _mix(_mix(_mix(state & MASK_32) ^ (state >> 32)) + row_B)
    column_V = _mix(torch.arange(columns, device=state.device))
    state += 1
    return _mix(key_B[:, None] ^ column_V)


def _mix(x: Tensor) -> Tensor:
    """Scramble the lowest 32 bits one to one: Wellons' "lowbias32" (nullprogram.com/blog/2018/07/31), bias 0.17."""
    x = x & MASK_32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK_32  # what overflows 64 bits is above these 32
    return x ^ (x >> 16)


def _draw(logits_BV: Tensor, state: Tensor) -> Tensor:
    """A token per row from softmax(logits): the first event of a race of exponential clocks, so one argmax does it."""
    rows, columns = logits_BV.shape
    # fp32 said aloud: whole numbers plus 0.5 take torch's default dtype, and fp16 ends at 65504.
    uniform_BV = ((random_bits(rows, columns, state).float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return (logits_BV - torch.log(-torch.log1p(-uniform_BV))).argmax(-1)
