"""Is the engine at work? Its API server says so for hours after the engine itself has stopped, so two things are asked.

`/metrics`: does anything move that only moves when the engine takes a step? And, where nothing has moved for a while:
does a real request for one token come back? Either one is a sign of life, of each data-parallel rank by itself. Neither
for the set time means that it hangs. Time is the monotonic clock's, which stands still while the machine is suspended.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from serve.watch.ready import Server, call

PROBE_AFTER = 1 / 3  # of the set time without a sign: then a request is sent
READ_EVERY = 1 / 20  # of the set time, and at most …
LONGEST_PAUSE_SECONDS = 4.0
# The launcher looks five times a second. If it could not for so long, the machine was suspended, frozen or swamped, and
# what the engine did meanwhile is not known: the time does not count.
GAP_SECONDS = 2.0


@dataclass(frozen=True)
class Signs:
    """Where one kind of engine shows that it works.

    moving: samples of `/metrics` of which at least one changes with every step. running, waiting: its requests. rank:
    the label that tells data-parallel ranks apart. rank_header: sends a request to one of them. probe: a path that
    answers a GET with 200 only if the engine itself has answered; None: a completion of one token is asked for.
    """

    moving: tuple[str, ...]
    running: str
    waiting: str
    rank: str
    rank_header: str | None
    probe: str | None


ENGINES = {
    # vllm/v1/metrics/loggers.py. The count of iterations stands still while a prompt longer than one step's tokens is
    # read, since a step without an output is not counted; the use of the KV cache grows with every step then.
    "vllm": Signs(
        moving=("vllm:iteration_tokens_total_count", "vllm:kv_cache_usage_perc"),
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        rank="engine",
        rank_header="X-data-parallel-rank",
        probe=None,
    ),
    # sglang/srt/metrics/collector.py, there with --enable-metrics only; entrypoints/http_server.py: /health_generate
    # asks for one token, and takes any output of the engine, also for another request, as the answer.
    "sglang": Signs(
        moving=("sglang:generation_tokens_total", "sglang:prompt_tokens_total", "sglang:token_usage"),
        running="sglang:num_running_reqs",
        waiting="sglang:num_queue_reqs",
        rank="dp_rank",
        rank_header=None,
        probe="/health_generate",
    ),
}

_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


def samples(text: str, names: tuple[str, ...], label: str) -> dict[str, dict[str, float]]:
    """Return, from a page in Prometheus' text format, the sum of each named sample by the label's value ("": none)."""
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in _SAMPLE.findall(text):
        if name in names:
            match = re.search(rf'(?:^|,){label}="([^"\\]*)"', labels)
            values = found.setdefault(match.group(1) if match else "", {})
            values[name] = values.get(name, 0.0) + float(value)
    return found


class Heartbeat:
    """Watches a server that is ready. `silence` is to be called about five times a second."""

    def __init__(self, server: Server, engine: str, hang: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin. engine: a key of `ENGINES`; hang: seconds without any sign of life after which an engine hangs."""
        self._server = server
        self._signs = ENGINES[engine]
        self._hang = hang
        self._clock = clock
        self._lock = threading.Lock()
        self._looked = clock()
        self._alive = {"": self._looked}  # rank: when there was the last sign of it
        self._values: dict[str, dict[str, float]] = {}
        self._asked: set[str] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._read_metrics, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Ask nothing any more."""
        self._closed.set()

    def silence(self) -> str | None:
        """Return what to tell of an engine that hangs, or None. Sends a request where nothing moves."""
        with self._lock:
            now = self._clock()
            if now - self._looked > GAP_SECONDS:
                self._alive = {rank: min(now, at + now - self._looked) for rank, at in self._alive.items()}
            self._looked = now
            for rank, at in self._alive.items():
                if now - at > self._hang:
                    return self._described(rank, now - at)
                if now - at > self._hang * PROBE_AFTER and rank not in self._asked:
                    self._asked.add(rank)
                    threading.Thread(target=self._probe, args=(rank,), name="probe", daemon=True).start()
        return None

    def load(self) -> str:
        """Return how many requests were running and waiting when `/metrics` was last read."""
        with self._lock:
            values = list(self._values.values())
        running, waiting = (
            sum(int(value.get(name, 0)) for value in values) for name in (self._signs.running, self._signs.waiting)
        )
        return f"{running} requests running, {waiting} waiting"

    def _described(self, rank: str, seconds: float) -> str:
        which = f"rank {rank} of the engine" if len(self._alive) > 1 else "the engine"
        values = self._values.get(rank, {})
        running, waiting = (int(values.get(name, 0)) for name in (self._signs.running, self._signs.waiting))
        requests = f"{running} requests running, {waiting} waiting"
        return f"{which} hangs: no step and no answer to a request for {seconds:.0f} s ({requests})"

    def _read_metrics(self) -> None:
        names = (*self._signs.moving, self._signs.running, self._signs.waiting)
        while not self._closed.is_set():
            try:
                status, body = call(self._server, "GET", "/metrics", timeout=self._hang)
                found = samples(body.decode(errors="replace"), names, self._signs.rank) if status == 200 else {}
            except (OSError, http.client.HTTPException, ValueError):
                found = {}
            if found:
                self._compare(found)
            self._closed.wait(min(self._hang * READ_EVERY, LONGEST_PAUSE_SECONDS))

    def _compare(self, found: dict[str, dict[str, float]]) -> None:
        with self._lock:
            now = self._clock()
            self._alive = {rank: self._alive.get(rank, now) for rank in found}
            for rank, values in found.items():
                before = self._values.get(rank, {})
                if any(values.get(name) != before.get(name) for name in self._signs.moving):
                    self._alive[rank] = now
            self._values = found

    def _probe(self, rank: str) -> None:
        headers = {self._signs.rank_header: rank} if self._signs.rank_header and len(self._alive) > 1 else {}
        try:
            if self._signs.probe:
                status, _ = call(self._server, "GET", self._signs.probe, timeout=self._hang)
            else:
                asked = {"model": self._server.name, "prompt": "1", "max_tokens": 1, "temperature": 0}
                body = json.dumps(asked).encode()
                status, _ = call(self._server, "POST", "/v1/completions", body, headers, timeout=self._hang)
        except (OSError, http.client.HTTPException):
            status = 0
        if status != 200:
            self._closed.wait(min(self._hang * READ_EVERY, LONGEST_PAUSE_SECONDS))  # the next one not at once
        with self._lock:
            self._asked.discard(rank)
            if status == 200 and rank in self._alive:
                self._alive[rank] = self._clock()
