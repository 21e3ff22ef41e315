"""The engine's log: how it is read while it grows, kept, and limited."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from serve.watch import progress
from serve.watch.logs import KEPT, keep_logs, limit_log
from serve.watch.progress import Tail, error_line
from serve.watch.ready import meanwhile


def test_a_log_that_is_too_large_is_moved_aside_and_written_on(tmp_path: Path) -> None:
    log = tmp_path / "engine-1.log"
    with log.open("ab", buffering=0) as engine:
        tail = Tail(log)
        engine.write(b"one\n" * 10)
        assert tail.lines() == ["one"] * 10
        limit_log(log, 41)
        assert log.stat().st_size == 40
        limit_log(log, 40)
        assert log.stat().st_size == 0
        aside = tmp_path / "engine-1.log.cut"
        assert aside.read_bytes() == b"one\n" * 10
        assert aside.stat().st_mode & 0o777 == 0o640
        assert tail.lines() == []
        engine.write(b"two\n")
        assert log.read_bytes() == b"two\n"
        assert tail.lines() == ["two"]
    limit_log(tmp_path / "none.log", 1)


def test_logs_of_engines_that_died_are_kept_but_not_for_ever(tmp_path: Path) -> None:
    log = tmp_path / "engine-1.log"
    for life in range(KEPT + 3):
        keep_logs(log)
        log.write_text(str(life))
    names = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert names == {"engine-1.log": "7", **{f"engine-1.log.{age}": str(7 - age) for age in range(1, KEPT + 1)}}


def test_a_line_without_an_end_is_read_in_parts_and_a_half_line_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "MOST_BYTES", 8)
    log = tmp_path / "engine-1.log"
    log.write_bytes(b"ab\ncd\nefg" + b"x" * 20 + b"\nhalf")
    tail = Tail(log)
    read = [tail.lines() for _ in range(8)]
    assert read[0] == ["ab", "cd"]
    assert "".join(line for lines in read[1:] for line in lines) == "efg" + "x" * 20
    assert read[-1] == []


def test_the_cause_is_looked_for_in_the_end_of_a_long_log(tmp_path: Path) -> None:
    log = tmp_path / "engine-1.log"
    with log.open("wb") as stream:
        stream.write(b"ValueError: long ago\n")
        stream.truncate(3 << 30)  # sparse: it would not fit if it were read
        stream.seek(0, 2)
        stream.write(b"\nRuntimeError: the cause\n")
    began = time.monotonic()
    assert error_line(log) == "RuntimeError: the cause"
    assert time.monotonic() - began < 5


def test_waiting_for_an_answer_ends_with_the_engine() -> None:
    stuck = threading.Event()
    looks = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            raise RuntimeError("the engine ended")

    try:
        with pytest.raises(RuntimeError, match="the engine ended"):
            meanwhile(lambda: stuck.wait(60), look)
    finally:
        stuck.set()
    assert meanwhile(lambda: 7, lambda: None) == 7
    with pytest.raises(ZeroDivisionError):
        meanwhile(lambda: 1 // 0, lambda: None)
    since: list[float] = []

    def fall() -> None:
        since.append(time.monotonic())
        raise ConnectionResetError

    def late() -> None:  # its end is seen after its answer has failed
        if since and time.monotonic() - since[0] > 0.3:
            raise RuntimeError("the engine ended")

    with pytest.raises(RuntimeError, match="the engine ended"):
        meanwhile(fall, late)
