"""`python -m convert verify` and `manifest`: bytes, then what they mean, of every format, each fault by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert import manifest_command, verify
from convert.content import check_content
from convert.manifest import MANIFEST, SIGNATURE, write_manifest
from tests.launcher import ROOT
from tests.quantised import quantised_checkpoint
from tests.tiny import checkpoint, edit_config, read_config, read_tensors, user_error, write_tensors

FP8 = torch.float8_e4m3fn
EXPERT = "model.layers.1.mlp.experts.0.down_proj"
QKV = "model.layers.0.attention.query_key_value"
FORMATS = ("plain", "fp8", "w8a8", "modelslim", "w4a16")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint in every format."""
    directory = tmp_path_factory.mktemp("formats")
    plain = checkpoint(directory / "plain", dtype="bf16")
    paths = {"plain": plain}
    for form in FORMATS[1:]:
        name = "w8a8" if form == "modelslim" else form
        paths[form] = quantised_checkpoint(plain, directory / form, name, modelslim=form == "modelslim")
    return paths


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda form: Path(shutil.copytree(made[form], tmp_path / form))


@pytest.mark.parametrize("form", FORMATS)
def test_good_ones_of_every_format(made: dict[str, Path], form: str) -> None:
    assert check_content(made[form]) == []


@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": True},
        {"moe_router_enable_expert_bias": False},
        {"use_qkv_bias": True, "use_bias": True},
        {"use_qk_norm": False, "num_nextn_predict_layers": 0},
        {"num_shared_experts": 0, "first_k_dense_replace": 0},
        {"num_shared_experts": 2},
    ],
    ids=str,
)
def test_the_architectures_variants(tmp_path: Path, overrides: dict[str, Any]) -> None:
    path = checkpoint(tmp_path / "model", **overrides)
    assert check_content(path) == []
    if "tie_word_embeddings" in overrides:  # what tied heads carry along is no fault
        tensors = read_tensors(path)
        write_tensors(path, tensors | {"lm_head.weight": tensors["model.word_embeddings.weight"].clone()})
        assert check_content(path) == []


def change(path: Path, **tensors: Tensor | None) -> Path:
    """Replace tensors (None: remove); the names have ``__`` for a dot."""
    changed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = read_tensors(path) | changed
    return write_tensors(path, {name: tensor for name, tensor in kept.items() if tensor is not None})


def at(path: Path, name: str, index: tuple[int, ...], value: float) -> Path:
    """Change one element; of FP8 the byte."""
    tensor = read_tensors(path)[name]
    (tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor)[index] = value
    return write_tensors(path, read_tensors(path) | {name: tensor})


def config(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    said = read_config(path)["quantization_config"]
    edit(said)
    return edit_config(path, quantization_config=said)


def scheme(path: Path, **changes: Any) -> Path:
    return config(path, lambda said: said["config_groups"]["group_0"]["weights"].update(changes))


def describe(path: Path, **changes: Any) -> Path:
    file = path / "quant_model_description.json"
    said = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: kind for name, kind in said.items() if kind is not None}))
    return path


def quantise_head(path: Path) -> Path:
    return write_tensors(
        path,
        read_tensors(path)
        | {"lm_head.weight": torch.ones(300, 64, dtype=torch.int8), "lm_head.weight_scale": torch.ones(300, 1)},
    )


INF = float("inf")
FAULTS: list[tuple[str, str, Callable[[Path], Any], str]] = [
    ("missing", "plain", lambda p: change(p, model__norm__weight=None), "tensor model.norm.weight is missing"),
    ("missing-quantised", "w8a8", lambda p: change(p, **{f"{QKV}.weight": None, f"{QKV}.weight_scale": None}),
     f"tensor {QKV}.weight is missing"),
    ("extra", "plain", lambda p: change(p, model__norms__weight=torch.ones(64)),
     "tensor model.norms.weight has no place in the model of config.json (did you mean 'model.norm.weight'?)"),
    ("shape", "plain", lambda p: change(p, model__norm__weight=torch.ones(65)),
     "tensor model.norm.weight has shape [65], config.json asks for [64]"),
    ("config-shape", "plain", lambda p: edit_config(p, vocab_size=301), "asks for [301, 64]"),
    ("config-impossible", "plain", lambda p: edit_config(p, num_attention_heads=0), "num_attention_heads"),
    ("config-huge", "plain", lambda p: edit_config(p, num_experts=2**40), "experts; the file is damaged"),
    ("dtype", "plain", lambda p: edit_config(p, torch_dtype="float16"),
     "says float16, model.word_embeddings.weight is BF16"),
    ("mixed-halves", "plain", lambda p: change(p, model__norm__weight=torch.ones(64, dtype=torch.float16)),
     "holds F16 tensors"),
    ("int", "plain", lambda p: change(p, model__norm__weight=torch.ones(64, dtype=torch.int32)), "has dtype I32"),
    ("pickle", "plain", lambda p: (p / "x.bin").touch(), "a pickle can run code"),
    ("nan", "plain", lambda p: at(p, "model.norm.weight", (3,), float("nan")),
     "tensor model.norm.weight holds NaN or infinity within rows 0 to 64"),
    ("inf", "plain", lambda p: at(p, "model.word_embeddings.weight", (299, 63), -INF),
     "tensor model.word_embeddings.weight holds NaN or infinity"),
    ("bias-nan", "plain", lambda p: at(p, "model.layers.1.mlp.gate.expert_bias", (0,), float("nan")), "bias holds"),
    ("plain-nan-in-fp8", "fp8", lambda p: at(p, "lm_head.weight", (0, 0), float("nan")), "lm_head.weight holds NaN"),
    ("fp8-nan", "fp8", lambda p: at(p, f"{EXPERT}.weight", (63, 23), 0x7F), f"tensor {EXPERT}.weight holds NaN"),
    ("fp8-minus-nan", "fp8", lambda p: at(p, f"{EXPERT}.weight", (0, 0), 0xFF), f"tensor {EXPERT}.weight holds NaN"),
    ("fp8-scale-nan", "fp8", lambda p: at(p, f"{EXPERT}.weight_scale_inv", (0, 0), float("nan")),
     f"tensor {EXPERT}.weight has a scale that is NaN or infinite"),
    ("fp8-scale-zero", "fp8", lambda p: at(p, f"{QKV}.weight_scale_inv", (0, 0), 0.0),
     f"tensor {QKV}.weight has a scale of 0 where values are not"),
    ("scale-inf", "w8a8", lambda p: at(p, f"{QKV}.weight_scale", (3, 0), INF), "has a scale that is NaN or infinite"),
    ("scale-negative", "w8a8", lambda p: at(p, f"{QKV}.weight_scale", (3, 0), -1.0), "a scale that is negative (-1)"),
    ("scale-huge", "w8a8", lambda p: at(p, f"{QKV}.weight_scale", (3, 0), 7e4), "a scale that is beyond 65504"),
    ("scale-zero", "w8a8", lambda p: at(p, f"{QKV}.weight_scale", (3, 0), 0.0), "a scale of 0 where values are not"),
    ("offset", "modelslim", lambda p: at(p, f"{QKV}.weight_offset", (3, 0), 1.0), "asymmetric is not supported"),
    ("int4-scale-zero", "w4a16", lambda p: at(p, f"{EXPERT}.weight_scale", (3, 0), 0.0), "has a scale of 0"),
    ("int4-shape", "w4a16", lambda p: at(p, f"{EXPERT}.weight_shape", (0,), 65), "weight_shape of"),
    ("no-scale", "w8a8", lambda p: change(p, **{f"{QKV}.weight_scale": None}), "no scale"),
    ("head-quantised", "w8a8", quantise_head, "tensor lm_head.weight is w8a8; head must keep its precision"),
    ("no-config", "w8a8", lambda p: edit_config(p, quantization_config=None), "has no quantization_config, but"),
    ("config-of-plain", "plain",
     lambda p: edit_config(p, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128],
                                                   "activation_scheme": "dynamic"}),
     "is there, but all weights are plain"),
    ("unknown-method", "w8a8", lambda p: config(p, lambda said: said.update(quant_method="awq")), "is not understood"),
    ("no-groups", "w8a8", lambda p: config(p, lambda said: said.pop("config_groups")), "is not understood"),
    ("bits", "w8a8", lambda p: scheme(p, num_bits=4), "is not understood"),
    ("other-method", "w8a8", lambda p: config(p, lambda said: said.update(quant_method="fp8")), "is not understood"),
    ("asymmetric", "w8a8", lambda p: scheme(p, symmetric=False), "symmetric is false"),
    ("layout", "w8a8", lambda p: config(p, lambda said: said.update(format="pack-quantized")), "is not understood"),
    ("group", "w4a16", lambda p: scheme(p, group_size=8), "says groups of 8"),
    ("block", "fp8", lambda p: config(p, lambda said: said.update(weight_block_size=[64, 64])), "is not understood"),
    ("not-ignored", "w8a8", lambda p: config(p, lambda said: said["ignore"].remove("lm_head")),
     "says lm_head is w8a8, it is stored as plain"),
    ("bad-pattern", "w8a8", lambda p: config(p, lambda said: said["ignore"].append("re:(")), "is not understood"),
    ("ignored", "w8a8", lambda p: config(p, lambda said: said["ignore"].append(QKV)),
     f"says {QKV} is plain, it is stored as w8a8"),
    ("ignored-by-pattern", "w4a16", lambda p: config(p, lambda said: said["ignore"].append("re:.*experts")),
     f"says {EXPERT} is plain, it is stored as w4a16"),
    ("fp8-ignored", "fp8", lambda p: config(p, lambda said: said["modules_to_not_convert"].append(QKV)),
     f"says {QKV} is plain, it is stored as fp8"),
    ("description-type", "modelslim", lambda p: describe(p, **{f"{QKV}.weight": "FLOAT"}),
     f"says {QKV}.weight is FLOAT, it is W8A8_DYNAMIC"),
    ("description-scale", "modelslim", lambda p: describe(p, **{f"{QKV}.weight_scale": None}),
     f"says {QKV}.weight_scale is nothing, it is W8A8_DYNAMIC"),
    ("description-experts", "modelslim", lambda p: describe(p, **{"model.layers.3.mlp.experts.weight": None}),
     "says model.layers.3.mlp.experts.weight is nothing"),
    ("description-extra", "modelslim", lambda p: describe(p, **{"model.layers.9.x.weight": "FLOAT"}),
     "names model.layers.9.x.weight, which is not there"),
    ("description-offset", "modelslim", lambda p: change(p, **{f"{QKV}.weight_offset": None}),
     f"{QKV}.weight_offset is missing"),
    ("description-broken", "modelslim", lambda p: (p / "quant_model_description.json").write_text("{"),
     "not readable as JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "damage", "expected"), [one[1:] for one in FAULTS], ids=[one[0] for one in FAULTS])
def test_a_fault_in_what_the_weights_mean(
    copy: Callable[[str], Path], form: str, damage: Callable[[Path], Any], expected: str
) -> None:
    path = copy(form)
    damage(path)
    said = check_content(path)
    assert any(expected in line for line in said), said
    assert all("\n" not in line and str(path) in line for line in said)


def test_what_was_left_out_must_be_said(made: dict[str, Path], tmp_path: Path) -> None:
    for form, key in (("fp8", "modules_to_not_convert"), ("w8a8", "ignore")):
        path = quantised_checkpoint(made["plain"], tmp_path / form, form, leave_out=[r"shared_experts"])
        assert check_content(path) == []
        config(path, lambda said, key=key: said.update({key: [one for one in said[key] if "shared" not in one]}))
        said = check_content(path)
        assert len(said) == 9  # three in each of two MoE layers and the MTP layer
        assert all("shared_experts" in line and f"is {form}, it is stored as plain" in line for line in said)


@pytest.mark.parametrize("form", ["fp8", "w8a8", "w4a16"])
def test_a_scale_of_zero_for_zeros_is_good(copy: Callable[[str], Path], form: str) -> None:
    """And int8 values of -128, which compressed-tensors itself writes."""
    path = copy(form)
    tensors = read_tensors(path)
    values, scale = {
        "fp8": (f"{EXPERT}.weight", f"{EXPERT}.weight_scale_inv"),
        "w8a8": (f"{EXPERT}.weight", f"{EXPERT}.weight_scale"),
        "w4a16": (f"{EXPERT}.weight_packed", f"{EXPERT}.weight_scale"),
    }[form]
    zero = -0x77777778 if form == "w4a16" else 0  # 0x88888888: eight values of 0, each stored as 8
    tensors[values] = torch.full_like(tensors[values].float(), zero, dtype=torch.float64).to(tensors[values].dtype)
    tensors[scale] = torch.zeros_like(tensors[scale])
    if form == "w8a8":
        tensors[f"{QKV}.weight"][0, 0] = -128
    write_tensors(path, tensors)
    assert check_content(path) == []


def test_values_far_into_a_tensor_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.rounding.STEP_ELEMENTS", 128 * 64)
    path = checkpoint(tmp_path / "model", vocab_size=1000)
    at(path, "lm_head.weight", (999, 0), INF)
    assert "within rows 896 to 1000" in check_content(path)[0]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)


def test_the_commands(copy: Callable[[str], Path]) -> None:
    path = copy("plain")
    without = run("verify", str(path))
    assert without.returncode == 2
    assert "has no manifest.json, so nothing vouches for its files: `python -m convert manifest DIR`" in without.stderr
    assert run("manifest", str(path)).returncode == 0
    assert "is there already; `verify` checks it, --force replaces it" in run("manifest", str(path)).stderr
    quick = run("verify", str(path), "--quick", "--json")
    assert quick.returncode == 0, quick.stderr
    assert "content was not looked at" in quick.stdout
    document = json.loads(quick.stdout.splitlines()[-1])
    assert document["files"] == "sizes and headers"
    assert document["weights"] == "not looked at"
    assert document["problems"] == []
    os.truncate(path / "README.md", 1)
    bad = run("verify", str(path), "--json", "--no-content")
    assert bad.returncode == 2
    assert (
        bad.stderr
        == f"error: {path}/README.md: has 1 bytes, manifest.json says 326; it is cut off, or not the file it was\n"
    )
    assert json.loads(bad.stdout.splitlines()[-1])["problems"] == [bad.stderr[7:-1]]
    assert "did you mean '--quick'" in run("verify", str(path), "--quik").stderr


def test_a_full_check_looks_at_the_weights(copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = at(copy("w8a8"), f"{QKV}.weight_scale", (3, 0), INF)
    write_manifest(path, command={}, source={})  # of a directory that was bad from the beginning
    assert verify.main([str(path), "--no-content"]) == 0
    assert "what the weights mean was not looked at" in capsys.readouterr().out
    assert verify.main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert "has a scale that is NaN or infinite" in err
    assert "1 problem;" in out


def test_no_more_than_twenty_lines(copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = copy("plain")
    write_manifest(path, command={}, source={})
    for number in range(25):
        (path / f"extra-{number}").touch()
    assert verify.main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 21
    assert err.endswith("error: and 5 more\n")
    assert "25 problems" in out


def test_a_signature_without_a_key_is_spoken_of(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy("plain")
    write_manifest(path, command={}, source={})
    (path / SIGNATURE).write_text("x")
    assert verify.main([str(path), "--quick"]) == 0
    assert "signature: not looked at: no --key" in capsys.readouterr().out


def test_a_manifest_is_only_made_of_a_whole_checkpoint(copy: Callable[[str], Path]) -> None:
    path = copy("plain")
    os.truncate(path / "model.safetensors", 1000)
    assert "model.safetensors: " in user_error(manifest_command.main, ["manifest", str(path)])
    assert not (path / MANIFEST).exists()
    shutil.rmtree(path)
    path = copy("plain")
    (path / ".cache").mkdir()
    assert ".cache: not a file; remove it" in user_error(manifest_command.main, ["manifest", str(path)])
    (path / SIGNATURE).write_text("of an older one")
    (path / ".cache").rmdir()
    assert manifest_command.main(["manifest", str(path), "--force"]) == 0
    assert not (path / SIGNATURE).exists()


@pytest.mark.slow
@pytest.mark.beside
def test_values_are_looked_at_in_flat_memory(tmp_path: Path) -> None:
    """A tensor of 400 MB, not written but for its end."""
    header = {"x": {"dtype": "BF16", "shape": [50_000, 4096], "data_offsets": [0, 50_000 * 8192]}}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.seek(50_000 * 8192 - 2, 1)
        stream.write(b"\x80\x7f")  # infinity
    (tmp_path / "config.json").write_text('{"model_type": "bailing_moe"}')
    code = (
        "import sys; from pathlib import Path\n"
        "from ascend.checkpoint import open_checkpoint\n"
        "from ascend.stored import stored_weights\n"
        "from convert.values import check_values\n"
        "held = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "weights = stored_weights(open_checkpoint(sys.argv[1]).tensors)\n"
        "before = held()\n"
        "print(list(check_values(weights)))\n"
        "print(held() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    problem, kilobytes = done.stdout.splitlines()
    assert "rows 49920 to 50000" in problem
    assert int(kilobytes) < 64 << 10
