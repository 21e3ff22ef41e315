"""A directory that appears whole or not at all: built beside its place, made durable, then renamed into it."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ascend.errors import UserError

FILE_MODE = 0o640
DIRECTORY_MODE = 0o750


@contextmanager
def staged_directory(target: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes ``target`` when the block ends, and vanishes when it fails.

    A ``target`` that another writer filled meanwhile stays if its files are the same; if not, it is replaced with
    ``replace`` and refused without. Files get mode 0640. Any `OSError` becomes one line.
    """
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write to {target.parent}: {error.strerror}") from None
    try:
        yield staging
        make_durable(staging)
        _publish(staging, target, replace)
        sync(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, target: Path, replace: bool) -> None:
    replaced: list[Path] = []
    try:
        while True:
            try:
                os.rename(staging, target)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            # Another writer may move it away at any moment: the name is then free.
            with suppress(FileNotFoundError):
                if _same_files(staging, target):
                    return
                if not replace:
                    raise UserError(f"{target} was filled with something else meanwhile: give another directory")
                replaced.append(Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)))
                os.rename(target, replaced[-1])
    finally:
        for old in replaced:
            shutil.rmtree(old)


def _same_files(left: Path, right: Path) -> bool:
    names = sorted(os.listdir(left))
    if names != sorted(os.listdir(right)):
        return False
    _, mismatch, errors = filecmp.cmpfiles(left, right, names, shallow=False)
    return not mismatch and not errors


def make_durable(directory: Path) -> None:
    """Give a directory and its files their modes and bring them to the disk."""
    for file in directory.iterdir():
        file.chmod(FILE_MODE)
        sync(file)
    directory.chmod(DIRECTORY_MODE)
    sync(directory)


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
