"""`perf parity`: what is right passes, on any batch and any kernels; each kind of mistake fails with its cause."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import ascend
from ascend.model import BailingMoeV2ForCausalLM
from ops import cpu, reference
from perf import parity
from perf.judge import LIMITS, Verdict, judge
from perf.parity_numbers import compare, follows
from perf.parity_prompts import Batch, random_batches, restored_batches
from perf.parity_side import read_info, write_side
from perf.parity_trace import trace
from tests.tiny import checkpoint, edit_config, read_tensors, user_error, write_tensors

# What the kernels of an NPU take: heads of 64, expert widths in blocks of 64.
SHAPE = {"head_dim": 64, "hidden_size": 128, "moe_intermediate_size": 64}


# Near-ties


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int, int]:
    """Biased scores, what the reference chooses of them, groups, kept groups, experts per token."""
    n_group = draw(st.sampled_from((1, 2, 4, 8)))
    topk_group = draw(st.integers(1, n_group))
    experts = n_group * draw(st.integers(2, 4))
    top_k = draw(st.integers(1, topk_group * experts // n_group))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    logit, bias = torch.randn(16, experts, generator=generator), torch.randn(experts, generator=generator)
    _, chosen = reference.moe_gate(logit, torch.eye(experts), bias, top_k, n_group, topk_group, True, 1.0)
    return torch.sigmoid(logit) + bias, chosen, n_group, topk_group, top_k


@settings(deadline=None)
@given(routings(), st.floats(0, 0.1), st.integers(0, 2**20))
def test_a_router_follows_its_scores_and_near_ones(
    routing: tuple[Tensor, Tensor, int, int, int], tolerance: float, seed: int
) -> None:
    score, chosen, n_group, topk_group, _ = routing
    assert follows(score, chosen, n_group, topk_group, 1e-6).all()
    noise = (2 * torch.rand(score.shape, generator=torch.Generator().manual_seed(seed)) - 1) * tolerance
    assert follows(score + noise, chosen, n_group, topk_group, tolerance + 1e-6).all()


@settings(deadline=None)
@given(routings())
def test_a_clearly_worse_expert_is_no_near_tie(routing: tuple[Tensor, Tensor, int, int, int]) -> None:
    score, chosen, n_group, topk_group, top_k = routing
    if top_k == score.shape[1]:
        return
    left_out = torch.ones_like(score).scatter_(1, chosen, 0).argmax(-1)
    worse = chosen.clone()
    worse[:, 0] = left_out
    lowered = score.scatter(1, left_out[:, None], -9.0)
    assert not follows(lowered, worse, n_group, topk_group, 0.1).any()
    assert not follows(torch.full_like(score, torch.nan), chosen, n_group, topk_group, 0.1).any()


# Real models, in this process


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parity")
    return {dtype: checkpoint(folder / dtype, dtype=dtype, **SHAPE) for dtype in ("fp32", "bf16")}


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return random_batches(300, 2, 48, 0)


@pytest.fixture(scope="module")
def trusted(paths: dict[str, Path], batches: list[Batch]) -> dict[str, dict[str, Tensor]]:
    return {dtype: trace(ascend.load_model(path), batches, 2) for dtype, path in paths.items()}


def verdict_of(a: dict[str, Tensor], model: BailingMoeV2ForCausalLM, batches: list[Batch], precision: str) -> Verdict:
    limits = LIMITS[precision]
    b = trace(model, batches, 2, a)
    return judge(compare(a, b, limits, model.config.n_group, model.config.topk_group), limits)


def rows_alone(batches: list[Batch]) -> list[Batch]:
    return [
        Batch(batch.ids_BT[row : row + 1], batch.start_B[row : row + 1])
        for batch in batches
        for row in range(len(batch.ids_BT))
    ]


def all_in_one(batches: list[Batch]) -> list[Batch]:
    return [Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in ("ids_BT", "start_B")))]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batched", [list, rows_alone, all_in_one])
def test_the_same_model_passes_however_its_rows_are_batched(
    paths: dict[str, Path],
    trusted: dict[str, dict[str, Tensor]],
    batches: list[Batch],
    precision: str,
    batched: Callable[[list[Batch]], list[Batch]],
) -> None:
    verdict = verdict_of(trusted[precision], ascend.load_model(paths[precision]), batched(batches), precision)
    assert verdict == Verdict()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "w8a8", "w4a16"])
def test_other_kernels_pass(
    paths: dict[str, Path], batches: list[Batch], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantise = precision if precision.startswith("w") else None
    model = ascend.load_model(paths["fp32" if precision == "fp32" else "bf16"], quantise=quantise)
    a = trace(model, batches, 2)
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setitem(cpu._table, dtype, None)
    b = trace(model, batches, 2, a)
    assert not torch.equal(a["logits"], b["logits"]), "the reference ran in place of the kernels"
    limits = LIMITS[precision]
    assert judge(compare(a, b, limits, model.config.n_group, model.config.topk_group), limits) == Verdict()


def scale(name: str, factor: float) -> Callable[[BailingMoeV2ForCausalLM], None]:
    def change(model: BailingMoeV2ForCausalLM) -> None:
        model.get_parameter(name).data.mul_(factor)

    return change


def permute_experts(model: BailingMoeV2ForCausalLM) -> None:
    experts: Any = model.model.layers[1].mlp.experts
    experts.down.data = experts.down.data.roll(1, 0)


def forget_the_bias(model: BailingMoeV2ForCausalLM) -> None:
    gate: Any = model.model.layers[1].mlp.gate
    options = (gate.top_k, gate.n_group, gate.topk_group, gate.normalise, gate.scaling)
    gate.forward = lambda x_TH: reference.moe_gate(x_TH, gate.weight, None, *options)


def ignore_padding(model: BailingMoeV2ForCausalLM) -> None:
    make = model.model.step
    model.model.step = lambda position, start, *rest: make(position, torch.zeros_like(start), *rest)  # type: ignore[method-assign]


def skip_a_layer_in_the_chain(model: BailingMoeV2ForCausalLM) -> None:
    forward = model.model.forward

    def changed(embedding: Tensor, step: Any, taps: list[Tensor] | None = None) -> Tensor:
        return forward(embedding, step, taps) * 1.5

    model.model.forward = changed  # type: ignore[method-assign]


BROKEN: dict[str, tuple[Callable[[BailingMoeV2ForCausalLM], None], str, str]] = {
    "one projection 1 % larger": (
        scale("model.layers.2.attention.dense.weight", 1.01),
        "layer 2: attention",
        "attention",
    ),
    "the experts 1 % smaller": (scale("model.layers.1.mlp.experts.down", 0.99), "layer 1: MLP", "experts"),
    "the dense MLP 1 % larger": (scale("model.layers.0.mlp.down", 1.01), "layer 0: MLP", "MLP"),
    "experts permuted": (permute_experts, "layer 1: MLP", "experts"),
    "the router's weight 5 % larger": (
        scale("model.layers.2.mlp.gate.weight", 1.05),
        "layer 2: router ",
        "router",
    ),
    "the router's bias forgotten": (forget_the_bias, "layer 1: misrouted", "how the router chooses"),
    "the final norm 5 % larger in part": (
        lambda model: model.model.norm.weight.data[:8].mul_(1.5),  # type: ignore[func-returns-value]
        "head: ",
        "final norm",
    ),
    "one embedding": (lambda model: model.model.word_embeddings.weight.data.mul_(1.01), "embedding", "embedding"),
    "padding seen": (ignore_padding, "layer 0: attention", "attention"),
    "the draft's projection": (scale("model.layers.3.eh_proj.weight", 1.05), "MTP 0", ""),
    "only the whole pass": (skip_a_layer_in_the_chain, "whole pass", "only the whole pass"),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_model_fails_and_the_verdict_says_where(
    paths: dict[str, Path], trusted: dict[str, dict[str, Tensor]], batches: list[Batch], what: str, precision: str
) -> None:
    change, place, cause = BROKEN[what]
    model = ascend.load_model(paths[precision])
    with torch.no_grad():
        change(model)
    verdict = verdict_of(trusted[precision], model, batches, precision)
    assert not verdict.passed
    assert verdict.reasons[0].startswith(place), verdict.reasons
    assert cause in str(verdict.cause)


@pytest.mark.parametrize("name", ["attention.dense.weight", "attention.query_key_value.weight", "mlp.experts.down"])
def test_in_fp32_one_element_of_a_matrix_is_enough(
    paths: dict[str, Path], trusted: dict[str, dict[str, Tensor]], batches: list[Batch], name: str
) -> None:
    model = ascend.load_model(paths["fp32"])
    weight = model.get_parameter(f"model.layers.1.{name}").data.flatten()
    largest = weight[-weight.numel() // 4 :].abs().argmax() - weight.numel() // 4  # among the values, not the queries
    weight[largest] *= 1.01
    verdict = verdict_of(trusted["fp32"], model, batches, "fp32")
    assert verdict.reasons[0].startswith("layer 1: MLP" if "experts" in name else "layer 1: attention"), verdict.reasons


def test_what_comes_after_a_flip_in_its_row_is_not_counted_as_before_it(
    trusted: dict[str, dict[str, Tensor]],
) -> None:
    a = trusted["bf16"]
    b = {name: tensor.clone() for name, tensor in a.items()}
    b["experts"][48 + 10, 1, 0] += 100  # row 1 of 48 tokens, position 10
    b["decode.experts"][0, 1, 0, 0] += 100  # row 0, the second of two steps
    b["prefill.experts"][-1, 0, 0] += 100  # the padded row
    numbers = compare(a, b, LIMITS["bf16"], 4, 2)
    assert (numbers.whole.positions, numbers.whole_clean.positions) == (128, 128 - 38)
    assert (numbers.decode.positions, numbers.decode_clean.positions) == (9, 2 + 3)
    assert sum(layer.flips for layer in numbers.layers) == 0


def test_a_flip_at_a_near_tie_is_counted_and_one_without_is_unexplained(trusted: dict[str, dict[str, Tensor]]) -> None:
    a = {name: tensor.clone() for name, tensor in trusted["bf16"].items()}
    scores, chosen = a["layer.1.scores"], a["layer.1.experts"]
    score_E = torch.tensor([0.9, 0.8, 0.505, 0.5, 0.1, 0.1, 0.1, 0.1])  # groups of two: the first two are kept
    scores[:], chosen[:] = score_E, torch.tensor([0, 1, 2])
    b = {name: tensor.clone() for name, tensor in a.items()}
    b["layer.1.scores"][5, 3], b["layer.1.experts"][5] = 0.51, torch.tensor([0, 1, 3])
    near = compare(a, b, LIMITS["bf16"], 4, 2).layers[1]
    assert (near.flips, near.unexplained, near.misrouted) == (1, 0, 0)
    b["layer.1.experts"][6] = torch.tensor([0, 2, 3])
    far = compare(a, b, LIMITS["bf16"], 4, 2).layers[1]
    assert (far.flips, far.unexplained, far.misrouted) == (2, 1, 1)


@pytest.mark.parametrize(
    ("changed", "place", "cause"),
    [
        ({"rope_theta": 10000.0}, "layer 0: attention", "positions"),
        ({"partial_rotary_factor": 1.0, "rotary_dim": 64}, "layer 0: attention", "positions"),
        ({"routed_scaling_factor": 2.4}, "layer 1: routing weights", "routed_scaling_factor"),
        ({"norm_topk_prob": False}, "layer 1: routing weights", "norm_topk_prob"),
        ({"topk_group": 3}, "layer 1: ", "how the router chooses"),
        ({"rms_norm_eps": 0.1}, "layer 0: attention", "attention"),
    ],
)
def test_another_configuration_fails_and_the_verdict_names_what(
    trusted: dict[str, dict[str, Tensor]],
    paths: dict[str, Path],
    batches: list[Batch],
    tmp_path: Path,
    changed: dict[str, Any],
    place: str,
    cause: str,
) -> None:
    shutil.copytree(paths["bf16"], tmp_path / "other")
    limits = LIMITS["bf16"]
    b = trace(ascend.load_model(edit_config(tmp_path / "other", **changed)), batches, 2, trusted["bf16"])
    verdict = judge(compare(trusted["bf16"], b, limits, 4, 2), limits)  # side a says which groups there are
    assert not verdict.passed
    assert verdict.reasons[0].startswith(place), verdict.reasons
    assert cause in str(verdict.cause)


def test_the_tokens_of_a_file_make_the_same_batches(batches: list[Batch]) -> None:
    tokens = torch.cat([batch.ids_BT[batch.real] for batch in batches])
    again = restored_batches(tokens, [[2, 48, 0], [1, 48, 16]])
    for one, other in zip(batches, again, strict=True):
        assert torch.equal(one.ids_BT, other.ids_BT)
        assert torch.equal(one.start_B, other.start_B)
    assert "damaged" in user_error(restored_batches, tokens, [[2, 48, 0]])


# The command, its workers and its files


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "perf", "parity", *map(str, arguments)]
    # Threads that wait for one another make small models many times slower on a busy machine.
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ)


def refusal(*arguments: object) -> str:
    return user_error(parity.main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def saved(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Side a, as the first of two sites keeps it: fp32, small, without decode steps."""
    file = tmp_path_factory.mktemp("site 1") / "a.safetensors"
    options = ("--rows", 1, "--prompt-length", 16, "--decode", 1)
    done = run("--a", "cpu", "--model", paths["fp32"], "--save-a", file, *options)
    assert done.returncode == 0, done.stderr
    assert "PASS" not in done.stdout
    return file


@pytest.mark.slow
def test_a_saved_side_is_private_and_says_what_made_it(saved: Path) -> None:
    assert stat.S_IMODE(saved.stat().st_mode) == 0o640
    assert list(saved.parent.iterdir()) == [saved]
    info = read_info(saved)
    assert (info.side, info.dtype, info.quantise, info.emulated, info.torch_npu) == ("cpu", "fp32", None, False, None)
    assert info.torch == torch.__version__
    assert info.batches == [[1, 16, 0], [1, 16, 5]]


@pytest.mark.slow
def test_one_weight_made_larger_at_the_second_site_fails(saved: Path, paths: dict[str, Path], tmp_path: Path) -> None:
    tensors = read_tensors(paths["fp32"])
    name = "model.layers.2.attention.dense.weight"
    tensors[name] = tensors[name] * 1.01
    other = write_tensors(Path(shutil.copytree(paths["fp32"], tmp_path / "other")), tensors)
    bad = run("--a", saved, "--b", "cpu", "--model", other, "--json")
    assert bad.returncode == 1, bad.stderr
    document = json.loads(bad.stdout.splitlines()[-1])
    assert document["verdict"] == "FAIL"
    assert document["reasons"][0].startswith("layer 2: attention")
    assert "FAIL: layer 2: attention" in bad.stdout


@pytest.mark.slow
def test_two_saved_sides_are_compared_where_no_model_is(saved: Path, paths: dict[str, Path], tmp_path: Path) -> None:
    b = tmp_path / "b.safetensors"
    good = run("--a", saved, "--b", "cpu", "--model", paths["fp32"], "--save-b", b, "--layers")
    assert good.returncode == 0, good.stderr
    assert "\nPASS: " in good.stdout
    assert good.stdout.count("\nlayer ") == 4  # three of them and the head of the table
    again = run("--a", saved, "--b", b, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["verdict"] == "PASS"


@pytest.mark.slow
def test_sides_of_different_computations_are_refused(saved: Path, paths: dict[str, Path], tmp_path: Path) -> None:
    other = edit_config(Path(shutil.copytree(paths["fp32"], tmp_path / "other")), rope_theta=10000.0)
    assert "its config.json is not the one" in refusal("--a", saved, "--b", "cpu", "--model", other)
    assert "--seed: the file of side a has settled it" in refusal("--a", saved, "--b", saved, "--seed", 1)
    tensors, info = load_file(saved), read_info(saved)
    for changed, words in (
        ({"config_sha256": "0"}, "different config"),
        ({"tokens_sha256": "0"}, "different tokens"),
        ({"dtype": "bf16"}, "different dtype"),
        ({"quantise": "w8a8"}, "different quantise"),
        ({"like_sha256": "0"}, "not computed on the streams of this side a"),
    ):
        write_side(tmp_path / "b.safetensors", tensors, dataclasses.replace(info, **changed))  # type: ignore[arg-type]
        assert words in refusal("--a", saved, "--b", tmp_path / "b.safetensors")


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_no_side_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    assert "not a side of this version's" in refusal(
        "--a", tmp_path / "a.safetensors", "--b", tmp_path / "a.safetensors"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--a", "cpu", "--b", "npu-emulatd"], "did you mean 'npu-emulated'?"),
        (["--a", "cpu", "--b", "cpu"], "--model is missing"),
        (["--a", "cpu"], "--b is missing"),
        (["--a", "cpu", "--b", "cpu", "--model", "DIR", "--quantize", "w8a8"], "did you mean '--quantise'?"),
        (["--a", "cpu", "--b", "cpu", "--model", "DIR"], "no such model directory"),
        (["--a", "cpu", "--b", "cpu", "--model", "DIR", "--prompt-length", "3"], "at least 16"),
        (["--a", "cpu", "--b", "cpu", "--save-a", "/no/such/a.safetensors"], "there is no such folder"),
        (["--a", "cpu", "--save-a", "a", "--save-b", "b"], "--save-b: that side is not computed here"),
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
    done = run("--a", "cpu", "--b", "cpu", "--model", other)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "model.norm.weight is missing" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("fp32",), ("bf16",), ("bf16", "--quantise", "w8a8"), ("bf16", "--quantise", "w4a16")]
)
def test_an_emulated_card_computes_what_the_cpu_does(paths: dict[str, Path], options: tuple[str, ...]) -> None:
    done = run("--a", "cpu", "--b", "npu-emulated", "--model", paths[options[0]], "--json", *options[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["b"]["emulated"] is True
    assert document["b"]["torch_npu"]
    assert "EMULATED: no card took part" in done.stdout


@pytest.mark.slow
def test_within_the_emulator_no_card_is_taken_for_a_real_one(paths: dict[str, Path]) -> None:
    emulator = [sys.executable, "-m", "ascend.emulator", "--", sys.executable, "-m", "perf", "parity"]
    command = [*emulator, "--a", "cpu", "--b", "npu", "--model", str(paths["bf16"]), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert (document["b"]["side"], document["b"]["emulated"]) == ("npu-emulated", True)
    assert (document["a"]["side"], document["a"]["emulated"]) == ("cpu", False)
