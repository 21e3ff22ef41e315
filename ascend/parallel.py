"""One model over several ranks: which heads, which rows of which weight and which experts are this rank's.

Attention, dense MLPs, shared experts and the head are divided over the ranks of a *tensor* group; ranks of other tensor
groups see other tokens (data parallel). The routed experts are divided over all ranks of the *world*: into ``experts``
blocks of whole experts, and within a block by their width. With one tensor group all ranks hold the same tokens.

    8 ranks, tensor 8, experts 8: attention by heads, 32 of 256 experts a rank (what serves 910B best at small batches)
    4 ranks, tensor 4, experts 2: each half of the ranks holds half of the experts, each rank half of their width
    4 ranks, tensor 1, experts 4: four streams of tokens, all experts shared out (data parallel attention)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ascend.errors import UserError, suggest
from ops.expert_parallel import STRATEGIES, ExpertParallel
from ops.placement import Placement
from ops.process_group import Group

if TYPE_CHECKING:
    from ascend.config import BailingMoeV2Config
    from ascend.devices import DeviceFacts


@dataclass(frozen=True)
class Parallel:
    """The groups of a rank; ``Parallel()`` is one process alone.

    placement: which expert each slot holds, on as many ranks as there are blocks (`ops.placement`), for all layers or
    by layer; None: each expert once, in order. strategy: how tokens and experts meet, a name of
    `ops.expert_parallel.STRATEGIES` or "auto".
    """

    world: Group = field(default_factory=Group)
    tensor: Group = field(default_factory=Group)
    experts: int = 1
    placement: Placement | Mapping[int, Placement] | None = None
    strategy: str = "auto"
    facts: DeviceFacts | None = None
    mc2_group: Group | None = None
    mixtures: dict[int, ExpertParallel] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def mesh(
        cls,
        world: Group,
        tensor: int,
        experts: int,
        placement: Placement | Mapping[int, Placement] | None = None,
        strategy: str = "auto",
        facts: DeviceFacts | None = None,
    ) -> Parallel:
        """Divide ``world`` into tensor groups of ``tensor`` neighbouring ranks and experts into ``experts`` blocks.

        Called on all ranks alike. Raises `UserError` for numbers that do not divide the ranks.
        """
        for name, part in (("tensor", tensor), ("experts", experts)):
            if part < 1 or world.size % part:
                raise UserError(f"{name}={part} does not divide the {world.size} ranks")
        parts = [range(first, first + tensor) for first in range(0, world.size, tensor)]
        group = world.split(parts) if world.size > 1 else world
        # MC2 shares its communicator with nothing else.
        mc2_group = world.twin() if strategy == "mc2" and world.size > 1 else None
        return cls(world, group, experts, placement, strategy, facts, mc2_group)

    @property
    def replicated(self) -> bool:
        """Whether all ranks hold the same tokens."""
        return self.tensor.size == self.world.size

    @property
    def width_shards(self) -> int:
        """Among how many ranks an expert's width is divided."""
        return self.world.size // self.experts

    def check(self, config: BailingMoeV2Config) -> None:
        """Raise `UserError` if the model does not divide so."""
        self.mixture(config.num_experts)
        self._check_placement(config)
        tensor, N, G = self.tensor.size, config.num_attention_heads, config.num_key_value_heads
        wholes = (
            ("num_attention_heads", N, tensor),
            ("intermediate_size", config.intermediate_size, tensor),
            ("the shared experts' width", config.shared_intermediate_size, tensor),
            ("moe_intermediate_size", config.moe_intermediate_size, self.width_shards),
            ("the number of expert slots", self.slots(config.num_experts), self.experts),
        )
        for name, value, parts in wholes:
            if value % parts:
                raise UserError(f"{name} {value} does not divide into {parts} ranks")
        if G % tensor and tensor % G:
            raise UserError(f"num_key_value_heads {G} does not divide into {tensor} ranks, nor they into it")

    def _check_placement(self, config: BailingMoeV2Config) -> None:
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        for layer in filter(config.is_moe_layer, range(layers)):
            if isinstance(self.placement, Mapping) and layer not in self.placement:
                raise UserError(
                    f"the placement has layers {sorted(self.placement)}, and none for the experts of {layer}"
                )
            placed = self.placed(layer)
            if placed is None:
                continue
            if (placed.num_experts, placed.ranks) != (config.num_experts, self.experts):
                raise UserError(
                    f"the placement is of {placed.num_experts} experts on {placed.ranks} ranks, "
                    f"not {config.num_experts} on {self.experts}"
                )
            if len(placed.slots) != self.slots(config.num_experts):
                raise UserError(f"the placement of layer {layer} has {len(placed.slots)} slots, that of others has not")

    # What of the model is this rank's

    def heads(self, config: BailingMoeV2Config) -> tuple[range, range]:
        """This rank's query heads and key/value heads; ranks share a key/value head where there are too few."""
        N, G, size, rank = config.num_attention_heads, config.num_key_value_heads, self.tensor.size, self.tensor.rank
        query = range(rank * N // size, (rank + 1) * N // size)
        if size <= G:
            return query, range(rank * G // size, (rank + 1) * G // size)
        return query, range(rank * G // size, rank * G // size + 1)

    def share(self, size: int) -> range:
        """This rank's part of a dimension that the tensor group divides."""
        part = size // self.tensor.size
        return range(self.tensor.rank * part, (self.tensor.rank + 1) * part)

    def vocabulary(self, size: int) -> range:
        """This rank's rows of the head: all of them where they do not divide."""
        return range(size) if size % self.tensor.size else self.share(size)

    def expert_width(self, width: int) -> range:
        """This rank's part of each of its experts."""
        part, shard = width // self.width_shards, self.world.rank % self.width_shards
        return range(shard * part, (shard + 1) * part)

    def placed(self, layer: int) -> Placement | None:
        """Where the experts of a layer are; None: in order."""
        return self.placement[layer] if isinstance(self.placement, Mapping) else self.placement

    def slots(self, num_experts: int) -> int:
        """Slots of all ranks, in every layer alike: more than there are experts where some have copies."""
        placement = self.placement
        if isinstance(placement, Mapping):
            placement = next(iter(placement.values()), None)
        return num_experts if placement is None else len(placement.slots)

    def numbers(self, num_experts: int) -> int:
        """Slot numbers that the ops are told of: one more than there are, nobody's, where tokens may be padded with it.

        That is so where ranks hold all experts and share their width, and do not simply add up what they have.
        """
        adds_up = self.replicated and self.strategy in ("auto", "all_reduce")
        return self.slots(num_experts) + int(self.experts == 1 and not adds_up)

    def local_slots(self, num_experts: int) -> range:
        """This rank's slots among those of all ranks."""
        count = self.slots(num_experts) // self.experts
        block = self.world.rank // self.width_shards
        return range(block * count, (block + 1) * count)

    def local_experts(self, num_experts: int, layer: int) -> list[int]:
        """The expert in each of this rank's slots."""
        placed = self.placed(layer)
        return [slot if placed is None else placed.slots[slot] for slot in self.local_slots(num_experts)]

    # What the ranks do together

    def mixture(self, num_experts: int) -> ExpertParallel:
        """Return what brings tokens and experts together: one for all MoE layers, so that MC2 is checked once.

        Raises `UserError` for a strategy that there is not, or not for these ranks.
        """
        if num_experts not in self.mixtures:
            slots, shards = len(self.local_slots(num_experts)), self.width_shards
            try:
                made = ExpertParallel(self.world, slots, shards, self.strategy, self.facts, self.mc2_group)
            except ValueError as error:
                raise UserError(f"{error}{suggest(self.strategy, STRATEGIES)}") from None
            self.mixtures[num_experts] = made
        return self.mixtures[num_experts]

    def agreed(self, value: int) -> int:
        """What the first rank of the tensor group says: ranks that hold the same tokens must draw the same."""
        return self.tensor.all_gather_ints([value])[0][0]

    def counts(self, tokens: int) -> list[int] | None:
        """How many tokens each rank brings to an MoE layer if this one's tensor group holds ``tokens``.

        None where all ranks hold the same. The ranks ask each other, for which the host waits: once per step.
        """
        if self.replicated:
            return None
        size = self.tensor.size
        streams = [count for (count,) in self.world.all_gather_ints([tokens])]
        shares = [-(-count // size) for count in streams]
        return [max(0, min(n, T - rank % size * n)) for rank, (T, n) in enumerate(zip(streams, shares, strict=True))]

    def mix(
        self,
        mixture: Callable[..., Tensor],
        x_TH: Tensor,
        weight_TK: Tensor,
        expert_TK: Tensor,
        experts: Callable[..., Tensor],
        shared: Callable[[Tensor], Tensor] | None,
        counts: list[int] | None,
    ) -> Tensor:
        """Return the routed experts' sums plus this rank's part of the shared experts', added up over the ranks."""
        if self.replicated:
            return mixture(x_TH, weight_TK, expert_TK, experts, replicated=True, shared=shared)
        # The ranks of a tensor group hold the same tokens: each brings its slice of them.
        T, size = x_TH.shape[0], self.tensor.size
        n = -(-T // size)
        own = slice(self.tensor.rank * n, (self.tensor.rank + 1) * n)
        out_TH = mixture(x_TH[own], weight_TK[own], expert_TK[own], experts, False, counts)
        out_TH = self.tensor.all_gather(F.pad(out_TH, (0, 0, 0, n - out_TH.shape[0])))[:T]
        return out_TH if shared is None else out_TH + self.tensor.all_reduce(shared(x_TH))

    def whole_vocabulary(self, logits: Tensor, vocab_size: int) -> Tensor:
        """Put the ranks' parts of the logits ``[…, V / ranks]`` side by side."""
        if logits.shape[-1] == vocab_size:
            return logits
        parts = self.tensor.all_gather(logits.unsqueeze(0))
        return parts.movedim(0, -2).flatten(-2)
