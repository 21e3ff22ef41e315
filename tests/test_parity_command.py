"""`perf parity` as a user runs it: three verbs, the workers, the files that travel, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perf import parity
from perf.parity.side import read_info, write_side
from tests.test_parity import SHAPE
from tests.tiny import checkpoint, edit_config, read_tensors, user_error, write_tensors

pytestmark = pytest.mark.beside


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "perf", "parity", *map(str, arguments)]
    # Threads that wait for one another make small models many times slower on a busy machine.
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ)


def refusal(*arguments: object) -> str:
    return user_error(parity.main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parity")
    return {dtype: checkpoint(folder / dtype, dtype=dtype, **SHAPE) for dtype in ("fp32", "bf16")}


@pytest.fixture(scope="module")
def recorded(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Side a, as the first of two sites keeps it: fp32, small, with one decode step."""
    file = tmp_path_factory.mktemp("site 1") / "a.safetensors"
    options = ("--rows", 1, "--prompt-length", 16, "--decode", 1)
    done = run("record", "cpu", file, "--model", paths["fp32"], "--json", *options)
    assert done.returncode == 0, done.stderr
    assert "PASS" not in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["side"]["dtype"] == "fp32"
    return file


@pytest.mark.slow
def test_a_recorded_side_is_private_and_says_what_made_it(recorded: Path) -> None:
    assert stat.S_IMODE(recorded.stat().st_mode) == 0o640
    assert list(recorded.parent.iterdir()) == [recorded]
    info = read_info(recorded)
    assert (info.side, info.dtype, info.quantise, info.emulated, info.torch_npu) == ("cpu", "fp32", None, False, None)
    assert info.torch == torch.__version__
    assert info.batches == [[1, 16, 0], [1, 16, 5]]


@pytest.mark.slow
def test_one_weight_made_larger_at_the_second_site_fails(
    recorded: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    tensors = read_tensors(paths["fp32"])
    name = "model.layers.2.attention.dense.weight"
    tensors[name] = tensors[name] * 1.01
    other = write_tensors(Path(shutil.copytree(paths["fp32"], tmp_path / "other")), tensors)
    bad = run("check", recorded, "cpu", "--model", other, "--json")
    assert bad.returncode == 1, bad.stderr
    document = json.loads(bad.stdout.splitlines()[-1])
    assert document["verdict"] == "FAIL"
    assert document["reasons"][0].startswith("layer 2: attention")
    assert "FAIL: layer 2: attention" in bad.stdout


@pytest.mark.slow
def test_two_recorded_sides_are_compared_where_no_model_is(
    recorded: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    b = tmp_path / "b.safetensors"
    done = run("record", "cpu", b, "--model", paths["fp32"], "--like", recorded)
    assert done.returncode == 0, done.stderr
    good = run("check", recorded, b, "--layers", "--json")
    assert good.returncode == 0, good.stderr
    assert "\nPASS: " in good.stdout
    assert good.stdout.split("\n\n")[1].count("\nlayer ") == 3
    assert json.loads(good.stdout.splitlines()[-1])["verdict"] == "PASS"
    alone = run("record", "cpu", tmp_path / "c.safetensors", "--model", paths["fp32"], "--seed", 1)
    assert alone.returncode == 0, alone.stderr
    assert "different tokens" in refusal("check", recorded, tmp_path / "c.safetensors")
    assert "would be overwritten" in refusal("record", "cpu", b, "--model", paths["fp32"], "--like", b)


@pytest.mark.slow
def test_sides_of_different_computations_are_refused(recorded: Path, paths: dict[str, Path], tmp_path: Path) -> None:
    other = edit_config(Path(shutil.copytree(paths["fp32"], tmp_path / "other")), rope_theta=10000.0)
    assert "its config.json is not the one" in refusal("check", recorded, "cpu", "--model", other)
    settled = refusal("record", "cpu", tmp_path / "b", "--model", paths["fp32"], "--like", recorded, "--seed", 1)
    assert f"--seed: {recorded} has settled it" in settled
    tensors, info = load_file(recorded), read_info(recorded)
    for changed, words in (
        ({"config_sha256": "0"}, "different config"),
        ({"tokens_sha256": "0"}, "different tokens"),
        ({"dtype": "bf16"}, "different dtype"),
        ({"quantise": "w8a8"}, "different quantise"),
        ({"like_sha256": "0"}, "not computed on the streams of this side a"),
    ):
        write_side(tmp_path / "b.safetensors", tensors, dataclasses.replace(info, **changed))  # type: ignore[arg-type]
        assert words in refusal("check", recorded, tmp_path / "b.safetensors")


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_no_side_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    assert "not a side of this version's" in refusal("check", tmp_path / "a.safetensors", "cpu")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["liv", "cpu", "cpu"], "did you mean 'live'?"),
        (["--a", "cpu", "--b", "cpu"], "unknown verb '--a'"),
        (["live", "cpu", "npu-emulatd", "--model", "DIR"], "did you mean 'npu-emulated'?"),
        (["live", "cpu", "cpu"], "required: --model"),
        (["live", "cpu"], "required: b, --model"),
        (["live", "cpu", "cpu", "--model", "DIR", "--quantize", "w8a8"], "did you mean '--quantise'?"),
        (["live", "cpu", "cpu", "--model", "DIR"], "no such model directory"),
        (["live", "cpu", "cpu", "--model", "DIR", "--prompt-length", "3"], "at least 16"),
        (["live", "cpu", "cpu", "--model", "DIR", "--html", "/no/such/page.html"], "there is no such folder"),
        (["record", "cpu", "/no/such/a.safetensors", "--model", "DIR"], "there is no such folder"),
        (["check", "no.safetensors", "cpu", "--model", "DIR"], "no.safetensors: no such file"),
        (["check", "no.safetensors", "cpu", "--seed", "1"], "unknown argument '--seed'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_computed(arguments: list[str], words: str) -> None:
    assert words in refusal(*arguments)


@pytest.mark.slow
def test_a_worker_that_refuses_is_quoted_in_one_line(paths: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(paths["fp32"], tmp_path / "other"))
    tensors = read_tensors(other)
    del tensors["model.norm.weight"]
    write_tensors(other, tensors)
    done = run("live", "cpu", "cpu", "--model", other)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "model.norm.weight is missing" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("fp32",), ("bf16",), ("bf16", "--quantise", "w8a8"), ("bf16", "--quantise", "w4a16")]
)
def test_an_emulated_card_computes_what_the_cpu_does(paths: dict[str, Path], options: tuple[str, ...]) -> None:
    done = run("live", "cpu", "npu-emulated", "--model", paths[options[0]], "--rows", 2, "--json", *options[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["b"]["emulated"] is True
    assert document["b"]["torch_npu"]
    assert "EMULATED: no card took part" in done.stdout


@pytest.mark.slow
def test_within_the_emulator_no_card_is_taken_for_a_real_one(paths: dict[str, Path]) -> None:
    emulator = [sys.executable, "-m", "ascend.emulator", "--", sys.executable, "-m", "perf", "parity"]
    command = [*emulator, "live", "cpu", "npu", "--model", str(paths["bf16"]), "--rows", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert (document["b"]["side"], document["b"]["emulated"]) == ("npu-emulated", True)
    assert (document["a"]["side"], document["a"]["emulated"]) == ("cpu", False)
