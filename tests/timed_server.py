"""An OpenAI completions server whose times are known: `python -m tests.timed_server --port N …`, to test `perf serve`.

Each request takes one of ``slots``, first come, first served; its first token comes ``ttft`` seconds after that and the
next ones every ``itl``. Every time is computed from the request's arrival and when a slot is free, and slept until, so
that no delay adds up: the throughput at capacity is slots · tokens / (ttft + (tokens - 1) · itl) exactly.

`/metrics` counts as known to a prefix cache the prompts that came before, in vLLM's words.

`--stall S --stall-after N`: from 0.1 s after the N-th request's arrival on, nothing moves for S seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import subprocess
import sys
import urllib.error
import urllib.request
from types import TracebackType
from typing import Any

from aiohttp import web

from tests.launcher import ROOT, free_port, wait_for

MODEL = "timed"


class TimedServer:
    """The server in a process of its own. Use it as a context; ``url`` is where it answers."""

    def __init__(self, **options: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "tests.timed_server", "--port", str(self.port), *arguments]
        self.process = subprocess.Popen(command, cwd=ROOT)

    def __enter__(self) -> TimedServer:
        assert wait_for(self._is_up, 30.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()

    def log(self) -> list[dict[str, Any]]:
        """Per request that came: prompt (token ids), max_tokens, and seconds it should have waited for its slot."""
        with urllib.request.urlopen(f"{self.url}/log", timeout=10) as response:
            return list(json.load(response))

    def _is_up(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/log", timeout=1).close()
        except urllib.error.URLError:
            return False
        return True


class Timed:
    """The handlers. Times within are those of a clock that a stall stops; `_real` says when they truly are."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.free = [0.0] * args.slots
        self.log: list[dict[str, Any]] = []
        self.stall_at = float("inf")
        self.seen: set[tuple[int, ...]] = set()
        self.known_tokens = 0

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Answer with ``max_tokens`` tokens, on time."""
        arrived = asyncio.get_running_loop().time()
        if (refused := self._refused(request)) is not None:
            return refused
        body = await request.json()
        number = len(self.log)
        if self.args.stall and number == self.args.stall_after:
            self.stall_at = arrived + 0.1
        prompt = tuple(body["prompt"])
        self.known_tokens += len(prompt) if prompt in self.seen else 0
        self.seen.add(prompt)
        tokens = body["max_tokens"] - (1 if self.args.wrong_length else 0)
        came = self._stopped(arrived)
        start = max(came, heapq.heappop(self.free))
        heapq.heappush(self.free, start + self.args.ttft + (tokens - 1) * self.args.itl)
        self.log.append({"prompt": body["prompt"], "max_tokens": body["max_tokens"], "waited": start - came})
        if self.args.fail_every and number % self.args.fail_every == self.args.fail_every - 1:
            return web.Response(status=500, reason="Out of slots")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for token in range(tokens):
            await self._until(start + self.args.ttft + token * self.args.itl)
            await response.write(_event({"choices": [{"index": 0, "text": " a"}]}))
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}
        await response.write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        return response

    async def models(self, request: web.Request) -> web.Response:
        """As vLLM lists them."""
        one = {"id": self.args.model, "owned_by": "stub", "max_model_len": self.args.max_model_len}
        return self._refused(request) or web.json_response({"data": [one]})

    async def version(self, _request: web.Request) -> web.Response:
        """As vLLM tells it."""
        return web.json_response({"version": "1"})

    async def metrics(self, request: web.Request) -> web.Response:
        """As vLLM counts, for two engines."""
        name = "vllm:prefix_cache_hits"
        lines = [f'{name}_total{{engine="{one}",model_name="m"}} {self.known_tokens / 2:.1f}' for one in (0, 1)]
        head = f"# HELP {name}_total cached tokens\n# TYPE {name}_total counter\n"
        created = f'{name}_created{{engine="0"}} 1.7e+09'
        return self._refused(request) or web.Response(text=head + "\n".join([*lines, created, ""]))

    async def moved(self, _request: web.Request) -> web.Response:
        """Send everyone elsewhere."""
        raise web.HTTPFound("/v1/models")

    async def requests(self, _request: web.Request) -> web.Response:
        """What came so far."""
        return web.json_response(self.log)

    def _refused(self, request: web.Request) -> web.Response | None:
        wants = f"Bearer {self.args.api_key}"
        return (
            None if not self.args.api_key or request.headers.get("Authorization") == wants else web.Response(status=401)
        )

    async def _until(self, time: float) -> None:
        clock = asyncio.get_running_loop()
        # A stall may be set while this sleeps: look again. Sleeps end up to 1 ms late, so the last of it is spun away.
        while (rest := self._real(time) - clock.time()) > 0:
            await asyncio.sleep(min(rest - 0.001, 0.05) if rest > 0.001 else 0)

    def _real(self, time: float) -> float:
        return time if time < self.stall_at else time + self.args.stall

    def _stopped(self, time: float) -> float:
        return time if time < self.stall_at else max(self.stall_at, time - self.args.stall)


def _event(document: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(document)}\n\n".encode()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--ttft", type=float, default=0.2)
    parser.add_argument("--itl", type=float, default=0.02)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--stall", type=float, default=0.0)
    parser.add_argument("--stall-after", type=int, default=0)
    parser.add_argument("--fail-every", type=int, default=0)
    parser.add_argument("--wrong-length", type=int, default=0)
    parser.add_argument("--api-key", default="")
    parser.add_argument("--max-model-len", type=int, default=4096)
    timed = Timed(args := parser.parse_args())
    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/v1/completions", timed.completions)
    app.router.add_get("/v1/models", timed.models)
    app.router.add_get("/version", timed.version)
    app.router.add_get("/metrics", timed.metrics)
    app.router.add_get("/moved/v1/models", timed.moved)
    app.router.add_get("/log", timed.requests)
    web.run_app(app, host="127.0.0.1", port=args.port, print=None, access_log=None)


if __name__ == "__main__":
    main()
