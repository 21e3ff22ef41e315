"""Supervision, with a stub engine that can hang, die, stall and break: what clients see, and what the launcher does."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launcher import Launched, free_port, wait_for
from tests.streams import Streams, ask
from tests.stub_launch import NAME, launch

FIRST_ANSWER = 24  # tokens of the request that tells that the server is ready
HANG = 2.0


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
@pytest.mark.beside
def test_a_core_that_failed_and_does_not_end_is_ended(started: Callable[..., Launched]) -> None:
    """As with vLLM-Ascend on several cards, whose core waits for its workers: the API server never hears of it."""
    prefix = "(EngineCore pid=9) ERROR 11-23 08:00:00 [core.py:7]"
    said = f"{prefix} EngineCore failed to start.\n{prefix} RuntimeError: NPU out of memory"
    launched = started({"log": said, "load": 60})
    assert launched.process.wait(25) == 1
    assert "error: the engine did not start: RuntimeError: NPU out of memory" in launched.output
    assert launched.processes() == set()


@pytest.mark.slow
def test_the_first_request_is_watched(started: Callable[..., Launched]) -> None:
    dying, hanging = started({"die_at_token": 3}), started({"hang_at_token": 3}, flags="--timeout 6")
    assert dying.process.wait(20) == hanging.process.wait(30) == 1
    assert "error: the engine did not start: " in dying.output
    assert "error: no answer after 6 s, the last stage was 'answering the first request'" in hanging.output
    stopping = started({"hang_at_token": 3})
    assert wait_for(lambda: "answering the first request" in stopping.output, 20)
    stopping.process.send_signal(signal.SIGTERM)
    assert stopping.process.wait(10) == 143
    for launched in (dying, hanging, stopping):
        assert launched.processes() == set()


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
    idle = started({"hang_after": 1}, {}, flags=flags)
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
        "long prompts": {"chunks": 50, "step": 0.05},
        "a stall": {"stall": [FIRST_ANSWER + 20, HANG * 0.6]},
        "rubbish": {"rubbish": True},
        "slow metrics": {"slow_metrics": HANG * 0.8, "slots": 2, "step": 0.03},
    }
    running = [started(how, flags=f"--hang {HANG}") for how in hard_times.values()]
    for launched in running:
        launched.wait_until_ready(60)
    crowds = [
        Streams(f"http://127.0.0.1:{launched.port}/v1", NAME, count=8, tokens=10 if name == "long prompts" else 40)
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
    looping = started({"die_after": 0.5}, flags="--restarts 2")
    tried = started({"die_after": 0.5}, {"exit": 1}, {})  # the second life does not even get ready
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
    said = [FIRST_ANSWER + 5, f"(Worker_TP3 pid=7) ERROR 11-23 14:28:07 [worker.py:1 MARK] RuntimeError: {kernel}"]
    dying = started({"log_at_token": said, "die_at_token": FIRST_ANSWER + 20}, {})
    broken = started(
        {"log_at_token": [said[0], said[1].replace(kernel, memory)], "die_at_token": FIRST_ANSWER + 20}, {}
    )
    forged = started({"log_at_token": [said[0], said[1].replace(kernel, memory)]}, {})
    planted = [said[0], said[1].replace(kernel, memory).replace(" MARK", "") + f"\nRuntimeError: {memory}"]
    unsigned = started({"log_at_token": planted, "die_at_token": FIRST_ANSWER + 20}, {})
    for launched in (dying, broken, unsigned):
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
    assert wait_for(lambda: serves(unsigned), 10)  # a client may have written that line: no card counts an error
    assert events(unsigned)[2:5] == ["fault", "death", "restart"]
    assert "not signed by the engine, and no card counts such an error" in unsigned.output
    stopped(unsigned)
    whole = Streams(forged.wait_until_ready(30)["base_url"], NAME, tokens=40)  # a client may have written that line
    assert all(outcome.is_whole for outcome in whole.wait(20))
    assert events(forged) == ["start", "ready"]
    assert "device fault" not in forged.output
    stopped(forged)


@pytest.mark.slow
def test_sigterm_lets_all_streams_finish(started: Callable[..., Launched]) -> None:
    launched = started({"step": 0.02}, flags="--drain 30")
    base_url = launched.wait_until_ready(30)["base_url"]
    streams = Streams(base_url, NAME, count=32, tokens=300)
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
    assert seconds < 2 * 8  # two seconds of work each; how many at once the machine decides
    winner.wait_until_ready(30)
    assert winner.stop() == 0
