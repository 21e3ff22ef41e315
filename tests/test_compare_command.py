"""`perf compare` on the command line: its table, its document, its refusals."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perf.compare.command import main
from perf.compare.comparison import compare
from perf.compare.systems import read_systems
from perf.compare.table import as_document
from perf.result import Result, write
from tests.perf_results import NPU, decode, model, ops, run, serve
from tests.tiny import user_error

REPOSITORY = Path(__file__).parents[1]


# The command line.


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    count = itertools.count()

    def made(*results: Result) -> list[str]:
        paths = [tmp_path / f"{next(count)}.json" for _ in results]
        for path, one in zip(paths, results, strict=True):
            write(path, one)
        return [str(path) for path in paths]

    return made


Files = Callable[..., list[str]]


def test_the_table(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    made = files(serve(watts=1000.0), serve(run(NPU), (200.0, 1495.0)))
    assert main([*made, "--label", "here", "--label", "there"]) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "A here"
    assert lines[1].startswith("4 x NVIDIA H20; vllm 0.32.0; AntAngelMed (checkpoint, bf16); perf serve, 2026")
    head = "load output tokens/s TPOT, median TPOT, p99 TTFT, median TTFT, p99 ITL, p99 per card per W of limit Pareto"
    assert lines[2] == head
    assert lines[3].startswith("concurrency 1 ")
    assert "B against A: how many times as much, with 95 % bounds" in lines
    assert "note: 4 against 8 cards: look at the figures per card" in lines
    ratios = [line for line in lines if " to " in line]
    assert ratios[0].startswith("concurrency 1 output tokens/s 0.")
    assert ratios[0].endswith("worse")
    assert ratios[1].startswith("concurrency 1 TPOT, median 2.")
    assert ratios[1].endswith("worse")
    unsettled = [line for line in ratios if line.startswith("concurrency 8")]
    assert unsettled
    assert all(line.endswith(") not settled") for line in unsettled)
    assert main([made[1], made[0]]) == 0
    assert "better" in capsys.readouterr().out


def test_the_document_says_the_same(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    made = files(serve(), serve(model(precision="fp8")))
    assert main([*made, "--across", "precision", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    document = json.loads(out[-1], parse_constant=lambda name: pytest.fail(name))
    comparison = compare([*read_systems(Path(made[0])), *read_systems(Path(made[1]))], ["precision"])
    assert document == json.loads(json.dumps(as_document(comparison)))
    assert [system["name"] for system in document["systems"]] == ["A", "B"]
    assert document["systems"][1]["run"]["model"]["precision"] == "fp8"
    assert len(document["points"]) == 4
    (pair,) = document["pairs"]
    assert (pair["a"], pair["b"], pair["comparable"], document["across"]) == ("A", "B", True, ["precision"])
    assert [finding["what"] for finding in pair["allowed"]] == ["precision"]
    assert {(one["axis"], one["load"]) for one in pair["ratios"]} == {("concurrency", 1), ("concurrency", 8)}


def test_no_ratio_where_two_are_not_comparable(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    made = files(serve(), serve(model(precision="fp8")), serve(run(NPU)))
    assert main([*made, "--json"]) == 1
    *table, last = capsys.readouterr().out.splitlines()
    refused, compared = json.loads(last)["pairs"]
    assert (refused["comparable"], refused["ratios"], compared["comparable"]) == (False, [], True)
    start = table.index("B against A: NOT COMPARABLE")
    why = "precision: bf16 against fp8 (another precision moves other bytes and gives other answers)"
    assert table[start + 1] == f"   {why}; if that is what you compare: --across precision"
    assert table[start + 2] == ""
    assert table[start + 3].startswith("C against A: how many")
    assert compared["ratios"]


def test_one_file_alone_is_shown(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files(serve())) == 0
    assert "against" not in capsys.readouterr().out


def test_more_systems_than_letters(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    made = files(*[serve()] * 27)
    labels = [part for number in range(27) for part in ("--label", f"site {number}")]
    assert main([*made, *labels]) == 0
    assert "\nZ  site 25\n" in (out := capsys.readouterr().out)
    assert "\n27  site 26\n" in out
    assert "27 against A" in out


def test_mistakes_get_one_line(files: Files, tmp_path: Path) -> None:
    a, b, ops_file = files(serve(), serve(run(NPU)), ops())
    gone, folder = tmp_path / "gone.json", tmp_path / "gone" / "page.html"
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    older = tmp_path / "older.json"
    older.write_text(json.dumps({"schema": 2, "kind": "serve", "run": {}, "settings": {}, "rows": []}))
    (alike,) = files(serve())
    twice = "two systems are both called '4 x NVIDIA H20, bf16'; name the files with --label, once for each file"
    ends = "; see `python -m perf compare --help`"
    unset = serve(max_concurrency=None)
    (without,) = files(unset)
    for arguments, line in (
        ([a, "--htm", "x"], f"unknown argument '--htm' (did you mean '--html'?){ends}"),
        ([], f"the following arguments are required: FILE{ends}"),
        ([str(gone)], f"{gone}: cannot be read (No such file or directory)"),
        ([str(broken)], f"{broken}: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "),
        ([str(older)], f"{older}: schema 2, this version reads 1; measure again"),
        ([ops_file], f"{ops_file}: a result of `perf ops`; compare takes those of decode and serve"),
        ([a, alike], twice),
        ([a, b, "--label", "x"], "--label: 1 for 2 files; give one for each, in their order"),
        ([a, b, "--label", "x", "--label", "x"], "two systems are both called 'x'; name the files with --label, "),
        ([a, b, "--across", "precison"], "--across: unknown 'precison' (did you mean 'precision'?); there is "),
        ([a, b, "--html", str(folder)], f"--html {folder}: there is no such folder"),
        ([a, b, "--html", str(tmp_path)], f"--html {tmp_path}: is a directory"),
        ([a, b, "--plots", str(gone)], f"--plots {gone}: there is no such folder"),
        ([without], f"{without}: rows.0: one of max_concurrency and request_rate must be set, not both"),
    ):
        assert user_error(main, arguments).startswith(line), arguments


@pytest.mark.slow
def test_exit_codes(files: Files) -> None:
    a, b, c = files(serve(), serve(run(NPU)), serve(model(precision="fp8")))
    for arguments, code in (([a, b], 0), ([a, c], 1), ([a, c, "--across", "precision"], 0), ([a, "gone"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "perf", "compare", *arguments], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert (done.stderr == "") == (code < 2)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"step_seconds": [0.1, 0.0]}, "rows.0: step_seconds must be above 0"),
        ({"step_seconds": []}, "rows.0: step_seconds must be above 0"),
        ({"batch": 0}, "rows.0: batch must be at least 1"),
    ],
)
def test_rows_that_cannot_be_are_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    result = decode({("lean", 1): [0.1, 0.2], ("lean", 8): [0.3, 0.2]})
    write(tmp_path / "a.json", replace(result, rows=[replace(result.rows[0], **changed), *result.rows[1:]]))
    assert said in user_error(read_systems, tmp_path / "a.json")


def test_a_row_that_stands_twice_is_refused(tmp_path: Path) -> None:
    result = decode({("lean", 1): [0.1, 0.2], ("lean", 8): [0.3, 0.2]})
    write(tmp_path / "a.json", replace(result, rows=[*result.rows, result.rows[0]]))
    assert "stand there twice" in user_error(read_systems, tmp_path / "a.json")


def test_a_run_with_failed_requests_is_refused(tmp_path: Path) -> None:
    result = serve()
    broken = replace(result.rows[0], result=result.rows[0].result | {"failed": 5})
    write(tmp_path / "a.json", replace(result, rows=[broken, *result.rows[1:]]))
    assert "rows.0: 5 requests failed" in user_error(read_systems, tmp_path / "a.json")
