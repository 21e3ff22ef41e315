"""Clients of a server that may break: what each of them got, and when."""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Outcome:
    """What one client saw. error: of an error event, of the connection, or of the status; finish: the finish_reason."""

    texts: list[str] = field(default_factory=list)
    error: str | None = None
    finish: str | None = None
    done: bool = False
    ended_at: float = 0.0

    @property
    def is_whole(self) -> bool:
        """Whether it is an answer from its beginning to its end."""
        return self.error is None and self.finish == "length" and self.done


class Streams:
    """Some clients at once, each reading a stream in a thread of its own."""

    def __init__(self, base_url: str, model: str, count: int = 1, tokens: int = 100, **options: Any) -> None:
        """Send the requests and return at once."""
        self._address = base_url.removeprefix("http://").partition("/")[0]
        self._body = {"model": model, "max_tokens": tokens, "stream": True, "temperature": 0, **options}
        self.outcomes = [Outcome() for _ in range(count)]
        self._threads = [threading.Thread(target=self._read, args=(number,), daemon=True) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def begun(self, tokens: int = 1) -> bool:
        """Whether every client has got so many tokens."""
        return all(len(outcome.texts) >= tokens for outcome in self.outcomes)

    def wait(self, seconds: float) -> list[Outcome]:
        """Return what they saw; a stream that has not ended by then has ``ended_at`` 0."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self.outcomes

    def _read(self, number: int) -> None:
        outcome = self.outcomes[number]
        try:
            connection = http.client.HTTPConnection(self._address, timeout=600)
            body = json.dumps({**self._body, "prompt": f"patient {number}"})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                outcome.error = f"status {response.status}"
            else:
                for line in response:
                    self._take(outcome, line.strip())
                if not (outcome.done or outcome.error):
                    outcome.error = "broken off"  # http.client does not tell that the last chunk is missing
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no JSON
            outcome.error = repr(error)
        outcome.ended_at = time.monotonic()

    def _take(self, outcome: Outcome, line: bytes) -> None:
        if line == b"data: [DONE]":
            outcome.done = True
        elif line:
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                outcome.error = event["error"]["message"]
            for choice in event.get("choices", []):
                outcome.texts.append(choice["text"])
                outcome.finish = choice["finish_reason"] or outcome.finish


def ask(base_url: str, model: str, tokens: int = 3, timeout: float = 10.0) -> int:
    """The status of one small request; 0 if there was no connection or no answer."""
    connection = http.client.HTTPConnection(base_url.removeprefix("http://").partition("/")[0], timeout=timeout)
    body = json.dumps({"model": model, "prompt": "fever", "max_tokens": tokens})
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()
