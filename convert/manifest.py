"""`manifest.json`: the size and SHA-256 of every file of a directory, and whether the directory is still that.

Only the standard library and light parts of `ascend` are imported: the launcher checks a manifest before anything else
is there. A directory is what its manifest says or it is refused: one file more is as wrong as one less.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ascend
from ascend.checkpoint import parse_json, read_header
from ascend.errors import UserError
from convert.files import MANIFEST, SIGNATURE, DiffersError, is_file_name, listing, sha256_of
from convert.staging import FILE_MODE, sync

VERSION = 1
MAX_MANIFEST_BYTES = 16 << 20  # 150 bytes a file: room for a hundred thousand
THREADS = 2  # one reads while another hashes; more would only wait for most disks
NOTHING_VOUCHES = (
    "has no manifest.json, so nothing vouches for its files: "
    "`python -m convert manifest DIR` writes one while they are known to be good"
)
_KEYS = ("manifest_version", "tool", "command", "source", "files", "sha256")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: SHA-256 in hex, and bytes."""

    sha256: str
    nbytes: int


@dataclass(frozen=True)
class Manifest:
    """A manifest as it was read: who wrote it, what was asked for, from what, and every file by name."""

    tool: dict[str, Any]
    command: dict[str, Any]
    source: dict[str, Any]
    files: dict[str, FileRecord]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(record.nbytes for record in self.files.values())


def write_manifest(
    directory: Path,
    *,
    command: Mapping[str, Any],
    source: Mapping[str, Any],
    known: Mapping[str, FileRecord] | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write the manifest of what lies in ``directory``. The same files and arguments give the same bytes.

    command, source: plain values, as the caller wants them told. known: files that were hashed while they were written,
    they are not read again. advance: told of bytes that were read. Raises `UserError` for anything that is not a file.
    """
    found, problems = listing(directory)
    if problems:
        raise UserError(problems[0])
    records = {}
    for name, size in sorted(found.items()):
        record = (known or {}).get(name)
        if record is None:
            try:
                record = FileRecord(sha256_of(directory / name, size, advance), size)
            except DiffersError as problem:
                raise UserError(f"{directory / name}: {problem}") from None
        elif record.nbytes != size:
            raise UserError(f"{directory / name}: has {size} bytes, {record.nbytes} were written: something changed it")
        records[name] = {"sha256": record.sha256, "bytes": record.nbytes}
    tool = {"name": "antangelmed", "version": ascend.__version__}
    content = {"manifest_version": VERSION, "tool": tool, "command": command, "source": source, "files": records}
    write_whole(directory / MANIFEST, _text(content | {"sha256": _sha256(_text(content))}))


def _text(content: Mapping[str, Any]) -> str:
    """The one way to write a manifest."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Write a small file so that it is there whole and durable, or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.chmod(FILE_MODE)
        sync(partial)
        os.replace(partial, file)
        sync(file.parent)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def manifest_bytes(directory: Path) -> bytes:
    """Read the manifest's file, which a signature is over. Raises `UserError` if there is none."""
    file = directory / MANIFEST
    try:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory")
        if not file.is_file():
            raise UserError(f"{directory}: {NOTHING_VOUCHES}")
        with file.open("rb") as stream:
            content = stream.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_MANIFEST_BYTES:
        raise UserError(f"{file}: more than {MAX_MANIFEST_BYTES >> 20} MiB is no manifest; the file is damaged")
    return content


def read_manifest(directory: Path, content: bytes | None = None) -> Manifest:
    """Read a manifest, or ``content`` that was read and found to be signed. Raises `UserError` if it is malformed."""
    file = directory / MANIFEST
    content = manifest_bytes(directory) if content is None else content
    value = parse_json(file, content)
    if value.get("manifest_version") != VERSION:
        raise UserError(
            f"{file}: manifest_version is {value.get('manifest_version')!r}, this version reads {VERSION}; "
            "check with the version that wrote it"
        )
    if set(value) != set(_KEYS) or not all(isinstance(value[key], dict) for key in _KEYS[1:-1]):
        raise UserError(f"{file}: not an object with exactly {', '.join(_KEYS)}; the file is damaged")
    # Its own hash is against rot alone: who changes it on purpose writes another, and only a signature tells.
    unhashed = {key: item for key, item in value.items() if key != "sha256"}
    try:
        is_as_written = content == _text(value).encode() and value["sha256"] == _sha256(_text(unhashed))
    except RecursionError:
        is_as_written = False
    if not is_as_written:
        raise UserError(f"{file}: is not what was written (its SHA-256 is another); the file is damaged")
    files = {name: _record(file, name, entry) for name, entry in value["files"].items()}
    return Manifest(value["tool"], value["command"], value["source"], files)


def _record(file: Path, name: str, entry: Any) -> FileRecord:
    if not is_file_name(name) or name in (MANIFEST, SIGNATURE):
        raise UserError(f"{file}: {name!r} is not the name of a file beside it; the file is damaged")
    if not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"}:
        raise UserError(f"{file}: the entry of {name} has not exactly sha256 and bytes; the file is damaged")
    sha256, nbytes = entry["sha256"], entry["bytes"]
    if not (isinstance(sha256, str) and _SHA256.fullmatch(sha256) and type(nbytes) is int and nbytes >= 0):
        raise UserError(f"{file}: the entry of {name} is malformed; the file is damaged")
    return FileRecord(sha256, nbytes)


def check_quick(directory: Path, manifest: Manifest) -> list[str]:
    """Return what is wrong, a line each: files missing, unknown, of another size, safetensors headers malformed.

    No content is read: a changed bit in a tensor is not seen.
    """
    found, problems = _check_listing(directory, manifest)
    for name in sorted(found):
        if name.endswith(".safetensors"):
            try:
                read_header(directory / name)
            except UserError as problem:
                problems.append(str(problem))
    return problems


def check_full(
    directory: Path, manifest: Manifest, advance: Callable[[int], None] = lambda nbytes: None, threads: int = THREADS
) -> list[str]:
    """Return what is wrong, a line each, with the SHA-256 of every file computed; ``advance`` is told of bytes read."""
    found, problems = _check_listing(directory, manifest)
    lock, stop = threading.Lock(), threading.Event()

    def counted(nbytes: int) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        with lock:
            advance(nbytes)

    def check(name: str) -> str | None:
        record = manifest.files[name]
        try:
            if sha256_of(directory / name, record.nbytes, counted) != record.sha256:
                raise DiffersError(
                    f"its content is not what {MANIFEST} says (SHA-256); the file is damaged or was changed"
                )
        except DiffersError as problem:
            return f"{directory / name}: {problem}"
        except BaseException:
            stop.set()  # the others need not go on
            raise
        return None

    names = [name for name, nbytes in found.items() if nbytes == manifest.files[name].nbytes]
    names.sort(key=lambda name: -found[name])  # so that no thread is left alone with the largest in the end
    with ThreadPoolExecutor(threads) as pool:
        try:
            problems += filter(None, pool.map(check, names))
        except BaseException:
            stop.set()
            raise
    return sorted(problems)


def _check_listing(directory: Path, manifest: Manifest) -> tuple[dict[str, int], list[str]]:
    found, problems = listing(directory, lambda name: name in manifest.files)
    for name, record in manifest.files.items():
        if name not in found:
            if not os.path.lexists(directory / name):
                problems.append(f"{directory / name}: missing, though {MANIFEST} names it; copy the directory again")
        elif found[name] != record.nbytes:
            problems.append(
                f"{directory / name}: has {found[name]} bytes, {MANIFEST} says {record.nbytes}; "
                "it is cut off, or not the file it was"
            )
    return found, sorted(problems)


def summary(problems: Iterable[str]) -> str:
    """The first problem as the one line of an error, with how many more there are."""
    first, *more = problems
    return first + (f" (and {len(more)} more: `python -m convert verify DIR` lists them)" if more else "")
