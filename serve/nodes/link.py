"""The launchers of several servers stay in touch while they serve, and notice when one is gone.

Because vLLM does not (0.32, CPU, two network namespaces): a killed server leaves `/health` at 200 on an idle node 0
until the next request dies of it; without node 0, or with the cable pulled, an engine waits on with its cards taken.

One JSON object a line, of a bounded length, both ways: {} every second; node 0 to the others {"ready": true};
{"ended": "why"} from one that stops.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from serve.state import printable

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 10.0
LINE_BYTES = 16384
WORDS = 300  # of another node's reason that are repeated here


class Line:
    """A connection to the launcher of another node, as JSON objects; ``node`` is -1 until it has said which it is.

    Its methods raise OSError: `ConnectionError` for its end, and for what is no launcher.
    """

    def __init__(self, connection: socket.socket, address: str, node: int = -1) -> None:
        self.socket, self.address, self.node = connection, address, node
        self.heard = time.monotonic()
        self._rest = self._unsent = b""
        connection.setblocking(False)

    @property
    def name(self) -> str:
        """The node's, for a person."""
        return f"node {self.node} ({self.address})"

    def send(self, message: Mapping[str, Any]) -> None:
        """Send, as far as the other side still takes anything; that it does not shows in its silence."""
        if len(self._unsent) < LINE_BYTES:  # never a part of a line alone: it would spoil the next one
            self._unsent += json.dumps(message).encode() + b"\n"
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]

    def receive(self, seconds: float) -> list[dict[str, Any]]:
        """Wait up to ``seconds`` for something to arrive; return the whole messages of it, maybe none."""
        if not select.select([self.socket], [], [], max(0.0, seconds))[0]:
            return []
        data = self.socket.recv(LINE_BYTES)
        if not data:
            raise ConnectionError("it closed the connection")
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_BYTES:
            raise ConnectionError("it is no launcher of this project")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            messages = [None]
        if not all(isinstance(one, dict) for one in messages):
            raise ConnectionError("it is no launcher of this project")
        self.heard = time.monotonic()
        return messages

    def is_silent(self) -> bool:
        """Whether nothing has come for too long."""
        return time.monotonic() - self.heard > SILENCE_SECONDS

    def close(self) -> None:
        """Close it."""
        self.socket.close()


class NodeLink:
    """The connections to the other launchers, looked after by a thread; node 0 has one to each, the others to it.

    Use it as a context manager. Without connections, as for a single server, nothing is ever lost.
    """

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        self._lines = list(lines)
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._ready = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._lines:
            self._thread.start()

    def __enter__(self) -> NodeLink:
        return self

    def __exit__(self, kind: object, error: object, _: object) -> None:
        self.close(str(error or "it was stopped"))

    def lost(self) -> str | None:
        """Return which node is gone, and why as far as it said so; None while all are there."""
        return self._lost

    def is_ready(self) -> bool:
        """Whether node 0 has said that the engine answers."""
        return self._ready.is_set()

    def tell_ready(self) -> None:
        """On node 0: the engine answers."""
        self._tell({"ready": True})

    def close(self, reason: str = "it was stopped") -> None:
        """Tell the others that this node ends, and why."""
        if not self._closed.is_set():
            self._closed.set()
            self._tell({"ended": reason[:WORDS]})
            for line in self._lines:
                line.close()

    def _tell(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            for line in self._lines:
                with contextlib.suppress(OSError):
                    line.send(message)

    def _watch(self) -> None:
        while self._lost is None and not self._closed.wait(BEAT_SECONDS):
            self._tell({})
            for line in self._lines:
                try:
                    for message in line.receive(0):
                        self._hear(line, message)
                    if line.is_silent():
                        self._lose(
                            f"{line.name} has been silent for {SILENCE_SECONDS:.0f} s: is it up, and the cable in?"
                        )
                except (OSError, ValueError) as error:
                    self._lose(f"{line.name} is gone: {error}")

    def _hear(self, line: Line, message: Mapping[str, Any]) -> None:
        if message.get("ready") is True:
            self._ready.set()
        if "ended" in message:
            self._lose(f"{line.name} has ended: {words(message['ended'])}")

    def _lose(self, reason: str) -> None:
        if self._lost is None and not self._closed.is_set():
            self._lost = reason


def words(reason: object) -> str:
    """Return what another node says, fit to be printed."""
    return printable(str(reason))[:WORDS]
