"""The modules that hold weights and call one op on them; in other formats than the model's dtype: `weights_quantised`.

`lay_out` brings a module's weights into the device's layout, once, after which they no longer are what the checkpoint
holds.

Shapes: T tokens, H hidden_size, I intermediate width, E experts on this rank, K experts per token.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import ops
from ops import layout
from ops.process_group import Group


class Weight(nn.Module):
    """A module that is nothing but a weight (and a bias): a norm, a projection, an embedding."""

    def __init__(self, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """The linear projection of ``x``."""
        return ops.linear(x, self.weight, self.bias)

    def reorder_heads(self, rows: int, head_dim: int, rotary_dim: int) -> None:
        """Put the first ``rows`` rows, those of query and key heads, in the device's order."""
        for parameter in self.parameters(recurse=False):
            parameter.data[:rows] = layout.heads(parameter.data[:rows], head_dim, rotary_dim)


class MLP(nn.Module):
    """SwiGLU with gate and up fused: a dense layer's MLP, or all shared experts of a layer as one.

    ``group`` adds up the parts of the ranks among which the width is divided; None leaves that to the caller.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, group: Group | None = None) -> None:
        super().__init__()
        self.group = group or Group()
        self.gate_up = nn.Parameter(torch.empty(2 * intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(hidden_size, intermediate_size))

    def forward(self, x_TH: Tensor) -> Tensor:
        """``[..., H]`` → ``[..., H]``."""
        return self.group.all_reduce(ops.swiglu_mlp(x_TH, self.gate_up, self.down))

    def weights(self) -> tuple[nn.Parameter, ...]:
        """The weights as the ops take them."""
        return self.gate_up, self.down


class Experts(nn.Module):
    """The weights of a rank's routed experts of a layer, stacked for grouped work.

    first: the slot of the first of them, of ``total`` slots on all ranks.
    """

    suffix: ClassVar[str] = ""  # of the names of the format's ops
    shared_class: ClassVar[type[Any]] = MLP  # of the shared experts that go into one op with these

    def __init__(self, experts: int, hidden_size: int, width: int, first: int, total: int) -> None:
        super().__init__()
        self.first, self.total = first, total
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, x_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor, shared: Any = None) -> Tensor:
        """What this rank's experts add to the sum, ``[T, H]``; see `ops.reference.moe_experts`.

        Plus what the ``shared`` experts give, where they are given: in one op if they are in the format that goes with
        this one, apart if they are in another; each is rounded before they are added in either case.
        """
        routed = (x_TH, weight_TK, expert_TK, *self.weights())
        slots = (self.first, self.total)
        if isinstance(shared, self.shared_class):
            both_TH: Tensor = getattr(ops, f"moe{self.suffix}")(*routed, *shared.weights(), *slots)
            return both_TH
        out_TH: Tensor = getattr(ops, f"moe_experts{self.suffix}")(*routed, *slots)
        return out_TH if shared is None else out_TH + shared(x_TH)

    def weights(self) -> tuple[nn.Parameter, ...]:
        """The weights as the ops take them."""
        return self.gate_up, self.down

    def rows(self, x_MH: Tensor, count_E: Tensor) -> Tensor:
        """Run each expert on its rows, not weighted; see `ops.reference.expert_rows`."""
        return ops.expert_rows(x_MH, count_E, self.gate_up, self.down)

    def lay_out(self) -> None:
        """Bring the weights into the device's layout, one after the other: each passes through memory twice."""
        (self.gate_up.data,) = layout.experts(self.gate_up.data)
        (self.down.data,) = layout.experts(self.down.data)
