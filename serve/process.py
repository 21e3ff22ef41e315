"""The engine as a process tree: started in a session of its own, ended to the last child. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from serve.engine import EngineCommand

# From linux/prctl.h.
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 15.0  # for the engine to end by itself; vLLM takes under one second where no request runs
POLL_SECONDS = 0.05
UMASK = 0o027  # logs and caches can be read by the group, by no one else

_libc = ctypes.CDLL(None, use_errno=True)


class EngineProcess:
    """The running engine. Use it as a context manager: on leaving, no process of it is left."""

    def __init__(self, command: EngineCommand, log: Path) -> None:
        """Start ``command`` with all its output going to ``log``, in the log's directory."""
        # Whatever the engine's children leave orphaned becomes a child of this process, where it can be found.
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o640)
        try:
            self._leader = subprocess.Popen(
                command.command,
                env=command.full_environment(),
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,  # Ctrl-C in the terminal reaches the launcher alone, which then ends the engine
                preexec_fn=_before_exec(os.getpid()),
            )
        finally:
            os.close(descriptor)
        self.exit_code: int | None = None

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the API server."""
        return self._leader.pid

    def poll(self) -> int | None:
        """Collect every child that has ended. Returns the API server's exit code (-9: by signal 9) or None."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self.pid:
                    self.exit_code = self._leader.returncode = os.waitstatus_to_exitcode(status)
        return self.exit_code

    def stop(self) -> None:
        """End the engine and everything it started: SIGTERM to the API server, after the grace time SIGKILL to all."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)
            self._wait(GRACE_SECONDS, lambda: self.poll() is None)
        # The API server ends its engine core; what still lives now was orphaned by a crash or hangs.
        self._wait(2.0, lambda: bool(self._descendants()))
        while processes := self._descendants():
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._wait(0.5, lambda: bool(self._descendants()))

    def _wait(self, seconds: float, going_on: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while going_on() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _descendants(self) -> list[int]:
        """Return the ids of all living processes below this one."""
        self.poll()
        children: dict[int, list[int]] = {}
        for entry in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                # "pid (name) state ppid …"; the name may hold spaces and parentheses.
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry))
        found, todo = [], [os.getpid()]
        while todo:
            below = children.get(todo.pop(), [])
            found += below
            todo += below
        return found


def _before_exec(launcher: int) -> Callable[[], None]:
    def prepare() -> None:
        os.umask(UMASK)
        # If the launcher is killed without a chance to clean up, the engine is told to end.
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:
            os._exit(1)

    return prepare
