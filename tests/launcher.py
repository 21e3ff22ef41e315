"""Runs `serve/launch.sh` for the tests, and finds every process it has started, also those that lost their parent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serve.watch.process import session_members

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "serve" / "launch.sh"
MARK = "ANTANGELMED_TEST_RUN"  # in the environment of all that a launch starts


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_listening(port: int) -> bool:
    """Whether somebody answers on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], Any], seconds: float) -> bool:
    """Wait until the condition holds; False if it does not within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def run_in_time(command: Sequence[str], seconds: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program that must end by itself within so many seconds; a second try allows for a busy machine."""
    for _ in range(2):
        begin = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)
        taken = time.monotonic() - begin
        if taken < seconds:
            return done
    raise AssertionError(f"took {taken:.1f} s: {done.stderr}")


class Launched:
    """A running `serve/launch.sh`, or another ``program`` with its flags, with its logs below ``directory``."""

    def __init__(
        self, directory: Path, *arguments: str, port: int | None = None, program: Sequence[str] = (str(LAUNCH),)
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.port = port or free_port()
        self.mark = uuid.uuid4().hex
        self._sessions: set[int] = set()
        self.ready_file = directory / "ready.json"
        self.output_file = directory / "output.txt"
        environment = {**os.environ, MARK: self.mark, "XDG_STATE_HOME": str(directory)}
        environment.pop("ANTANGELMED_STARTED_AT", None)
        command = [*program, "--port", str(self.port), "--ready-file", str(self.ready_file), *arguments]
        with self.output_file.open("w") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        """What the launcher has printed so far, both streams."""
        return self.output_file.read_text()

    def wait_until_ready(self, seconds: float = 300.0) -> dict[str, Any]:
        """The document of the ready file, once it is there."""
        done = wait_for(lambda: self.ready_file.exists() or self.process.poll() is not None, seconds)
        assert done, f"not ready after {seconds} s:\n{self.output}"
        assert self.process.poll() is None, f"ended with code {self.process.returncode}:\n{self.output}"
        document: dict[str, Any] = json.loads(self.ready_file.read_text())
        return document

    def stop(self, signum: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        """Send the signal and return the exit code; what is still there after the time is killed."""
        assert len(self.processes()) >= 2  # notes the engine's session
        try:
            self.process.send_signal(signum)
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)
            raise

    def processes(self) -> set[int]:
        """Every living process that the launch has started, whoever its parent is now.

        By the mark in its environment; vLLM's inner processes write their titles over theirs, but stay in the session
        of the API server, which must have been seen here before it ended.
        """
        needle = f"{MARK}={self.mark}".encode()
        marked = {
            pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if needle in _read(pid, "environ")
        }
        self._sessions |= {pid for pid in marked if _is_session_leader(pid)}
        return marked.union(*map(session_members, self._sessions))

    def titled(self, title: str) -> int:
        """The one process whose title begins so: vLLM gives its inner processes titles."""
        (found,) = [pid for pid in self.processes() if _read(pid, "cmdline").startswith(title.encode())]
        return found


def listening_addresses(pids: set[int]) -> set[str]:
    """The local addresses, as the kernel writes them, on which the processes listen for TCP."""
    tables = [Path("/proc/net/tcp").read_text(), Path("/proc/net/tcp6").read_text()]
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    address_of = {f"socket:[{row[9]}]": row[1].partition(":")[0] for row in rows if row[3] == "0A"}
    return {address_of[link] for pid in pids for link in _descriptors(pid) if link in address_of}


def shared_memory(pid: int) -> set[Path]:
    """The files in ``/dev/shm`` that the process has mapped."""
    lines = _read(pid, "maps").decode().splitlines()
    return {Path(line.split()[5]) for line in lines if " /dev/shm/" in line and not line.endswith("(deleted)")}


def _is_session_leader(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def _read(pid: int, what: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


def _descriptors(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except OSError:
            continue
    return found
