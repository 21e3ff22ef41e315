"""The parts of supervision, each by itself: signs of life, back-off, signals, what is told and what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from serve.plugin.middleware import STOPPING_FILE, Honest
from serve.watch import heartbeat
from serve.watch.events import EventLog
from serve.watch.heartbeat import ENGINES, Heartbeat, samples
from serve.watch.progress import Tail, error_line
from serve.watch.ready import Server
from serve.watch.restarts import Restarts
from serve.watch.stopping import STOP_SIGNALS, Stopped, StopSignals
from serve.watch.systemd import notify


def test_the_wait_doubles_and_too_many_deaths_are_the_end() -> None:
    now = [0.0]
    for spread, waits in ((0.0, [0.5, 1, 2, 4, 8, 16, 30, 30]), (1.0, [1, 2, 4, 8, 16, 32, 60, 60])):
        restarts = Restarts(8, clock=lambda: now[0], spread=lambda spread=spread: spread)  # type: ignore[misc]
        assert [restarts.after_death() for _ in waits] == waits
        assert restarts.after_death() is None
        now[0] += 601
        assert restarts.after_death() == waits[0]  # what is long ago is forgotten
    assert Restarts(0).after_death() is None


def test_samples_are_those_of_each_rank() -> None:
    page = """# HELP vllm:a_total x
# TYPE vllm:a_total counter
vllm:a_total{engine="0",model_name="m"} 3.0
vllm:a_total{engine="1",model_name="say \\"engine=\\"7"} 1e+01
vllm:a_total{model_name="m",no_engine="2",engine="1"} 2
vllm:a_total_created{engine="0"} 1.7e9
vllm:b 5
broken {
"""
    assert samples(page, ("vllm:a_total", "vllm:b"), "engine") == {
        "0": {"vllm:a_total": 3.0},
        "1": {"vllm:a_total": 12.0},
        "": {"vllm:b": 5.0},
    }


def test_a_warning_is_not_what_an_engine_died_of(tmp_path: Path) -> None:
    log = tmp_path / "log"
    warning = "(APIServer pid=1) WARNING 11-23 07:04:27 [x.py:1] limits can cause errors like `OSError: too many files`"
    log.write_text(f"{warning}\nstill here\n")
    assert error_line(log) == "still here"
    said = "EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause."
    log.write_text(f"(EngineCore pid=2) ERROR 11-23 07:04:28 [core.py:9] RuntimeError: it broke\n{said}\n{warning}\n")
    assert error_line(log) == "RuntimeError: it broke"


class FakeServer:
    """Stands where `serve.watch.ready.call` is: what a server with two ranks would answer, and what it was asked."""

    def __init__(self, moves: Sequence[str] = (), answers: Sequence[str] = ("0", "1"), metrics: bool = True) -> None:
        self.moves, self.answers, self.metrics = moves, answers, metrics
        self.steps = {"0": 0.0, "1": 0.0}
        self.used = 0.0
        self.thinks = 0.0  # seconds, about a request
        self.probes: list[tuple[str, dict[str, str], Any]] = []

    def call(
        self, _method: str, path: str, body: bytes | None = None, headers: Any = None, *, timeout: float
    ) -> tuple[int, bytes]:
        if path == "/metrics":
            if not self.metrics:
                raise TimeoutError
            for rank in self.steps:
                self.steps[rank] += rank in self.moves
            self.used += "used" in self.moves
            lines = [f'vllm:iteration_tokens_total_count{{engine="{rank}"}} {n}' for rank, n in self.steps.items()]
            lines += [f'vllm:kv_cache_usage_perc{{engine="{rank}"}} {self.used}' for rank in self.steps]
            lines += [f'vllm:num_requests_running{{engine="{rank}"}} 4' for rank in self.steps]
            return 200, "\n".join(lines).encode()
        self.probes.append((path, dict(headers or {}), json.loads(body) if body else None))
        time.sleep(self.thinks)
        if (headers or {}).get("X-data-parallel-rank", "0") in self.answers:
            return 200, b"{}"
        raise TimeoutError


Beat = Callable[..., Heartbeat]


@pytest.fixture
def beat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Beat]:
    """Makes a heartbeat over a fake server."""
    fakes: dict[str, FakeServer] = {}
    beats: list[Heartbeat] = []
    monkeypatch.setattr(heartbeat, "call", lambda server, *rest, **named: fakes[server.name].call(*rest, **named))

    def make(
        fake: FakeServer, engine: str = "vllm", hang: float = 0.4, clock: Callable[[], float] = time.monotonic
    ) -> Heartbeat:
        name = str(len(fakes))
        fakes[name] = fake
        server = Server("127.0.0.1", 1, name, Path(), "cpu", Path(), demo=False, chat=False)
        beats.append(Heartbeat(server, engine, hang, clock))
        return beats[-1]

    yield make
    for one in beats:
        one.close()


def watched(seconds: float, *beats: Heartbeat) -> list[str | None]:
    """The first thing that each of them tells within the time."""
    told: list[str | None] = [None] * len(beats)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        told = [before or one.silence() for before, one in zip(told, beats, strict=True)]
        time.sleep(0.01)
    return told


def test_signs_of_life(beat: Beat) -> None:
    table: list[tuple[str, FakeServer, str | None]] = [
        ("idle", FakeServer(), None),
        ("saturated", FakeServer(moves=("0", "1"), answers=()), None),
        ("one long prompt", FakeServer(moves=("used",), answers=()), None),
        ("no metrics", FakeServer(moves=("0", "1"), metrics=False), None),
        ("hung", FakeServer(answers=()), "for 0 s (4 requests running, 0 waiting)"),
        ("rank 0", FakeServer(moves=("1",), answers=("1",)), "rank 0 of the engine hangs"),
        ("rank 1", FakeServer(moves=("0",), answers=("0",)), "rank 1 of the engine hangs"),
        ("api server", FakeServer(answers=(), metrics=False), "the engine hangs: no step and no answer to a request"),
    ]
    for (name, _, expected), told in zip(table, watched(0.6, *[beat(fake) for _, fake, _ in table]), strict=True):
        assert told is None if expected is None else expected in (told or ""), (name, told)


def test_a_request_is_sent_to_the_silent_rank_only_when_nothing_moves(beat: Beat) -> None:
    fake = FakeServer(moves=("0",))
    assert watched(0.3, beat(fake)) == [None]
    assert fake.probes
    for path, headers, body in fake.probes:
        assert (path, headers) == ("/v1/completions", {"X-data-parallel-rank": "1"})
        assert body["max_tokens"] == 1


def test_a_silent_engine_is_asked_one_thing_at_a_time(beat: Beat) -> None:
    fake = FakeServer()
    fake.thinks = 10.0
    assert watched(0.6, beat(fake)) != [None]
    assert len(fake.probes) == 2  # one for each rank


def test_sglang_is_asked_in_its_own_words(beat: Beat) -> None:
    fake = FakeServer()
    assert watched(0.3, beat(fake, "sglang")) == [None]
    assert {path for path, _, _ in fake.probes} == {ENGINES["sglang"].probe}


def test_a_suspended_machine_does_not_hang(beat: Beat) -> None:
    ahead = [0.0]
    one = beat(FakeServer(answers=(), metrics=False), hang=10.0, clock=lambda: time.monotonic() + ahead[0])
    assert one.silence() is None
    ahead[0] += 3600
    assert one.silence() is None
    for _ in range(6):
        ahead[0] += 1.9  # as when we are only slow
        silence = one.silence()
    assert silence is not None


@pytest.fixture
def signals() -> Iterator[None]:
    before = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    yield
    for signum, handler in zip(STOP_SIGNALS, before, strict=True):
        signal.signal(signum, handler)


@pytest.mark.usefixtures("signals")
def test_a_signal_stops_once_and_a_second_one_is_impatience() -> None:
    stop = StopSignals()
    steps = []

    def undivided() -> None:
        with stop.held():
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("not interrupted here")

    with pytest.raises(Stopped) as stopped:
        undivided()
    assert steps
    assert stopped.value.signum == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGHUP)  # a terminal that closes tells so twice
    assert not stop.again()
    os.kill(os.getpid(), signal.SIGINT)  # raises nothing any more
    assert stop.again()


def test_an_event_is_one_line_whatever_it_says(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("hang", reason='a\nb\x1b[31m"c"', count=3)
    log.write("end", code=0)
    first, second = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {"event": "hang", "reason": 'a b [31m"c"', "count": 3}
    assert second["event"] == "end"
    assert (tmp_path / "events.jsonl").stat().st_mode & 0o777 & ~0o640 == 0
    EventLog(Path("/dev/full/no")).write("lost")


def test_a_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notify("READY=1")  # nobody listens, nothing happens
    for address in (str(tmp_path / "notify"), f"@antangelmed-test-{os.getpid()}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.settimeout(5)
            manager.bind(address.replace("@", "\0"))
            monkeypatch.setenv("NOTIFY_SOCKET", address)
            notify("READY=1")
            assert manager.recv(100) == b"READY=1"


def through_middleware(path: str, *bodies: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and whole body of an application behind it that sends these bodies."""
    sent: list[Any] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number, body in enumerate(bodies):
            await send({"type": "http.response.body", "body": body, "more_body": number + 1 < len(bodies)})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Honest(app)({"type": "http", "path": path}, None, send))  # type: ignore[arg-type]
    assert not sent[-1].get("more_body")
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(message["body"] for message in sent[1:])


def test_a_stream_that_failed_has_no_end_mark() -> None:
    text, error, done = b'data: {"choices": []}\n\n', b'data: {"error": {"message": "x"}}\n\n', b"data: [DONE]\n\n"
    assert through_middleware("/v1/completions", text, done)[2] == text + done
    assert through_middleware("/v1/completions", text, error, done)[2] == text + error
    quoted = b'data: {"choices": [{"text": "data: {\\"error\\""}]}\n\n'
    assert through_middleware("/v1/completions", quoted, done)[2] == quoted + done


def test_a_server_that_stops_begins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "stopping"
    monkeypatch.setenv(STOPPING_FILE, str(file))
    assert through_middleware("/v1/completions", b"yes")[0] == 200
    file.touch()
    status, headers, body = through_middleware("/v1/completions", b"yes")
    assert status == 503
    assert int(headers[b"retry-after"]) > 0
    assert json.loads(body)["error"]["code"] == 503
    assert through_middleware("/health", b"")[0] == 503
    assert through_middleware("/metrics", b"yes")[0] == 200


def test_a_log_that_was_cut_off_is_read_from_its_beginning(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\ntwo\n")
    tail = Tail(log)
    assert tail.lines() == ["one", "two"]
    log.write_text("new\n")
    assert tail.lines() == ["new"]
    assert tail.lines() == []
