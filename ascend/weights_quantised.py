"""The modules of `ascend.weights` with quantised weights, and which of them a format has; `ops.quantise` rounds.

Each is made from its whole brother; `lay_out` is as there. Shapes: E experts on this rank, O outputs, I inputs; others
as in `ascend.weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

import ops
from ascend.errors import UserError
from ascend.weights import MLP, Experts, Weight
from ops import layout, quantise

_fp8_pair = partial(quantise.fp8_weight, matrices=2)


def _frozen(tensors: tuple[Tensor, Tensor]) -> tuple[nn.Parameter, nn.Parameter]:
    weight, scale = (nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
    return weight, scale


class WeightW8A8(Weight):
    """A projection with int8 weights and one scale per output; its tokens are quantised as they come."""

    def __init__(self, whole: Weight) -> None:
        nn.Module.__init__(self)
        self.weight, self.scale = _frozen(quantise.int8_weight(whole.weight.data))
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        """The linear projection of ``x``."""
        return ops.linear_w8a8(x, self.weight, self.scale, self.bias)

    def lay_out(self) -> None:
        """Bring the weight into the device's layout."""
        self.weight.data, self.scale.data = layout.matrix_int8(self.weight.data, self.scale.data)


class WeightFP8(Weight):
    """A projection with FP8 weights in blocks; its tokens are quantised as they come."""

    def __init__(self, whole: Weight) -> None:
        nn.Module.__init__(self)
        self.weight, self.scale = _frozen(quantise.fp8_weight(whole.weight.data))
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        """The linear projection of ``x``."""
        return ops.linear_fp8(x, self.weight, self.scale, self.bias)


class MLPW8A8(nn.Module):
    """`MLP` with int8 weights."""

    def __init__(self, whole: MLP) -> None:
        super().__init__()
        self.group = whole.group
        self.gate_up, self.gate_up_scale = _frozen(quantise.int8_weight(whole.gate_up.data))
        self.down, self.down_scale = _frozen(quantise.int8_weight(whole.down.data))

    def forward(self, x_TH: Tensor) -> Tensor:
        """``[..., H]`` → ``[..., H]``."""
        out_TH = ops.swiglu_mlp_w8a8(x_TH.flatten(0, -2), *self.weights())
        return self.group.all_reduce(out_TH.view_as(x_TH))

    def weights(self) -> tuple[nn.Parameter, ...]:
        """The weights as the ops take them."""
        return self.gate_up, self.gate_up_scale, self.down, self.down_scale

    def lay_out(self) -> None:
        """Bring the weights into the device's layout."""
        for weight, scale in ((self.gate_up, self.gate_up_scale), (self.down, self.down_scale)):
            weight.data, scale.data = layout.matrix_int8(weight.data, scale.data)


class MLPFP8(nn.Module):
    """`MLP` with FP8 weights; gate and up have blocks of their own."""

    def __init__(self, whole: MLP) -> None:
        super().__init__()
        self.group = whole.group
        self.gate_up, self.gate_up_scale = _frozen(_fp8_pair(whole.gate_up.data))
        self.down, self.down_scale = _frozen(quantise.fp8_weight(whole.down.data))

    def forward(self, x_TH: Tensor) -> Tensor:
        """``[..., H]`` → ``[..., H]``."""
        out_TH = ops.swiglu_mlp_fp8(x_TH.flatten(0, -2), *self.weights())
        return self.group.all_reduce(out_TH.view_as(x_TH))

    def weights(self) -> tuple[nn.Parameter, ...]:
        """The weights as the ops take them."""
        return self.gate_up, self.gate_up_scale, self.down, self.down_scale


Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]


class _ExpertsQuantised(Experts):
    """`Experts` in another format: rounded one by one, so that little is there beside the old and the new weights."""

    def __init__(self, whole: Experts, gate_up: Rounding, down: Rounding) -> None:
        nn.Module.__init__(self)
        self.first, self.total = whole.first, whole.total
        self.gate_up, self.gate_up_scale = _frozen(_one_by_one(gate_up, whole.gate_up.data))
        self.down, self.down_scale = _frozen(_one_by_one(down, whole.down.data))

    def weights(self) -> tuple[nn.Parameter, ...]:
        """The weights as the ops take them."""
        return self.gate_up, self.gate_up_scale, self.down, self.down_scale


def _one_by_one(rounded: Rounding, weight_EOI: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = (part.new_empty((len(weight_EOI), *part.shape)) for part in rounded(weight_EOI[0]))
    if weight_EOI.is_meta:
        return values, scales
    for expert, weight_OI in enumerate(weight_EOI):
        values[expert], scales[expert] = rounded(weight_OI)
    return values, scales


class ExpertsW8A8(_ExpertsQuantised):
    """`Experts` with int8 weights."""

    suffix: ClassVar[str] = "_w8a8"
    shared_class: ClassVar[type[Any]] = MLPW8A8

    def __init__(self, whole: Experts) -> None:
        super().__init__(whole, quantise.int8_weight, quantise.int8_weight)

    def lay_out(self) -> None:
        """Bring the weights into the device's layout."""
        laid_out = layout.experts_int8(*(one.data for one in self.weights()))
        for parameter, data in zip(self.weights(), laid_out, strict=True):
            parameter.data = data


class ExpertsW4A16(_ExpertsQuantised):
    """`Experts` with int4 weights in groups of inputs.

    ``groups``: how many inputs of gate_up and of down share a scale; by default the usual 128, or all of fewer.
    """

    suffix: ClassVar[str] = "_w4a16"

    def __init__(self, whole: Experts, groups: tuple[int, int] | None = None) -> None:
        inputs = (whole.gate_up.shape[-1], whole.down.shape[-1])
        gate_up, down = groups or (min(quantise.INT4_GROUP, count) for count in inputs)
        super().__init__(whole, partial(quantise.int4_weight, group=gate_up), partial(quantise.int4_weight, group=down))
        self.interleaved = False

    def forward(self, x_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor, shared: Any = None) -> Tensor:
        """What this rank's experts, and shared ones, add to the sum, ``[T, H]``."""
        if self.interleaved != layout.interleaves(x_TH.device):
            raise UserError(
                f"the int4 weights were moved to {x_TH.device}, where their words hold others: load them there"
            )
        return super().forward(x_TH, weight_TK, expert_TK, shared)

    def lay_out(self) -> None:
        """Bring the weights into the device's layout."""
        if self.interleaved:
            return
        self.interleaved = layout.interleaves(self.gate_up.device)
        for name in ("gate_up", "down"):
            packed, scale = getattr(self, name), getattr(self, f"{name}_scale")
            packed.data, scale.data = layout.experts_int4(packed.data, scale.data)


class ExpertsFP8(_ExpertsQuantised):
    """`Experts` with FP8 weights; gate and up have blocks of their own."""

    suffix: ClassVar[str] = "_fp8"
    shared_class: ClassVar[type[Any]] = MLPFP8

    def __init__(self, whole: Experts) -> None:
        super().__init__(whole, _fp8_pair, quantise.fp8_weight)


# What takes the place of which module, by format. Modules of other classes stay as they are.
FORMATS: Mapping[str, Mapping[type[nn.Module], Callable[..., nn.Module]]] = {
    "w8a8": {Weight: WeightW8A8, MLP: MLPW8A8, Experts: ExpertsW8A8},
    "w4a16": {Experts: ExpertsW4A16},
    "fp8": {Weight: WeightFP8, MLP: MLPFP8, Experts: ExpertsFP8},
}


def quantised(module: Any, to: str, groups: tuple[int, int] | None = None) -> Any:
    """Return the module in a format, itself where the format leaves such modules as they are.

    ``groups`` as `ExpertsW4A16` takes them, of that format alone. On the meta device only shapes are made.
    """
    make = FORMATS[to].get(type(module))
    if make is None:
        return module
    return make(module) if groups is None else make(module, groups)
