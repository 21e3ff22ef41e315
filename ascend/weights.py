"""The modules that hold weights and call one op on them, in each precision: BF16/FP32, W8A8, and W4A16 experts.

`quantised` turns one into its quantised form; `lay_out` brings its weights into the device's layout, once, after which
they no longer are what the checkpoint holds.

Shapes: T tokens, H hidden_size, I intermediate width, E experts on this rank, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ops
from ops import layout, quantise
from ops.process_group import Group

FORMATS = ("w8a8", "w4a16")


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class Weight(nn.Module):
    """A module that is nothing but a weight (and a bias): a norm, a projection, an embedding."""

    def __init__(self, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """The linear projection of ``x``."""
        return ops.linear(x, self.weight, self.bias)

    def quantised(self) -> WeightW8A8:
        """The same projection with int8 weights."""
        return WeightW8A8(self)

    def reorder_heads(self, rows: int, head_dim: int, rotary_dim: int) -> None:
        """Put the first ``rows`` rows, those of query and key heads, in the device's order."""
        for parameter in self.parameters(recurse=False):
            parameter.data[:rows] = layout.heads(parameter.data[:rows], head_dim, rotary_dim)


class WeightW8A8(Weight):
    """A projection with int8 weights and one scale per output."""

    def __init__(self, whole: Weight) -> None:
        nn.Module.__init__(self)
        weight, scale = quantise.int8_weight(whole.weight.data)
        self.weight, self.scale, self.bias = _frozen(weight), _frozen(scale), whole.bias

    def forward(self, x: Tensor) -> Tensor:
        """The linear projection of ``x``, its tokens quantised as they come."""
        return ops.linear_w8a8(x, self.weight, self.scale, self.bias)

    def lay_out(self) -> None:
        """Bring the weight into the device's layout."""
        self.weight.data, self.scale.data = layout.matrix_int8(self.weight.data, self.scale.data)


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

    def quantised(self) -> MLPW8A8:
        """The same MLP with int8 weights."""
        return MLPW8A8(self)


class MLPW8A8(nn.Module):
    """`MLP` with int8 weights."""

    def __init__(self, whole: MLP) -> None:
        super().__init__()
        self.group = whole.group
        gate_up, gate_up_scale = quantise.int8_weight(whole.gate_up.data)
        down, down_scale = quantise.int8_weight(whole.down.data)
        self.gate_up, self.gate_up_scale = _frozen(gate_up), _frozen(gate_up_scale)
        self.down, self.down_scale = _frozen(down), _frozen(down_scale)

    def forward(self, x_TH: Tensor) -> Tensor:
        """``[..., H]`` → ``[..., H]``."""
        flat_TH = x_TH.flatten(0, -2)
        out_TH = ops.swiglu_mlp_w8a8(flat_TH, self.gate_up, self.gate_up_scale, self.down, self.down_scale)
        return self.group.all_reduce(out_TH.view_as(x_TH))

    def lay_out(self) -> None:
        """Bring the weights into the device's layout."""
        for weight, scale in ((self.gate_up, self.gate_up_scale), (self.down, self.down_scale)):
            weight.data, scale.data = layout.matrix_int8(weight.data, scale.data)


class Experts(nn.Module):
    """The weights of a rank's routed experts of a layer, stacked for grouped work.

    first: the slot of the first of them, of ``total`` slots on all ranks.
    """

    def __init__(self, experts: int, hidden_size: int, width: int, first: int, total: int) -> None:
        super().__init__()
        self.first, self.total = first, total
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, x_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """What this rank's experts add to the sum, ``[T, H]``; see `ops.reference.moe_experts`."""
        return ops.moe_experts(x_TH, weight_TK, expert_TK, self.gate_up, self.down, self.first, self.total)

    def rows(self, x_MH: Tensor, count_E: Tensor) -> Tensor:
        """Run each expert on its rows, not weighted; see `ops.reference.expert_rows`."""
        return ops.expert_rows(x_MH, count_E, self.gate_up, self.down)

    def quantised(self, to: str) -> Experts:
        """The same experts with int8 or int4 weights."""
        return ExpertsW8A8(self) if to == "w8a8" else ExpertsW4A16(self)

    def lay_out(self) -> None:
        """Bring the weights into the device's layout, one after the other: each passes through memory twice."""
        (self.gate_up.data,) = layout.experts(self.gate_up.data)
        (self.down.data,) = layout.experts(self.down.data)


class ExpertsW8A8(Experts):
    """`Experts` with int8 weights."""

    def __init__(self, whole: Experts) -> None:
        nn.Module.__init__(self)
        self.first, self.total = whole.first, whole.total
        gate_up, gate_up_scale = quantise.int8_weight(whole.gate_up.data)
        down, down_scale = quantise.int8_weight(whole.down.data)
        self.gate_up, self.gate_up_scale = _frozen(gate_up), _frozen(gate_up_scale)
        self.down, self.down_scale = _frozen(down), _frozen(down_scale)

    def forward(self, x_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """What this rank's experts add to the sum, ``[T, H]``."""
        return ops.moe_experts_w8a8(x_TH, weight_TK, expert_TK, *self._weights(), self.first, self.total)

    def lay_out(self) -> None:
        """Bring the weights into the device's layout."""
        laid_out = layout.experts_int8(*(one.data for one in self._weights()))
        for parameter, data in zip(self._weights(), laid_out, strict=True):
            parameter.data = data

    def _weights(self) -> tuple[nn.Parameter, ...]:
        return self.gate_up, self.gate_up_scale, self.down, self.down_scale


class ExpertsW4A16(Experts):
    """`Experts` with int4 weights in groups of inputs; a width below the usual group is one group."""

    def __init__(self, whole: Experts) -> None:
        nn.Module.__init__(self)
        self.first, self.total = whole.first, whole.total
        gate_up, gate_up_scale = _int4(whole.gate_up.data)
        down, down_scale = _int4(whole.down.data)
        self.gate_up, self.gate_up_scale = _frozen(gate_up), _frozen(gate_up_scale)
        self.down, self.down_scale = _frozen(down), _frozen(down_scale)

    def forward(self, x_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """What this rank's experts add to the sum, ``[T, H]``."""
        weights = (self.gate_up, self.gate_up_scale, self.down, self.down_scale)
        return ops.moe_experts_w4a16(x_TH, weight_TK, expert_TK, *weights, self.first, self.total)

    def lay_out(self) -> None:
        """Bring the weights into the device's layout."""
        for name in ("gate_up", "down"):
            packed, scale = getattr(self, name), getattr(self, f"{name}_scale")
            packed.data, scale.data = layout.experts_int4(packed.data, scale.data)


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    return quantise.int4_weight(weight, min(quantise.INT4_GROUP, weight.shape[-1]))
