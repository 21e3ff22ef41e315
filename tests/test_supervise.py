"""Supervision, with a stub engine that can hang, die, stall and break: what clients see, and what the launcher does."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from serve import heartbeat
from serve.events import EventLog
from serve.heartbeat import ENGINES, Heartbeat, samples
from serve.progress import error_line
from serve.ready import Server
from serve.restarts import Restarts
from serve.stopping import STOP_SIGNALS, Stopped, StopSignals
from serve.systemd import notify
from serve.vllm_middleware import STOPPING_FILE, Honest
from tests.launcher import Launched, free_port, wait_for
from tests.streams import Streams, ask
from tests.stub_launch import NAME, launch

FIRST_ANSWER = 24  # tokens of the request that tells that the server is ready
HANG = 2.0

# --- the parts -------------------------------------------------------------------------------------------------------


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
vllm:a_total{model_name="m",engine="1"} 2
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
    """Stands where `serve.ready.call` is: what a server with two ranks would answer, and what it was asked."""

    def __init__(self, moves: Sequence[str] = (), answers: Sequence[str] = ("0", "1"), metrics: bool = True) -> None:
        self.moves, self.answers, self.metrics = moves, answers, metrics
        self.steps = {"0": 0.0, "1": 0.0}
        self.used = 0.0
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


# --- drills ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts launchers over the stub, and ends what a failed test has left of them."""
    all_of_them: list[Launched] = []

    def start(*lives: dict[str, Any], flags: str = "", port: int | None = None) -> Launched:
        directory = tmp_path / f"run-{len(all_of_them)}"
        all_of_them.append(launch(directory, *lives, flags=flags, port=port))
        return all_of_them[-1]

    yield start
    for launched in all_of_them:
        for pid in launched.processes():
            os.kill(pid, signal.SIGKILL)
        launched.process.wait()


def events(launched: Launched) -> list[str]:
    """The names of the events so far."""
    return [json.loads(line)["event"] for line in event_log(launched).read_text().splitlines()]


def event_log(launched: Launched) -> Path:
    return launched.ready_file.parent / "antangelmed" / f"events-{launched.port}.jsonl"


def serves(launched: Launched) -> bool:
    return launched.ready_file.exists() and ask(f"http://127.0.0.1:{launched.port}/v1", NAME) == 200


def test_a_failure_before_it_was_ever_ready_is_final(started: Callable[..., Launched]) -> None:
    launched = started({"log": "ValueError: heads do not fit", "exit": 3})
    assert launched.process.wait(20) == 1
    assert "error: the engine did not start: ValueError: heads do not fit; its log: " in launched.output
    assert events(launched) == ["start", "end"]


@pytest.mark.slow
def test_a_death_in_a_stream_is_told_and_the_service_comes_back(started: Callable[..., Launched]) -> None:
    both = [started({death: FIRST_ANSWER + 5}, {}) for death in ("die_at_token", "core_dies_at_token")]
    for launched in both:
        stream = Streams(launched.wait_until_ready(30)["base_url"], NAME)
        assert wait_for(lambda: stream.begun(5), 10)  # noqa: B023
        died_at = time.monotonic()
        (outcome,) = stream.wait(10)
        assert outcome.error
        assert not outcome.done
        assert outcome.ended_at - died_at < 2
        assert wait_for(lambda: not launched.ready_file.exists(), 2 - (time.monotonic() - died_at))  # noqa: B023
        assert wait_for(lambda: serves(launched), 10 - (time.monotonic() - died_at))  # noqa: B023
        assert events(launched) == ["start", "ready", "death", "restart", "start", "ready"]
        assert "starting it again in" in launched.output
        assert "ready again after" in launched.output
        log = launched.ready_file.parent / "antangelmed" / f"engine-{launched.port}.log"
        assert Path(f"{log}.1").exists()  # of the engine that died
    stopped(*both)


def stopped(*launchers: Launched) -> None:
    """All of them end when told, with all their processes."""
    assert all(len(launched.processes()) > 1 for launched in launchers)  # their sessions are known from here on
    for launched in launchers:
        launched.process.terminate()
    for launched in launchers:
        assert launched.process.wait(10) == 0
        assert launched.processes() == set()


@pytest.mark.slow
def test_a_hang_is_seen_though_health_says_200(started: Callable[..., Launched]) -> None:
    flags = f"--hang {HANG}"
    busy = started({"hang_at_token": FIRST_ANSWER + 5}, {}, flags=flags)
    idle = started({"hang_after": 1.5}, {}, flags=flags)
    api_server = started(flags=flags)
    base_url = busy.wait_until_ready(30)["base_url"]
    stream = Streams(base_url, NAME)
    api_server.wait_until_ready(30)
    (engine,) = api_server.processes() - {api_server.process.pid, *guards(api_server)}
    os.kill(engine, signal.SIGSTOP)
    since = time.monotonic()
    for launched in (busy, idle, api_server):
        assert wait_for(lambda: "hangs: no step and no answer" in launched.output, HANG + 5), launched.output  # noqa: B023
        assert time.monotonic() - since > HANG * 0.8
    (outcome,) = stream.wait(5)
    assert outcome.error
    assert not outcome.done
    for launched in (busy, idle, api_server):
        assert wait_for(lambda: serves(launched), 10)  # noqa: B023
        assert events(launched)[:4] == ["start", "ready", "hang", "death"]
    stopped(busy, idle, api_server)


def guards(launched: Launched) -> set[int]:
    children = Path(f"/proc/{launched.process.pid}/task/{launched.process.pid}/children").read_text().split()
    return {int(pid) for pid in children if b"stub_launch" in Path(f"/proc/{pid}/cmdline").read_bytes()}


@pytest.mark.slow
def test_no_false_alarm(started: Callable[..., Launched]) -> None:
    hard_times = {
        "idle": {},
        "saturated": {"slots": 2, "step": 0.03},
        "long prompts": {"chunks": 30, "step": 0.1},
        "a stall": {"stall": [FIRST_ANSWER + 20, HANG * 0.6]},
        "rubbish": {"rubbish": True},
        "slow metrics": {"slow_metrics": HANG * 0.8, "slots": 2, "step": 0.03},
    }
    running = [started(how, flags=f"--hang {HANG}") for how in hard_times.values()]
    for launched in running:
        launched.wait_until_ready(60)
    crowds = [
        Streams(f"http://127.0.0.1:{launched.port}/v1", NAME, count=8, tokens=10 if name == "long prompts" else 60)
        for name, launched in zip(hard_times, running, strict=True)
        if name not in ("idle", "rubbish")
    ]
    rubbish = Streams(f"http://127.0.0.1:{running[-2].port}/v1", NAME)
    time.sleep(3 * HANG)
    assert rubbish.outcomes[0].error
    for launched in running:
        assert events(launched) == ["start", "ready"], launched.output
    for crowd in crowds:
        assert all(outcome.is_whole for outcome in crowd.wait(30))
    stopped(*running)


@pytest.mark.slow
def test_a_crash_loop_ends_with_one_line_and_less_is_tried_again(started: Callable[..., Launched]) -> None:
    looping = started({"die_after": 1}, flags="--restarts 2")
    tried = started({"die_after": 1}, {"exit": 1}, {})  # the second life does not even get ready
    assert wait_for(lambda: "ready again" in tried.output, 20), tried.output
    assert events(tried).count("death") == 2
    assert len(tried.processes()) == 3  # launcher, guard, engine
    tried.process.kill()
    tried.process.wait()
    assert wait_for(lambda: not tried.processes(), 10)  # the guard knows the engine of the day
    assert looping.process.wait(30) == 1
    assert events(looping).count("death") == 3
    error = looping.output.splitlines()[-1]
    assert error.startswith("error: crash loop, so it is not started again: 3 deaths within 10 minutes")
    assert "the engine ended (signal 9)" in error
    assert not looping.ready_file.exists()
    assert looping.processes() == set()


@pytest.mark.slow
def test_a_device_fault_is_named_and_acted_on(started: Callable[..., Launched]) -> None:
    kernel, memory = "error code 507014 aicore timeout", "UCE ERROR: HBM MULTI BIT ECC ERROR on NPU 3"
    said = [FIRST_ANSWER + 5, f"(Worker_TP3 pid=7) ERROR 11-23 14:28:07 [worker.py:1] RuntimeError: {kernel}"]
    dying = started({"log_at_token": said, "die_at_token": FIRST_ANSWER + 20}, {})
    broken = started({"log_at_token": [said[0], said[1].replace(kernel, memory)]}, {})
    for launched in (dying, broken):
        stream = Streams(launched.wait_until_ready(30)["base_url"], NAME, tokens=1000)
        (outcome,) = stream.wait(10)
        assert outcome.error
        assert wait_for(lambda: "device fault: " in launched.output, 5)  # noqa: B023
    assert broken.process.wait(10) == 1
    assert "error: HBM-ECC on card 3: memory has lost bits that cannot be corrected; not started" in broken.output
    assert events(broken) == ["start", "ready", "fault", "end"]
    assert wait_for(lambda: serves(dying), 10)
    assert events(dying)[2:5] == ["fault", "death", "restart"]
    stopped(dying)


@pytest.mark.slow
def test_sigterm_lets_all_streams_finish(started: Callable[..., Launched]) -> None:
    launched = started({"step": 0.02}, flags="--drain 30")
    base_url = launched.wait_until_ready(30)["base_url"]
    streams = Streams(base_url, NAME, count=32, tokens=150)
    assert wait_for(streams.begun, 10)
    launched.process.send_signal(signal.SIGTERM)
    assert wait_for(lambda: not launched.ready_file.exists(), 1)
    time.sleep(0.3)
    connection = http.client.HTTPConnection("127.0.0.1", launched.port, timeout=5)
    connection.request("POST", "/v1/completions", json.dumps({"model": NAME, "prompt": "x"}))
    refused = connection.getresponse()
    assert (refused.status, int(refused.headers["Retry-After"]) > 0) == (503, True)
    assert sum(outcome.is_whole for outcome in streams.wait(30)) == 32
    assert launched.process.wait(10) == 0
    assert events(launched) == ["start", "ready", "drain", "end"]


@pytest.mark.slow
def test_a_drain_has_an_end(started: Callable[..., Launched]) -> None:
    again, limited = (started({"step": 0.05}, flags=f"--drain {seconds}") for seconds in (100, 2))
    crowds = [Streams(one.wait_until_ready(30)["base_url"], NAME, count=4, tokens=1000) for one in (again, limited)]
    assert wait_for(lambda: all(crowd.begun() for crowd in crowds), 10)
    assert all(len(one.processes()) == 3 for one in (again, limited))
    for one in (again, limited):
        one.process.terminate()
    time.sleep(1.5)
    begin = time.monotonic()
    again.process.terminate()
    assert again.process.wait(10) == 0
    assert time.monotonic() - begin < 1.5  # 1 s, and the killing
    assert limited.process.wait(10) == 0
    for crowd in crowds:
        for outcome in crowd.wait(5):
            assert outcome.error
            assert not outcome.done
    assert again.processes() == limited.processes() == set()


@pytest.mark.slow
def test_of_eight_starts_on_one_port_one_goes_on(started: Callable[..., Launched]) -> None:
    port = free_port()
    begin = time.monotonic()
    eight = [started(port=port) for _ in range(8)]
    assert wait_for(lambda: sum(one.process.poll() is not None for one in eight) == 7, 20)
    seconds = time.monotonic() - begin
    (winner,) = [one for one in eight if one.process.poll() is None]
    for loser in eight:
        if loser is not winner:
            assert loser.process.returncode == 2
            assert re.search(r"port \d+ is (being )?taken by .*pid \d+", loser.output)  # of the winner, or its engine
    assert seconds < 2 * 4  # two seconds each, eight at once on two cores
    winner.wait_until_ready(30)
    assert winner.stop() == 0
