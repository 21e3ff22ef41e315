"""What vLLM's API server does not say or refuse: its stopping, a stream that broke off, and `request_check.py`.

vLLM loads it into the API server: `--middleware serve.plugin.middleware.Honest`. Seen in 0.23 and 0.32: once told to
stop, it goes on to accept requests and answers them with status 500, or with 200 and nothing; and after the error event
of a stream that broke off it still sends `[DONE]`, which to a client that knows no error events means a whole answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from serve.plugin.request_check import LARGEST_BODY, wrong_with

STOPPING_FILE = "ANTANGELMED_STOPPING_FILE"  # in the engine's environment: while this file exists, nothing new is begun
FLAG = ("--middleware", "serve.plugin.middleware.Honest")
RETRY_AFTER_SECONDS = 10
WATCHED = "/metrics"  # is answered to the end: a monitoring system wants to see it
ERROR_EVENT = b'data: {"error"'
DONE_EVENT = b"data: [DONE]"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def stopping_file(directory: Path, port: int) -> Path:
    """Return the file that tells the server on this port to begin nothing new."""
    return directory / f"stopping-{port}"


class Honest:
    """An ASGI middleware: refuses what comes while the server stops, and takes `[DONE]` from a stream that failed."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._file = os.environ.get(STOPPING_FILE)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._file and scope["path"] != WATCHED and os.path.exists(self._file):
            await _refuse(send, 503, "ServiceUnavailableError", "the server is stopping")
        elif scope.get("method") == "POST":
            await self._post(scope, receive, _without_false_end(send))
        else:
            await self._app(scope, receive, _without_false_end(send))

    async def _post(self, scope: Message, receive: Receive, send: Send) -> None:
        parts, size, is_whole = [], 0, False
        while not is_whole:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > LARGEST_BODY:
                await _refuse(send, 413, "BadRequestError", f"a request has at most {LARGEST_BODY} bytes")
                return
            is_whole = not message.get("more_body")
        body = b"".join(parts)
        if wrong := wrong_with(body):
            await _refuse(send, 400, "BadRequestError", wrong)
            return
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Message:
            return next(given, None) or await receive()

        await self._app(scope, again, send)


def _without_false_end(send: Send) -> Send:
    failed = False

    async def honest(message: Message) -> None:
        nonlocal failed
        body = message.get("body", b"")
        failed = failed or body.startswith(ERROR_EVENT)
        if failed and body.startswith(DONE_EVENT):
            message = {**message, "body": b""}
        await send(message)

    return honest


async def _refuse(send: Send, status: int, kind: str, message: str) -> None:
    error = {"message": message, "type": kind, "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    if status == 503:
        headers.append((b"retry-after", b"%d" % RETRY_AFTER_SECONDS))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
