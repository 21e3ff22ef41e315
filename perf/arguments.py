"""Values of this package's command lines, each checked before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ascend.errors import UserError, suggest


def numbers(flag: str, text: str) -> list[int]:
    """Read "1,8,32": different whole numbers of at least 1. Raises `UserError` for anything else."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or len(set(found)) < len(found):
        raise UserError(f"{flag} '{text}' is not a list of different whole numbers from 1, such as 1,8,32")
    return found


def names(flag: str, text: str, known: Iterable[str]) -> list[str]:
    """Read "a,b": different ones of ``known``. Raises `UserError` for anything else."""
    known, found = list(known), text.split(",")
    for name in found:
        if name not in known:
            raise UserError(f"{flag}: unknown '{name}'{suggest(name, known)}; there is {', '.join(known)}")
    if len(set(found)) < len(found):
        raise UserError(f"{flag} '{text}' names one twice")
    return found


def out_file(flag: str, file: Path | None) -> None:
    """Refuse a file that could not be written in the end, before anything is measured."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UserError(f"{flag} {file}: " + ("is a directory" if file.is_dir() else "there is no such folder"))
