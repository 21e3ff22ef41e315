"""`perf serve` with the real load client: against a server whose times are known, and against the real engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ascend.errors import UserError
from convert.demo import write_demo
from perf import serve
from perf.load.checks import check
from perf.load.client import LoadClient
from perf.load.endpoint import Endpoint
from perf.load.points import Point
from perf.load.table import COLUMNS
from perf.load.workloads import Workload, identity, lengths, requests, sha256, workload
from perf.result import read
from tests.conftest import RunningServer
from tests.timed_server import MODEL, TimedServer
from tests.tiny import user_error

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

IDS = range(1000)
TOKENS = 51
TTFT, ITL, SLOTS = 0.2, 0.02, 4
SERVICE = TTFT + (TOKENS - 1) * ITL  # seconds a request holds its slot
WORK = Workload("timed", (16, 64), (TOKENS, TOKENS), "")
ATTEMPTS = 3


@pytest.fixture(scope="module")
def client() -> Iterator[LoadClient]:
    with LoadClient(Endpoint("", MODEL), WORK, 0, IDS, {"ttft": 500.0}) as running:
        yield running


def measure(client: LoadClient, server: TimedServer, point: Point) -> dict[str, Any]:
    client.common["base_url"] = server.url
    result, sent = client.measure(point)
    came = [(one["prompt"], one["max_tokens"]) for one in server.log()]
    asked = requests(WORK, 0, point.label, point.requests, IDS)
    assert sorted(came) == sorted((one.prompt, one.output_tokens) for one in asked)
    if point.request_rate is None:
        assert sent == sha256(asked)
    return result


@pytest.mark.parametrize(
    ("point", "ttft", "rate"),
    [
        (Point(1, None, 8), TTFT, TOKENS / SERVICE),
        # Twice as many users as slots: after the first wave each waits for one whole service time.
        (Point(2 * SLOTS, None, 8 * SLOTS), TTFT + SERVICE, SLOTS * TOKENS / SERVICE),
    ],
    ids=str,
)
def test_known_times_are_reported(client: LoadClient, point: Point, ttft: float, rate: float) -> None:
    known = {
        "median_ttft_ms": (1e3 * ttft, 0.02),
        "mean_itl_ms": (1e3 * ITL, 0.02),
        "median_itl_ms": (1e3 * ITL, 0.02),
        "mean_tpot_ms": (1e3 * ITL, 0.02),
        "median_tpot_ms": (1e3 * ITL, 0.02),
        "output_throughput": (rate, 0.03),
    }
    for attempt in range(ATTEMPTS):
        with TimedServer(ttft=TTFT, itl=ITL, slots=SLOTS) as server:
            result = measure(client, server, point)
        check(result, point, lengths(WORK, 0, point.requests))
        off = {
            key: f"{result[key]:.2f} in place of {is_:.2f}"
            for key, (is_, bound) in known.items()
            if abs(result[key] / is_ - 1) > bound
        }
        if not off:
            break
        # 2 % of 200 ms are 4 ms, one time slice of the kernel's where other processes want both cores.
        print(f"attempt {attempt + 1}: {off}; load average {os.getloadavg()[0]:.1f}")
    assert not off
    good = sum(one <= 0.5 for one in result["ttfts"])
    assert result["request_goodput"] == pytest.approx(good / result["duration"])
    assert good == (point.requests if point.max_concurrency == 1 else SLOTS)


def test_a_stall_shows_in_a_closed_loop_to_those_in_it(client: LoadClient) -> None:
    point, stall = Point(SLOTS, None, 3 * SLOTS), 2.0
    with TimedServer(ttft=TTFT, itl=ITL, slots=SLOTS, stall=stall, stall_after=SLOTS + 2) as server:
        result = measure(client, server, point)
    for latency in ("ttft", "e2el"):
        assert result[f"p99_{latency}_ms"] - result[f"p50_{latency}_ms"] == pytest.approx(1e3 * stall, rel=0.05)
    assert sum(ttft > 1 for ttft in result["ttfts"]) == SLOTS  # the others had not asked yet
    assert result["duration"] == pytest.approx(3 * SERVICE + stall, rel=0.03)


def test_a_stall_shows_in_an_open_loop_to_all_who_come(client: LoadClient) -> None:
    # By the schedule of this seed, nobody comes and no first token is due within 0.1 s of the stall's start and end.
    point, stall, after = Point(None, 10.0, 40), 2.0, 11
    for attempt in range(ATTEMPTS):
        with TimedServer(ttft=TTFT, itl=ITL, slots=100, stall=stall, stall_after=after) as server:
            result = measure(client, server, point)
        try:
            check(result, point, lengths(WORK, 0, point.requests))
            break
        except UserError as late:  # the client could not keep its schedule
            print(f"attempt {attempt + 1}: {late}; load average {os.getloadavg()[0]:.1f}")
    check(result, point, lengths(WORK, 0, point.requests))
    start = result["scheduled_times"][after] + 0.1
    expected = [
        TTFT if due + TTFT < start or due >= start + stall else TTFT + stall - max(0.0, due - start)
        for due in result["scheduled_times"]
    ]
    assert sum(ttft > 2 * TTFT for ttft in expected) > 2 * SLOTS
    assert result["mean_ttft_ms"] == pytest.approx(1e3 * sum(expected) / len(expected), rel=0.02)
    for is_, should in zip(result["ttfts"], expected, strict=True):
        assert is_ == pytest.approx(should, abs=0.05)
    assert result["p99_ttft_ms"] > 1e3 * stall


def test_failures_and_wrong_lengths_are_not_reported(client: LoadClient) -> None:
    point = Point(2, None, 6)
    with TimedServer(ttft=0.01, itl=0.001, fail_every=3) as server:
        failed = measure(client, server, point)
    message = "concurrency 2: 2 of 6 requests failed: Out of slots; nothing is reported"
    assert message in user_error(check, failed, point, lengths(WORK, 0, 6))
    with TimedServer(ttft=0.01, itl=0.001, wrong_length=1) as server:
        short = measure(client, server, point)
    assert "answered with 50 tokens in place of 51 (6 of 6" in user_error(check, short, point, lengths(WORK, 0, 6))


def test_the_command_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_demo(tmp_path / MODEL)
    (tmp_path / "key").write_text("sesame")
    out = tmp_path / "out.json"
    argv = ["--model", str(tmp_path / MODEL), "--workload", "short-chat", "--scale", "0.05", "--out", str(out)]
    argv += ["--api-key-file", str(tmp_path / "key"), "--goodput", "ttft:500", "--cards", "2x910B3", "--seed", "5"]
    with TimedServer(ttft=0.02, itl=0.005, api_key="sesame") as server:
        closed = ["--concurrency", "2,4", "--repeats", "2", "--requests", "4", "--json"]
        assert serve.main([*argv, "--base-url", server.url, *closed]) == 0
        log = server.log()
    result, printed = read(out), capsys.readouterr().out
    assert [(row.max_concurrency, row.repeat) for row in result.rows] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    work = workload("short-chat", 0.05)
    assert result.settings.workload == "short-chat x0.05"
    assert result.settings.workload_sha256 == identity(work, 5, range(2033))
    assert result.settings.requests == 16
    assert (result.settings.engine, result.settings.service_level) == ("stub 1", {"ttft": 500.0})
    assert (result.run.machine.device, result.run.machine.cards, result.run.seed) == ("910B3", 2, 5)
    for row in result.rows:
        assert row.result["input_lens"] == [prompt for prompt, _ in lengths(work, 5, 4)]
        assert {key for key, _, _ in COLUMNS} <= set(row.result)
        assert row.watts is None
    assert len({row.prompts_sha256 for row in result.rows}) == 4
    warm = 2 + 4
    assert len(log) == 16 + warm == len({tuple(one["prompt"]) for one in log})
    text = out.read_text()
    assert "sesame" not in text + printed
    assert "generated" not in text
    assert f"{out.stat().st_mode & 0o777:o}" == "640"
    assert json.loads(printed.splitlines()[-1])["points"][1]["max_concurrency"] == 4


def test_the_real_engine_is_measured(server: RunningServer, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    argv = ["--base-url", server.base_url, "--model", str(server.model_path), "--scale", "0.1", "--out", str(out)]
    options = ["--concurrency", "1,2", "--requests", "4", "--repeats", "1", "--precision", "fp32"]
    assert serve.main([*argv, *options]) == 0
    result = read(out)
    assert result.settings.engine.startswith("vllm 0.")
    assert result.run.model.name == "tiny"
    assert result.run.machine.device_type == "cpu"
    for row in result.rows:
        measured = row.result
        assert list(zip(measured["input_lens"], measured["output_lens"], strict=True)) == lengths(
            workload("short-chat", 0.1), 0, 4
        )
        assert 0 < measured["mean_ttft_ms"] < measured["mean_e2el_ms"]
        assert 0 < measured["mean_tpot_ms"] < measured["mean_e2el_ms"] / 20
        assert measured["output_throughput"] * measured["duration"] == pytest.approx(4 * 26)
        assert measured["max_concurrent_requests"] <= 4
