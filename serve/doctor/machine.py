"""The machine as the checks see it: files and packages through `Host`, vendors' tools with a time limit."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from ascend.devices import Host

TOOL_SECONDS = 10.0
QUICK_SECONDS = 8.0  # for all tools together, where the launcher asks
LARGEST_OUTPUT = 1 << 20
# Where drivers put their tools when PATH of a service or a container does not say so.
TOOL_FOLDERS = ("/usr/local/bin", "/usr/local/sbin", "/usr/bin", "/usr/sbin", "/sbin", "/usr/local/Ascend/driver/tools")


@dataclass(frozen=True)
class Asked:
    """What the user wants to start, as far as it decides what must be there. port None: no server is to be started."""

    device: str = "cpu"
    model: Path | None = None
    port: int | None = None
    host: str = "127.0.0.1"
    nodes: int = 1
    network_interface: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a tool printed, both streams together, and why that is not to be relied on (empty: it is)."""

    text: str
    problem: str = ""
    is_missing: bool = False


@dataclass
class Machine:
    """A host, what was asked for, and every tool's answer, asked once. quick: tools share `QUICK_SECONDS`."""

    asked: Asked
    host: Host = field(default_factory=Host)
    quick: bool = False
    answers: dict[tuple[str, ...], Answer] = field(default_factory=dict)
    hung: set[str] = field(default_factory=set)
    seconds_used: float = 0.0

    def run(self, *command: str, seconds: float = TOOL_SECONDS) -> Answer:
        """Return what a vendor's tool answers; one that hangs is ended with all its children, and not asked again."""
        if command not in self.answers:
            left = QUICK_SECONDS - self.seconds_used if self.quick else seconds
            begin = time.monotonic()
            self.answers[command] = self._run(command, min(seconds, left))
            self.seconds_used += time.monotonic() - begin
        return self.answers[command]

    def _run(self, command: tuple[str, ...], seconds: float) -> Answer:
        environ = self.host.environ
        folders = [environ.get("PATH", ""), *(str(self.host.path(folder)) for folder in TOOL_FOLDERS)]
        program = shutil.which(command[0], path=os.pathsep.join(folders))
        if program is None:
            return Answer("", "is not installed", is_missing=True)
        if command[0] in self.hung:
            return Answer("", "was not asked again: it hung before")
        if seconds < 0.1:
            return Answer("", "was not asked: the time for quick checks is used up")
        # Into memory and not a pipe: children of a tool that hangs would hold the pipe open.
        with os.fdopen(os.memfd_create("doctor"), "w+b") as output:
            try:
                process = subprocess.Popen(
                    [program, *command[1:]],
                    env={**environ, "LC_ALL": "C"},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            except OSError as failure:
                return Answer("", f"cannot be run ({failure.strerror})")
            code = _wait(process, seconds)
            if code is None:
                self.hung.add(command[0])
                problem = f"gave no answer within {seconds:.0f} s"
            else:
                problem = f"ended with code {code}" if code else ""
            output.seek(0)
            return Answer(output.read(LARGEST_OUTPUT).decode(errors="replace"), problem)

    def free_bytes(self, folder: str) -> int | None:
        """Return the bytes free where a folder is, or would be made; None if that cannot be told."""
        path = self.host.path(folder)
        while not path.exists() and path != path.parent:
            path = path.parent
        try:
            return shutil.disk_usage(path).free
        except OSError:
            return None


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Wait for the end; return the exit code, None where there was none in time and all was killed.

    A process that cannot be killed, because it is stuck in a driver, is left alone.
    """
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        return None
