"""When is a server ready: once it has answered a real request. And what is then said about it."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.demo_config import NOTE
from serve.process import EngineProcess
from serve.progress import ANSWERING, Progress, error_line, printable

QUESTION = "What is a normal resting heart rate for an adult?"
ANSWER_TOKENS = 24
POLL_SECONDS = 0.2
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where a server that listens everywhere is reached from here


class EngineError(Exception):
    """The engine ended, or did not answer in time; the message is one line."""


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


def wait_until_it_answers(server: Server, engine: EngineProcess, progress: Progress, timeout: float) -> str:
    """Return the text of the first answer. Raises `EngineError` if the engine ends or ``timeout`` seconds pass."""
    deadline = time.monotonic() + timeout
    while True:
        progress.update()
        if engine.poll() is not None:
            progress.close()
            raise EngineError(f"the engine did not start: {error_line(server.log)}")
        left = deadline - time.monotonic()
        if left <= 0:
            stage, _ = progress.close()[-1]
            raise EngineError(f"no answer after {timeout:.0f} s, the last stage was '{stage}'; --timeout allows more")
        answer = _ask(server, progress, left)
        if answer is not None:
            return answer
        time.sleep(POLL_SECONDS)


def _ask(server: Server, progress: Progress, timeout: float) -> str | None:
    """Return the answer's text, or None if nothing answers yet."""
    connection = http.client.HTTPConnection(server.reached_at, server.port, timeout=timeout)
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        connection.connect()
        progress.enter(ANSWERING)
        connection.request("POST", f"/v1{server.endpoint}", json.dumps(server.request()), headers)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    try:
        answer = json.loads(body)
        if response.status == 200:
            choice = answer["choices"][0]
            message = choice.get("message") or {"content": choice["text"]}
            return str(message.get("content") or message.get("reasoning") or "")
        reason = answer["error"]["message"]
    except (ValueError, LookupError, TypeError, AttributeError):
        reason = "no readable answer"
    raise EngineError(f"it refused the first request with status {response.status}: {printable(str(reason))[:300]}")


def announce(server: Server, answer: str, stages: Sequence[tuple[str, float]]) -> None:
    """Print the address, the name, a ready curl line, the real answer, and where the time went."""
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
    if server.demo:
        print(f"careful:  {NOTE}")
    print("try it:")
    print(f"  curl -s {server.base_url}{server.endpoint} -H 'Content-Type: application/json' -d {shlex.quote(body)}")
    print(f"log:      {server.log}")
    print("Ctrl-C stops it.", flush=True)


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
