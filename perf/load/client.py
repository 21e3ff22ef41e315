"""The load client, handled from here: starts `perf.load.worker`, hands it runs, takes its answers, ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from types import TracebackType
from typing import Any, ClassVar

from ascend.errors import UserError
from perf.load.endpoint import Endpoint
from perf.load.points import Point
from perf.load.workloads import Workload

START_SECONDS = 300.0
WARM_UP_TOKENS = 32  # of each answer before a point: prefill and the decode shapes of its batch have run then
# No proxy: it would see the key, and be part of what is measured.
DIRECT = {"no_proxy": "*", "NO_PROXY": "*"}
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


def check_installed() -> None:
    """Raise `UserError` if there is no vLLM here, whose load client this is."""
    if find_spec("vllm") is None:
        raise UserError(
            "perf serve drives vLLM's own load client, and vLLM is not installed here; install it (no card is needed), "
            "or measure with guidellm or aiperf and give their result files to `perf compare`"
        )


class LoadClient:
    """vLLM's load client in its own process, for one endpoint, workload and seed. Use it as a context."""

    COMMAND: ClassVar[Sequence[str]] = (sys.executable, "-m", "perf.load.worker")

    def __init__(
        self,
        endpoint: Endpoint,
        work: Workload,
        seed: int,
        ids: range,
        service_level: dict[str, float] | None = None,
        timeout: float = 3600.0,
        verbose: bool = False,
    ) -> None:
        self.timeout = timeout
        self.common = {
            "base_url": endpoint.base_url,
            "model": endpoint.model,
            "workload": asdict(work),
            "seed": seed,
            "ids": [ids.start, ids.stop],
            "service_level": service_level or {},
        }
        key = {"OPENAI_API_KEY": endpoint.api_key} if endpoint.api_key else {}
        self.process = subprocess.Popen(
            self.COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if verbose else subprocess.DEVNULL,
            env={**os.environ, **DIRECT, **QUIET, **key},
            text=True,
        )
        self.version = ""

    def __enter__(self) -> LoadClient:
        try:
            self.version = f"vllm bench serve, vllm {self._answer(START_SECONDS)['version']}"
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()

    def warm_up(self, point: Point) -> None:
        """Send one short wave that is not counted, of prompts of its own. Raises `UserError` if a request fails."""
        wave = point.max_concurrency or min(point.requests, 8)
        # In the open loop all at once: what matters is that the server's batch shapes have run.
        warm = self._ask(f"warm-up of {point.label}", wave, wave, None, WARM_UP_TOKENS)["result"]
        if warm["failed"]:
            raise UserError(f"{point}: {failures(warm)} while warming up; nothing is reported")

    def measure(self, point: Point) -> tuple[dict[str, Any], str]:
        """Do one run; returns the client's result and the SHA-256 of what was sent."""
        answer = self._ask(point.label, point.requests, point.max_concurrency, point.request_rate, None)
        return answer["result"], answer["sha256"]

    def _ask(
        self, label: str, requests: int, concurrency: int | None, rate: float | None, most_output_tokens: int | None
    ) -> dict[str, Any]:
        assert self.process.stdin is not None
        job = self.common | {
            "label": label,
            "requests": requests,
            "max_concurrency": concurrency,
            "request_rate": rate,
            "most_output_tokens": most_output_tokens,
        }
        with suppress(BrokenPipeError):  # it has ended then, and the missing answer says so
            print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self._answer(self.timeout)
        if "error" in answer:
            raise UserError(f"the load client failed: {answer['error']}; run again with --verbose to see why")
        return answer

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        late = threading.Timer(seconds, self.process.kill)
        start = time.monotonic()
        late.start()
        try:
            line = self.process.stdout.readline()
        finally:
            late.cancel()
        if not line.endswith("\n"):
            if time.monotonic() - start >= seconds:
                raise UserError(f"no answer within {seconds:g} s: the server hangs or needs a longer --timeout")
            raise UserError(f"the load client ended with code {self.process.wait()}; --verbose shows why")
        return dict(json.loads(line))


def failures(result: dict[str, Any]) -> str:
    """Return how many requests of a run failed and the first error's last line."""
    count = result["failed"] + result["completed"]
    first = next((error.strip().splitlines()[-1] for error in result["errors"] if error.strip()), "no reason given")
    return f"{result['failed']} of {count} requests failed: {first}"
