"""What the engine is doing, read from its log: the stage it is in, and the line that says why it failed."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from serve.state import printable

# A line of vLLM's log that contains the text begins the stage. Seen in 0.23, 0.32 and 0.33; a text that a
# version words differently only joins two stages.
STAGES = (
    ("non-default args", "reading the model's configuration"),
    ("Initializing a V1 LLM engine", "starting the workers"),
    ("Starting to load model", "loading the weights"),
    ("Loading weights took", "warming up"),
    ("Starting vLLM server on", "opening the port"),
)
# What vLLM's engine core says last when it cannot start; then it ends, or should.
FAILED = "EngineCore failed to start."
ANSWERING = "answering the first request"
COMPARING = "comparing with the recorded answer"
LAST_BYTES = 1 << 20  # of a log, for the line that says why an engine ended
MOST_BYTES = 4 << 20  # that are read at once; a line that is longer is taken for several

_ERROR = re.compile(r"\b(?:[A-Za-z_.]*(?:Error|Exception)|error)\b\s*:\s*\S|Value error, |Killed|out of memory")
_PYDANTIC = "Value error, "  # how pydantic begins, and " [type=value_error, …]" how it ends, the message of a check
_CONSEQUENCES = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "Worker failed with error",
    "See root cause",
    "See stack trace",
    "raise ",
)
_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) )?((INFO|WARNING|ERROR) [\d-]+ [\d:]+ \[[^\]]+\] )?")
_HARMLESS = re.compile(r"^(\(\S+ pid=\d+\) )?(INFO|WARNING) ")  # may speak of errors that could come


def error_line(log: Path) -> str:
    """Return the line of the engine's log that names the cause of its end, or what is known without one."""
    with log.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, 2) - LAST_BYTES))
        written = stream.read(LAST_BYTES).decode(errors="replace").splitlines()
    lines = [_PREFIX.sub("", line).strip() for line in written]
    errors = [
        line for line, whole in zip(lines, written, strict=True) if _ERROR.search(line) and not _HARMLESS.match(whole)
    ]
    causes = [line for line in errors if not any(text in line for text in _CONSEQUENCES)]
    said = causes or errors or [line for line in lines if line]
    if not said:
        return "it wrote nothing to its log"
    return printable(said[-1].removeprefix(_PYDANTIC).partition(" [type=value_error")[0])[:500]


class Tail:
    """What comes to a log that is being written, whole lines only."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read = 0

    def lines(self) -> list[str]:
        """Return lines that are new since the last call, none if there are none; there may be more where there were."""
        with self._log.open("rb") as stream:
            if stream.seek(0, 2) < self._read:  # somebody has cut it off, as logrotate's copytruncate does
                self._read = 0
            stream.seek(self._read)
            new = stream.read(MOST_BYTES)
        complete = new if len(new) == MOST_BYTES and b"\n" not in new else new[: new.rfind(b"\n") + 1]
        self._read += len(complete)
        return complete.decode(errors="replace").splitlines()


class Progress:
    """Follows the log and shows the stage: one line that renews itself on a terminal, else one line per stage."""

    def __init__(self, log: Path, started_at: float) -> None:
        """Begin with the engine's start; ``started_at`` (seconds since the epoch) is when the user asked for it."""
        self._tail = Tail(log)
        self._terminal = sys.stderr.isatty()
        self._start = time.monotonic() - (time.time() - started_at)
        self._marks = [("environment and checks", self._start)]
        self._failed_at: float | None = None
        self.enter("importing the engine")

    def enter(self, stage: str) -> None:
        """A stage begins, and the one before it ends, now. Nothing happens if it has begun already."""
        if any(stage == entered for entered, _ in self._marks):
            return
        self._marks.append((stage, time.monotonic()))
        if not self._terminal:
            print(f"{time.monotonic() - self._start:6.1f} s  {stage}", file=sys.stderr, flush=True)

    def update(self) -> None:
        """Read what is new in the log and show where things are."""
        for line in self._tail.lines():
            for text, stage in STAGES:
                if text in line:
                    self.enter(stage)
            if self._failed_at is None and line.endswith(FAILED):
                self._failed_at = time.monotonic()
        if self._terminal:
            line = f"{time.monotonic() - self._start:6.1f} s  {self._marks[-1][0]}"
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    def failed_for(self) -> float:
        """Seconds since the engine's core said that it does not start; 0 if it has not."""
        return 0.0 if self._failed_at is None else time.monotonic() - self._failed_at

    def close(self) -> list[tuple[str, float]]:
        """End the display. Returns the stages with the seconds each took."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        ends = [at for _, at in self._marks[1:]] + [time.monotonic()]
        return [(stage, end - at) for (stage, at), end in zip(self._marks, ends, strict=True)]
