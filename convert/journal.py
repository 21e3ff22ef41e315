"""The directory a conversion works in: beside its target, held by one process, with a record of what is finished.

    .NAME.converting/        beside the target NAME
        holder               the process that holds it (a lock on the directory itself is what counts)
        journal.jsonl        first what is being made, then a line per finished file, each made durable
        files/               becomes NAME by a rename, at the very end

A process that is killed leaves it; the same command finds what is finished and goes on. The lock dies with its process.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from ascend.errors import UserError
from convert.rounding import Errors
from convert.shard import ShardResult
from convert.shard_writer import PARTIAL
from convert.staging import DIRECTORY_MODE, FILE_MODE, make_durable, sync

JOURNAL, HOLDER, FILES = "journal.jsonl", "holder", "files"


def work_directory(target: Path) -> Path:
    """Where a conversion to ``target`` works."""
    return target.with_name(f".{target.name}.converting")


class Journal:
    """A context manager that holds the work directory; ``finished`` are the files an earlier run has left."""

    def __init__(self, target: Path, what: dict[str, Any], restart: bool = False) -> None:
        """Take the directory for making ``what`` (it tells this conversion from others).

        Raises `UserError` if another process holds it, or if it holds another conversion, unless ``restart``.
        """
        self.path = work_directory(target)
        self.files = self.path / FILES
        self.descriptor = self._hold()
        try:
            (self.path / HOLDER).write_text(f"{os.getpid()}\n")
            found = None if restart else self._read(what)
            self.finished = found or {}
            self._clear(begin_anew=found is None)
            self.files.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            self.stream = (self.path / JOURNAL).open("a", encoding="utf-8")
            os.chmod(self.path / JOURNAL, FILE_MODE)
            if found is None:
                self._append(what)
        except OSError as error:
            os.close(self.descriptor)
            raise UserError(f"cannot write to {self.path}: {error.strerror}") from None
        except BaseException:
            os.close(self.descriptor)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.close()
        os.close(self.descriptor)

    def _hold(self) -> int:
        while True:
            try:
                self.path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot write to {self.path.parent}: {error.strerror}") from None
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:  # whoever held it has just finished
                continue
            except OSError as error:
                raise UserError(f"{self.path}: cannot be opened: {error.strerror}") from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise UserError(f"{self.path} is in use by {self._holder()}: it converts to the same target") from None
            # Whoever held it may have finished between our opening and our lock: then this is its target now.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.path), os.fstat(descriptor)):
                    return descriptor
            os.close(descriptor)

    def _holder(self) -> str:
        for _ in range(20):  # it may have taken the directory a moment ago
            with suppress(OSError, ValueError):
                return f"pid {int((self.path / HOLDER).read_text())}"
            time.sleep(0.05)
        return "another process"

    def _read(self, what: dict[str, Any]) -> dict[str, ShardResult] | None:
        """The files that are finished; None where nothing was begun."""
        file = self.path / JOURNAL
        lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
        if len(lines) < 2:  # not even the first line is whole
            return None
        if lines[0] != _line(what):
            raise UserError(
                f"{self.path} holds another conversion that was not finished (other options, or the source has "
                "changed): give the same command again to finish it, or --restart to begin anew"
            )
        finished = {}
        for line in lines[1:-1]:  # what follows the last line break was being written when it ended
            try:
                entry = json.loads(line)
                errors = {name: Errors(**values) for name, values in entry.pop("errors").items()}
                result = ShardResult(**entry, errors=errors)
            except (ValueError, TypeError, LookupError, AttributeError):
                raise UserError(f"{file} is damaged: give the command with --restart to begin anew") from None
            shard = self.files / result.file
            if shard.is_file() and shard.stat().st_size == result.nbytes:
                finished[result.file] = result
        return finished

    def _clear(self, begin_anew: bool) -> None:
        """Remove what was half written; to ``begin_anew``, everything."""
        for entry in self.files.iterdir() if self.files.exists() else ():
            if entry.name not in self.finished:
                entry.unlink()
        if begin_anew:
            for entry in self.path.iterdir():
                if entry.name not in (HOLDER, FILES):
                    entry.unlink()
        else:  # a torn last line goes, in place: the others are never away
            file = self.path / JOURNAL
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)

    def finish(self, result: ShardResult) -> None:
        """Record a file that is durable under its name."""
        sync(self.files)
        self.finished[result.file] = result
        self._append(asdict(result))

    def _append(self, entry: dict[str, Any]) -> None:
        self.stream.write(_line(entry) + "\n")
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def publish(self, target: Path) -> None:
        """Give the finished directory its name, and leave nothing else behind."""
        make_durable(self.files)
        os.rename(self.files, target)
        sync(target.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the work directory."""
        shutil.rmtree(self.path)

    def discard_partial(self) -> None:
        """Remove what was half written, after a run that could not go on: it may have filled the disk."""
        for file in self.files.glob(f"*{PARTIAL}"):
            with suppress(OSError):  # that of a disk which has become read-only stays
                file.unlink()


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True)
