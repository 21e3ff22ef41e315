"""Conversions that are broken off, starved and fought over: rows 21, 22 and 24 of the reliability figures.

Crash points, full disks and damaged sources run in forks (`tests.convert_forks`); signals and locks are tried on the
real command.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ascend.errors import UserError
from convert.engine import convert, prepare
from convert.journal import Journal
from convert.plan import Request
from tests import tiny
from tests.broken_checkpoints import BROKEN
from tests.convert_forks import content, identity

pytestmark = pytest.mark.beside

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("CONVERT_KILLS", "5"))  # the figure is 20; with two processes each takes four seconds
BY_NAME = {"pytorch_model.bin", "model.pt", "MODEL.PTH"}  # pickles beside the weights: left out and named


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("source") / "source", "bf16")


@pytest.fixture(scope="module")
def sources(source: Path) -> dict[str, Path]:
    fp8 = source.with_name("fp8")
    convert(prepare(source, fp8, Request("fp8")), 1)
    return {"bf16": source, "fp8": fp8}


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 20 MB, in forty files of the target: there is time to break it off."""
    path = tmp_path_factory.mktemp("larger") / "source"
    return tiny.checkpoint(path, "bf16", hidden_size=256, moe_intermediate_size=128, num_experts=32)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 80 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "none", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def forks(scenario: str, source: Path, base: Path, argument: str = "") -> Any:
    base.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.convert_forks", scenario, str(source), str(base), argument]
    return json.loads(subprocess.check_output(command, cwd=ROOT, text=True))


def is_one_line(said: str) -> bool:
    return said.startswith("error: ") and said.count("\n") == 1 and said.endswith("\n")


@pytest.mark.slow
@pytest.mark.parametrize("points", [26])
def test_broken_off_at_any_call(points: int, source: Path, tmp_path: Path) -> None:
    seen = forks("crashes", source, tmp_path / "base", str(points))
    assert seen["wrong"] == []
    assert seen["points"] >= (60 if points > 4 else 4)
    assert seen["files"] == 5
    assert seen["halfway"] > points // 3, "many of the points are past the first file"
    assert seen["repeated"] <= 1


@pytest.mark.slow
def test_eight_at_the_same_instant(source: Path, tmp_path: Path) -> None:
    convert(prepare(source, tmp_path / "whole", Request("w8a8", max_shard_bytes=60_000)), 1)
    for one in forks("at_once", source, tmp_path / "base", "5"):
        said = [text.strip() for text in one["said"]]
        assert said.count("made") == 1, one
        for text, code in zip(said, one["codes"], strict=True):
            in_use = re.fullmatch(r"error: .*/\.target\.converting is in use by pid \d+: it converts to .*", text)
            assert code == (2 if in_use else 0), one
            assert in_use or text in ("made", "found"), one
        assert one["left"] == ["target"]
        assert one["content"] == content(tmp_path / "whole")


@pytest.mark.slow
def test_faults_of_source_and_place(source: Path, tmp_path: Path) -> None:
    seen = forks("faults", source, tmp_path / "base")
    base = tmp_path / "base"
    assert seen.pop("restart")["code"] == 0
    lines = {
        "cut": f"{base}/cut/source/model.safetensors: was cut off while it was read",
        "touched": f"{base}/touched/source changed while it was read",
        "limited": "cannot write model-00001-of-00005.safetensors, 0.00 GB: File too large",
        "no parent": f"{base}/no parent/missing is no directory: make it first",
        "file as parent": f"{base}/file as parent/file is no directory: make it first",
        "other options": f"{base}/other options/.target.converting holds another conversion that was not finished",
    }
    for name, line in lines.items():
        one = seen.pop(name)
        assert (one["code"], one["target"], one["partial"]) == (2, False, []), name
        assert is_one_line(one["said"]), one
        assert one["said"].startswith(f"error: {line}"), one
    assert not seen


@pytest.mark.slow
def test_a_disk_that_others_fill(source: Path, disk: Path) -> None:
    seen = forks("full_disk", source, disk)
    assert [one["after"] for one in seen] == list(range(7))
    assert max(one["finished"] for one in seen) == 5
    for one in seen:
        for code, said, target in (("code", "said", "target"), ("again", "again_said", "again_target")):
            assert one[code] == 2, one
            assert is_one_line(one[said]), one
            assert not one[target], one
        if one["after"]:  # before, not even the journal could be begun
            assert re.search(r"\(\d[\d,]+ bytes\) are needed", one["again_said"]), one
        assert (one["finish"], one["identical"], one["repeated"], one["left"]) == (0, True, 0, ["target"]), one


@pytest.mark.slow
def test_a_disk_that_becomes_read_only(source: Path, disk: Path) -> None:
    seen = forks("read_only", source, disk)
    assert seen["codes"] == [2, 2, 0]
    for said in seen["said"]:
        assert is_one_line(said), said
        assert "Read-only file system" in said
    assert seen["target"] == [False, False]
    assert seen["kept"] == [True]
    assert seen["left"] == ["target"]


def test_too_small_a_disk_is_refused_at_once(source: Path, disk: Path) -> None:
    (disk / "filler").write_bytes(bytes(30 << 20))
    job = prepare(source, disk / "target", Request("w8a8"))
    begun = time.monotonic()
    line = tiny.user_error(convert, job, 1)
    assert time.monotonic() - begun < 1
    assert f"({job.plan.nbytes + (64 << 20):,} bytes) are needed" in line
    assert not (disk / "target").exists()


DAMAGED = {
    "weight": ("bf16", "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.2.up_proj.weight"),
    "norm": ("bf16", "model.norm.weight", "model.norm.weight"),
    "scale": ("fp8", "model.layers.0.mlp.up_proj.weight_scale_inv", "model.layers.0.mlp.up_proj.weight"),
    "code": ("fp8", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_no_number_is_refused_by_name(
    what: str, value: float, sources: dict[str, Path], tmp_path: Path
) -> None:
    form, tensor, named = DAMAGED[what]
    damaged = Path(shutil.copytree(sources[form], tmp_path / "damaged"))
    tensors = tiny.read_tensors(damaged)
    values = tensors[tensor]
    if values.dtype == torch.float8_e4m3fn:  # both signs: it has no infinity
        values.view(torch.uint8).view(-1)[-1] = 0x7F if value != value else 0xFF
    else:
        values.view(-1)[-1] = value
    tiny.write_tensors(damaged, tensors)
    for to in ("bf16", form.replace("bf16", "w8a8")):  # rounded, or read back; and as it is
        line = tiny.user_error(convert, prepare(damaged, tmp_path / to, Request(to)), 1)
        assert f"tensor {named} holds NaN or infinity" in line
        assert not (tmp_path / to).exists()


@pytest.mark.parametrize("what", BROKEN.keys() - BY_NAME)
def test_a_broken_source_is_refused_in_its_words(what: str, tmp_path: Path) -> None:
    breaking, line = BROKEN[what]
    breaking(tmp_path / "model")
    said = tiny.user_error(prepare, tmp_path / "model", tmp_path / "target", Request("w8a8"))
    assert said == line.replace("{dir}", str(tmp_path / "model"))
    assert not list(tmp_path.glob("*target*"))


class Command:
    """`python -m convert` as a user runs it, in a process group of its own as a terminal makes one."""

    def __init__(self, source: Path, target: Path, *options: str, to: str = "w8a8") -> None:
        command = [sys.executable, "-m", "convert", to, str(source), str(target), "--max-shard-size", "1MB", *options]
        self.target, self.work = target, target.with_name(f".{target.name}.converting")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # a shell ignores it for what it puts aside
        )

    def until_recorded(self, count: int) -> None:
        """Wait for so many files to stand in the journal, or for the end."""
        limit = time.monotonic() + 60
        while not self.target.exists():
            with suppress(FileNotFoundError):
                if (self.work / "journal.jsonl").read_bytes().count(b"\n") > count:
                    return
            assert time.monotonic() < limit
            assert self.process.poll() is None or self.target.exists(), self.process.communicate()
            time.sleep(0.002)

    def group(self) -> list[int]:
        """Living processes of its group, from /proc: a zombie is none."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                except OSError:
                    continue
                if int(group) == self.process.pid and state != "Z":
                    found.append(int(entry.name))
        return found

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=60)
        limit = time.monotonic() + 5
        while self.group() and time.monotonic() < limit:
            time.sleep(0.01)
        assert not self.group(), "a process outlives its parent"
        return self.process.returncode, said


@pytest.mark.slow
def test_killed_at_random_moments(larger: Path, tmp_path: Path) -> None:
    """kill -9 of the parent of two processes; the next command goes on, the last one to the end."""
    convert(prepare(larger, tmp_path / "whole", Request("w8a8", max_shard_bytes=10**6)), 1)
    whole, chance, progressed = content(tmp_path / "whole"), random.Random(6), 0
    files = len(list((tmp_path / "whole").glob("*.safetensors")))
    for round_ in range(KILLS // 5):
        target = tmp_path / f"target{round_}"
        for kill in range(5):
            command = Command(larger, target, "--workers", "2")
            kept = identity(command.work / "files")
            if kill == 0:  # while it starts
                time.sleep(chance.random() * 2)
            else:
                command.until_recorded(min(len(kept) + chance.randint(1, 3), files))
                time.sleep(chance.random() * 0.02)
            command.process.kill()
            code, _said = command.end()
            after = identity(command.work / "files") or identity(target)
            assert sum(after.get(file) != one for file, one in kept.items()) <= 2  # one of each process
            assert not target.exists() or content(target) == whole
            progressed += len(after) > len(kept)
        code, said = Command(larger, target).end()
        assert code == 0, said
        assert content(target) == whole
        assert not target.with_name(f".{target.name}.converting").exists()
    assert progressed >= KILLS // 2


@pytest.mark.slow
def test_seven_while_one_is_stopped(larger: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    dead = Command(larger, target)
    dead.until_recorded(1)
    os.kill(dead.process.pid, signal.SIGKILL)
    dead.end()
    assert (dead.work / "holder").read_text() == f"{dead.process.pid}\n"
    first = Command(larger, target)  # takes over what the dead one held
    first.until_recorded(3)
    os.kill(first.process.pid, signal.SIGSTOP)
    try:

        def other(_: int) -> tuple[int, str]:
            return Command(larger, target).end()

        with ThreadPoolExecutor(2) as pool:
            for code, said in pool.map(other, range(7)):
                assert code == 2
                assert f"is in use by pid {first.process.pid}" in said
                assert is_one_line(said)
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    code, said = first.end()
    assert code == 0, said
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_gone_on_with(number: signal.Signals, code: int, larger: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    command = Command(larger, target, "--workers", "2")
    command.until_recorded(2)
    if number == signal.SIGINT:
        os.killpg(command.process.pid, number)
    else:
        os.kill(command.process.pid, number)
    ended, said = command.end()
    assert ended == code
    others = [line for line in said.splitlines() if " GB written, " not in line]
    assert others == ["interrupted: finished files stay, the same command goes on with the next"]
    assert not target.exists()
    there = len(identity(command.work / "files"))
    ended, said = Command(larger, target, "--workers", "2").end()
    assert ended == 0, said
    found = re.match(r"(\d+) of \d+ files are there from an earlier run\n", said)
    assert found, said
    assert there - 2 <= int(found[1]) <= there


@pytest.mark.slow
def test_interrupted_while_processes_start(larger: Path, tmp_path: Path) -> None:
    """Two seconds long they import; nothing of that is seen."""
    command = Command(larger, tmp_path / "target", "--workers", "2")
    limit = time.monotonic() + 30
    while len(command.group()) < 4 and time.monotonic() < limit:  # two of them, and multiprocessing's tracker
        time.sleep(0.005)
    time.sleep(0.15)
    os.killpg(command.process.pid, signal.SIGINT)
    code, said = command.end()
    assert (code, said) == (130, "interrupted: finished files stay, the same command goes on with the next\n")


@pytest.mark.parametrize("line", ["no JSON", "[]", "5", '{"file": "a"}', '{"errors": {}, "surprise": 1}'])
def test_a_damaged_record_is_told(tmp_path: Path, line: str) -> None:
    what = {"plan": "a conversion"}
    with Journal(tmp_path / "target", what) as journal:
        journal.stream.write(f"{line}\n")
    with pytest.raises(UserError, match=r"journal\.jsonl is damaged: give the command with --restart"):
        Journal(tmp_path / "target", what)
    with Journal(tmp_path / "target", what, restart=True) as journal:
        assert journal.finished == {}
