"""Data and expert parallel on the CPU: what vLLM 0.32 lacks, and dies of at the first request.

1. The two collectives around a layer's experts. The tokens of all ranks are gathered before them and the results added
   and scattered after them, each rank with as many tokens as it has: `CpuCommunicator` cannot.
2. With `--enable-expert-parallel` a rank holds some of the experts, but the CPU's kernel takes the number of an expert
   in the whole model for its place in the rank's memory, and reads beyond it.

github.com/vllm-project/vllm/issues/57837; to be dropped with its pull request 47778.
T: the tokens of this rank, S: those of all ranks, K: experts per token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.experts import cpu_moe

from ops.process_group import Group


def all_gatherv(
    self: CpuCommunicator, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None
) -> Tensor | list[Tensor]:
    """Return the rows ``[T, …]`` of all ranks, one rank after the other: ``[S, …]``; ``sizes`` has every T."""
    assert dim == 0, "tokens are rows"
    if isinstance(input_, list):
        return [_gathered(self, one, sizes) for one in input_]
    return _gathered(self, input_, sizes)


def _gathered(self: CpuCommunicator, x: Tensor, sizes: list[int] | None) -> Tensor:
    own = [x.shape[0]] * self.world_size
    return Group(self.device_group).all_to_all(torch.cat([x] * self.world_size), own, sizes or own, "all_gather")


def reduce_scatterv(self: CpuCommunicator, input_: Tensor, dim: int = -1, sizes: list[int] | None = None) -> Tensor:
    """Return this rank's rows ``[T, …]`` of the sum over the ranks of ``[S, …]``, added in fp32."""
    assert dim == 0, "tokens are rows"
    sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
    own = sizes[self.rank_in_group]
    parts = Group(self.device_group).all_to_all(input_, sizes, [own] * self.world_size, "reduce_scatter")
    return parts.unflatten(0, (self.world_size, own)).float().sum(0).to(input_.dtype)


def own_experts(topk_SK: Tensor, weights_SK: Tensor, expert_map: Tensor) -> tuple[Tensor, Tensor]:
    """Return the experts as numbered on this rank, with weight 0 where another rank has them.

    ``expert_map`` has an expert's number here for its number in the model, -1 where it is not here.
    """
    here_SK = expert_map[topk_SK.long()].to(topk_SK.dtype)
    return here_SK.clamp(min=0), weights_SK.masked_fill(here_SK < 0, 0)


def _with_own_experts(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the kernel's ``apply``, which is called with keywords."""

    @functools.wraps(apply)
    def wrapped(self: cpu_moe.CPUUnquantizedExperts, *arguments: Any, **named: Any) -> Any:
        if named.get("expert_map") is not None:
            topk, weights = own_experts(named["topk_ids"], named["topk_weights"], named["expert_map"])
            named |= {"topk_ids": topk, "topk_weights": weights}
        return apply(self, *arguments, **named)

    return wrapped


if CpuCommunicator.all_gatherv is DeviceCommunicatorBase.all_gatherv:
    CpuCommunicator.all_gatherv = torch.compiler.disable(all_gatherv)  # type: ignore[method-assign]
    CpuCommunicator.reduce_scatterv = torch.compiler.disable(reduce_scatterv)  # type: ignore[method-assign]
    if _kernel := getattr(cpu_moe, "CPUUnquantizedExperts", None):  # not in 0.23, which is not served on a CPU here
        _kernel.apply = _with_own_experts(_kernel.apply)
