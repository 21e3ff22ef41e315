"""Experts spread over ranks: one interface, several ways to bring tokens and experts together.

Shapes: T tokens of this rank (of the step, where all ranks hold the same), H hidden_size, K experts per token, A rows
that this rank's experts get, S slots (experts held) per expert-parallel rank, E expert-parallel ranks, R ranks in all.

Tokens are either *replicated*, the same T on every rank (attention is tensor-parallel), or *distributed*, T of its own
on each (attention is data-parallel). A strategy is made for one kind and serves the other too: its tokens are gathered
or sliced first. All compute `ops.reference.moe_experts` over all experts; which rank computes which row is what
`ops.dispatch_reference` says. A new strategy is a function and a row of `STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.npu_mc2 import fits, mc2, why_never
from ops.parallel_policy import Facts, choose
from ops.process_group import Group

CHECKED = 16  # made-up tokens of a rank that MC2 is tried on
CHECK_TOLERANCE = 2e-2  # of the largest value: both sum in fp32 and round to 16 bits, in different places

# ``(x_AH, weight_AK fp32, expert_AK) -> partial_AH``: a rank's own experts; the slot of another rank adds nothing.
# Given a `Shared` as a fourth argument, they add what it gives.
Experts = Callable[..., Tensor]
# ``x_TH -> partial_TH``: a rank's part of the experts that every token goes through.
Shared = Callable[[Tensor], Tensor]


class Tokens(NamedTuple):
    """Some tokens, the slots that they chose, and what each of these counts (fp32)."""

    x_TH: Tensor
    weight_TK: Tensor
    expert_TK: Tensor


@dataclass(frozen=True)
class Layout:
    """Which slots are where: ``width_shards`` consecutive ranks share S slots, each with a part of the experts' width.

    The outputs of such ranks are partial sums, which add up like those of different experts.
    """

    group: Group
    slots: int
    width_shards: int = 1
    mc2_group: Group | None = None

    @property
    def ep_size(self) -> int:
        """E: among how many ranks, or blocks of ranks, the experts are divided."""
        return self.group.size // self.width_shards

    def run(self, experts: Experts, tokens: Tokens, shared: Shared | None = None) -> Tensor:
        """This rank's part of the sums, ``[T, H]``; its experts are not called for no tokens."""
        if tokens.x_TH.shape[0] == 0:
            return tokens.x_TH
        return experts(*tokens) if shared is None else experts(*tokens, shared)


# The strategies


def all_reduce(
    layout: Layout, tokens: Tokens, counts: Sequence[int] | None, experts: Experts, shared: Shared | None = None
) -> Tensor:
    """Every rank has all tokens and adds what its own experts give: one all-reduce and nothing else.

    ``shared``, of which each rank has a part too (a tensor-parallel shared expert), goes along for nothing.
    """
    return layout.group.all_reduce(layout.run(experts, tokens, shared))


def all_gather(layout: Layout, tokens: Tokens, counts: Sequence[int] | None, experts: Experts) -> Tensor:
    """All-gather the tokens, as `all_reduce` then, but each rank gets the sums of its own tokens only."""
    everyone = gather(layout.group, tokens, counts or ())
    return layout.group.reduce_scatter(layout.run(experts, everyone))[: tokens.x_TH.shape[0]]


def all_to_all(layout: Layout, tokens: Tokens, counts: Sequence[int] | None, experts: Experts) -> Tensor:
    """Send each token once to each rank that holds some of its experts; one row, weighted and added there, comes back.

    The host must know the split sizes: it waits for the device once per layer, so this cannot be captured in a graph.
    At home the rows are added in fp32, in the order of their ranks.
    """
    group, x_TH, expert_TK = layout.group, tokens.x_TH, tokens.expert_TK
    block_E = torch.arange(layout.ep_size, device=expert_TK.device)
    goes_TE = (expert_TK.div(layout.slots, rounding_mode="floor")[:, :, None] == block_E).any(1)
    goes_RT = goes_TE.repeat_interleave(layout.width_shards, dim=1).T
    sent_RR = group.all_gather(goes_RT.sum(1)[None]).tolist()  # [from][to]; here the host waits
    send, receive = sent_RR[group.rank], [row[group.rank] for row in sent_RR]
    # By rank, then by token. A sort instead of `nonzero`, which would have the host wait once more.
    order = goes_RT.flatten().float().argsort(descending=True, stable=True)[: sum(send)]
    token_A = order % max(x_TH.shape[0], 1)

    arrived = group.all_to_all(_pack(tokens)[token_A], send, receive)
    partial_AH = layout.run(experts, _unpack(arrived, tokens))
    back_AH = group.all_to_all(partial_AH, receive, send).float()
    out_TH = torch.zeros_like(x_TH, dtype=torch.float32)
    for token, row in zip(token_A.split(send), back_AH.split(send), strict=True):
        out_TH.index_add_(0, token, row)  # a token comes once per rank: no two rows of a call meet, whatever the device
    return out_TH.to(x_TH.dtype)


class Strategy(NamedTuple):
    """``run`` gets tokens of the kind it is made for, how many each rank has (if known), and returns their sums."""

    run: Callable[[Layout, Tokens, Sequence[int] | None, Experts], Tensor]
    replicated: bool


STRATEGIES = {
    "all_reduce": Strategy(all_reduce, replicated=True),
    "all_gather": Strategy(all_gather, replicated=False),
    "all_to_all": Strategy(all_to_all, replicated=False),
    "mc2": Strategy(mc2, replicated=False),
}


class ExpertParallel:
    """The experts of a group's ranks as one: ``__call__`` returns what all experts together give this rank's tokens.

    slots: experts on each expert-parallel rank, copies included (`ops.placement`); rank r of the group holds the slots
    ``S · (r // width_shards) … + S - 1`` of all. strategy: a name in `STRATEGIES`, or "auto" (`ops.parallel_policy`,
    which asks ``facts`` what card it is; None is unknown). mc2_group: a communicator of the same ranks that nothing
    else uses; without it MC2 takes the group's own.
    """

    def __init__(
        self,
        group: Group,
        slots: int,
        width_shards: int = 1,
        strategy: str = "auto",
        facts: Facts | None = None,
        mc2_group: Group | None = None,
    ) -> None:
        if width_shards < 1 or group.size % width_shards:
            raise ValueError(f"{group.size} ranks do not divide into blocks of {width_shards} that share their experts")
        if strategy != "auto" and strategy not in STRATEGIES:
            raise ValueError(f"unknown expert-parallel strategy '{strategy}': use auto, {', '.join(STRATEGIES)}")
        self.layout = Layout(group, slots, width_shards, mc2_group)
        if strategy == "mc2" and (reason := why_never(self.layout)):
            raise ValueError(f"expert-parallel strategy mc2 cannot be used here: {reason}")
        self.strategy, self.facts = strategy, facts
        self.trusts_mc2 = False

    def __call__(
        self,
        x_TH: Tensor,
        weight_TK: Tensor,
        expert_TK: Tensor,
        experts: Experts,
        replicated: bool,
        tokens_per_rank: Sequence[int] | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        """Return the weighted sums over each token's experts, ``[T, H]`` in the dtype of ``x_TH``.

        weight_TK: fp32; expert_TK: int64, slots of the whole group (an id outside adds nothing). replicated: all ranks
        bring the same tokens, and get the same sums. Else each brings its own, maybe none, and ``tokens_per_rank`` says
        how many each has: without it the ranks ask each other, for which the host waits.
        shared: with replicated tokens, this rank's part of the experts that every token goes through, to be added.
        """
        tokens, group, T = Tokens(x_TH, weight_TK, expert_TK), self.layout.group, x_TH.shape[0]
        if shared is not None and not replicated:
            raise ValueError("shared experts need replicated tokens: each rank would add its part to other tokens")
        if group.size == 1:
            return all_reduce(self.layout, tokens, None, experts, shared)
        n = -(-T // group.size)
        counts = [max(0, min(n, T - r * n)) for r in range(group.size)] if replicated else tokens_per_rank
        if counts is None and self.strategy != "all_to_all":  # which asks for more than this anyway
            counts = [count for (count,) in group.all_gather_ints([T])]
        if counts is not None and not replicated and counts[group.rank] != T:
            raise ValueError(f"rank {group.rank} has {T} tokens, tokens_per_rank says {list(counts)}")
        name = self.strategy
        if name == "auto":
            name = choose(sum(counts or ()), self.layout.ep_size, replicated, self.facts)
        if name == "mc2":
            name = self._mc2_or_else(tokens, max(counts or (0,)), experts)
        strategy = STRATEGIES[name]

        if replicated and strategy.replicated:
            return all_reduce(self.layout, tokens, None, experts, shared)
        if replicated:
            own = Tokens(*(part[group.rank * n : (group.rank + 1) * n] for part in tokens))
            out_TH = group.all_gather(_pad(strategy.run(self.layout, own, counts, experts), n))[:T]
            return out_TH if shared is None else out_TH + group.all_reduce(shared(x_TH))
        if strategy.replicated:
            everyone = gather(group, tokens, counts or ())
            first = group.rank * max(counts or ())
            return strategy.run(self.layout, everyone, None, experts)[first : first + T]
        return strategy.run(self.layout, tokens, counts, experts)

    def _mc2_or_else(self, tokens: Tokens, most: int, experts: Experts) -> str:
        """MC2 for a step that it takes, once it has shown, on made-up tokens, that it gives what `all_to_all` gives."""
        if not fits(self.layout, tokens, most):
            return "all_to_all"
        if not self.trusts_mc2:
            self._check_mc2(tokens, experts)
            self.trusts_mc2 = True
        return "mc2"

    def _check_mc2(self, like: Tokens, experts: Experts) -> None:
        layout, group = self.layout, self.layout.group
        generator = torch.Generator().manual_seed(group.rank)
        (H, K), device = (like.x_TH.shape[1], like.expert_TK.shape[1]), like.x_TH.device
        x_TH = torch.randn(CHECKED, H, generator=generator).to(like.x_TH.dtype)
        chosen_TK = torch.rand(CHECKED, layout.slots * group.size, generator=generator).argsort(1)[:, :K]
        weight_TK = torch.rand(CHECKED, K, generator=generator)
        made_up = Tokens(*(one.to(device) for one in (x_TH, weight_TK, chosen_TK)))
        counts = [CHECKED] * group.size
        expected = all_to_all(layout, made_up, counts, experts).float()
        off = (mc2(layout, made_up, counts, experts).float() - expected).abs().max() / expected.abs().max()
        wrong = group.all_gather_ints([int(not off <= CHECK_TOLERANCE)])  # NaN is wrong too
        if ranks := [str(rank) for rank, (bad,) in enumerate(wrong) if bad]:
            raise RuntimeError(
                f"mc2 gives other sums than all_to_all on rank {', '.join(ranks)} of {group.size}: the dispatch and "
                "combine of this CANN cannot be trusted here; use strategy all_to_all or all_reduce"
            )


def gather(group: Group, tokens: Tokens, counts: Sequence[int]) -> Tokens:
    """The tokens of all ranks, each rank's padded to the largest count by tokens that chose nothing. One all-gather."""
    n = max(counts)
    padded = Tokens(_pad(tokens.x_TH, n), _pad(tokens.weight_TK, n), _pad(tokens.expert_TK, n, value=-1))
    return _unpack(group.all_gather(_pack(padded)), tokens)


def _pad(x_TH: Tensor, rows: int, value: int = 0) -> Tensor:
    return F.pad(x_TH, (0, 0, 0, rows - x_TH.shape[0]), value=value)


def _pack(tokens: Tokens) -> Tensor:
    """One row per token, so that one collective carries all: the weights and ids as bits in the dtype of ``x_TH``."""
    dtype = tokens.x_TH.dtype
    weight, expert = tokens.weight_TK.float().contiguous(), tokens.expert_TK.int().contiguous()
    return torch.cat([tokens.x_TH, weight.view(dtype), expert.view(dtype)], dim=1)


def _unpack(packed: Tensor, like: Tokens) -> Tokens:
    width = like.expert_TK.shape[1] * 4 // packed.dtype.itemsize
    x, weight, expert = (part.contiguous() for part in packed.split([like.x_TH.shape[1], width, width], dim=1))
    return Tokens(x, weight.view(torch.float32), expert.view(torch.int32).to(like.expert_TK.dtype))
