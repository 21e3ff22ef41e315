"""The op schemas of a torch-npu release that is not installed, read from its wheel: plain strings in its library."""

from __future__ import annotations

import re
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
        match = re.search(rb"(?<![\w.])" + op.encode() + rb"\([^\0]*?\) -> [^\0]+", library)
        if match is not None:
            found[op] = torch._C.parse_schema(f"npu::{match[0].decode()}")
    return found
