"""What is done about a device fault depends on who wrote it, on the vendor's tool, and on when it was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.engine import EngineCommand
from serve.plugin.log_format import MARK
from serve.watch import fault_log, isolation
from serve.watch.events import EventLog
from serve.watch.fault_log import REMEMBERED_SECONDS, FaultLog
from serve.watch.isolation import isolated
from serve.watch.ready import EngineError, FinalError, Server
from tests.test_faults import PRINTED

SIGNED = "(Worker_TP3 pid=7) ERROR 11-23 08:00:00 [worker.py:1 5eed] "
UNSIGNED = "(Worker_TP3 pid=7) ERROR 11-23 08:00:00 [worker.py:1] "
DIED = EngineError("the engine ended (signal 9)")


class Engine:
    """An engine's log on a machine with eight NPUs, and what is made of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "engine-1.log"
        self.path.write_text("")
        server = Server("127.0.0.1", 1, "m", directory, "npu", self.path, demo=False, chat=False)
        self.events = EventLog(directory / "events.jsonl")
        self.log = FaultLog(server, EngineCommand(["x"], {MARK: "5eed"}), self.events)

    def write(self, *lines: str) -> None:
        with self.path.open("a") as stream:
            stream.write("".join(f"{line}\n" for line in lines))

    def explained(self, *lines: str) -> EngineError:
        """What its end is put down to after these lines."""
        self.write(*lines)
        return self.log.explain(DIED)

    @property
    def isolated(self) -> list[int]:
        return list(isolated("npu", self.directory))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(fault_log, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(isolation, "present", lambda device: tuple(range(8)) if device == "npu" else ())
    monkeypatch.setattr(isolation, "identities", lambda device: {})
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    return Engine(tmp_path)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, int] | None], None]:
    """Sets how many errors npu-smi counts on which cards; None: it does not answer."""

    def says(counts: dict[int, int] | None) -> None:
        def output(*command: str) -> str:
            count = (counts or {}).get(int(command[-1]), 0)
            return "" if counts is None else f"  HBM Double Bit Error Count  : {count}\n"

        monkeypatch.setattr(isolation, "_output", output)

    return says


def test_a_signed_memory_fault_isolates_its_card_whatever_came_after_it(engine: Engine) -> None:
    engine.write(SIGNED + PRINTED["UCE"])
    engine.log.follow()
    engine.write(*(f"{SIGNED}  File 'x.py', line {line}, in step" for line in range(5000)))
    failure = engine.explained()
    assert isinstance(failure, FinalError)
    assert str(failure).startswith("UCE on card 3: memory has an uncorrectable error; npu card 3 isolated")
    assert engine.isolated == [3]


def test_the_card_may_be_named_in_a_later_reading(engine: Engine) -> None:
    core = SIGNED.replace("Worker_TP3", "EngineCore")
    engine.write(core + PRINTED["HBM-ECC"])
    engine.log.follow()
    assert "card 6 isolated" in str(engine.explained(f"{core}(PID:9, Device:6, RankID:-1)"))
    assert engine.isolated == [6]


@pytest.mark.parametrize("line", [UNSIGNED + PRINTED["UCE"], PRINTED["UCE"], UNSIGNED.replace("7", "1") + "UCE ERROR"])
def test_a_line_that_a_client_may_have_written_isolates_nothing(
    engine: Engine, tool: Callable[[dict[int, int] | None], None], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tool({})
    failure = engine.explained(line)
    assert failure is DIED
    assert engine.isolated == []
    assert "no card counts such an error" in capsys.readouterr().err
    assert json.loads((engine.directory / "events.jsonl").read_text())["signed"] is False


def test_such_a_line_and_a_card_that_counts_errors_isolate_that_card(
    engine: Engine, tool: Callable[[dict[int, int] | None], None]
) -> None:
    tool({5: 2})
    assert "npu card 5 isolated" in str(engine.explained(PRINTED["UCE"] + " on npu:1"))
    assert engine.isolated == [5]


def test_such_a_line_without_the_tool_is_the_end_but_isolates_nothing(
    engine: Engine, tool: Callable[[dict[int, int] | None], None]
) -> None:
    tool(None)
    failure = engine.explained(PRINTED["UCE"])
    assert isinstance(failure, FinalError)
    assert "not started again, nothing is isolated" in str(failure)
    assert engine.isolated == []


def test_unsigned_words_neither_stop_nor_count_as_the_second_time(engine: Engine) -> None:
    assert str(engine.explained(PRINTED["driver"])) == f"{DIED}"
    for _ in range(3):
        failure = engine.explained(UNSIGNED + PRINTED["aicore-timeout"])
        assert not isinstance(failure, FinalError)
    assert isinstance(engine.explained(SIGNED + PRINTED["driver"]), FinalError)


def test_what_was_long_ago_is_not_the_cause_but_memory_is_never_forgotten(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.write(SIGNED + PRINTED["HCCS-link"])
    engine.log.follow()
    began = fault_log.time.monotonic
    monkeypatch.setattr(fault_log.time, "monotonic", lambda: began() + 500)
    engine.write("(EngineCore pid=7) INFO 11-23 08:00:00 [loggers.py:1 5eed] Avg prompt throughput: 0.0 tokens/s")
    engine.log.follow()
    monkeypatch.setattr(fault_log.time, "monotonic", began)
    now = fault_log.time.monotonic()
    monkeypatch.setattr(fault_log.time, "monotonic", lambda: now + REMEMBERED_SECONDS + 1)
    assert engine.log.explain(DIED) is DIED
    assert "stream-timeout" in str(engine.explained(SIGNED + PRINTED["stream-timeout"]))
    monkeypatch.undo()
    monkeypatch.setattr(fault_log, "SETTLE_SECONDS", 0.0)
    assert "HCCS-link" in str(engine.log.explain(DIED))


def test_the_worst_fault_decides_and_every_one_is_told(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    failure = engine.explained(SIGNED + PRINTED["HCCS-link"], SIGNED + PRINTED["HBM-ECC"])
    assert str(failure).startswith("HBM-ECC on card 3")
    assert {"HCCS-link", "HBM-ECC"} == {
        json.loads(line)["name"] for line in (engine.directory / "events.jsonl").read_text().splitlines()
    }
    assert capsys.readouterr().err.count("device fault: ") == 2
