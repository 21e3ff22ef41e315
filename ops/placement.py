"""Which rank holds which experts: expert loads in, placement out. Pure: no process group, no device.

A *slot* is the place of one expert's weights on one rank; slots are numbered rank by rank. An expert may have several
slots (redundant experts, the idea of DeepSeek's EPLB): its tokens are then spread over its copies. Per step the busiest
rank sets the time, so a placement is judged by its load: busiest rank over mean.

Shapes: T tokens, K experts per token, E experts, F copies of the expert that has the most.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """The expert in each slot, and the ranks that the slots are spread over. ValueError where an expert has no slot."""

    slots: tuple[int, ...]
    num_experts: int
    ranks: int

    def __post_init__(self) -> None:
        if self.ranks < 1 or len(self.slots) % self.ranks:
            raise ValueError(f"{len(self.slots)} slots do not divide among {self.ranks} ranks")
        if set(self.slots) != set(range(self.num_experts)):
            raise ValueError(f"the slots hold {len(set(self.slots))} experts, not each of 0 to {self.num_experts - 1}")

    @property
    def slots_per_rank(self) -> int:
        """Slots on each rank."""
        return len(self.slots) // self.ranks

    @property
    def replicas(self) -> tuple[int, ...]:
        """How many slots each expert has."""
        return tuple(self.slots.count(expert) for expert in range(self.num_experts))

    def on_rank(self, rank: int) -> tuple[int, ...]:
        """The experts in this rank's slots."""
        return self.slots[rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank]

    def load_per_rank(self, loads: Sequence[float]) -> list[float]:
        """Each rank's share of ``loads`` (per expert, in any unit), an expert's divided evenly among its copies."""
        replicas = self.replicas
        return [math.fsum(loads[e] / replicas[e] for e in self.on_rank(rank)) for rank in range(self.ranks)]

    def imbalance(self, loads: Sequence[float]) -> float:
        """Load of the busiest rank over the mean; 1 is perfect, and what it is without any load."""
        per_rank = self.load_per_rank(loads)
        return max(per_rank) * self.ranks / total if (total := math.fsum(per_rank)) else 1.0

    def table(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """``(slot_EF, copies_E)`` int64 for `physical`: each expert's slots, padded with its first, and how many."""
        slots_of: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.slots):
            slots_of[expert].append(slot)
        width = max(map(len, slots_of))
        padded = [slots + slots[:1] * (width - len(slots)) for slots in slots_of]
        return torch.tensor(padded, device=device), torch.tensor([len(slots) for slots in slots_of], device=device)


def physical(expert_TK: Tensor, slot_EF: Tensor, copies_E: Tensor, offset: int = 0) -> Tensor:
    """The slots ``[T, K]`` that tokens go to: token t takes copy ``(t + offset) % copies`` of each of its experts.

    ``expert_TK`` holds experts in [0, E). With tokens of their own, ranks give their rank as ``offset``, or the first
    copies would get more; with the same tokens on all ranks they must all give the same. The host waits for nothing.
    """
    token_T1 = torch.arange(expert_TK.shape[0], device=expert_TK.device)[:, None] + offset
    return slot_EF[expert_TK, token_T1 % copies_E[expert_TK]]


def record(expert_TK: Tensor, num_experts: int) -> Tensor:
    """How many tokens chose each expert: ``[E]`` int64, to be added up over steps. The host waits for nothing."""
    chosen = expert_TK.flatten().long()
    return chosen.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))


def contiguous(num_experts: int, ranks: int) -> Placement:
    """Experts in order, as many on each rank, one copy of each: what is used without recorded loads."""
    return Placement(tuple(range(num_experts)), num_experts, ranks)


def balance(loads: Sequence[float], ranks: int, slots_per_rank: int) -> Placement:
    """Place experts of these loads so that the busiest rank has as little as a greedy search finds; deterministic.

    Spare slots hold copies of the experts with the most load per copy. An expert has at most one copy per rank, save
    where there are more slots than that fills, and where nothing found beats the contiguous placement: spare slots
    then hold copies of their own rank's experts, which change nothing. So the result is never worse than contiguous.
    With one copy of each, the busiest rank is at most (1 - 1/ranks) · the largest load above the mean.
    """
    num_experts, slots = len(loads), ranks * slots_per_rank
    if ranks < 1 or not 0 < num_experts <= slots:
        raise ValueError(f"{num_experts} experts do not fit in {ranks} ranks of {slots_per_rank} slots")
    if not all(math.isfinite(load) and load >= 0 for load in loads):
        raise ValueError("expert loads must be finite and not negative")
    copies = _copies(loads, ranks, slots)
    share = [load / count for load, count in zip(loads, copies, strict=True)]
    held = _pack(share, copies, ranks)
    _improve(held, share)
    placement = Placement(tuple(e for rank in held for e in sorted(rank)), num_experts, ranks)
    if num_experts % ranks:
        return placement
    plain = contiguous(num_experts, ranks)
    if max(placement.load_per_rank(loads)) <= max(plain.load_per_rank(loads)):
        return placement
    # Every expert of a rank gets as many copies as the next, or one more: only on that rank, so loads stay.
    own = [plain.on_rank(rank) for rank in range(ranks)]
    return Placement(tuple(e[i % len(e)] for e in own for i in range(slots_per_rank)), num_experts, ranks)


def _copies(loads: Sequence[float], ranks: int, slots: int) -> list[int]:
    """How many slots each expert gets: spare ones go, one at a time, to the expert with the most load per copy."""
    copies = [1] * len(loads)
    for _ in range(slots - len(loads)):
        room = [e for e in range(len(loads)) if copies[e] < ranks] or range(len(loads))
        copies[max(room, key=lambda e: (loads[e] / copies[e], -copies[e], -e))] += 1
    return copies


def _pack(share: Sequence[float], copies: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal the slots out, heaviest first, in rounds of one per rank, each to the lightest rank that may have it.

    A round never widens the gap between ranks beyond the largest share, so the bound in `balance` holds.
    """
    dealt = sorted((e for e in range(len(share)) for _ in range(copies[e])), key=lambda e: (-share[e], e))
    held: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for first in range(0, len(dealt), ranks):
        waiting = set(range(ranks))
        for expert in dealt[first : first + ranks]:
            rank = min(waiting, key=lambda r: (expert in held[r], load[r], r))
            waiting.remove(rank)
            held[rank].append(expert)
            load[rank] += share[expert]
    return held


def _improve(held: list[list[int]], share: Sequence[float]) -> None:
    """Swap an expert of the busiest rank for a lighter one of another, the best such swap first, while that helps."""
    while True:
        load = [math.fsum(share[e] for e in experts) for experts in held]
        busy = max(range(len(held)), key=lambda r: (load[r], -r))
        best, swap = load[busy] * (1 - 1e-9), None
        for rank, experts in enumerate(held):
            for i, ours in enumerate(held[busy]):
                for j, theirs in enumerate(experts):
                    moved = share[ours] - share[theirs]
                    heavier = max(load[busy] - moved, load[rank] + moved)
                    if heavier < best and ours not in experts and theirs not in held[busy]:
                        best, swap = heavier, (rank, i, j)
        if swap is None:
            return
        rank, i, j = swap
        held[busy][i], held[rank][j] = held[rank][j], held[busy][i]


def write_loads(path: Path, loads: Mapping[int, Sequence[float]]) -> None:
    """Write recorded loads, by layer and then by expert, as JSON."""
    text = json.dumps({"expert_loads": {str(layer): list(loads[layer]) for layer in sorted(loads)}})
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640), "w") as file:
        file.write(text + "\n")


def read_loads(path: Path, num_experts: int) -> dict[int, list[float]]:
    """Read what `write_loads` wrote. Raises ValueError, one line, for a file that is not loads of so many experts."""
    try:
        layers = json.loads(path.read_text())["expert_loads"]
        loads = {int(layer): [float(load) for load in of_layer] for layer, of_layer in layers.items()}
    except OSError as error:
        raise ValueError(f"cannot read expert loads from {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} holds no expert loads: record them again") from None
    for layer, of_layer in loads.items():
        if len(of_layer) != num_experts:
            raise ValueError(
                f"{path} has loads of {len(of_layer)} experts in layer {layer}, the model has {num_experts}"
            )
        if not all(math.isfinite(load) and load >= 0 for load in of_layer):
            raise ValueError(f"{path} has a load in layer {layer} that is negative or not finite: record them again")
    return loads
