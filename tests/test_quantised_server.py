"""Quantised checkpoints on the real vLLM CPU engine, which has no kernels for them: `serve.plugin.widened`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ascend
from ascend.cost import parameters
from ascend.errors import UserError
from convert.demo import write_demo
from convert.engine import convert, prepare
from convert.plan import Request
from ops import quantise
from serve.planning.cpu import engine_bytes
from serve.planning.model import model_in
from serve.plugin.widening import widened
from tests.launcher import ROOT, Launched
from tests.quantised import quantised_checkpoint
from tests.tiny import checkpoint as small_checkpoint
from tests.tiny import edit_config, read_config, read_tensors, write_tensors

TOLERANCE = 1e-3  # on fp32 logprobs of the same weights, as for whole ones in test_vllm_parity.py; 1e-5 is seen
FORMATS = ("fp8", "fp8-channel", "w8a8", "modelslim", "w4a16")


def write_format(plain: Path, path: Path, form: str) -> Path:
    """Write ``plain`` in a format; fp8-channel, which we only read, by hand from the fp8 one's names."""
    if form == "fp8-channel":
        quantised_checkpoint(plain, path, "fp8")
        tensors = read_tensors(path)
        for name in [name for name in tensors if name.endswith(".weight_scale_inv")]:
            module = name.removesuffix("_scale_inv")
            weight = read_tensors(plain)[module].float()
            scale = (weight.abs().amax(1, keepdim=True) / quantise.FP8_MAX).bfloat16()
            tensors |= {module: quantise.fp8_values(weight / scale.float()), f"{module}_scale": scale}
            del tensors[name]
        write_tensors(path, tensors)
        return edit_config(
            path, quantization_config={"quant_method": "compressed-tensors", "format": "float-quantized"}
        )
    return quantised_checkpoint(plain, path, "w8a8" if form == "modelslim" else form, modelslim=form == "modelslim")


def whole(parts: dict[str, Tensor]) -> Tensor:
    """The weight in fp32 that the tensors of one stand for, by `ops.quantise` and the formats' definitions alone."""
    if "weight_packed" in parts:
        return quantise.dequantised_int4(parts["weight_packed"], parts["weight_scale"].float())
    if "weight_scale_inv" in parts:
        return quantise.dequantised_fp8(parts["weight"], parts["weight_scale_inv"])
    return parts["weight"].float() * parts["weight_scale"].float()


def dequantised(path: Path, into: Path) -> Path:
    """Write the plain fp32 checkpoint that a quantised one stands for."""
    modules: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        module, _, end = name.rpartition(".")
        if end.startswith("weight_") or any(f"{module}.weight_scale{tail}" in tensors for tail in ("", "_inv")):
            modules.setdefault(module, {})[end] = tensor
        else:
            plain[name] = tensor.float()
    assert len(modules) >= 100
    into.mkdir()
    save_file(plain | {f"{name}.weight": whole(parts) for name, parts in modules.items()}, into / "model.safetensors")
    config = {key: value for key, value in read_config(path).items() if key != "quantization_config"}
    (into / "config.json").write_text(json.dumps(config))
    return into


@pytest.mark.slow
@pytest.mark.beside
def test_prompt_logprobs_are_those_of_the_rounded_weights(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    write_demo(plain)
    for form in FORMATS:
        write_format(plain, tmp_path / form, form)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 2000, (n,), generator=generator).tolist() for n in (200, 37)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    # As a module: as a file it would find tests/triton where torch looks for the real one.
    command = [sys.executable, "-m", "tests.vllm_logprobs", str(tmp_path / "prompts.json"), str(tmp_path / "out.json")]
    run = subprocess.run(
        [*command, *(str(tmp_path / form) for form in FORMATS)],
        cwd=ROOT,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    unrounded = ascend.load_model(plain, dtype=torch.float32)
    worst, moved = {}, {}
    for form, answers in zip(FORMATS, json.loads((tmp_path / "out.json").read_text()), strict=True):
        rounded = ascend.load_model(dequantised(tmp_path / form, tmp_path / f"{form}-whole"))
        theirs, ours, before = [], [], []
        for prompt, positions in zip(prompts, answers, strict=True):
            with torch.no_grad():
                ours_TV, before_TV = (one(torch.tensor([prompt]))[0].log_softmax(-1) for one in (rounded, unrounded))
            for t, logprobs in enumerate(positions[1:]):
                tokens = list(map(int, logprobs))
                theirs += logprobs.values()
                ours += ours_TV[t, tokens].tolist()
                before += before_TV[t, tokens].tolist()
        assert len(theirs) >= 235 * 5
        worst[form] = (torch.tensor(theirs) - torch.tensor(ours)).abs().max().item()
        moved[form] = (torch.tensor(theirs) - torch.tensor(before)).abs().mean().item()
    print("largest difference to the rounded weights' logprobs", worst, "mean to the unrounded ones'", moved)
    assert max(worst.values()) < TOLERANCE, worst
    assert min(moved.values()) > 100 * TOLERANCE, moved  # the rounding itself would have been seen
    assert worst["w8a8"] == pytest.approx(worst["modelslim"])


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.timeout(600)
def test_the_launcher_serves_one_and_says_what_it_does(tmp_path: Path) -> None:
    write_demo(tmp_path / "plain")
    model = tmp_path / "w8a8"
    convert(prepare(tmp_path / "plain", model, Request("w8a8")))
    launched = Launched(tmp_path, "--device", "cpu", "--model", str(model))
    try:
        base_url = launched.wait_until_ready()["base_url"]
        body = json.dumps({"model": "w8a8", "prompt": "头痛三天", "max_tokens": 8, "temperature": 0})
        request = urllib.request.Request(f"{base_url}/completions", body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            assert json.loads(response.read())["usage"]["completion_tokens"] == 8
        assert "weights stored as w8a8 are widened to 16 bits" in launched.output
    finally:
        launched.stop()


def test_a_stream_is_widened_whatever_comes_first() -> None:
    weight = torch.randn(1400, 384).bfloat16()  # more rows than are widened in one step
    int8, channel = quantise.int8_weight(weight)
    fp8, blocks = quantise.fp8_weight(weight)
    packed, groups = quantise.int4_weight(weight)
    tensors = {
        "a.weight": int8,
        "a.weight_scale": channel[:, None],
        "a.weight_offset": torch.zeros(1400, 1),
        "b.weight": fp8,
        "b.weight_scale_inv": blocks,
        "c.weight_packed": packed,
        "c.weight_scale": groups,
        "c.weight_shape": torch.tensor(weight.shape),
        "norm.weight": weight[0],
        "gate.expert_bias": weight[1].float(),
    }
    for names in (sorted(tensors), sorted(tensors, reverse=True), sorted(tensors, key=lambda name: name[::-1])):
        found = dict(widened(((name, tensors[name]) for name in names), torch.float32))
        assert sorted(found) == ["a.weight", "b.weight", "c.weight", "gate.expert_bias", "norm.weight"]
        assert found["a.weight"].equal(int8.float() * channel.float()[:, None])
        assert found["b.weight"].equal(quantise.dequantised_fp8(fp8, blocks))
        assert found["c.weight"].equal(quantise.dequantised_int4(packed, groups.float()))
        assert found["norm.weight"] is tensors["norm.weight"]
    # In the order of a file nothing waits longer than until its partner, two tensors on.
    yielded = [
        name for name, _ in widened(((name, tensors[name]) for name in ("a.weight", "a.weight_scale")), torch.float32)
    ]
    assert yielded == ["a.weight"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a.weight": torch.ones(2, 2, dtype=torch.int8)}, "no scale"),
        ({"a.weight_scale": torch.ones(2, 1)}, "no values"),
        ({"a.weight": torch.ones(2, 2, dtype=torch.int8), "a.weight_scale": torch.ones(3, 1)}, "does not fit"),
        ({"a.weight_offset": torch.ones(2, 1)}, "asymmetric"),
        (
            {"a.weight": torch.tensor([[float("nan")]]).to(quantise.FP8), "a.weight_scale": torch.ones(1, 1)},
            "NaN",
        ),
    ],
)
def test_a_stream_that_is_not_whole_is_refused(tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(UserError, match=said):
        list(widened(tensors.items(), torch.bfloat16))


@pytest.mark.slow
@pytest.mark.beside
def test_only_this_architectures_checkpoints_are_taken_over_and_only_unasked() -> None:
    from serve.plugin.widened import NAME, WidenedConfig

    ours, other = ascend.BailingMoeV2Config(), type("Config", (), {"model_type": "llama"})()
    take = WidenedConfig.override_quantization_method
    for method in ("fp8", "compressed-tensors"):
        assert take({"quant_method": method}, None, ours) == NAME
        assert take({"quant_method": method}, method, ours) is None
        assert take({"quant_method": method}, None, other) is None
    assert take({"quant_method": "awq"}, None, ours) is None


def test_the_launcher_counts_widened_weights_and_says_so(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "plain", dtype="bf16")
    plain = model_in(tmp_path / "plain")
    elements = parameters(plain.shape).total
    for form in FORMATS:
        model = model_in(write_format(tmp_path / "plain", tmp_path / form, form))
        for wide in (2, 4):
            nbytes, note = engine_bytes(model, wide)
            assert nbytes == elements * wide
            name = {"modelslim": "w8a8", "fp8-channel": "fp8"}.get(form, form)
            assert str(note).startswith(f"weights stored as {name} are widened to {wide * 8} bits")
            assert ("activations" in str(note)) == (form != "w4a16")
        assert engine_bytes(model, 2, "fp8")[1] is None
    assert engine_bytes(plain, 2)[1] is None
