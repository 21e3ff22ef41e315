"""Supervision of the real engine: it is killed in the middle of streams, and told to stop in the middle of others."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from pathlib import Path

import pytest

from convert.demo import write_demo
from tests.launcher import Launched, wait_for
from tests.streams import Streams, ask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HANG = 5.0


def test_a_killed_engine_core_is_told_and_replaced_and_sigterm_lets_all_finish(tmp_path: Path) -> None:
    write_demo(tmp_path / "tiny", dtype="fp32")
    launched = Launched(
        tmp_path / "run", "--device", "cpu", "--model", str(tmp_path / "tiny"), "--hang", str(HANG), "--drain", "60"
    )
    ready = launched.wait_until_ready()
    base_url, model = ready["base_url"], ready["model"]
    log = tmp_path / "run" / "antangelmed" / f"events-{launched.port}.jsonl"

    def events() -> list[str]:
        return [json.loads(line)["event"] for line in log.read_text().splitlines()]

    crowd = Streams(base_url, model, count=16, tokens=4000, ignore_eos=True)
    assert wait_for(crowd.begun, 30)
    time.sleep(HANG * 1.5)
    assert events() == ["start", "ready"]  # no false alarm
    os.kill(launched.titled("VLLM::EngineCore"), signal.SIGKILL)
    died_at = time.monotonic()
    assert wait_for(lambda: not launched.ready_file.exists(), 2)
    for outcome in crowd.wait(10):
        assert outcome.error
        assert not outcome.done
        assert outcome.ended_at - died_at < 2

    assert wait_for(launched.ready_file.exists, 120), launched.output
    assert ask(base_url, model) == 200
    assert events() == ["start", "ready", "death", "restart", "start", "ready"]

    streams = Streams(base_url, model, count=32, tokens=200, ignore_eos=True)
    assert wait_for(streams.begun, 30)
    assert len(launched.processes()) >= 4
    launched.process.terminate()
    assert wait_for(lambda: not launched.ready_file.exists(), 1)
    connection = http.client.HTTPConnection("127.0.0.1", launched.port, timeout=10)
    connection.request("POST", "/v1/completions", json.dumps({"model": model, "prompt": "x"}))
    refused = connection.getresponse()
    assert (refused.status, int(refused.headers["Retry-After"]) > 0) == (503, True)
    assert sum(outcome.is_whole for outcome in streams.wait(60)) == 32
    assert launched.process.wait(30) == 0
    assert launched.processes() == set()
