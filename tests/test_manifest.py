"""The manifest: the same directory gives the same bytes, and every way to differ from it is found and named."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import convert.files
from ascend.errors import UserError
from convert import manifest as manifests
from convert.demo import write_demo
from convert.manifest import MANIFEST, FileRecord, check_full, check_quick, read_manifest, write_manifest
from tests.broken_checkpoints import DATA, safetensors
from tests.launcher import ROOT
from tests.tiny import user_error


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in three shards, with its manifest."""
    path = tmp_path_factory.mktemp("manifest") / "tiny"
    write_demo(path, max_shard_size="2MB")
    write_manifest(path, command={"command": "test"}, source={"fingerprint": "f"})
    return path


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def problems(path: Path) -> list[str]:
    """What the full check says, however it says it."""
    try:
        return check_full(path, read_manifest(path))
    except UserError as problem:
        return [str(problem)]


def test_what_it_says(tiny: Path) -> None:
    content = json.loads((tiny / MANIFEST).read_text())
    assert set(content) == {"manifest_version", "tool", "command", "source", "files", "sha256"}
    assert (content["command"], content["source"]) == ({"command": "test"}, {"fingerprint": "f"})
    assert set(content["files"]) == {file.name for file in tiny.iterdir()} - {MANIFEST}
    for name, entry in content["files"].items():
        data = (tiny / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert stat.S_IMODE((tiny / MANIFEST).stat().st_mode) == 0o640
    done = subprocess.run(
        ["sha256sum", "-c"], input=sums(content), cwd=tiny, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert str(tiny) not in (tiny / MANIFEST).read_text()


def sums(content: dict[str, Any]) -> str:
    return "".join(f"{entry['sha256']}  {name}\n" for name, entry in content["files"].items())


def test_it_is_deterministic_and_does_not_name_itself(copy: Path) -> None:
    first = (copy / MANIFEST).read_bytes()
    (copy / "manifest.sig").write_text("a signature is none of the files")
    os.utime(copy / "config.json", (1, 1))
    write_manifest(copy, source={"fingerprint": "f"}, command={"command": "test"})
    assert (copy / MANIFEST).read_bytes() == first
    assert problems(copy) == check_quick(copy, read_manifest(copy)) == []


def test_files_that_were_hashed_before_are_not_read_again(copy: Path) -> None:
    known = {shards(copy)[0].name: FileRecord("0" * 64, shards(copy)[0].stat().st_size)}
    write_manifest(copy, command={}, source={}, known=known)
    assert read_manifest(copy).files[shards(copy)[0].name].sha256 == "0" * 64
    os.truncate(shards(copy)[0], 10)
    assert "has 10 bytes, 2001480 were written" in user_error(write_manifest, copy, command={}, source={}, known=known)


def test_a_hundred_flipped_bits_are_found(tiny: Path, tmp_path: Path) -> None:
    """Wherever they are: each file gets some, `config.json` and the manifest itself among them."""
    pick, found = random.Random(6), 0
    files = sorted(file.name for file in tiny.iterdir())
    path = Path(shutil.copytree(tiny, tmp_path / "rotten"))
    for turn in range(100):
        name = files[turn % len(files)]
        flip(path / name, pick.randrange(8 * (tiny / name).stat().st_size))
        said = problems(path)
        found += len(said) == 1 and str(path / name) in said[0]
        shutil.copyfile(tiny / name, path / name)
    assert found == 100
    assert problems(path) == []


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_bit_of_the_manifest_counts(tiny: Path, data: st.DataObject) -> None:
    content = bytearray((tiny / MANIFEST).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    assert MANIFEST in user_error(read_manifest, tiny, bytes(content))


def truncated(path: Path) -> str:
    os.truncate(shards(path)[1], 2000)
    return f"{shards(path)[1].name}: has 2000 bytes, manifest.json says 2006208"


def appended(path: Path) -> str:
    with (path / "tokenizer.json").open("a") as stream:
        stream.write("\n")
    return "tokenizer.json: has 131057 bytes, manifest.json says 131056"


def missing(path: Path) -> str:
    (path / "README.md").unlink()
    return "README.md: missing, though manifest.json names it"


def extra(path: Path) -> str:
    (path / "modeling_bailing_moe_v2.py").write_text("print('hello')")
    return "modeling_bailing_moe_v2.py: manifest.json does not name it; remove it"


def hidden(path: Path) -> str:
    (path / ".hidden").touch()
    return ".hidden: manifest.json does not name it; remove it"


def cache(path: Path) -> str:
    (path / "__pycache__").mkdir()
    return "__pycache__: not a file; remove it"


def link_out(path: Path) -> str:
    shutil.move(shards(path)[0], path.parent / "elsewhere")
    (path / "model-00001-of-00003.safetensors").symlink_to(path.parent / "elsewhere")
    return "model-00001-of-00003.safetensors: a link that leads out of the directory"


def dangling(path: Path) -> str:
    (path / "README.md").unlink()
    (path / "README.md").symlink_to("nowhere")
    return "README.md: cannot be read: No such file or directory"


def pipe(path: Path) -> str:
    (path / "README.md").unlink()
    os.mkfifo(path / "README.md")
    return "README.md: not a file; remove it"


def control_characters(path: Path) -> str:
    (path / "a\x1b[31m\nb").touch()
    return r"a\x1b[31m\nb': a name that is not printable UTF-8"


def header(path: Path) -> str:
    data = shards(path)[0].read_bytes()
    shards(path)[0].write_bytes(data.replace(b'"BF16"', b'"BF17"', 1))
    return "has unknown dtype 'BF17'"


QUICK = [
    truncated, appended, missing, extra, hidden, cache, link_out, dangling, pipe, control_characters, header,
]  # fmt: skip


@pytest.mark.parametrize("damage", QUICK, ids=lambda damage: damage.__name__)
def test_what_is_told_without_reading_content(copy: Path, damage: Callable[[Path], str]) -> None:
    expected = damage(copy)
    said = check_quick(copy, read_manifest(copy))
    assert any(expected in line for line in said), said
    assert all("\n" not in line and "\x1b" not in line for line in said)
    assert problems(copy) != []


def swapped(path: Path) -> list[str]:
    """Two files of one size trade names, as only content can tell."""
    first, second = path / "one.safetensors", path / "two.safetensors"
    first.write_bytes(safetensors(data=DATA))
    second.write_bytes(safetensors(data=DATA[::-1]))
    write_manifest(path, command={}, source={})
    first.rename(path / "three.safetensors")
    second.rename(first)
    (path / "three.safetensors").rename(second)
    return [first.name, second.name]


def test_all_that_is_wrong_is_told_and_only_content_tells_some(copy: Path) -> None:
    names = swapped(copy)
    manifest = read_manifest(copy)
    assert check_quick(copy, manifest) == []
    said = check_full(copy, manifest)
    assert [line.partition(":")[0] for line in said] == [str(copy / name) for name in names]
    extra(copy)
    missing(copy)
    assert len(check_full(copy, manifest)) == 4
    shutil.move(copy / "config.json", copy / "config.json.bak")  # a renamed file is one missing and one too many
    assert len(check_full(copy, manifest)) == 6


def test_links_within_the_directory_are_files(copy: Path) -> None:
    (copy / "LICENSE").symlink_to("README.md")
    write_manifest(copy, command={}, source={})
    assert problems(copy) == []
    (copy / "README.md").write_text("other")
    assert len(problems(copy)) == 2


@pytest.mark.parametrize("change", ["cut off", "changed"])
def test_a_file_that_changes_while_it_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.setattr(convert.files, "BUFFER_BYTES", 4096)
    file, seen = copy / "tokenizer.json", []

    def meddle(nbytes: int) -> None:
        if not seen and nbytes == 4096:
            seen.append(nbytes)
            if change == "cut off":
                os.truncate(file, 8192)
            else:
                flip(file, 8 * 100_000)

    manifest = read_manifest(copy)
    whole = manifests.Manifest({}, {}, {}, {file.name: manifest.files[file.name]})
    for other in [other for other in copy.iterdir() if other not in (file, copy / MANIFEST)]:
        other.unlink()
    said = check_full(copy, whole, meddle)
    assert len(said) == 1
    assert f"tokenizer.json: was {change} while it was read" in said[0]


def test_ctrl_c_stops_all_threads(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert.files, "BUFFER_BYTES", 512)
    calls = []

    def interrupt(nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) == 1:
            raise KeyboardInterrupt
        time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        check_full(copy, read_manifest(copy), interrupt)
    assert len(calls) < 2000  # of 10,000


def test_a_manifest_that_was_laid_out_anew(copy: Path) -> None:
    (copy / MANIFEST).write_text(json.dumps(json.loads((copy / MANIFEST).read_text()), sort_keys=True))
    assert "is not what was written" in user_error(read_manifest, copy)


def rewritten(path: Path, **changes: Any) -> Path:
    """The manifest as someone would write it who knows how."""
    content = json.loads((path / MANIFEST).read_text())
    del content["sha256"]
    content |= changes
    content["sha256"] = manifests._sha256(manifests._text(content))
    (path / MANIFEST).write_text(manifests._text(content))
    return path


GOOD = {"sha256": "0" * 64, "bytes": 1}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"manifest_version": 2}, "manifest_version is 2, this version reads 1"),
        ({"more": 1}, "not an object with exactly"),
        ({"files": []}, "not an object with exactly"),
        ({"files": {"../x": GOOD}}, "'../x' is not the name of a file beside it"),
        ({"files": {"a/b": GOOD}}, "'a/b' is not the name"),
        ({"files": {"..": GOOD}}, "'..' is not the name"),
        ({"files": {"": GOOD}}, "'' is not the name"),
        ({"files": {"a\nerror: b": GOOD}}, r"'a\nerror: b' is not the name"),
        ({"files": {MANIFEST: GOOD}}, "is not the name"),
        ({"files": {"a": GOOD | {"bytes": -1}}}, "the entry of a is malformed"),
        ({"files": {"a": GOOD | {"bytes": True}}}, "the entry of a is malformed"),
        ({"files": {"a": GOOD | {"sha256": "0" * 63}}}, "the entry of a is malformed"),
        ({"files": {"a": "0" * 64}}, "the entry of a has not exactly"),
    ],
)
def test_a_manifest_that_is_malformed(copy: Path, changes: dict[str, Any], expected: str) -> None:
    assert expected in user_error(read_manifest, rewritten(copy, **changes))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": {}, "files": {}}', '{"a": ' * 9000, "\xff", " " * (16 << 20) + "{}"]
)
def test_a_manifest_that_is_no_manifest(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_text(text, encoding="latin-1")
    assert str(copy / MANIFEST) in user_error(read_manifest, copy)


def test_a_manifest_nested_too_deep(copy: Path) -> None:
    deep: dict[str, Any] = {}
    for _ in range(600):
        deep = {"a": deep}
    text = (copy / MANIFEST).read_text().replace('"command": "test"', f'"command": {json.dumps(deep)}')
    (copy / MANIFEST).write_text(text)
    assert "is not what was written" in user_error(read_manifest, copy)


def test_a_directory_that_is_not_there_or_has_none(tmp_path: Path) -> None:
    assert user_error(read_manifest, tmp_path / "x") == f"{tmp_path / 'x'}: no such directory"
    assert "python -m convert manifest DIR" in user_error(read_manifest, tmp_path)


@pytest.mark.slow
def test_three_hundred_files_within_a_second(tmp_path: Path) -> None:
    """With 75,000 tensors: three formats' worth of the 103 B model's."""
    for number in range(300):
        tensors = {
            f"model.layers.{number}.mlp.experts.{one}.gate_proj.weight": {
                "dtype": "U8", "shape": [2], "data_offsets": [2 * one, 2 * one + 2],
            }
            for one in range(250)
        }  # fmt: skip
        (tmp_path / f"model-{number:05d}.safetensors").write_bytes(safetensors(tensors, bytes(500)))
    write_manifest(tmp_path, command={}, source={})
    manifest, seconds = read_manifest(tmp_path), []
    for _ in range(3):
        begin = time.process_time()
        assert check_quick(tmp_path, manifest) == []
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 1.0


def test_it_needs_nothing_that_is_slow_or_not_installed_yet() -> None:
    code = (
        "import sys, convert.manifest, serve.preflight\n"
        "print({'torch', 'numpy', 'tqdm', 'transformers', 'cryptography'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_hashing_keeps_memory_flat(tmp_path: Path) -> None:
    with (tmp_path / "large.safetensors").open("wb") as stream:
        os.truncate(stream.fileno(), 300 << 20)
    code = (
        "import sys; from pathlib import Path; from convert.manifest import *\n"
        "path = Path(sys.argv[1]); write_manifest(path, command={}, source={})\n"
        "assert check_full(path, read_manifest(path)) == []\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < 64 << 10  # KiB, with the interpreter
