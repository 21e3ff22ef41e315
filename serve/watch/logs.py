"""The engine's log on the disk: the logs of engines that died are kept, and none grows without an end."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

KEPT = 5  # of engines that died, engine-PORT.log.1 the latest: what happened is found out afterwards
LARGEST = 256 << 20  # bytes; days of work under load, or a client that makes a server write for hours
CUT = ".cut"  # engine-PORT.log.cut: what stood in the log before it had that size


def keep_logs(log: Path) -> None:
    """Make room for a new log. Raises `OSError`."""
    names = [log, *(Path(f"{log}.{number}") for number in range(1, KEPT + 1))]
    for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
        if newer.exists():
            newer.rename(older)


def limit_log(log: Path, largest: int = LARGEST) -> None:
    """Move what a log holds aside once it is too large; the engine writes on, as it appends.

    A line that is written between the two steps is lost. On a full disk all of it is, which is what a disk needs then.
    """
    with contextlib.suppress(OSError):
        if log.stat().st_size < largest:
            return
        aside = Path(f"{log}{CUT}")
        with contextlib.suppress(OSError):
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
            with open(descriptor, "wb") as to, log.open("rb") as whole:
                shutil.copyfileobj(whole, to, 1 << 20)
        os.truncate(log, 0)
