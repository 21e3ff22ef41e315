"""Cards that had a memory fault stay out until they were replaced, or a person says otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ascend.errors import UserError
from serve.watch import isolation
from serve.watch.faults import Fault
from serve.watch.isolation import FILE, forget, isolate, isolate_numbers, isolated, judged, sick_cards


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[int, str]:
    """Eight NPUs with serial numbers; a test may change them. The state directory is the test's own."""
    serials = {card: f"SN{card}" for card in range(8)}
    monkeypatch.setattr(isolation, "present", lambda device: tuple(range(8)) if device == "npu" else ())
    monkeypatch.setattr(isolation, "identities", lambda device: dict(serials))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    return serials


def file_of(tmp_path: Path) -> Path:
    return tmp_path / "antangelmed" / FILE


def test_a_card_is_out_until_it_is_replaced_also_when_it_is_moved(machine: dict[int, str], tmp_path: Path) -> None:
    assert isolated("npu") == {}
    assert isolate((3,), "UCE on card 3: memory") == (3,)
    assert isolated("npu") == {3: "UCE on card 3: memory"}
    machine[3], machine[5] = "SN5", "SN3"  # moved to another slot
    assert list(isolated("npu")) == [5]
    machine[5] = "SN99"  # replaced
    assert isolated("npu") == {}
    file = file_of(tmp_path)
    assert file.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in file.parent.iterdir()] == [FILE]


def test_without_a_serial_number_the_place_counts(machine: dict[int, str]) -> None:
    machine.clear()
    isolate((2,), "sick", "npu")
    assert isolated("npu") == {2: "sick"}
    machine.update({2: "SN2"})
    assert isolated("npu") == {2: "sick"}


def test_cards_are_counted_as_the_engine_sees_them_and_unknown_means_all_of_these(machine: dict[int, str]) -> None:
    visible = {"ASCEND_RT_VISIBLE_DEVICES": "4,6"}
    assert isolate((1,), "sick", "npu", visible) == (6,)
    assert isolate((), "nobody knows which", "npu", visible) == (4, 6)
    assert isolated("npu") == {4: "nobody knows which", 6: "nobody knows which"}
    assert isolate((), "all", "npu") == tuple(range(8))
    assert isolate((0,), "no card here", "cpu", visible) == (4,)
    assert isolate((1,), "as the plan reads it", "npu", {"ASCEND_RT_VISIBLE_DEVICES": " 7, 2 "}) == (2,)


def test_cards_of_one_kind_are_not_those_of_another(machine: dict[int, str]) -> None:
    isolate_numbers((3,), "sick", "cuda")
    assert isolated("npu") == {}
    assert isolated("cuda") == {3: "sick"}


def recorded(name: str) -> str:
    return (Path(__file__).parent / "recorded" / name).read_text()


def test_the_vendors_tool_says_which_card_counts_errors_now(
    machine: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = dict.fromkeys(range(8), recorded("npu-smi-ecc-23.0.5.txt"))
    monkeypatch.setattr(isolation, "_output", lambda *command: said[int(command[-1])])
    assert sick_cards("npu") == ()
    said[2] = recorded("npu-smi-ours-ecc-before.txt")  # over its whole life
    assert sick_cards("npu") == ()
    said[4] = recorded("npu-smi-ours-ecc-now.txt")
    assert sick_cards("npu") == (4,)
    said[6] = ""
    assert sick_cards("npu") == (4,)
    said[1] = ""
    assert sick_cards("npu") is None
    monkeypatch.setattr(isolation, "present", lambda device: (0, 1))
    for text, cards in {
        "0, 0\n1, 0\n": (), "0, 0\n1, 3\n": (1,), "1, 3\n": (1,), "0, 0\n": None, "0, [N/A]\n1, 0\n": None, "": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(isolation, "_output", lambda *command: text)  # noqa: B023
        assert sick_cards("cuda") == cards, text
    monkeypatch.setattr(isolation, "present", lambda device: ())
    assert sick_cards("npu") is None


def test_a_person_may_forget_them(machine: dict[int, str], tmp_path: Path) -> None:
    isolate((1, 2), "sick")
    assert [line.split(";")[0] for line in forget()] == ["npu card 1 may be used again", "npu card 2 may be used again"]
    assert isolated("npu") == {}
    assert forget() == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"version": 2, "cards": [], "faults": []}', '{"version": 1, "cards": [{}], "faults": []}',
     '{"version": 1, "cards": [], "faults": [{"name": "UCE", "cards": [1], "at": "now"}]}',
     '{"version": 1, "cards": [], "faults": [{"name": "UCE", "cards": ["1"], "at": 1}]}',
     '{"version": 1, "cards": [], "faults": [7]}',
     '{"version": 1, "cards": [], "faults": [], "more": 1}', '{"version": 1, "cards": 1, "faults": []}', "[" * 99999],
)  # fmt: skip
def test_a_damaged_record_stops_the_start(machine: dict[int, str], tmp_path: Path, content: str) -> None:
    isolate((1,), "sick")
    file_of(tmp_path).write_text(content)
    with pytest.raises(UserError, match="--forget-isolated"):
        isolated("npu")
    assert forget() == []
    assert isolated("npu") == {}


def test_the_second_time_out_of_a_card_within_an_hour_isolates_it(machine: dict[int, str]) -> None:
    once = Fault("aicore-timeout", "a kernel did not end", "restart", (3,), "…")
    assert judged(once, now=1000.0) is once
    assert judged(Fault(once.name, once.meaning, once.action, (4,), "…"), now=1010.0).action == "restart"
    assert judged(once, now=4601.0).action == "restart"  # an hour and a second later
    again = judged(once, now=8000.0)
    assert again.action == "isolate"
    assert "second time" in again.meaning
    exception = Fault("aicore-exception", "a kernel failed", "restart", (3,), "…")
    assert [judged(exception, now=9000.0 + at).action for at in range(3)] == ["restart"] * 3


def test_identities_are_those_of_the_vendors_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "nvidia-smi": "0, GPU-aaaa\n1, GPU-bbbb\nFailed to initialize\n",
        "npu-smi": "\tNPU ID                         : 0\n\tSerial Number                  : 033ABC\n",
    }
    monkeypatch.setattr(isolation, "_output", lambda tool, *_: said[tool])
    monkeypatch.setattr(isolation, "present", lambda device: (0, 1))
    assert isolation.identities("cuda") == {0: "GPU-aaaa", 1: "GPU-bbbb"}
    assert isolation.identities("npu") == {0: "033ABC", 1: "033ABC"}
    said["npu-smi"] = "\tSerial Number                  : NA\n"
    assert isolation.identities("npu") == {}


def test_the_record_is_one_json_object(machine: dict[int, str], tmp_path: Path) -> None:
    isolate((0,), "x" * 1000, "npu")
    record = json.loads(file_of(tmp_path).read_text())
    (card,) = record["cards"]
    assert set(card) == {"device", "index", "identity", "reason", "at"}
    assert len(card["reason"]) == 500
