"""What lies in a directory: the size of every file, what should not be in it, the SHA-256 of one that may be huge."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from ascend.errors import UserError

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
BUFFER_BYTES = 1 << 20


class DiffersError(Exception):
    """A file is not what it should be; the text says how, without its name."""


def is_file_name(name: str) -> bool:
    """Whether a file of this name lies in the directory itself, and its name can be printed."""
    return bool(name) and name not in (".", "..") and "/" not in name and name.isprintable()


def listing(directory: Path, expected: Callable[[str], bool] = lambda name: True) -> tuple[dict[str, int], list[str]]:
    """Return the sizes of a directory's files, manifest and signature aside, and what should not be in it."""
    found, problems = {}, []
    try:
        home = os.path.realpath(directory)
        for entry in os.scandir(directory):
            try:
                if entry.name in (MANIFEST, SIGNATURE):
                    if entry.is_file(follow_symlinks=False):
                        continue
                    why = "not a file of its own; remove it"
                elif entry.is_symlink() and os.path.dirname(os.path.realpath(entry.path)) != home:
                    why = "a link that leads out of the directory; put the file itself there"
                elif not is_file_name(entry.name):
                    why = "a name that is not printable UTF-8; rename or remove it"
                elif not stat.S_ISREG(entry.stat().st_mode):
                    why = "not a file; remove it, or move it elsewhere"
                elif not expected(entry.name):
                    why = f"{MANIFEST} does not name it; remove it"
                else:
                    found[entry.name] = entry.stat().st_size
                    continue
            except OSError as error:
                why = f"cannot be read: {error.strerror}"
            shown = str(directory / entry.name)
            problems.append(f"{shown if shown.isprintable() else ascii(shown)}: {why}")
    except OSError as error:
        raise UserError(f"{directory}: cannot be read: {error.strerror}") from None
    return found, problems


def sha256_of(file: Path, nbytes: int, advance: Callable[[int], None]) -> str:
    """Hash a file of ``nbytes``, in flat memory. Raises `DiffersError` if it changes meanwhile or cannot be read."""
    digest, buffer, done = hashlib.sha256(), memoryview(bytearray(BUFFER_BYTES)), 0
    try:
        with file.open("rb", buffering=0) as stream:
            begun = os.fstat(stream.fileno())
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
                done += count
                advance(count)
                if done > nbytes:
                    break
            ended = os.fstat(stream.fileno())
    except OSError as error:
        raise DiffersError(f"cannot be read: {error.strerror}") from None
    if done < nbytes:
        raise DiffersError(f"was cut off while it was read, after {done} of {nbytes} bytes")
    if done > nbytes or (begun.st_mtime_ns, begun.st_size) != (ended.st_mtime_ns, ended.st_size):
        raise DiffersError("was changed while it was read; check again when nothing writes to it")
    return digest.hexdigest()
