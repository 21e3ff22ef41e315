"""The op schemas of a torch-npu release that is not installed, read from its wheel: plain strings in its library."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch

LIBRARY = "torch_npu/lib/libtorch_npu.so"


def read(wheel: Path, ops: Iterable[str]) -> dict[str, torch.FunctionSchema]:
    """Return the schema of each op of the `npu` namespace (without overloads); one that the wheel lacks is left out."""
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read(LIBRARY)
    found = {}
    for op in ops:
        text = _string(library, op.encode() + b"(")
        if text is not None:
            found[op] = torch._C.parse_schema(f"npu::{text}")
    return found


def _string(library: bytes, beginning: bytes) -> str | None:
    """The first string of the library that begins so, and ends as a schema does."""
    at = -1
    while (at := library.find(b"\0" + beginning, at + 1)) >= 0:
        text = library[at + 1 : library.index(b"\0", at + 1)]
        if b") -> " in text:
            return text.decode()
    return None
