"""One file of weights made from the source: the innermost loop of a conversion, and what a worker process runs."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ascend.errors import UserError
from ascend.stored import PLAIN
from convert.plan import Item, Shard
from convert.rounding import Errors, check_beside, check_finite, decoded, restored, rounded, steps
from convert.scaling import Scales
from convert.shard_writer import ShardWriter
from convert.source import TORCH_DTYPES, Reader
from convert.targets import Output

READ_AHEAD = 8  # weights
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 32 << 20  # the most that glibc takes


@dataclass(frozen=True)
class Work:
    """What all files of a target share.

    directory: where they go. plain_dtype: of the model where it is plain, to which scales of integers are rounded even
    where a file holds them wider. group: inputs per int4 scale. scales: the file with a calibration's factors.
    """

    directory: Path
    plain_dtype: str
    group: int
    scales: Path | None


@dataclass(frozen=True)
class ShardResult:
    """A finished file: its hash and size, and what rounding did to each of its weights, by name."""

    file: str
    sha256: str
    nbytes: int
    errors: dict[str, Errors]


def convert_shard(
    work: Work, shard: Shard, scales: Scales, advance: Callable[[int], None] = lambda nbytes: None
) -> ShardResult:
    """Write one file of the target; ``scales`` are those of ``work``, ``advance`` is told of bytes that were read.

    Raises `UserError` for a source that cannot be read or holds NaN, `OSError` where
    nothing more can be written.
    """
    torch.set_num_threads(1)  # steps fit one core's cache; more cores are for more files
    _keep_memory()
    errors = {}
    tensors = [output for item in shard.items for output in item.outputs]
    with Reader() as reader, ShardWriter(work.directory / shard.file, tensors) as writer:
        for number, item in enumerate(shard.items):
            if number % READ_AHEAD == 0:
                reader.will_need(ahead.source.values for ahead in shard.items[number + 1 :][: 2 * READ_AHEAD])
            check_beside(item.source, reader)
            if item.is_copied and item.source.name not in scales:
                _copy(item, reader, writer)
            else:
                errors[item.source.name] = _round(item, reader, writer, work, scales)
            advance(item.source.nbytes)
        return ShardResult(shard.file, writer.close(), writer.nbytes, errors)


def _keep_memory() -> None:
    """Let glibc keep what is freed: steps of a megabyte or two would come from the kernel anew each time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for setting in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(setting, KEPT_BYTES)


def _copy(item: Item, reader: Reader, writer: ShardWriter) -> None:
    """Bytes as they are; what a format has besides and the source has not (its fixed values) is made."""
    entries = dict(item.source.entries())
    for output in item.outputs:
        entry = entries.get(output.part)
        if entry is None:
            writer.put(output, 0, _fixed(output, item))
            continue
        rows = entry.shape[0] if entry.shape else 1
        for begin, end in steps(rows, entry.nbytes // max(rows, 1)):
            data = reader.rows(entry, begin, end)
            check_finite(item.source.name, data)
            writer.put(output, begin, data)


def _round(item: Item, reader: Reader, writer: ShardWriter, work: Work, scales: Scales) -> Errors:
    found, source = Errors(), item.source
    outputs = {output.part: output for output in item.outputs}
    dtype = TORCH_DTYPES[outputs["values"].dtype if item.to == PLAIN else work.plain_dtype]
    for begin, end in steps(source.shape[0], source.shape[1] if len(source.shape) > 1 else 1):
        weight = scales.apply(source.name, decoded(source, reader, begin, end), begin, end).float()
        parts = rounded(weight, item.to, dtype, work.group)
        for part, data in parts.items():
            if part in outputs:
                blocks = begin * outputs[part].shape[0] // source.shape[0] if part == "scale" else begin
                writer.put(outputs[part], blocks, data)
        found.add(weight, restored(item.to, parts))
    if not math.isfinite(found.squares):
        raise UserError(f"{source.values.file}: tensor {source.name} holds NaN or infinity: the file is damaged")
    for output in item.outputs:
        if output.part not in parts:
            writer.put(output, 0, _fixed(output, item))
    return found


def _fixed(output: Output, item: Item) -> Tensor:
    """What a format stores beside values and scales."""
    if output.part == "shape":
        return torch.tensor(item.source.shape, dtype=torch.int64)
    return torch.zeros(output.shape)
