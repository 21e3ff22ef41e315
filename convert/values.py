"""Whether the numbers of a checkpoint can be what a model was made of: finite, scales in range, nothing contradictory.

Some rows at a time, so that memory stays flat. Shapes: R rows of one step, S scales in a row, P rows of scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ascend.checkpoint import TensorEntry
from ascend.errors import UserError
from ascend.stored import FP8_BLOCK, StoredWeight
from convert.rounding import check_beside, steps
from convert.source import Reader
from ops import quantise

# The largest finite fp16 number. Scales of trained weights are below 1; engines keep them in the model's 16 bits, and
# one that is not finite there makes NaN of a layer.
MAX_SCALE = 65504.0
READ_AHEAD = 8  # weights
Advance = Callable[[int], None]


def check_values(weights: Mapping[str, StoredWeight], advance: Advance = lambda nbytes: None) -> Iterator[str]:
    """Yield a line for each weight with impossible numbers; ``advance`` is told of bytes that were read."""
    # By place in the files: a disk is fastest read from one end to the other.
    ordered = sorted(weights.values(), key=lambda one: (one.values.file, one.values.offset))
    with Reader() as reader:
        for number, one in enumerate(ordered):
            reader.will_need(ahead.values for ahead in ordered[number + 1 : number + 1 + READ_AHEAD])
            try:
                check_beside(one, reader)
                problem = _check(one, reader)
            except UserError as error:
                yield str(error)
            else:
                if problem:
                    yield f"{one.values.file}: tensor {one.name} {problem}; the file is damaged, or was badly made"
            advance(one.nbytes)


def _check(one: StoredWeight, reader: Reader) -> str | None:
    """Say what is wrong with a weight, None for a good one."""
    if one.scale is None:
        return _check_plain(one.values, reader)
    for begin, end in steps(*one.shape):
        values = reader.rows(one.values, begin, end)
        if values.dtype == quantise.FP8 and bool((values.view(torch.uint8).bitwise_and(0x7F) == 0x7F).any()):
            return f"holds NaN within rows {begin} to {end}"
        unit = FP8_BLOCK if one.format == "fp8" else 1
        scale = reader.rows(one.scale, begin // unit, -(-end // unit)).float()
        problem = _check_scale(scale)
        if problem:
            return f"has a scale that is {problem} within rows {begin} to {end}"
        if not bool(scale.all()) and _any_scaled_by_zero(values, scale.view(len(scale), -1), one):
            return f"has a scale of 0 where values are not, within rows {begin} to {end}"
    return None


def _check_plain(entry: TensorEntry, reader: Reader) -> str | None:
    rows = entry.shape[0] if entry.shape else 1
    for begin, end in steps(rows, math.prod(entry.shape[1:])):
        data = reader.rows(entry, begin, end)
        if data.numel():
            low, high = torch.aminmax(data)  # NaN comes through
            if not math.isfinite(low) or not math.isfinite(high):
                return f"holds NaN or infinity within rows {begin} to {end}"
    return None


def _check_scale(scale: Tensor) -> str | None:
    if not scale.numel():
        return None
    low, high = map(float, torch.aminmax(scale))
    if not math.isfinite(low) or not math.isfinite(high):
        return "NaN or infinite"
    if low < 0:
        return f"negative ({low:.4g})"
    return f"beyond {MAX_SCALE:g} ({high:.4g})" if high > MAX_SCALE else None


def _any_scaled_by_zero(values: Tensor, scale: Tensor, one: StoredWeight) -> bool:
    """Whether a value that is not 0 has the scale 0; ``scale`` is ``[R, S]``, of FP8 blocks ``[P, S]``."""
    if one.format == "fp8":
        scale = quantise.fp8_scales(scale, values.shape)
    if one.format == "w4a16":
        values = quantise.int4_bytes(values)
        scale = scale.repeat_interleave(values.shape[1] // scale.shape[1], -1)
    filled = values.view(torch.uint8).bitwise_and(0x7F) != 0 if values.dtype == quantise.FP8 else values != 0
    return bool((filled & (scale == 0)).any())
