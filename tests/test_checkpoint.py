"""open_checkpoint: what is refused, in which words, and that nothing is read but headers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend.checkpoint import open_checkpoint, read_config, read_header
from ascend.errors import UserError
from tests.broken_checkpoints import BROKEN, DATA, HEADER, INDEX, A, safetensors, sharded, whole
from tests.tiny import user_error


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_gets_one_line(what: str, tmp_path: Path) -> None:
    breaking, line = BROKEN[what]
    path = tmp_path / "model"
    breaking(path)
    assert user_error(open_checkpoint, path) == line.replace("{dir}", str(path))


@pytest.mark.parametrize("read", [open_checkpoint, read_config, read_header])
def test_what_the_system_refuses_gets_one_line(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / ("a" * 300)
    assert user_error(read, path) == f"{path}: cannot be read: File name too long"


def test_a_whole_file_is_listed(tmp_path: Path) -> None:
    found = open_checkpoint(whole(tmp_path))
    assert found.config == {"model_type": "bailing_moe"}
    assert {name: (e.file.name, e.dtype, e.shape, e.offset, e.nbytes) for name, e in found.tensors.items()} == {
        "a": ("model.safetensors", "F32", (2,), 248, 8),
        "b": ("model.safetensors", "BF16", (2, 2), 256, 8),
    }
    assert found.nbytes == 16


def test_whole_shards_are_listed(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    found = open_checkpoint(str(tmp_path)).tensors
    assert {name: (e.file.name, e.offset) for name, e in found.items()} == {
        "a": ("one.safetensors", 248),
        "b": ("two.safetensors", 248),
    }


def test_tensors_without_bytes_are_whole(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0, 5], "data_offsets": [8, 8]}
    scalar = {"dtype": "F32", "shape": [], "data_offsets": [8, 12]}
    path = whole(tmp_path, model=safetensors({"a": A, "z": scalar, "e": empty}, DATA[:12]))
    assert {name: e.nbytes for name, e in open_checkpoint(path).tensors.items()} == {"a": 8, "z": 4, "e": 0}


def opens_or_says_why(path: Path) -> None:
    said = str(path)
    try:
        open_checkpoint(path)
    except UserError as error:
        said = str(error)
    assert str(path) in said
    assert said.isprintable()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(tmp_path_factory.mktemp("fuzz"))


EDIT = st.tuples(
    st.sampled_from(["replace", "insert", "delete"]), st.integers(0, 270), st.binary(min_size=1, max_size=3)
)


@given(edits=st.lists(EDIT, min_size=1, max_size=6))
@settings(deadline=None, max_examples=300)
def test_any_mutation_of_the_bytes_opens_or_is_refused(directory: Path, edits: list[tuple[str, int, bytes]]) -> None:
    content = safetensors(json.dumps(HEADER).encode())
    for kind, at, piece in edits:
        content = content[:at] + (piece if kind != "delete" else b"") + content[at + len(piece) * (kind != "insert") :]
    opens_or_says_why(whole(directory, model=content))


NUMBER = st.sampled_from([0, 1, 2, 4, 8, 16, -1, 2**63, 10**80, 0.5, float("nan"), True])
WORD = st.sampled_from(["", "a", "F32", "\n", "\ud800", "é", ".", "..", "../a", "a\0", "/dev/zero", "a" * 300])
JUNK = st.none() | NUMBER | WORD | st.lists(NUMBER | WORD, max_size=3) | st.dictionaries(WORD, NUMBER, max_size=2)
ENTRY = JUNK | st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "I4"]) | JUNK, "shape": st.lists(NUMBER, max_size=3) | JUNK,
     "data_offsets": st.tuples(NUMBER, NUMBER) | JUNK}
)  # fmt: skip


@given(
    header=st.dictionaries(WORD | st.sampled_from(["b", "__metadata__"]), ENTRY, max_size=3),
    data=st.binary(max_size=30),
)
@settings(deadline=None, max_examples=300)
def test_any_header_opens_or_is_refused(directory: Path, header: dict[str, Any], data: bytes) -> None:
    opens_or_says_why(whole(directory, model=safetensors(header, data)))


@given(weight_map=JUNK | st.dictionaries(WORD, JUNK | WORD.map(lambda word: word + ".safetensors"), max_size=3))
@settings(deadline=None, max_examples=300)
def test_any_index_opens_or_is_refused(directory: Path, weight_map: Any) -> None:
    try:
        opens_or_says_why(whole(directory, index={"weight_map": weight_map}))
    finally:
        (directory / INDEX).unlink()


FRUGAL = """
import resource, sys, time
from ascend.checkpoint import open_checkpoint
rss = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
before, begun = rss(), time.perf_counter()
found = open_checkpoint(sys.argv[1])
print(len(found.tensors), found.nbytes, rss() - before, time.perf_counter() - begun, "torch" in sys.modules)
"""


def test_only_headers_are_read_and_torch_stays_out(tmp_path: Path) -> None:
    size = 8 << 30  # a file with a hole of this size; reading it would show in the memory and take seconds
    entry = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}
    whole(tmp_path, model=safetensors({"a": entry}, b""))
    os.truncate(tmp_path / "model.safetensors", 248 + size)
    command = [sys.executable, "-c", FRUGAL, str(tmp_path)]
    tensors, nbytes, kib, seconds, torch = subprocess.check_output(command, text=True).split()
    assert (int(tensors), int(nbytes), torch) == (1, size, "False")
    assert int(kib) < 4096
    assert float(seconds) < 1
