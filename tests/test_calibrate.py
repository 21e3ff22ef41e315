"""Calibration: the model stays what it is, rounding hurts it less on texts it was not made from, and rules are kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

import ascend
from ascend.checkpoint import open_checkpoint
from ascend.config import BailingMoeV2Config
from ascend.model import BailingMoeV2ForCausalLM
from ascend.stored import stored_weights
from convert.calibrate import MIN_TOKENS, calibrate
from convert.calibration_forward import Observer, Threads, hidden_states
from convert.calibration_report import CalibrationReport
from convert.calibration_search import MOST_DOUBLINGS, Weighted, candidates, cross_validated
from convert.check import compare_logits
from convert.demo import write_demo
from convert.engine import Job, Steps, convert, prepare
from convert.plan import Request, plan
from convert.scaling import Scales
from convert.texts import MOST_BYTES, read_texts
from ops import quantise
from tests import tiny
from tests.quantised import quantised_checkpoint

SHAPE = {"moe_intermediate_size": 32}  # a width that int4 takes
LAYERS = (1, 2)  # of `tiny.SHAPE` with experts; 3 is an MTP layer


def texts(seed: int, count: int, length: int = 40, vocabulary: int = tiny.SHAPE["vocab_size"]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for _ in range(count)]


def calibrated(path: Path, file: Path, ids: Sequence[list[int]], **request: Any) -> CalibrationReport:
    checkpoint = open_checkpoint(path)
    return calibrate(checkpoint, ids, plan(checkpoint, Request("w4a16", **request)), file)


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same heavy-tailed model in two dtypes."""
    base = tmp_path_factory.mktemp("heavy")
    return {dtype: tiny.checkpoint(base / dtype, dtype, weights="heavy", **SHAPE) for dtype in ("fp32", "bf16")}


@pytest.fixture(scope="module")
def factors(heavy: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CalibrationReport]:
    """Factors for the fp32 model."""
    file = tmp_path_factory.mktemp("factors") / "scales.safetensors"
    return file, calibrated(heavy["fp32"], file, texts(1, 12))


def scaled_checkpoint(source: Path, target: Path, file: Path) -> Path:
    """``source`` with factors and without rounding, by `Scales` alone."""
    scales = Scales.load(file)
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    tensors = tiny.read_tensors(source)
    scaled = {name: scales.apply(name, one, 0, len(one)).to(one.dtype) for name, one in tensors.items()}
    assert sum(not torch.equal(scaled[name], tensors[name]) for name in tensors) > 40
    return tiny.write_tensors(target, scaled)


def routing(path: Path, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what each router said."""
    model = ascend.load_model(path)
    said: list[Tensor] = []
    for layer in LAYERS:
        gate = model.model.layers[layer].mlp.gate
        gate.register_forward_hook(lambda module, args, out: said.extend(out[:2]))
    with torch.inference_mode():
        return model(ids), said


def test_streamed_layers_give_the_models_hidden_states(heavy: dict[str, Path]) -> None:
    ids = [*texts(0, 3, 17), [5], *texts(1, 1, 60)]
    checkpoint = open_checkpoint(heavy["fp32"])
    with torch.device("meta"):
        shape = BailingMoeV2ForCausalLM(BailingMoeV2Config(**checkpoint.config))
    with Threads() as threads:
        stream = hidden_states(shape, stored_weights(checkpoint.tensors), ids, Observer[None](), threads)
        found = [(x + residual)[0] for x, residual in stream]
    model = ascend.load_model(heavy["fp32"])
    begin = 0
    for text in ids:
        wanted = model(torch.tensor([text]), output_hidden_states=True, return_dict=True).hidden_states
        ours = [state[begin : begin + len(text)] for state in found]
        ours[-1] = ours[-1] * (ours[-1].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * model.model.norm.weight
        for one, other in zip(ours, wanted[1:], strict=True):
            torch.testing.assert_close(one, other[0], rtol=1e-5, atol=1e-5)
        begin += len(text)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_factors_change_neither_routing_nor_logits(
    dtype: str, heavy: dict[str, Path], factors: tuple[Path, CalibrationReport], tmp_path: Path
) -> None:
    file, report = factors
    assert all(layer.gate_up is not None and layer.gate_up.is_scaled for layer in report.layers)
    assert all(any(found.is_scaled for found in layer.down.values()) for layer in report.layers)
    ids = torch.tensor(texts(2, 2, 50))
    before, chosen = routing(heavy[dtype], ids)
    after, chosen_after = routing(scaled_checkpoint(heavy[dtype], tmp_path / "scaled", file), ids)
    # In bf16 the experts' own weights are rounded anew, which later routers see: the first must not.
    same = len(chosen) if dtype == "fp32" else 2
    for one, other in list(zip(chosen, chosen_after, strict=True))[:same]:
        if one.dtype == torch.int64 or dtype == "bf16":
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if dtype == "fp32":
        assert float((after - before).abs().max() / before.abs().max()) < 1e-4


def test_the_inputs_factors_are_powers_of_two(factors: tuple[Path, CalibrationReport]) -> None:
    scales = Scales.load(factors[0])
    for layer in LAYERS:
        t = scales.columns[f"model.layers.{layer}.mlp.gate.weight"]
        assert set(torch.frexp(t).mantissa.tolist()) == {0.5}
        assert t.log2().abs().max() <= MOST_DOUBLINGS
        assert torch.equal(scales.rows[f"model.layers.{layer}.post_attention_layernorm.weight"], 1 / t)
        for name in ("shared_experts.gate_proj", "shared_experts.up_proj", "experts.7.gate_proj", "experts.0.up_proj"):
            assert torch.equal(scales.columns[f"model.layers.{layer}.mlp.{name}.weight"], t)
    assert not [name for name in (*scales.rows, *scales.columns) if name.startswith("model.layers.3.")]


def test_errors_are_reported_and_lower(factors: tuple[Path, CalibrationReport]) -> None:
    report = factors[1].as_json()
    assert (report["texts"], report["tokens"], report["mtp_layers_not_scaled"]) == (12, 480, [3])
    assert [layer["layer"] for layer in report["layers"]] == list(LAYERS)
    for layer in report["layers"]:
        assert layer["gate_up"]["error_after"] < 0.97 * layer["gate_up"]["error_before"]
        assert layer["down"]["error_after"] < 0.97 * layer["down"]["error_before"]
        assert 0 < layer["down"]["alpha"]["max"] <= 1
        assert sum(layer["fallen_back"].values()) <= MIN_TOKENS * 8
    assert json.loads(json.dumps(report)) == report


def test_experts_seen_too_rarely_fall_back_and_are_listed(heavy: dict[str, Path], tmp_path: Path) -> None:
    report = calibrated(heavy["fp32"], tmp_path / "scales", texts(3, 2))
    scales = Scales.load(tmp_path / "scales")
    listed = 0
    for layer in report.layers:
        assert sum(layer.tokens) == 80 * tiny.SHAPE["num_experts_per_tok"]
        assert layer.fallen_back == {i: count for i, count in enumerate(layer.tokens) if count < MIN_TOKENS}
        for expert in range(8):
            name = f"model.layers.{layer.layer}.mlp.experts.{expert}.down_proj.weight"
            scaled = expert not in layer.fallen_back and layer.down[expert].is_scaled
            assert (name in scales.columns) == scaled
        listed += len(layer.as_json()["fallen_back"])
    assert 0 < listed < 16


def test_one_token_calibrates_nothing(heavy: dict[str, Path], tmp_path: Path) -> None:
    report = calibrated(heavy["fp32"], tmp_path / "scales", [[7]])
    assert Scales.load(tmp_path / "scales") == Scales()
    assert [layer["gate_up"] for layer in report.as_json()["layers"]] == [None, None]


def test_the_same_bytes_on_any_number_of_cores(
    heavy: dict[str, Path],
    factors: tuple[Path, CalibrationReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = torch.get_num_threads()
    for cores in (1, 3):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        report = calibrated(heavy["fp32"], tmp_path / str(cores), texts(1, 12))
        assert (tmp_path / str(cores)).read_bytes() == factors[0].read_bytes()
        assert report.as_json() == factors[1].as_json()
    assert (tmp_path / "1").stat().st_mode & 0o777 == 0o640
    assert torch.get_num_threads() == threads


@pytest.mark.slow
@pytest.mark.parametrize("source", ["fp8", "w8a8"])
def test_a_quantised_source(source: str, heavy: dict[str, Path], tmp_path: Path) -> None:
    """What it finds is close to what it finds for the weights that were rounded."""
    path = quantised_checkpoint(heavy["fp32"], tmp_path / "model", source)
    wanted = calibrated(heavy["fp32"], tmp_path / "plain", texts(1, 12)).as_json()
    found = calibrated(path, tmp_path / "scales", texts(1, 12)).as_json()
    for one, other in zip(found["layers"], wanted["layers"], strict=True):
        assert one["gate_up"]["error_after"] == pytest.approx(other["gate_up"]["error_after"], rel=0.1)
        assert one["down"]["error_after"] == pytest.approx(other["down"]["error_after"], rel=0.1)


def test_layers_left_out_are_not_scaled(heavy: dict[str, Path], tmp_path: Path) -> None:
    report = calibrated(heavy["fp32"], tmp_path / "scales", texts(1, 12), ignore=("model.layers.1.*",))
    assert [layer.layer for layer in report.layers] == [2]
    scales = Scales.load(tmp_path / "scales")
    assert not [name for name in (*scales.rows, *scales.columns) if name.startswith("model.layers.1.")]


def test_a_factor_that_would_lose_bits_is_not_taken(heavy: dict[str, Path], tmp_path: Path) -> None:
    """A router with the smallest number of bf16 in it cannot be divided."""
    tiny.checkpoint(tmp_path / "model", "bf16", weights="heavy", **SHAPE)
    tensors = tiny.read_tensors(tmp_path / "model")
    tensors["model.layers.1.mlp.gate.weight"][:] = 2.0**-133
    tensors["model.layers.1.post_attention_layernorm.weight"][::3] /= 8
    tiny.write_tensors(tmp_path / "model", tensors)
    report = calibrated(tmp_path / "model", tmp_path / "scales", texts(1, 12))
    first, second = (layer.gate_up for layer in report.layers)
    assert first is not None
    assert float(first.candidate.factor_I.min()) >= 1
    assert second is not None
    assert float(second.candidate.factor_I.max()) > 1


def test_int4_experts_come_too_late(heavy: dict[str, Path], tmp_path: Path) -> None:
    path = quantised_checkpoint(heavy["fp32"], tmp_path / "model", "w4a16")
    said = tiny.user_error(calibrated, path, tmp_path / "scales", texts(1, 2))
    assert "is INT4 already, too late for --calibrate" in said
    assert not (tmp_path / "scales").exists()


def test_a_target_without_int4_is_refused(heavy: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(heavy["fp32"])
    wanted = plan(checkpoint, Request("w8a8"))
    assert "no expert is rounded" in tiny.user_error(calibrate, checkpoint, texts(1, 2), wanted, tmp_path / "scales")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 64.0, 1e20]), min_size=8, max_size=8), st.booleans())
def test_candidates_are_finite_and_in_range(moment: list[float], powers_of_two: bool) -> None:
    found = candidates(torch.tensor(moment), powers_of_two)
    assert found[0].alpha == 0
    assert torch.equal(found[0].factor_I, torch.ones(8))
    for one in found:
        assert bool(one.factor_I.isfinite().all())
        assert float(one.factor_I.log2().abs().max()) <= MOST_DOUBLINGS


def test_weighted_errors_against_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(16, 32, generator=generator), torch.randn(50, 32, generator=generator)
    inputs[:, 3] *= 20
    moment = inputs.square().sum(0)
    tried = candidates(moment)
    found = Weighted.of(weight, moment, tried, 16, torch.float32)
    for one, error in zip(tried, found.errors, strict=True):
        packed, scale = quantise.int4_weight(weight * one.factor_I, 16)
        restored = quantise.dequantised_int4(packed, scale) / one.factor_I
        wanted = float(((restored - weight).square() * moment).sum())
        assert error == pytest.approx(wanted, rel=1e-4)
    best = cross_validated(weight, inputs, 16, torch.float32)
    assert best.candidate.alpha > 0
    assert best.after < 0.8 * best.before


def test_factors_of_noise_are_not_taken_for_more_than_they_are() -> None:
    """Channels that are alike gain nothing on other texts, however they look on a few."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(32, 64, generator=generator), torch.randn(8, 16, 64, generator=generator)
    found = [cross_validated(weight, one, 64, torch.float32).candidate.alpha for one in inputs]
    fooled = []
    for one in inputs:
        moment = one.square().sum(0)
        tried = candidates(moment)
        fooled.append(Weighted.of(weight, moment, tried, 64, torch.float32).best(tried).candidate.alpha)
    assert sum(found) < 0.4 * sum(fooled)


# The whole way


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_demo(path / "heavy", weights="heavy")
    return path / "heavy"


@pytest.mark.slow
@pytest.mark.beside
def test_int4_is_nearer_to_the_source_on_other_texts(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    seen, other = texts(1, 32, 64, config["vocab_size"]), texts(2, 8, 64, config["vocab_size"])
    found = {}
    for name in (None, "calibrated"):
        job = prepare(model_dir, tmp_path / str(name), Request("w4a16", calibrated=name))

        def calibration(file: Path, job: Job = job) -> dict[str, Any]:
            return calibrate(job.checkpoint, seen, job.plan, file).as_json()

        done = convert(job, workers=1, steps=Steps(calibration if name else None))
        assert done.report is not None
        assert ("calibration" in done.report) == bool(name)
        found[name] = compare_logits(model_dir, tmp_path / str(name), other)
    assert found["calibrated"]["kl_mean"] < 0.85 * found[None]["kl_mean"]
    assert found["calibrated"]["cosine_mean"] > found[None]["cosine_mean"]


# Texts


def test_prompts_become_token_ids(model_dir: Path, tmp_path: Path) -> None:
    lines = ["Wie geht es?", "  two  spaces", "血压"]
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    wanted = [tokenizer.encode(line).ids for line in lines]
    (tmp_path / "a.txt").write_text("\ufeff" + "\r\n".join(lines) + "\n\n \n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"id": 1, "text": line}) for line in lines))
    assert read_texts(tmp_path / "a.txt", model_dir) == wanted
    assert read_texts(tmp_path / "a.jsonl", model_dir) == wanted


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "holds no prompt"),
        ("blank.txt", b" \n\n", "holds no prompt"),
        ("latin.txt", b"secret \xe4", "no text in UTF-8 (byte 7)"),
        ("long.txt", b"hi\n" + b"secret " * 5000, "line 2 has"),
        ("many.txt", b"secret secret secret secret\n" * 15000, "more than 32768 tokens"),
        ("large.txt", b"x" * (MOST_BYTES + 1), "bytes large"),
        ("broken.jsonl", b'{"text": "secret"', 'line 1 is no JSON object with a string "text"'),
        ("other.jsonl", b'{"text": "ok"}\n{"prompt": "secret"}', "line 2 is no JSON object"),
        ("number.jsonl", b'{"text": 1}', "line 1 is no JSON object"),
        ("half.jsonl", b'{"text": "secret \\ud800"}', "line 1 holds half a character"),
    ],
)
def test_what_is_no_prompt_is_refused_without_a_word_of_it(
    name: str, content: bytes, said: str, model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    error = tiny.user_error(read_texts, tmp_path / name, model_dir)
    assert said in error
    assert str(tmp_path / name) in error
    assert "secret" not in error


def test_without_file_or_tokenizer(model_dir: Path, tmp_path: Path) -> None:
    assert "cannot be read: No such file" in tiny.user_error(read_texts, tmp_path / "none.txt", model_dir)
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    assert "prompts need a tokenizer" in tiny.user_error(read_texts, tmp_path / "a.txt", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "is no tokenizer" in tiny.user_error(read_texts, tmp_path / "a.txt", tmp_path)
