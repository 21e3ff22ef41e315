"""When is a server ready: once it has answered a real request. And what is then said about it."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ascend.errors import UserError
from convert.demo_config import NOTE
from serve.state import printable
from serve.watch.progress import ANSWERING, Progress

QUESTION = "What is a normal resting heart rate for an adult?"
ANSWER_TOKENS = 24
POLL_SECONDS = 0.2
SETTLE_SECONDS = 0.5
T = TypeVar("T")
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where a server that listens everywhere is reached from here


class EngineError(Exception):
    """The engine ended, or did not answer in time; the message is one line."""


class FinalError(EngineError):
    """A failure after which no engine is started again."""


@dataclass(frozen=True)
class Server:
    """What is being served, where, and under which name."""

    host: str
    port: int
    name: str
    model: Path
    device: str
    log: Path
    demo: bool
    chat: bool

    @property
    def reached_at(self) -> str:
        """The address a client on this machine connects to."""
        return ANY_ADDRESS.get(self.host, self.host)

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes as its base URL."""
        host = f"[{self.reached_at}]" if ":" in self.reached_at else self.reached_at
        return f"http://{host}:{self.port}/v1"

    @property
    def endpoint(self) -> str:
        """The path below the base URL; a model without a chat template only completes text."""
        return "/chat/completions" if self.chat else "/completions"

    def request(self) -> dict[str, Any]:
        """Return the body of the request that the launcher sends and shows."""
        asked = {"messages": [{"role": "user", "content": QUESTION}]} if self.chat else {"prompt": QUESTION}
        return {"model": self.name, **asked, "max_tokens": ANSWER_TOKENS, "temperature": 0}


def wait_until_it_answers(server: Server, progress: Progress, timeout: float, look: Callable[[], object]) -> str:
    """Return the text of the first answer. Raises `EngineError` if ``timeout`` seconds pass.

    look: is called again and again meanwhile; what it raises ends the waiting, as for an engine that has ended.
    """
    deadline = time.monotonic() + timeout
    while True:
        look()
        progress.update()
        left = deadline - time.monotonic()
        if left <= 0:
            stage, _ = progress.close()[-1]
            raise EngineError(f"no answer after {timeout:.0f} s, the last stage was '{stage}'; --timeout allows more")
        answer = meanwhile(lambda: _ask(server, progress, left), look)  # noqa: B023 - it ends within this round
        if answer is not None:
            return answer
        time.sleep(POLL_SECONDS)


def meanwhile(work: Callable[[], T], look: Callable[[], object]) -> T:
    """Return what ``work`` returns, or raise what it raises; until then ``look`` is called, and ends the waiting if it
    raises: work that waits for an engine which does not answer is left behind in its thread.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="request", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        look()
    if failed:
        time.sleep(SETTLE_SECONDS)  # an engine that ends takes its answers along: that it ended says more
        look()
        raise failed[0]
    return done[0]


def call(
    server: Server,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    timeout: float,
    connected: Callable[[], object] = lambda: None,
) -> tuple[int, bytes]:
    """Send one request, with the key that the server's clients need, and return the status and the answer's body.

    timeout: seconds for each step of it; connected: called once there is a connection. Raises `OSError` or
    `http.client.HTTPException` if no whole answer comes.
    """
    connection = http.client.HTTPConnection(server.reached_at, server.port, timeout=timeout)
    sent = {"Content-Type": "application/json", **(headers or {})}
    if key := os.environ.get("VLLM_API_KEY"):
        sent["Authorization"] = f"Bearer {key}"
    try:
        connection.connect()
        connected()
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _ask(server: Server, progress: Progress, timeout: float) -> str | None:
    """Return the answer's text, or None if nothing answers yet."""
    try:
        status, body = call(
            server,
            "POST",
            f"/v1{server.endpoint}",
            json.dumps(server.request()).encode(),
            timeout=timeout,
            connected=lambda: progress.enter(ANSWERING),
        )
    except (OSError, http.client.HTTPException):
        return None
    try:
        answer = json.loads(body)
        if status == 200:
            choice = answer["choices"][0]
            message = choice.get("message") or {"content": choice["text"]}
            return str(message.get("content") or message.get("reasoning") or "")
        reason = answer["error"]["message"]
    except (ValueError, LookupError, TypeError, AttributeError):
        reason = "no readable answer"
    raise EngineError(f"it refused the first request with status {status}: {printable(str(reason))[:300]}")


def announce(
    server: Server, answer: str, canary: str, stages: Sequence[tuple[str, float]], drafts: object = None
) -> None:
    """Print the address, the name, a ready curl line, the real answer, what vouches for it, and where the time went.

    drafts: how many were accepted so far; None where nothing drafts.
    """
    body = json.dumps(server.request())
    print(f"ready after {sum(seconds for _, seconds in stages):.1f} s")
    for stage, seconds in stages:
        print(f"  {seconds:6.1f} s  {stage}")
    print(f"address:  {server.base_url}")
    print(f"model:    {server.name}  ({server.model}, device {server.device})")
    if server.host in ANY_ADDRESS:
        print(f"careful:  {server.host} means that every machine in the network can ask it, without a password or TLS")
    print(f"asked:    {QUESTION}")
    print(f"answered: {printable(answer)}")
    print(f"canary:   {canary}")
    if drafts is not None:
        print(f"drafts:   {drafts}; counted in {server.base_url.removesuffix('/v1')}/metrics as vllm:spec_decode_…")
    if server.demo:
        print(f"careful:  {NOTE}")
    print("try it:")
    print(f"  curl -s {server.base_url}{server.endpoint} -H 'Content-Type: application/json' -d {shlex.quote(body)}")
    print(f"log:      {server.log}")
    print("Ctrl-C stops it.", flush=True)


def remove_ready_file(path: Path) -> None:
    """Remove what a launcher that was killed has left, before a start. Raises `UserError` if none can be written."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--ready-file {path}: cannot be replaced ({error.strerror}): name a file") from None
    if not path.parent.is_dir():
        raise UserError(f"--ready-file {path}: there is no directory {path.parent}: make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(
            f"--ready-file {path}: nothing can be written in {path.parent}: name another, or change its rights"
        )


def write_ready_file(path: Path, server: Server, stages: Sequence[tuple[str, float]]) -> None:
    """Write the JSON document of ``--ready-file``; it appears whole or not at all."""
    document = {
        "base_url": server.base_url,
        "model": server.name,
        "model_path": str(server.model),
        "device": server.device,
        "pid": os.getpid(),
        "log": str(server.log),
        "stages": {stage: round(seconds, 2) for stage, seconds in stages},
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(document) + "\n")
    partial.rename(path)
