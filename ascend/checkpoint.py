"""What lies in a checkpoint directory, told from headers alone: no tensor is read, only the standard library is needed.

`open_checkpoint` is the one gate for everything that loads weights (the launcher before it starts an engine,
`load_model` before it allocates): a directory that passes has a readable `config.json`, whole safetensors files that
cover what the index promises, and nothing that would run code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MODEL_TYPES = ("bailing_moe", "bailing_moe_v2")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 64  # torch's limit
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``nbytes`` from byte ``offset`` of ``file``; ``dtype`` as safetensors spells it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A directory that passed every check: its configuration as written and its tensors by name."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())


@contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None


@_os_errors()
def open_checkpoint(path: str | Path, beside_pickles: bool = False) -> Checkpoint:
    """Check a checkpoint directory and list its tensors. Raises `UserError` that names the file and the tensor.

    A directory that holds a pickle is refused, unless ``beside_pickles``: for one who only reads the safetensors.
    """
    path = Path(path)
    config = read_config(path)
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in PICKLE_SUFFIXES and not beside_pickles:
            raise UserError(
                f"{file}: a pickle can run code when it is opened, so a directory that holds one is not served; "
                "convert it to safetensors or remove it"
            )
    names = _read_index(path) if (path / INDEX).is_file() else None
    if names is None and not (path / SINGLE).is_file():
        raise UserError(f"{path}: no weights here, neither {SINGLE} nor {INDEX}")
    tensors: dict[str, TensorEntry] = {}
    for file in sorted(set(names.values())) if names is not None else [path / SINGLE]:
        for name, entry in read_header(file).items():
            if names is not None and names.get(name) != file:
                promised = f"says {names[name].name}" if name in names else "does not name it"
                raise UserError(f"{file}: holds tensor {name}, but {INDEX} {promised}")
            tensors[name] = entry
    for name in names or {}:
        if name not in tensors:
            raise UserError(f"{names[name]}: tensor {name} is not in it, though {INDEX} says so")  # type: ignore[index]
    return Checkpoint(path, config, tensors)


@_os_errors()
def read_config(path: Path) -> dict[str, Any]:
    """Read ``config.json`` of a model directory. Raises `UserError` if it is not one of this architecture."""
    if not path.is_dir():
        raise UserError(f"{path}: no such model directory" if not path.exists() else f"{path}: is not a directory")
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path}: is not a model directory, it has no config.json")
    config = parse_json(file, file.read_bytes())
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"{file}: model_type is {model_type!r}, this toolkit serves {' and '.join(MODEL_TYPES)}")
    return config


@_os_errors()
def read_header(file: Path) -> dict[str, TensorEntry]:
    """Read one safetensors header and check it against the file's size, as the format's specification demands."""
    if not file.is_file():
        raise UserError(f"{file}: missing, though the checkpoint needs it; copy the whole directory again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{file}: not a safetensors file, or cut off within its header ({size} bytes)")
        header = parse_json(file, stream.read(length))
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise UserError(
                f"{file}: tensor {name} starts at byte {entry.offset}, expected {end}; the header is damaged"
            )
        end += entry.nbytes
        if end > size:
            raise UserError(
                f"{file}: cut off within tensor {name}: it ends at byte {end}, the file has {size}; copy it again"
            )
    if end != size:
        raise UserError(f"{file}: {size - end} bytes after the last tensor belong to none; the file is damaged")
    return entries


def _entry(file: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    _check_name(file, name)
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file}: the header's entry for tensor {name} is malformed; the file is damaged") from None
    if dtype not in DTYPE_BYTES:
        raise UserError(f"{file}: tensor {name} has unknown dtype {dtype!r}")
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != nbytes:
        raise UserError(
            f"{file}: tensor {name} of {dtype} {list(shape)} needs {nbytes} bytes, the header gives {end - begin}"
        )
    return TensorEntry(file, dtype, shape, data_start + begin, nbytes)


def _check_name(file: Path, name: str) -> None:
    if not name.isprintable():  # it would reach the terminal in error messages
        raise UserError(f"{file}: the name {name!r} holds control characters; the file is damaged")


def _read_index(path: Path) -> dict[str, Path]:
    file = path / INDEX
    weight_map = parse_json(file, file.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: has no weight_map")
    for name, shard in weight_map.items():
        _check_name(file, name)
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{file}: tensor {name} is said to be in {shard!r}, which is not a file name")
        if not shard.endswith(".safetensors"):
            raise UserError(f"{file}: tensor {name} is in {shard!r}, which is not a safetensors file")
        _check_name(file, shard)
    return {name: path / shard for name, shard in weight_map.items()}


def parse_json(file: Path, text: bytes) -> dict[str, Any]:
    """Read a JSON object, in which no key may stand twice. Raises `UserError` that names the file."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key, item in pairs:
            if key in value:
                raise ValueError(f"{key!r} stands in it twice")
            value[key] = item
        return value

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a JSON object; the file is damaged")
    return value
