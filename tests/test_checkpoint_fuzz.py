"""Row 19 at its figure: ten thousand damaged headers and indexes, through all that reads them before a conversion."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from ascend.checkpoint import INDEX, open_checkpoint
from ascend.errors import UserError
from ascend.stored import stored_weights
from convert.plan import Request, plan
from convert.targets import TARGETS
from tests.broken_checkpoints import safetensors

MODULES = {  # name → dtype and shape of its tensors, every format of `ascend.stored` once
    "model.word_embeddings": {"weight": ("BF16", [16, 128])},
    "model.layers.0.mlp.gate_proj": {"weight": ("F8_E4M3", [128, 128]), "weight_scale_inv": ("F32", [1, 1])},
    "model.layers.0.mlp.up_proj": {"weight": ("I8", [8, 128]), "weight_scale": ("BF16", [8, 1])},
    "model.layers.1.mlp.experts.0.down_proj": {
        "weight_packed": ("I32", [8, 16]), "weight_scale": ("BF16", [8, 1]), "weight_shape": ("I64", [2]),
    },
    "model.norm": {"weight": ("BF16", [128])},
}  # fmt: skip
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I8": 1, "I32": 4, "I64": 8, "F16": 2, "F64": 8, "U8": 1}
SIZES = [0, 1, 2, 3, 7, 8, 16, 64, 127, 128, 129, 256, 2**31, 2**62, -1, 10**40]
PIECES = [
    b"0",
    b"-",
    b"9" * 20,
    b"1e9",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b",",
    b":",
    b"null",
    b"true",
    b"NaN",
    b"\0",
    b"\xff",
]


def header(modules: dict[str, dict[str, tuple[str, list[int]]]] | None = None) -> tuple[dict[str, Any], int]:
    entries, end = {}, 0
    for module, parts in (modules or MODULES).items():
        for part, (dtype, shape) in parts.items():
            nbytes = BYTES[dtype]
            for size in shape:
                nbytes *= size
            entries[f"{module}.{part}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
            end += nbytes
    return entries, end


def flipped(text: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, inserted, deleted; numbers and brackets exchanged."""
    for _ in range(chance.randint(1, 4)):
        text = text or b"{"
        at, kind = chance.randrange(len(text)), chance.randrange(4)
        if kind == 0:
            text = text[:at] + bytes([text[at] ^ 1 << chance.randrange(8)]) + text[at + 1 :]
        elif kind == 1:
            text = text[:at] + text[at + chance.randint(1, 9) :]
        elif kind == 2:
            text = text[:at] + chance.choice(PIECES) + text[at:]
        else:
            text = text[:at] + chance.choice(PIECES) + text[at + 1 :]
    return text


def reshaped(chance: random.Random) -> tuple[dict[str, Any], int]:
    """Valid JSON, and mostly a whole file: other dtypes and shapes of values and scales, parts missing or renamed."""
    modules = {module: dict(parts) for module, parts in MODULES.items()}
    for _ in range(chance.randint(1, 3)):
        module = chance.choice(list(MODULES))
        part = chance.choice(list(modules[module]) or ["weight"])
        dtype, shape = modules[module].pop(part, ("BF16", [8]))
        kind = chance.randrange(6)
        if kind == 0:
            dtype = chance.choice(list(BYTES))
        elif kind == 1:
            shape = [chance.choice(SIZES) for _ in range(chance.randrange(4))]
        elif kind == 2:
            part = chance.choice(["weight", "weight_scale", "weight_scale_inv", "weight_offset", "weight_shape", "x"])
        elif kind == 3:
            digits = chance.choice([1, 5, 400])
            modules[f"model.layers.{'9' * digits}.mlp.experts.{'7' * digits}.up_proj"] = {part: (dtype, shape)}
        elif kind == 4:
            continue
        modules[module][part] = (dtype, shape)
    return header(modules)


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))


def overwrite(file: Path, content: bytes, hole: int = 0) -> None:
    """In place: some file systems flush a file that was cut to nothing before. Tensors are a hole: no room, no time."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o640)
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content) + hole)
    os.close(descriptor)


def fuzzed(path: Path, count: int, seed: int) -> tuple[int, int]:
    """Damage a checkpoint ``count`` times; returns how many were planned and how many refused."""
    chance = random.Random(seed)
    planned = refused = 0
    entries, end = header()
    good = json.dumps(entries).encode()
    listed = json.dumps({"weight_map": dict.fromkeys(entries, "model.safetensors")}).encode()
    (path / "config.json").write_text('{"model_type": "bailing_moe_v2"}')
    for number in range(count):
        model, index = safetensors(good, b""), listed
        nbytes = end
        if number % 4 == 0:
            index = flipped(listed, chance)
        elif number % 4 == 1:
            model = safetensors(flipped(good, chance), b"")
        elif number % 4 == 2:
            changed, nbytes = reshaped(chance)
            model, index = (
                safetensors(changed, b""),
                json.dumps({"weight_map": dict.fromkeys(changed, "model.safetensors")}).encode(),
            )
        else:
            model = flipped(model[:16], chance) + model[16:]
        overwrite(path / "model.safetensors", model, min(max(nbytes, 0), 1 << 40))
        overwrite(path / INDEX, index)
        begun = time.perf_counter()
        try:
            checkpoint = open_checkpoint(path)
            stored_weights(checkpoint.tensors)
            plan(checkpoint, Request(chance.choice(list(TARGETS))))
            planned += 1
        except UserError as error:
            refused += 1
            assert str(error).isprintable(), (seed, number)  # noqa: PT017
        except Exception as error:
            raise AssertionError(f"mutation {number} of seed {seed}: {error!r}") from error
        assert time.perf_counter() - begun < 1, (seed, number)
    return planned, refused


@pytest.mark.parametrize(("count", "seed"), [(800, 1), pytest.param(10_000, 2, marks=pytest.mark.slow)])
def test_damaged_headers_are_planned_or_refused(count: int, seed: int, tmp_path: Path) -> None:
    fuzzed(tmp_path, 50, 0)
    before = status("VmRSS")
    planned, refused = fuzzed(tmp_path, count, seed)
    assert planned + refused == count
    assert planned > count // 100, "some of the damage does not matter"
    assert refused > count // 2
    assert status("VmRSS") - before <= 64 << 10, "KiB"


@pytest.mark.parametrize("name", ["model.layers.{}.x.weight", "model.layers.1.mlp.experts.{}.up_proj.weight"])
def test_a_number_longer_than_python_reads(name: str, tmp_path: Path) -> None:
    entries, end = header(MODULES | {name.format("9" * 5000).removesuffix(".weight"): {"weight": ("BF16", [8, 8])}})
    (tmp_path / "config.json").write_text('{"model_type": "bailing_moe_v2"}')
    overwrite(tmp_path / "model.safetensors", safetensors(entries, b""), end)
    try:
        plan(open_checkpoint(tmp_path), Request("w8a8"))
    except UserError as error:
        assert str(error).isprintable()  # noqa: PT017
