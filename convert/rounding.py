"""From one format to another, some rows of a weight at a time: `ops.quantise` rounds, here is what goes around it.

Shapes: R rows of one step, a multiple of 128 but in the last; I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend.errors import UserError
from ascend.stored import FP8_BLOCK, PLAIN, StoredWeight
from convert.source import Reader
from ops import quantise

STEP_ELEMENTS = 1 << 19  # 2 MB in fp32: what is worked on stays in a core's cache


@dataclass
class Errors:
    """What rounding did to a weight: sums of squares of the weight and of its error, the largest of both."""

    squares: float = 0.0
    squared_error: float = 0.0
    largest: float = 0.0
    largest_error: float = 0.0

    def add(self, weight_RI: Tensor, rounded_RI: Tensor) -> None:
        """Count some rows; ``rounded_RI`` (fp32) is overwritten."""
        self.squares += float(torch.linalg.vector_norm(weight_RI)) ** 2
        self.largest = max(self.largest, _largest(weight_RI))
        rounded_RI.sub_(weight_RI)
        self.squared_error += float(torch.linalg.vector_norm(rounded_RI)) ** 2
        self.largest_error = max(self.largest_error, _largest(rounded_RI))


def _largest(values: Tensor) -> float:
    low, high = torch.aminmax(values)  # 20 times as fast as the norm of that name
    return max(-float(low), float(high))


def steps(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Divide rows into steps that fit the cache, on the borders of FP8 blocks; no rows are one empty step."""
    step = max(FP8_BLOCK, STEP_ELEMENTS // max(columns, 1) // FP8_BLOCK * FP8_BLOCK)
    for begin in range(0, rows or 1, step):
        yield begin, min(begin + step, rows)


def decoded(stored: StoredWeight, reader: Reader, begin: int, end: int) -> Tensor:
    """Read rows of a weight, whatever it is stored as: fp32 ``[R, I]``, a plain one in its own dtype."""
    values = reader.rows(stored.values, begin, end)
    if stored.scale is None:
        return values
    check_finite(stored.name, values)
    if stored.format == "fp8":
        begin, end = begin // FP8_BLOCK, -(-end // FP8_BLOCK)
    scale = reader.rows(stored.scale, begin, end).float()
    return dequantised(stored.format, values, scale.view(len(scale), -1))


def dequantised(form: str, values: Tensor, scale: Tensor) -> Tensor:
    """The weights that stored values and scales (fp32, a row per row or block of rows) stand for: fp32 ``[R, I]``.

    NaN among FP8 values must have been refused before: it would become a number.
    """
    if form == "w8a8":
        return torch.mul(values, scale)
    if form == "w4a16":
        value = quantise.int4_bytes(values).unflatten(-1, (scale.shape[-1], -1))
        return torch.mul(value, scale.unsqueeze(-1)).flatten(-2)
    half = quantise.fp8_as_half(values)
    if form == "fp8-channel":
        return torch.mul(half, scale * 256)
    rows, columns = values.shape
    if rows % FP8_BLOCK or columns % FP8_BLOCK:
        return torch.mul(half, quantise.fp8_scales(scale * 256, values.shape))
    blocks = half.view(rows // FP8_BLOCK, FP8_BLOCK, columns // FP8_BLOCK, FP8_BLOCK)
    return torch.mul(blocks, (scale * 256)[:, None, :, None]).view(rows, columns)


def check_finite(name: str, values: Tensor) -> None:
    """Raise `UserError` if floats, FP8 among them, hold one that is no finite number."""
    if values.dtype == quantise.FP8:
        damaged = bool((values.view(torch.int8).bitwise_and(0x7F) == 0x7F).any())
    else:
        damaged = values.is_floating_point() and not bool(torch.isfinite(values).all())
    if damaged:
        raise UserError(f"tensor {name} holds NaN or infinity: the source is damaged")


def check_beside(stored: StoredWeight, reader: Reader) -> None:
    """Raise `UserError` if what lies beside values and scales says that they mean something else."""
    for end, entry in stored.beside:
        found = reader.rows(entry, 0, entry.shape[0])
        if end == "weight_offset" and bool(found.any()):
            raise UserError(f"{entry.file}: {stored.name} has offsets that are not zero: asymmetric is not supported")
        if end == "weight_shape" and found.tolist() != list(stored.shape):
            raise UserError(
                f"{entry.file}: weight_shape of {stored.name} is {found.tolist()}, not {list(stored.shape)}"
            )


def rounded(weight_RI: Tensor, to: str, dtype: torch.dtype, group: int) -> dict[str, Tensor]:
    """Round rows of a weight: its parts by name, "values" and "scale".

    dtype: of a plain weight, of the scales of integers. group: inputs per int4 scale.
    """
    if to == PLAIN:
        return {"values": weight_RI.to(dtype)}
    if to == "fp8":
        values, scale = quantise.fp8_weight(weight_RI)
        return {"values": values, "scale": scale}
    if to == "w4a16":
        values, scale = quantise.int4_weight(weight_RI, group, dtype)
        return {"values": values, "scale": scale}
    values, scale = quantise.int8_weight(weight_RI, dtype)
    return {"values": values, "scale": scale.unsqueeze(-1)}


def restored(to: str, parts: dict[str, Tensor]) -> Tensor:
    """What the parts of `rounded` stand for: fp32 ``[R, I]``, memory of its own."""
    if to == PLAIN:
        return parts["values"].to(torch.float32, copy=True)
    return dequantised(to, parts["values"], parts["scale"].float())
