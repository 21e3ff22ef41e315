"""One file of the target: laid out before the first byte is written, filled row by row, in flat memory.

The layout is that of the safetensors library (tensors by dtype, the widest first, then by name, the header padded to
eight bytes), so that every tensor is aligned and a file is what the library would have written.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ascend.errors import UserError
from convert.source import TORCH_DTYPES
from convert.staging import FILE_MODE
from convert.targets import Output

PARTIAL = ".partial"
ORDER = ("I64", "F32", "I32", "BF16", "F16", "F8_E4M3", "I8")  # that of the library's Dtype, backwards
HASH_BYTES = 1 << 20


def header(tensors: list[Output]) -> tuple[bytes, dict[str, int]]:
    """Return a file's first bytes, and where in it each tensor begins."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for output in sorted(tensors, key=lambda one: (ORDER.index(one.dtype), one.name)):
        offsets[output.name] = end
        entries[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [end, end + output.nbytes],
        }
        end += output.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {name: len(first) + offset for name, offset in offsets.items()}


class ShardWriter:
    """A context manager: `put` rows of tensors, then `close` makes it durable and gives it its name."""

    def __init__(self, path: Path, tensors: list[Output]) -> None:
        self.path, self.partial = path, path.with_name(path.name + PARTIAL)
        first, self.offsets = header(tensors)
        self.nbytes = len(first) + sum(output.nbytes for output in tensors)
        self.descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
        self._write(first, 0)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.partial.unlink(missing_ok=True)

    def put(self, output: Output, row: int, rows: Tensor) -> None:
        """Write ``rows`` of a tensor, from ``row`` on, in the dtype that it has in the file."""
        rows = rows.to(TORCH_DTYPES[output.dtype]).contiguous()
        row_bytes = output.nbytes // output.shape[0] if output.shape[0] else 0
        self._write(rows.view(-1).view(torch.uint8).numpy().data, self.offsets[output.name] + row * row_bytes)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        memory = memoryview(data)
        while memory:
            count = os.pwrite(self.descriptor, memory, offset)
            memory, offset = memory[count:], offset + count

    def close(self) -> str:
        """Make the file durable and name it; returns its SHA-256. Raises `UserError` if its size is a wrong one."""
        digest, offset = hashlib.sha256(), 0
        while data := os.pread(self.descriptor, HASH_BYTES, offset):
            digest.update(data)
            offset += len(data)
        if offset != self.nbytes:
            raise UserError(
                f"{self.partial}: has {offset} bytes and should have {self.nbytes}: something else wrote to it"
            )
        os.fsync(self.descriptor)
        os.close(self.descriptor)
        self.descriptor = -1
        os.replace(self.partial, self.path)
        return digest.hexdigest()
