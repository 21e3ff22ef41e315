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

# For the API server to end its children and itself: an idle vLLM takes about six seconds with a worker, one that is
# still loading may not react at all, and has nothing to lose.
GRACE_SECONDS = 15.0
LOADING_GRACE_SECONDS = 3.0
ORPHAN_SECONDS = 2.0  # for what is left when the API server is gone
POLL_SECONDS = 0.05
PART_TITLES = (b"VLLM::", b"sglang::")  # what vLLM and SGLang call their engine's own processes (setproctitle)
UMASK = 0o027  # logs and caches can be read by the group, by no one else


class Guard:
    """A child of the launcher that ends the engine if the launcher ends without having done so. A context manager.

    Make it before any thread is started: a fork of a process with threads may find a lock taken for good.
    """

    def __init__(self) -> None:
        waiting, self._lifeline = os.pipe()
        self._process = os.fork()
        if self._process:
            os.close(waiting)
            return
        try:
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.SIG_IGN)  # whoever signals all of us must not end the guard first
            os.setsid()
            os.close(self._lifeline)
            told = b""
            while part := os.read(waiting, 4096):  # nothing comes any more once the launcher is gone
                told += part
            session = int((told.split() or [b"0"])[-1])
            if session:
                end_session(session, LOADING_GRACE_SECONDS, lambda: None)
        finally:
            os._exit(0)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lifeline)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._process, 0)

    def watch(self, session: int) -> None:
        """From now on this session is the engine's; 0: there is none."""
        os.write(self._lifeline, b"%d\n" % session)


class EngineProcess:
    """The running engine."""

    def __init__(self, command: EngineCommand, log: Path, guard: Guard) -> None:
        """Start ``command`` with all its output going to ``log``, in the log's directory."""
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o640)
        try:
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
        finally:
            os.close(descriptor)
        self._guard = guard
        self._parts: dict[int, str] = {}
        guard.watch(self._leader.pid)

    def poll(self) -> int | None:
        """Return the API server's exit code (-9: ended by signal 9), or None while it runs."""
        return self._leader.poll()

    def note_parts(self) -> None:
        """Remember which processes the engine has, once it is ready: none of them may be missed from now on."""
        titles = {process: _command_line(process) for process in session_members(self._leader.pid)}
        self._parts = {
            process: title.split(b"\0")[0].decode(errors="replace").strip()
            for process, title in titles.items()
            if title.startswith(PART_TITLES)
        }

    def lost_part(self) -> str | None:
        """Return the title of one that is gone. The API server may live for seconds after it."""
        gone = (title for process, title in self._parts.items() if _session_of(process) != self._leader.pid)
        return next(gone, None)

    def end(self, grace: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """End it to the last process; the leader has ``grace`` seconds, or until ``hurry`` says so."""
        end_session(self._leader.pid, grace, self.poll, hurry)
        self._guard.watch(0)


def end_session(
    session: int, grace: float, collect: Callable[[], object], hurry: Callable[[], bool] = lambda: False
) -> None:
    """End all processes of a session: SIGTERM to its leader, who ends the others in order, then SIGKILL to all.

    ``grace`` is how many seconds the leader has for it, cut short as soon as ``hurry`` returns True.
    ``collect`` is called again and again to take the leader's exit code, where the caller is its parent.
    """

    def wait(seconds: float, going_on: Callable[[], object], hurry: Callable[[], bool] = lambda: False) -> None:
        deadline = time.monotonic() + seconds
        while going_on() and time.monotonic() < deadline and not hurry():
            time.sleep(POLL_SECONDS)
            collect()

    collect()
    if session in session_members(session):
        os.kill(session, signal.SIGTERM)
        wait(grace, lambda: session in session_members(session), hurry)
    wait(ORPHAN_SECONDS, lambda: session_members(session), hurry)
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
    processes = map(int, filter(str.isdecimal, os.listdir("/proc")))
    return {process for process in processes if _session_of(process) == session}


def _session_of(process: int) -> int | None:
    """Return the session of a process that lives."""
    try:
        # "pid (name) state ppid pgrp session …"; the name may hold spaces and parentheses.
        state, _, _, session = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return None
    return None if state in "ZX" else int(session)
