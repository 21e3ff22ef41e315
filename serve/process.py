"""The engine as a session of processes: started together, ended to the last one, whatever happens to the launcher.

A guard, forked from the launcher, waits until the launcher is gone, also by `kill -9`, and ends what it left.
Linux only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from serve.engine import EngineCommand

# For the API server to end its children and itself: an idle vLLM takes under one second, one that is still loading
# may not react at all, and has nothing to lose.
GRACE_SECONDS = 15.0
LOADING_GRACE_SECONDS = 3.0
ORPHAN_SECONDS = 2.0  # for what is left when the API server is gone
POLL_SECONDS = 0.05
UMASK = 0o027  # logs and caches can be read by the group, by no one else


class EngineProcess:
    """The running engine. Use it as a context manager: on leaving, no process of it is left."""

    def __init__(self, command: EngineCommand, log: Path) -> None:
        """Start ``command`` with all its output going to ``log``, in the log's directory."""
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o640)
        self._leader = subprocess.Popen(
            command.command,
            env=command.full_environment(),
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            umask=UMASK,
            start_new_session=True,  # Ctrl-C in the terminal reaches the launcher alone, which then ends the engine
        )
        os.close(descriptor)
        self.grace = LOADING_GRACE_SECONDS
        self._guard, self._lifeline = _start_guard(self._leader.pid)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        end_session(self._leader.pid, self.grace, self.poll)
        os.close(self._lifeline)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._guard, 0)

    def poll(self) -> int | None:
        """Return the API server's exit code (-9: ended by signal 9), or None while it runs."""
        return self._leader.poll()


def _start_guard(session: int) -> tuple[int, int]:
    """Fork the guard. Returns its process id and the descriptor whose closing, at the latest by our end, wakes it."""
    waiting, lifeline = os.pipe()
    guard = os.fork()
    if guard:
        os.close(waiting)
        return guard, lifeline
    try:
        os.setsid()
        os.close(lifeline)
        os.read(waiting, 1)
        end_session(session, LOADING_GRACE_SECONDS, lambda: None)
    finally:
        os._exit(0)


def end_session(session: int, grace: float, collect: Callable[[], object]) -> None:
    """End all processes of a session: SIGTERM to its leader, who ends the others in order, then SIGKILL to all.

    ``grace`` is how many seconds the leader has for it.
    ``collect`` is called again and again to take the leader's exit code, where the caller is its parent.
    """

    def wait(seconds: float, going_on: Callable[[], object]) -> None:
        deadline = time.monotonic() + seconds
        while going_on() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            collect()

    collect()
    if session in session_members(session):
        os.kill(session, signal.SIGTERM)
        wait(grace, lambda: session in session_members(session))
    wait(ORPHAN_SECONDS, lambda: session_members(session))
    for process in session_members(session):
        # Python's resource tracker removes the shared memory of the others once they are gone, and then ends.
        if b"multiprocessing.resource_tracker" not in _command_line(process):
            _kill(process)
    wait(ORPHAN_SECONDS, lambda: session_members(session))
    while members := session_members(session):
        for process in members:
            _kill(process)
        wait(ORPHAN_SECONDS, lambda: session_members(session))


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def session_members(session: int) -> set[int]:
    """Return the ids of the session's living processes."""
    members = set()
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            # "pid (name) state ppid pgrp session …"; the name may hold spaces and parentheses.
            state, _, _, found = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
            if int(found) == session and state not in "ZX":
                members.add(int(entry))
    return members
