"""Checkpoints made by hand, whole and broken in every way that we could think of, without torch or safetensors."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}
HEADER = {"__metadata__": {"format": "pt"}, "a": A, "b": B}
HEADER_BYTES = 240  # every header is padded to this, so that the data starts at byte 248 in all of them
DATA = bytes(range(16))
INDEX = "model.safetensors.index.json"


def safetensors(header: dict[str, Any] | bytes = HEADER, data: bytes = DATA) -> bytes:
    text = (header if isinstance(header, bytes) else json.dumps(header).encode()).ljust(HEADER_BYTES)
    return len(text).to_bytes(8, "little") + text + data


def whole(path: Path, **files: bytes | str | dict[str, Any]) -> Path:
    """A good single-file checkpoint, with some files replaced: ``config``, ``model`` or ``index``."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "bailing_moe"}')
    (path / "model.safetensors").write_bytes(safetensors())
    names = {"config": "config.json", "model": "model.safetensors", "index": INDEX}
    for key, content in files.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        (path / names[key]).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def sharded(path: Path, weight_map: dict[str, Any]) -> None:
    """Two shards, ``a`` in one.safetensors and ``b`` in two.safetensors, under this index."""
    whole(path, index={"weight_map": weight_map})
    (path / "model.safetensors").unlink()
    (path / "one.safetensors").write_bytes(safetensors({"a": A}, DATA[:8]))
    (path / "two.safetensors").write_bytes(safetensors({"b": B | {"data_offsets": [0, 8]}}, DATA[8:]))


def model(header: dict[str, Any] | bytes = HEADER, data: bytes = DATA) -> Callable[[Path], Any]:
    return lambda path: whole(path, model=safetensors(header, data))


def raw(content: bytes) -> Callable[[Path], Any]:
    return lambda path: whole(path, model=content)


def index(**weight_map: Any) -> Callable[[Path], Any]:
    return lambda path: sharded(path, weight_map)


def without(name: str) -> Callable[[Path], Any]:
    return lambda path: (whole(path) / name).unlink()


def pickled(name: str) -> Callable[[Path], Any]:
    return lambda path: (whole(path) / name).write_bytes(pickle.dumps({"a": 1}))


def zipped_pickle(path: Path) -> None:
    with zipfile.ZipFile(whole(path) / "model.safetensors", "w") as archive:
        archive.writestr("data.pkl", bytes(500))


def directory_instead_of(name: str) -> Callable[[Path], Any]:
    return lambda path: (without(name)(path), (path / name).mkdir())


def huge_header(path: Path) -> None:
    with (whole(path) / "model.safetensors").open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(200_000_000)


def looped(path: Path) -> None:
    without("model.safetensors")(path)
    (path / "model.safetensors").symlink_to("model.safetensors")


CUT = "not a safetensors file, or cut off within its header"
PICKLE = (
    "a pickle can run code when it is opened, so a directory that holds one is not served; "
    "convert it to safetensors or remove it"
)
NO_WEIGHTS = "{dir}: no weights here, neither model.safetensors nor model.safetensors.index.json"
FILE = "{dir}/model.safetensors"
MALFORMED = FILE + ": the header's entry for tensor a is malformed; the file is damaged"

# what is done to a directory → the line that says so
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (lambda path: None, "{dir}: no such model directory"),
    "a file": (lambda path: path.write_text("x"), "{dir}: is not a directory"),
    "empty directory": (lambda path: path.mkdir(), "{dir}: is not a model directory, it has no config.json"),
    "no config": (without("config.json"), "{dir}: is not a model directory, it has no config.json"),
    "config is not JSON": (
        lambda path: whole(path, config='{"model_type": '),
        "{dir}/config.json: not readable as JSON (Expecting value: line 1 column 16 (char 15)); the file is damaged",
    ),
    "config is a list": (
        lambda path: whole(path, config="[1]"),
        "{dir}/config.json: not a JSON object; the file is damaged",
    ),
    "config nests without end": (
        lambda path: whole(path, config="[" * 100_000),
        "{dir}/config.json: not readable as JSON (maximum recursion depth exceeded while decoding a JSON array from a "
        "unicode string); the file is damaged",
    ),
    "another model": (
        lambda path: whole(path, config={"model_type": "llama"}),
        "{dir}/config.json: model_type is 'llama', this toolkit serves bailing_moe and bailing_moe_v2",
    ),
    "no model_type": (
        lambda path: whole(path, config={}),
        "{dir}/config.json: model_type is None, this toolkit serves bailing_moe and bailing_moe_v2",
    ),
    "no weights": (without("model.safetensors"), NO_WEIGHTS),
    "weights are a directory": (directory_instead_of("model.safetensors"), NO_WEIGHTS),
    "weights are a link to themselves": (looped, NO_WEIGHTS),
    "pytorch_model.bin": (pickled("pytorch_model.bin"), "{dir}/pytorch_model.bin: " + PICKLE),
    "model.pt": (pickled("model.pt"), "{dir}/model.pt: " + PICKLE),
    "MODEL.PTH": (pickled("MODEL.PTH"), "{dir}/MODEL.PTH: " + PICKLE),
    "renamed pickle": (raw(pickle.dumps({"a": 1})), FILE + f": {CUT} ({len(pickle.dumps({'a': 1}))} bytes)"),
    "renamed zipped pickle": (zipped_pickle, FILE + f": {CUT} (614 bytes)"),
    "empty file": (raw(b""), FILE + f": {CUT} (0 bytes)"),
    "cut in the length": (raw(safetensors()[:5]), FILE + f": {CUT} (5 bytes)"),
    "cut in the header": (raw(safetensors()[:100]), FILE + f": {CUT} (100 bytes)"),
    "header over the limit": (huge_header, FILE + f": {CUT} (200000000 bytes)"),
    "cut in the data": (
        raw(safetensors()[:-1]),
        FILE + ": cut off within tensor b: it ends at byte 264, the file has 263; copy it again",
    ),
    "bytes after the end": (
        raw(safetensors() + b"xyz"),
        FILE + ": 3 bytes after the last tensor belong to none; the file is damaged",
    ),
    "not UTF-8": (
        model(b'{"\xff": 1}'),
        FILE + ": not readable as JSON ('utf-8' codec can't decode byte 0xff in position 2: invalid start byte); "
        "the file is damaged",
    ),
    "UTF-16": (
        model(json.dumps(HEADER).encode("utf-16")),
        FILE + ": not readable as JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte); "
        "the file is damaged",
    ),
    "empty header": (
        raw(bytes(8)),
        FILE + ": not readable as JSON (Expecting value: line 1 column 1 (char 0)); the file is damaged",
    ),
    "header is a list": (model(b"[1]"), FILE + ": not a JSON object; the file is damaged"),
    "a tensor twice": (
        model(f'{{"a": {json.dumps(A)}, "b": {json.dumps(B)}, "a": {json.dumps(A)}}}'.encode()),
        FILE + ": not readable as JSON ('a' stands in it twice); the file is damaged",
    ),
    "a shape twice": (
        model(b'{"a": {"dtype": "F32", "shape": [2], "shape": [4], "data_offsets": [0, 8]}}', DATA[:8]),
        FILE + ": not readable as JSON ('shape' stands in it twice); the file is damaged",
    ),
    "overlap": (
        model({"a": A, "b": B | {"data_offsets": [4, 12]}}),
        FILE + ": tensor b starts at byte 252, expected 256; the header is damaged",
    ),
    "gap": (
        model({"a": A, "b": B | {"data_offsets": [9, 17]}}, DATA + b"x"),
        FILE + ": tensor b starts at byte 257, expected 256; the header is damaged",
    ),
    "negative offset": (model({"a": A | {"data_offsets": [-8, 0]}}), MALFORMED),
    "offsets backwards": (
        model({"a": A | {"data_offsets": [8, 0]}}),
        FILE + ": tensor a of F32 [2] needs 8 bytes, the header gives -8",
    ),
    "offset as a fraction": (model({"a": A | {"data_offsets": [0.0, 8]}}), MALFORMED),
    "offset as true": (model({"a": A | {"data_offsets": [False, 8]}}), MALFORMED),
    "one offset": (model({"a": A | {"data_offsets": [0]}}), MALFORMED),
    "shape as a word": (model({"a": A | {"shape": "2"}}), MALFORMED),
    "negative shape": (model({"a": A | {"shape": [-1, -2]}}), MALFORMED),
    "too many dimensions": (model({"a": A | {"shape": [1] * 65}}), MALFORMED),
    "dtype as a list": (model({"a": A | {"dtype": ["F32"]}}), MALFORMED),
    "no dtype": (model({"a": {"shape": [2], "data_offsets": [0, 8]}}), MALFORMED),
    "entry is a number": (model({"a": 8}), MALFORMED),
    "unknown dtype": (model({"a": A | {"dtype": "F33"}}), FILE + ": tensor a has unknown dtype 'F33'"),
    "shape and size disagree": (
        model({"a": A | {"shape": [3]}}),
        FILE + ": tensor a of F32 [3] needs 12 bytes, the header gives 8",
    ),
    "shape overflows 64 bits": (
        model({"a": A | {"shape": [2**62, 4, 2]}}),
        FILE + f": tensor a of F32 [{2**62}, 4, 2] needs {2**67} bytes, the header gives 8",
    ),
    "size over 64 bits": (model({"a": A | {"shape": [10**80]}}), MALFORMED),
    "name with control characters": (
        model({"a\x1b[2J\n": A}, DATA[:8]),
        FILE + r": the name 'a\x1b[2J\n' holds control characters; the file is damaged",
    ),
    "index is not JSON": (
        lambda path: whole(path, index="x"),
        "{dir}/" + INDEX + ": not readable as JSON (Expecting value: line 1 column 1 (char 0)); the file is damaged",
    ),
    "index without map": (lambda path: whole(path, index={"a": 1}), "{dir}/" + INDEX + ": has no weight_map"),
    "index with an empty map": (index(), "{dir}/" + INDEX + ": has no weight_map"),
    "shard missing": (
        index(a="one.safetensors", b="three.safetensors"),
        "{dir}/three.safetensors: missing, though the checkpoint needs it; copy the whole directory again",
    ),
    "tensor not in its shard": (
        index(a="one.safetensors", b="two.safetensors", c="two.safetensors"),
        "{dir}/two.safetensors: tensor c is not in it, though " + INDEX + " says so",
    ),
    "tensor in another shard": (
        index(a="two.safetensors", b="two.safetensors"),
        "{dir}/two.safetensors: tensor a is not in it, though " + INDEX + " says so",
    ),
    "shards exchanged": (
        index(a="two.safetensors", b="one.safetensors"),
        "{dir}/one.safetensors: holds tensor a, but " + INDEX + " says two.safetensors",
    ),
    "tensor the index does not name": (
        lambda path: (sharded(path, {"a": "one.safetensors"}), (path / "one.safetensors").write_bytes(safetensors())),
        "{dir}/one.safetensors: holds tensor b, but " + INDEX + " does not name it",
    ),
    "index leads out of the directory": (
        index(a="../one.safetensors"),
        "{dir}/" + INDEX + ": tensor a is said to be in '../one.safetensors', which is not a file name",
    ),
    "index leads to the root": (
        index(a="/one.safetensors"),
        "{dir}/" + INDEX + ": tensor a is said to be in '/one.safetensors', which is not a file name",
    ),
    "index leads to a pickle": (
        index(a="one.dat"),
        "{dir}/" + INDEX + ": tensor a is in 'one.dat', which is not a safetensors file",
    ),
    "index leads to a number": (
        index(a=7),
        "{dir}/" + INDEX + ": tensor a is said to be in 7, which is not a file name",
    ),
    "shard name too long for the file system": (
        index(a="a" * 300 + ".safetensors"),
        "{dir}/" + "a" * 300 + ".safetensors: cannot be read: File name too long",
    ),
    "shard name with control characters": (
        index(a="\n.safetensors"),
        "{dir}/" + INDEX + r": the name '\n.safetensors' holds control characters; the file is damaged",
    ),
}
