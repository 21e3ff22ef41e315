"""Checkpoints of the real shapes whose weights are holes: what plans and configurations are made from is all there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ascend.checkpoint import DTYPE_BYTES, SINGLE, open_checkpoint
from convert.carried import beside, write_beside
from convert.demo import write_demo
from convert.plan import Request, plan
from convert.shapes import tensor_shapes
from tests.tiny import read_config

YARN = 4.0  # AntAngelMed's own


def write_plain(directory: Path, yarn: float | None = YARN, **changes: Any) -> Path:
    """AntAngelMed as published, in BF16; ``changes`` of its `config.json`. Returns ``directory``."""
    write_demo(directory, "ling-flash", yarn=yarn, **changes)
    shapes = ((name, dtype, shape) for name, (shape, dtype) in tensor_shapes(read_config(directory)).items())
    _write(directory / SINGLE, shapes)
    return directory


def write_quantised(directory: Path, plain: Path, target: str, layout: str = "compressed-tensors") -> Path:
    """What `convert` would write from ``plain``, as planned by it. Returns ``directory``."""
    directory.mkdir()
    checkpoint = open_checkpoint(plain)
    planned = plan(checkpoint, Request(target, layout))
    write_beside(directory, checkpoint, planned, beside(checkpoint))
    for shard in planned.shards:
        outputs = (output for item in shard.items for output in item.outputs)
        _write(directory / shard.file, ((one.name, one.dtype, one.shape) for one in outputs))
    return directory


def _write(file: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
    header, at = {}, 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)
