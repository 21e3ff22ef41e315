"""How the launcher is told to stop: the first signal once, at a moment that suits; a second one means at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class StopSignals:
    """Turns the first stop signal into one `Stopped`, and remembers whether there was another one."""

    def __init__(self) -> None:
        """Take the signals over."""
        self._first: int | None = None
        self._again = False
        self._told = False
        self._held = False
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._arrived)

    def again(self) -> bool:
        """Whether somebody does not want to wait. A closing terminal may send SIGHUP twice: that is no impatience."""
        return self._again

    def close(self) -> None:
        """From now on nothing is raised any more."""
        self._told = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No `Stopped` comes within the block, but at its end: for steps that must not be left half done."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self._tell()

    def _arrived(self, signum: int, _frame: FrameType | None) -> None:
        if self._first is None:
            self._first = signum
        elif signum != signal.SIGHUP:
            self._again = True
        self._tell()

    def _tell(self) -> None:
        if self._first is not None and not self._told and not self._held:
            self._told = True
            raise Stopped(self._first)
