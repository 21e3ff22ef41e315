"""`perf decode`: what its rows say follows from what was timed; engines, workers, mistakes; power."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ascend
from ascend.config import BailingMoeV2Config
from ascend.cost import active_parameters, decode_work, parameters
from ascend.devices.cpu import CpuDevice
from ascend.model import BailingMoeV2ForCausalLM
from ascend.model_shape import ModelShape
from ascend.precision import FP32, PRECISIONS
from ascend.weights import MLP
from perf import result
from perf.compare.systems import read_systems
from perf.decode import FEW, main
from perf.machine import describe
from perf.models import open_model
from perf.result import DecodeRow, Result
from tests import tiny
from tests.tiny import user_error

REPOSITORY = Path(__file__).parents[1]
CORES = len(os.sched_getaffinity(0))
QUICK = ["--new-tokens", "24", "--rounds", "2", "--prompt-length", "5", "--threads", "1"]


def decode(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "perf", "decode", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)


def rows_follow(made: Result, config: dict[str, Any], stored: str) -> None:
    """Recompute all that is derived in the rows of a decode result."""
    settings, rows = made.settings, made.rows
    plain = "fp32" if stored == "fp32" else "bf16"
    formats = replace(PRECISIONS[stored], plain=PRECISIONS[plain].plain, router=FP32)
    for row in rows:
        assert isinstance(row, DecodeRow)
        assert len(row.step_seconds) == len(row.read_rate) == settings.rounds
        median = statistics.median(row.step_seconds)
        assert row.tokens_per_second == pytest.approx(row.batch / median)
        assert row.context == settings.prompt_length + FEW + settings.new_tokens // 2
        assert row.bytes_per_step > 0
        shares = [row.bytes_per_step / s / rate for s, rate in zip(row.step_seconds, row.read_rate, strict=True)]
        assert row.share_of_read_rate == pytest.approx(statistics.median(shares))
        assert (row.sheet_rate, row.share_of_sheet) == (None, None), "nobody says what this processor can do"
        assert row.memory_bytes is None or row.memory_bytes > 1e6
        width = 4 if plain == "fp32" else 2
        work = decode_work(
            ModelShape.from_config(config),
            formats,
            row.batch,
            row.context,
            kv_bytes=width,
            distinct=row.distinct_experts,
        )
        assert row.bytes_per_step == pytest.approx(sum(part.nbytes for part in work.values()))
        assert row.flops_per_step == pytest.approx(sum(part.flops for part in work.values()))
        others = {(one.distinct_experts, tuple(one.read_rate)) for one in rows if one.batch == row.batch}
        assert len(others) == 1, "engines of a round share them"


@pytest.mark.slow
def test_lean_alone_with_random_weights(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    arguments = ["--model", "tiny", "--layers", "2", "--batch", "1,3", *QUICK, "--out", str(out), "--json"]
    done = decode(*arguments)
    assert done.returncode == 0, done.stderr
    assert "EMULATED" not in done.stdout
    lines = done.stdout.splitlines()
    made = result.read(out)
    assert json.loads(lines[-1]) == json.loads(out.read_text())
    run, model = made.run, made.run.model
    assert run.command == " ".join(["python -m perf decode", *arguments])
    assert (model.name, model.weights, model.precision) == ("tiny", "random", "bf16")
    assert (model.layers, model.num_hidden_layers) == (2, 4)
    assert (run.machine.device_type, run.machine.emulated, run.machine.cards) == ("cpu", False, 1)
    assert run.versions["lean"] == f"ascend {ascend.__version__}"
    assert (made.settings.rounds, made.settings.threads) == (2, 1)
    assert {(row.captured, row.random_weights) for row in made.rows} == {(False, True)}
    assert [(row.engine, row.batch) for row in made.rows] == [("lean", 1), ("lean", 3)]
    assert model.shape is not None
    rows_follow(made, model.shape | {"num_hidden_layers": 2}, "bf16")
    one, three = (row.distinct_experts for row in made.rows)
    assert one == 4, "a token takes top_k experts"
    assert three is not None
    assert 4 <= three <= 12
    assert "2 of 4 layers, random weights, bf16" in lines[0]
    table = [line.split() for line in lines if line.startswith("lean ")]
    for row, line in zip(made.rows, table, strict=True):
        median = 1e3 * statistics.median(row.step_seconds)
        assert line[:4] == ["lean", str(row.batch), f"{row.tokens_per_second:.1f}", f"{median:.2f}"]
        assert line[-3:] == ["1.00", "random", "weights"]


@pytest.mark.slow
def test_a_checkpoint_quantised_in_memory(tmp_path: Path) -> None:
    path, out = tiny.checkpoint(tmp_path / "demo", "bf16"), tmp_path / "a.json"
    done = decode("--model", str(path), "--quantise", "w8a8", "--batch", "2", *QUICK, "--out", str(out))
    assert done.returncode == 0, done.stderr
    made = result.read(out)
    assert (made.run.model.precision, made.run.model.name) == ("w8a8", "demo")
    assert made.run.model.weights not in (None, "random")
    rows_follow(made, tiny.read_config(path), "w8a8")


@pytest.mark.slow
def test_beside_its_peers(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    peers = ["transformers", "vllm"]
    arguments = ["--model", "tiny", "--engines", ",".join(["lean", *peers]), "--batch", "2", *QUICK, "--out", str(out)]
    done = decode(*arguments)
    assert done.returncode == 0, done.stderr
    made = result.read(out)
    first = made.rows[0]
    assert [row.engine for row in made.rows] == ["lean", *peers]
    assert made.run.model.shape is not None
    rows_follow(made, made.run.model.shape, "bf16")
    for row in made.rows[1:]:
        assert row.version.startswith(row.engine)
        assert made.run.versions[row.engine] == row.version
        line = next(line for line in done.stdout.splitlines() if line.startswith(row.engine)).split()
        times = zip(first.step_seconds, row.step_seconds, strict=True)
        assert line[-3] == f"{statistics.median(theirs / ours for ours, theirs in times):.2f}"


@pytest.mark.slow
def test_an_emulated_card_is_labelled(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    arguments = ["--model", "tiny", "--layers", "2", "--device", "npu-emulated", "--batch", "1", *QUICK]
    done = decode(*arguments, "--rounds", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("EMULATED CARD: every time below is this computer's, and says nothing of an Ascend")
    made = result.read(out)
    assert (made.run.machine.emulated, made.run.machine.device_type) == (True, "npu")
    assert [(row.captured, row.random_weights) for row in made.rows] == [(True, True)]


def test_mistakes_get_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "x"
    for arguments, line in (
        (
            ["--model", "tinny"],
            "--model tinny: neither a directory nor one of tiny, tiny-npu, small, ling-mini, ling-flash, de",
        ),
        (["--model", "tiny", "--drafts", "x"], "--drafts 'x' is neither auto nor a number from 0 to 15"),
        (["--model", "tiny", "--drafts", "16"], "--drafts '16' is neither auto nor a number from 0 to 15"),
        (["--model", "tiny", "--acceptance", "2"], "--acceptance is of steps with drafts: give --drafts too"),
        (
            ["--model", "tiny", "--drafts", "2", "--acceptance", "3.5"],
            "--acceptance 3.5: a step with 2 drafts keeps",
        ),
        (["--model", "tiny", "--drafts", "2", "--engines", "vllm"], "--drafts: the lean engine drafts; name it in"),
        (["--model", "tiny", "--layers", "9"], "--layers 9: tiny has 4, of which at least 2 make a dense and an MoE"),
        (["--model", "tiny", "--engines", "lean,vlm"], "--engines: unknown 'vlm' (did you mean 'vllm'?); there is "),
        (["--model", "tiny", "--engines", "lean,lean"], "--engines 'lean,lean' names one twice"),
        (["--model", "tiny", "--batch", "0"], "--batch '0' is not a list of different whole numbers from 1, such as"),
        (["--model", "tiny", "--rounds", "0"], "--prompt-length, --new-tokens, --rounds and --threads must be at l"),
        (["--model", "tiny", "--threads", "99999"], f"--threads 99999 is more than the {CORES} cores this process "),
        (["--model", "tiny", "--quantise", "w8"], "argument --quantise: invalid choice: 'w8' (choose from "),
        (["--model", "tiny", "--out", str(gone)], f"--out {gone}: there is no such folder"),
        (["--model", "tiny", "--new-token", "2"], "unknown argument '--new-token' (did you mean '--new-tokens'?); see"),
        ([], "the following arguments are required: --model; see `python -m perf decode --help`"),
        (["--model", "tiny", "--device", "gpu"], "unknown device 'gpu'"),
    ):
        assert user_error(main, arguments).startswith(line), arguments


@pytest.mark.slow
def test_an_engine_that_cannot_is_told_in_one_line() -> None:
    done = decode("--model", "tiny", "--engines", "lean,transformers", "--quantise", "w8a8", *QUICK)
    assert (done.returncode, done.stderr) == (
        2,
        "error: engine transformers: it runs unquantised only, after prompts\n",
    )
    assert done.stdout == ""


# Rounds, with engines whose times are known.

STEP, PREFILL, SET_UP, COST = 0.01, 0.5, 3.0, 1.5


class Known:
    """A worker of known times, for another batch size first sets up; ``noise``: seconds more, by (number, tokens)."""

    rates: list[float] = []  # noqa: RUF012 (of the test that runs)
    noise: dict[tuple[int, int], float] = {}  # noqa: RUF012
    interrupt_at: int | None = None

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.batch, self.reads = name, 0, iter(self.rates)

    def answer(self, **request: Any) -> dict[str, Any]:
        if not request:
            told = {"version": f"{self.name} 1", "captured": self.name == "lean" or None, "random_weights": True}
            return told | {"machine": asdict(describe(CpuDevice())), "sheet_rate": None, "draft_bytes": 10**6}
        if "read" in request:
            return {"read_rate": next(self.reads, 2e10), "matmul_rate": 1e11}
        if "kernels" in request:
            return {"kernels_per_layer": 7.5}
        if "distinct_experts" in request:
            return {"distinct_experts": 9.0 if request.get("drafts") else 4.0}
        if request["seed"] == self.interrupt_at:
            raise KeyboardInterrupt
        set_up = SET_UP if request["batch"] != self.batch else 0.0
        self.batch, tokens = request["batch"], request["new_tokens"]
        extra = self.noise.get((request["seed"], tokens), 0.0) if self.name == "lean" else 0.0
        told = {"seconds": set_up + PREFILL + tokens * STEP + extra, "memory_bytes": 10**9}
        if request.get("drafts"):
            told["seconds"] += tokens * (COST - 1) * STEP
            told |= {"drafts": 3, "tokens_per_step": 2.5}
        return told

    def stop(self) -> None:
        pass


KNOWN = ["--model", "tiny", "--engines", "lean,transformers", "--batch", "1,3", "--new-tokens", "24", "--rounds", "3"]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> type[Known]:
    monkeypatch.setattr("perf.decode.Worker", Known)
    for name, value in (("rates", []), ("noise", {}), ("interrupt_at", None)):
        monkeypatch.setattr(Known, name, value)
    return Known


@pytest.mark.slow
def test_what_an_engine_sets_up_is_no_part_of_a_step(known: type[Known], tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    assert main([*KNOWN, "--out", str(out)]) == 0
    rows = result.read(out).rows
    assert [(row.engine, row.batch, row.captured) for row in rows] == [
        ("lean", 1, True), ("transformers", 1, None), ("lean", 3, True), ("transformers", 3, None)
    ]  # fmt: skip
    for row in rows:
        assert row.step_seconds == pytest.approx([STEP] * 3)
        assert (row.distinct_experts, row.random_weights, row.memory_bytes) == (4.0, True, 10**9)


def test_steps_with_drafts_beside_plain_ones(
    known: type[Known], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    arguments = ["--model", "tiny", "--batch", "2", "--new-tokens", "24", "--rounds", "2", "--prompt-length", "2000"]
    assert main([*arguments, "--drafts", "3", "--acceptance", "2.5", "--out", str(out)]) == 0
    made = result.read(out)
    assert (made.settings.drafts, made.settings.acceptance, made.settings.kv) == ("3", 2.5, None)
    plain, drafted = made.rows
    assert (plain.engine, plain.drafts, plain.tokens_per_step, plain.kernels_per_layer) == ("lean", 0, 1.0, 7.5)
    assert (drafted.engine, drafted.drafts, drafted.tokens_per_step) == ("speculative", 3, 2.5)
    assert drafted.step_seconds == pytest.approx([COST * STEP] * 2)
    assert drafted.tokens_per_second == pytest.approx(2 * 2.5 / (COST * STEP))
    assert (plain.distinct_experts, drafted.distinct_experts) == (4.0, 9.0)
    assert drafted.context == 2000 + int(2.5 * (FEW + 12))
    shape = ModelShape.from_config(made.run.model.shape or {})
    stored = replace(PRECISIONS["bf16"], router=FP32)
    work = decode_work(shape, stored, 2, drafted.context, drafts=3, distinct=9.0).values()
    assert drafted.bytes_per_step == pytest.approx(sum(part.nbytes for part in work) + 3 * 10**6)
    # Prefill: what is left of the shorter generation when its steps are taken away; by hand.
    assert plain.prefill_seconds == pytest.approx([PREFILL + STEP] * 2)
    assert (drafted.prefill_seconds, drafted.share_of_matmul_rate) == ([], None)
    scores = 4 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * 1000
    flops = 2 * (2000 * (2 * active_parameters(shape) + scores) + 2 * shape.vocab_size * shape.hidden_size)
    assert plain.prefill_flops == pytest.approx(flops)
    assert plain.share_of_matmul_rate == pytest.approx(flops / (PREFILL + STEP) / 1e11)
    text = capsys.readouterr().out
    assert "batch 2: 3 drafts, 2.50 tokens a step (forced): a step costs 1.50 plain ones, 1.67 times the plain" in text
    assert "batch 2: 7.50 kernels and copies a layer" in text
    assert f"prefill of 2000 at {2 * 2000 / (PREFILL + STEP):.0f} tokens/s" in text
    assert next(line for line in text.splitlines() if line.startswith("speculative")).split()[-3] == "0.60"
    # `perf compare` counts tokens, not steps.
    (point,) = read_systems(out)[1].points
    assert point.samples["output_throughput"] == pytest.approx([drafted.tokens_per_second] * 2)
    assert point.samples["median_tpot_ms"] == pytest.approx([1e3 * COST * STEP / 2.5] * 2)


def test_a_filled_cache_has_no_prefill(known: type[Known], tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    assert (
        main([*KNOWN, "--engines", "lean", "--prompt-length", "5000", "--fill", "--kv", "fp8", "--out", str(out)]) == 0
    )
    made = result.read(out)
    assert (made.settings.filled, made.settings.kv, made.settings.drafts) == (True, "fp8", None)
    shape = ModelShape.from_config(made.run.model.shape or {})
    for row in made.rows:
        assert (row.prefill_seconds, row.prefill_flops) == ([], None)
        stored = replace(PRECISIONS["bf16"], router=FP32)
        work = decode_work(shape, stored, row.batch, row.context, kv_bytes=1, distinct=4.0).values()
        assert row.bytes_per_step == pytest.approx(sum(part.nbytes for part in work))


def test_a_model_too_large_is_refused_before_it_starts() -> None:
    free = CpuDevice().memory().free / 1e9
    # 32 rows of 32 + 8 + 64 tokens; bf16, the router in fp32.
    for model, needed in (("dense-36b", 72.3 + 0.9), ("ling-flash", 205.9 + 0.2)):
        head, _, rest = user_error(main, ["--model", model]).partition(" GB for weights and cache, cpu has ")
        assert head.startswith("lean need ")
        assert float(head.split()[-1]) == pytest.approx(needed, rel=2e-3)
        assert float(rest.split()[0]) == pytest.approx(free, abs=4)
        assert rest.endswith("give fewer --layers, another --quantise, a smaller --batch, or fewer engines")
    line = user_error(main, ["--model", "ling-flash", "--engines", "lean,transformers", "--drafts", "3"])
    assert line.startswith("lean, transformers need 41")
    # FP8, and while it is quantised a layer that is not yet: 256 experts of 25 MB.
    line = user_error(main, ["--model", "ling-flash", "--quantise", "fp8", "--batch", "1"])
    assert float(line.split()[2]) == pytest.approx(104.2 + 6.44, rel=3e-3)


@pytest.mark.slow
def test_a_round_that_says_nothing_is_left_out_for_all(
    known: type[Known], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    known.noise = {(2, FEW): 9.0}
    assert main([*KNOWN, "--out", str(out)]) == 0
    assert "batch 3: 1 of 3 rounds left out: more tokens took an engine no more time\n" in capsys.readouterr().err
    for row in result.read(out).rows:
        assert len(row.step_seconds) == len(row.read_rate) == 2
    known.noise[3, FEW] = 9.0
    line = "batch 1: 24 more tokens took no more time in 2 of 3 rounds; give --new-tokens more"
    assert user_error(main, KNOWN) == line
    known.noise = {(1, FEW): 9.0}
    line = "batch 1: 24 more tokens took no more time in 1 of 1 rounds; give --new-tokens more"
    assert user_error(main, [*KNOWN, "--rounds", "1"]) == line


def test_whole_rounds_outlive_an_interrupt(
    known: type[Known], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    known.interrupt_at = 2
    assert main([*KNOWN, "--out", str(out)]) == 130
    assert capsys.readouterr().err.endswith("interrupted: 1 of 3 rounds are whole and reported\n")
    assert [len(row.step_seconds) for row in result.read(out).rows] == [1] * 4
    out.unlink()
    known.interrupt_at = 1
    with pytest.raises(KeyboardInterrupt):
        main([*KNOWN, "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize(("last", "said"), [(2.2e10, False), (2.8e10, True)])
def test_a_read_rate_is_taken_before_and_after(
    last: float, said: bool, known: type[Known], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    # The warm-up's and then two rounds', each before and after.
    known.rates = [9e10, 9e10, 1.8e10, 2.2e10, 2e10, last]
    assert main([*KNOWN, "--batch", "1", "--rounds", "2", "--out", str(out)]) == 0
    for row in result.read(out).rows:
        assert row.read_rate == [2e10, (2e10 + last) / 2]
    text = capsys.readouterr().out
    assert ("NOT STEADY: the read rate moved by 20% between rounds" in text) == said
    assert [line.endswith("  random weights") for line in text.splitlines() if line.startswith("lean ")] == [True]


def test_a_dense_model_of_the_same_engine(tmp_path: Path) -> None:
    _, config, model = open_model("dense-36b", 3, "fp8", tmp_path)
    assert (model.name, model.layers, model.num_hidden_layers) == ("dense-36b", 3, 64)
    with torch.device("meta"):
        made = BailingMoeV2ForCausalLM(BailingMoeV2Config(**config))
    assert all(isinstance(layer.mlp, MLP) for layer in made.model.layers)
    whole = open_model("dense-36b", None, "fp8", tmp_path)[1]
    assert parameters(ModelShape.from_config(whole)).total == pytest.approx(36.15e9, rel=1e-3)
    assert made.model.rope.rotary_dim == 128, "its whole heads are rotated"
    line = user_error(open_model, "dense-36b", 65, "fp8", tmp_path)
    assert line == "--layers 65: dense-36b has 64, of which at least 1 are needed"
