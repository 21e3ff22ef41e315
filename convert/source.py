"""The checkpoint that is read: rows of tensors by `pread`, and what tells it from another.

Not mapped into memory, though that would be a little faster: of a file that is cut off meanwhile a mapped page is a
SIGBUS, which kills the process without a word, while `pread` says so.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ascend.checkpoint import Checkpoint, TensorEntry
from ascend.errors import UserError

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}


class Reader:
    """Reads rows of tensors; a context manager that holds the files open."""

    def __init__(self) -> None:
        self.descriptors: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)

    def rows(self, entry: TensorEntry, begin: int, end: int) -> Tensor:
        """Return rows ``[begin, end)`` of a tensor (of a vector: elements), in its own dtype, in fresh memory."""
        shape = (end - begin, *entry.shape[1:])
        row_bytes = entry.nbytes // entry.shape[0] if entry.shape[0] else 0
        buffer = torch.empty(shape, dtype=TORCH_DTYPES[entry.dtype])
        self._fill(entry, buffer.view(-1).view(torch.uint8).numpy().data, entry.offset + begin * row_bytes)
        return buffer

    def _fill(self, entry: TensorEntry, memory: memoryview, offset: int) -> None:
        try:
            if entry.file not in self.descriptors:
                self.descriptors[entry.file] = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
            while memory:
                count = os.preadv(self.descriptors[entry.file], [memory], offset)
                if not count:
                    raise UserError(f"{entry.file}: was cut off while it was read; copy it again")
                memory, offset = memory[count:], offset + count
        except OSError as error:
            raise UserError(f"{entry.file}: cannot be read: {error.strerror}") from None

    def will_need(self, entries: Iterable[TensorEntry]) -> None:
        """Let the kernel read ahead."""
        for entry in entries:
            if entry.file in self.descriptors:
                with suppress(OSError):
                    os.posix_fadvise(self.descriptors[entry.file], entry.offset, entry.nbytes, os.POSIX_FADV_WILLNEED)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a SHA-256 of what the headers say of all tensors, of the files' sizes, and of a manifest if there is one.

    Equal for copies of a checkpoint. Without a manifest it does not tell two apart that differ in values alone.
    """
    digest = hashlib.sha256()
    for name, entry in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {entry.dtype} {list(entry.shape)} {entry.file.name} {entry.offset}\n".encode())
    for name in ("config.json", "manifest.json"):
        with suppress(FileNotFoundError):
            digest.update((checkpoint.path / name).read_bytes())
    return digest.hexdigest()


def change_times(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """Return name, size and time of change of each file of weights: what a run that goes on must find unchanged."""
    found = []
    for file in sorted({entry.file for entry in checkpoint.tensors.values()}):
        try:
            stat = file.stat()
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        found.append((file.name, stat.st_size, stat.st_mtime_ns))
    return found
