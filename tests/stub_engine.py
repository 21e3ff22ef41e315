"""A stand-in for vLLM's API server that misbehaves when told: `python -m tests.stub_engine --port N … --stub JSON`.

Its contract is vLLM's (`vllm/entrypoints`, `vllm/v1/metrics/loggers.py`, 0.32): the flags, the paths, streams of
events, the names on `/metrics`, `/health` that always says 200, SIGTERM that finishes what runs if there is a
`--shutdown-timeout`, new requests answered with 500 meanwhile, and `[DONE]` even after an error event.

The JSON is a list with one object per life (the last one counts for all later ones; `--lives FILE` counts them):
  log            text that is written to the log at the start; log_at_token: after the N-th token of the life, with
                 the mark of signed lines in place of MARK
  exit           exit code, at once;  load: seconds before the port opens
  die_after      seconds after the first answer, then SIGKILL of itself;  hang_after: then no step any more
  die_at_token   SIGKILL of itself;  core_dies_at_token: as if its engine core were killed
  hang_at_token  no step any more;  stall: [N, S], at the N-th token nothing moves for S seconds
  step           seconds per step (0.01);  chunks: steps that a prompt takes;  slots: requests that run at once (64)
  rubbish        streams that are no JSON;  logprob: of every token (-1.0);  slow_metrics: seconds
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.plugin.log_format import MARK

DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


class Engine:
    """One task that takes steps; every running request gets a token per step."""

    def __init__(self, how: dict[str, Any]) -> None:
        self.how = how
        self.running: list[tuple[int, asyncio.Queue[str | None]]] = []
        self.waiting: list[tuple[int, asyncio.Queue[str | None]]] = []
        self.iterations = self.tokens = self.used = 0
        self.dead = False

    async def run(self) -> None:
        """Take steps while there is work."""
        while True:
            await asyncio.sleep(self.how.get("step", 0.01))
            slots = self.how.get("slots", 64) - len(self.running)
            begun, self.waiting = self.waiting[:slots], self.waiting[slots:]
            for _ in range(self.how.get("chunks", 0) if begun else 0):
                self.used += 1  # of the KV cache: a step without an output is not counted as an iteration
                await asyncio.sleep(self.how.get("step", 0.01))
            self.running += begun
            if self.running:
                await self._step()

    async def _step(self) -> None:
        self.iterations += 1
        for tokens, queue in self.running:
            self.tokens += 1
            queue.put_nowait(f" {tokens}")
            if self.tokens == self.how.get("log_at_token", [None])[0]:
                print(self.how["log_at_token"][1].replace("MARK", os.environ[MARK]), flush=True)
            if self.tokens in (self.how.get("die_at_token"), self.how.get("core_dies_at_token")):
                await asyncio.sleep(0.05)  # what was said before is on its way
                if self.tokens == self.how.get("die_at_token"):
                    os.kill(os.getpid(), signal.SIGKILL)
                self.dead = True
            if self.tokens == self.how.get("hang_at_token"):
                await asyncio.Event().wait()
            if self.tokens == self.how.get("stall", [None])[0]:
                await asyncio.sleep(self.how["stall"][1])
        self.running = [(tokens - 1, queue) for tokens, queue in self.running if tokens > 1 or queue.put_nowait(None)]

    async def answer(self, tokens: int) -> AsyncIterator[str]:
        """The tokens of one request, one after the other."""
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        self.waiting.append((tokens, queue))
        try:
            while True:
                with contextlib.suppress(asyncio.TimeoutError):
                    token = await asyncio.wait_for(queue.get(), 0.05)
                    if token is None:
                        return
                    yield token
                    continue
                if self.dead:
                    raise RuntimeError(DEAD)
        finally:  # it is done, or the client has gone
            self.running = [one for one in self.running if one[1] is not queue]
            self.waiting = [one for one in self.waiting if one[1] is not queue]


class Api:
    """The handlers."""

    def __init__(self, args: argparse.Namespace, how: dict[str, Any]) -> None:
        self.args = args
        self.how = how
        self.engine = Engine(how)
        self.stopping = False
        self.server: uvicorn.Server
        self.endings: list[asyncio.Task[None]]

    async def complete(self, request: Request) -> Response:
        """Both kinds of completion, as a whole and as a stream."""
        body = await request.json()
        if self.stopping or self.engine.dead:
            return _error(500, DEAD if self.engine.dead else "cannot schedule new futures after shutdown")
        key = os.environ.get("VLLM_API_KEY")
        if key and request.headers.get("authorization") != f"Bearer {key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        if body.get("model") != self.args.served_model_name:
            return _error(404, f"The model `{body.get('model')}` does not exist.")
        chat = request.url.path.endswith("/chat/completions")
        tokens = self.engine.answer(body.get("max_tokens") or 16)
        if body.get("stream"):
            return StreamingResponse(self._events(tokens, chat), media_type="text/event-stream")
        try:
            texts = [text async for text in tokens]
        except RuntimeError as error:
            return _error(500, str(error))
        self._fall()
        choice = _choice("".join(texts), chat, "length", delta=False)
        if body.get("logprobs") is not None:
            values = [self.how.get("logprob", -1.0)] * len(texts)
            choice["logprobs"] = {"tokens": texts, "token_logprobs": values, "top_logprobs": None}
        return JSONResponse({"object": "completion", "model": body["model"], "choices": [choice]})

    async def _events(self, tokens: AsyncIterator[str], chat: bool) -> AsyncIterator[str]:
        try:
            async for text in tokens:
                if self.how.get("rubbish"):
                    yield "data: {\x00\xff rubbish\n\n"
                else:
                    yield f"data: {json.dumps({'choices': [_choice(text, chat, None, delta=True)]})}\n\n"
            yield f"data: {json.dumps({'choices': [_choice('', chat, 'length', delta=True)]})}\n\n"
        except RuntimeError as error:
            yield f"data: {json.dumps({'error': {'message': str(error), 'code': 500}})}\n\n"
            self.server.should_exit = True
        yield "data: [DONE]\n\n"

    async def metrics(self, _request: Request) -> Response:
        """In Prometheus' text format, as vLLM names things."""
        await asyncio.sleep(self.how.get("slow_metrics", 0))
        engine = self.engine
        values = {
            "vllm:num_requests_running": len(engine.running),
            "vllm:num_requests_waiting": len(engine.waiting),
            "vllm:kv_cache_usage_perc": (engine.used % 1000) / 1000,
            "vllm:iteration_tokens_total_count": engine.iterations,
            "vllm:iteration_tokens_total_sum": engine.tokens,
            "vllm:generation_tokens_total": engine.tokens,
        }
        labels = f'engine="0",model_name="{self.args.served_model_name}"'
        lines = [f"{name}{{{labels}}} {value}" for name, value in values.items()]
        return PlainTextResponse("# HELP vllm:num_requests_running Number.\n" + "\n".join(lines) + "\n")

    async def models(self, _request: Request) -> Response:
        """What is served."""
        return JSONResponse({"object": "list", "data": [{"id": self.args.served_model_name, "max_model_len": 4096}]})

    async def health(self, _request: Request) -> Response:
        """Well, whatever happens."""
        return Response()

    async def serve(self) -> None:
        """Until the end: SIGTERM, or the engine's death."""
        routes = [
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/metrics", self.metrics),
            Route("/health", self.health),
        ]
        app: Any = Starlette(routes=routes)
        for name in self.args.middleware:
            module, _, attribute = name.rpartition(".")
            app = getattr(importlib.import_module(module), attribute)(app)
        config = uvicorn.Config(app, host=self.args.host, port=self.args.port, access_log=False, log_level="warning")
        self.server = uvicorn.Server(config)
        self.server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: endings.append(loop.create_task(self._stop())))
        endings: list[asyncio.Task[None]] = [loop.create_task(self.engine.run())]
        self.endings = endings
        await self.server.serve()

    def _fall(self) -> None:
        """What is to happen some time after the first answer."""
        loop = asyncio.get_running_loop()
        if "die_after" in self.how:
            loop.call_later(self.how.pop("die_after"), os.kill, os.getpid(), signal.SIGKILL)
        if "hang_after" in self.how:
            loop.call_later(self.how.pop("hang_after"), self.endings[0].cancel)

    async def _stop(self) -> None:
        self.stopping = True
        deadline = asyncio.get_running_loop().time() + self.args.shutdown_timeout
        while (self.engine.running or self.engine.waiting) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        self.engine.dead = bool(self.engine.running or self.engine.waiting)
        self.server.should_exit = True


def _choice(text: str, chat: bool, finish: str | None, *, delta: bool) -> dict[str, Any]:
    said = {"delta" if delta else "message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {"index": 0, **said, "finish_reason": finish}


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "InternalServerError", "code": status}}, status)


def main() -> None:
    """Serve until told otherwise."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model")
    parser.add_argument("--served-model-name")
    parser.add_argument("--shutdown-timeout", type=int, default=0)
    parser.add_argument("--middleware", action="append", default=[])
    parser.add_argument("--stub", type=json.loads, default=[{}])
    parser.add_argument("--lives", type=Path)
    args, _ = parser.parse_known_args()
    life = 0
    if args.lives:
        life = len(args.lives.read_text()) if args.lives.exists() else 0
        args.lives.write_text("x" * (life + 1))
    how = args.stub[min(life, len(args.stub) - 1)]
    if "log" in how:
        print(how["log"], flush=True)
    if "exit" in how:
        sys.exit(how["exit"])

    async def live() -> None:
        await asyncio.sleep(how.get("load", 0))
        await Api(args, how).serve()

    asyncio.run(live())


if __name__ == "__main__":
    main()
