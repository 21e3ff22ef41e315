"""Which expert-parallel strategy for which step: bytes moved, by formula, against what moving fewer costs to set up.

R ranks, E expert-parallel ranks (R / width shards), T tokens of the step over all ranks, H hidden_size, K experts per
token, b bytes per element.

No public measurement compares the strategies on eight 910B, and none was made here: the bytes are arithmetic, and the
two figures that turn them into a choice, `SETUP_SECONDS` and `LINK`, are marked where they stand.
"""

from __future__ import annotations

import math
from typing import Protocol

HIDDEN_SIZE, TOP_K, ELEMENT_BYTES = 4096, 8, 2  # the flagship in bf16; the choice needs no more than their size

# What all_to_all pays per layer before the first token moves, beside all_gather: the host waits for the device, two
# more collectives start, a sort runs. An assumption, not a measurement: a launch-bound 910B spends tens of microseconds
# on each; a fused pair of dispatch and combine there took 305 + 450 us at its size (sgl-kernel-npu, pull request 176).
SETUP_SECONDS = 300e-6

# Bytes per second that a card receives from the seven others of its machine, all at once. A card that is not here
# has an unknown link, and unknown is never bet on.
_A2 = 149e9  # measured by others with all_gather on 8 x 910B (limulidae, CANN 8.0); 196e9 each way on paper
_NVLINK = 450e9  # 900 GB/s both ways on paper (NVIDIA product pages); a collective reaches less
LINK = {
    "910B1": _A2,
    "910B2": _A2,
    "910B3": _A2,
    "H20-96G": _NVLINK,
    "H20-3e-141G": _NVLINK,
    "H100-80G": _NVLINK,
    "H200-141G": _NVLINK,
}


class Facts(Protocol):
    """What is asked of a card here; `ascend.devices.facts.DeviceFacts` has it."""

    @property
    def name(self) -> str:
        """The card's name in the table of devices."""


def ranks_per_token(ep_size: int, top_k: int = TOP_K) -> float:
    """How many of E ranks hold an expert of a token: ``E · (1 - (1 - 1/E)^K)`` for experts chosen at random.

    Group-limited routing keeps it lower (at most 4 of 8 ranks where each holds one routing group of eight).
    """
    return ep_size * (1 - (1 - 1 / ep_size) ** top_k)


def bytes_per_rank(
    strategy: str,
    tokens: int,
    ranks: int,
    replicated: bool,
    ep_size: int | None = None,
    hidden_size: int = HIDDEN_SIZE,
    top_k: int = TOP_K,
    element_bytes: int = ELEMENT_BYTES,
) -> float:
    """Bytes that a rank receives in one layer, tokens spread evenly, collectives as good as they can be.

    With f = (R-1)/R, a row of H·b bytes, and a packed token of H·b + 8·K (an fp32 weight and an int32 id per expert):

    - all-reduce of T rows: 2·f·T·H·b. All-gather, reduce-scatter: f·T rows or packed tokens each.
    - all_to_all: a token goes to `ranks_per_token` of E blocks, and each rank of a block gets it. With p = that / E,
      a rank receives p·f·T packed tokens, and as many rows come back: the part of an all-gather that is needed.
    - Where the kind of tokens is not the strategy's own, the all-gather that makes it so comes on top.
    """
    received = tokens * (ranks - 1) / ranks
    rows = received * hidden_size * element_bytes
    packed = rows + received * 8 * top_k
    if strategy == "all_reduce":
        return 2 * rows if replicated else packed + 2 * rows
    if strategy == "all_gather":
        moved = packed + rows
    elif strategy == "all_to_all":
        ep_size = ep_size or ranks
        moved = ranks_per_token(ep_size, top_k) / ep_size * (packed + rows)
    else:
        raise ValueError(f"no formula for the strategy '{strategy}'")
    return moved + rows if replicated else moved


def break_even(ep_size: int, link: float) -> float:
    """Tokens of a step from which all_to_all's fewer bytes take less time over ``link`` (bytes/s) than its set-up."""
    saved = bytes_per_rank("all_gather", 1, ep_size, False) - bytes_per_rank("all_to_all", 1, ep_size, False)
    return SETUP_SECONDS * link / saved if saved > 0 else math.inf


def choose(tokens: int, ep_size: int, replicated: bool, facts: Facts | None) -> str:
    """Name the strategy for a step of ``tokens`` tokens over all ranks; every rank must ask with the same numbers.

    - Replicated tokens: all_reduce, at any size. It is one collective, which the shared expert joins for nothing, it
      can be captured in a graph, and slicing the tokens to scatter them moves more bytes unless routing is narrow.
      vLLM-Ascend's maintained policy for eight 910B also keeps tokens on all ranks, at prefill and decode.
    - Distributed tokens: all_gather, which needs no split sizes and can be captured; all_to_all from `break_even` on,
      on a card whose link is known. That point follows from an assumed set-up time: measure before you rely on it.

    "mc2" (CANN's fused dispatch and combine) is never chosen: nothing public shows it faster at eight ranks.
    """
    if replicated:
        return "all_reduce"
    link = LINK.get(facts.name) if facts else None
    return "all_to_all" if link and ep_size > 1 and tokens >= break_even(ep_size, link) else "all_gather"
