"""Loading and saving: every value in its place, wrong tensors refused, the file's own names and bytes given back."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import ascend
from convert.demo_config import demo_config
from convert.shapes import tensor_shapes
from tests.broken_checkpoints import safetensors
from tests.tiny import checkpoint, edit_config, read_config, read_tensors, user_error, write_tensors

EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.expert_bias"
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("loader") / "demo")


@pytest.fixture
def copy(demo: Path, tmp_path: Path) -> Path:
    return shutil.copytree(demo, tmp_path / "copy")


def stacked(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """What the model's parameters must hold, put together from the checkpoint's tensors by hand."""
    expected = {name: tensor for name, tensor in tensors.items() if "_proj.weight" not in name or "eh_proj" in name}

    def gate_up(mlp: str) -> Tensor:
        return torch.cat([tensors[f"{mlp}.gate_proj.weight"], tensors[f"{mlp}.up_proj.weight"]])

    for layer in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        mlp = f"model.layers.{layer}.mlp"
        if layer < config["first_k_dense_replace"]:
            expected |= {f"{mlp}.gate_up": gate_up(mlp), f"{mlp}.down": tensors[f"{mlp}.down_proj.weight"]}
            continue
        experts = [f"{mlp}.experts.{expert}" for expert in range(config["num_experts"])]
        expected |= {
            f"{mlp}.experts.gate_up": torch.stack([gate_up(expert) for expert in experts]),
            f"{mlp}.experts.down": torch.stack([tensors[f"{expert}.down_proj.weight"] for expert in experts]),
            f"{mlp}.shared_experts.gate_up": gate_up(f"{mlp}.shared_experts"),
            f"{mlp}.shared_experts.down": tensors[f"{mlp}.shared_experts.down_proj.weight"],
        }
    return expected


VARIANTS: dict[str, dict[str, Any]] = {
    "as the family has it": {},
    "biases, two shared experts, two dense layers, two MTP layers": {
        "use_qkv_bias": True,
        "use_bias": True,
        "num_shared_experts": 2,
        "first_k_dense_replace": 2,
        "num_nextn_predict_layers": 2,
    },
    "no norm on queries and keys, no choosing bias": {"use_qk_norm": False, "moe_router_enable_expert_bias": False},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_value_lands_in_its_place_and_comes_back(variant: str, dtype: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "demo", dtype, **VARIANTS[variant])
    edit_config(path, model_type="bailing_moe" if dtype == "fp32" else "bailing_moe_v2")
    tensors, config = read_tensors(path), read_config(path)
    model = ascend.load_model(path)
    loaded = dict(model.named_parameters())
    expected = stacked(tensors, config)
    absent = loaded.keys() - expected.keys()
    assert absent == ({name for name in loaded if name.endswith("expert_bias")} if "choosing" in variant else set())
    assert expected.keys() <= loaded.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected.get(name, torch.zeros_like(tensor)).to(tensor.dtype)), name
        assert tensor.dtype == (torch.float32 if ".gate." in name else model.dtype), name
        assert not tensor.requires_grad
    assert not model.training

    model.save_pretrained(tmp_path / "saved")
    saved = read_tensors(tmp_path / "saved")
    assert saved.keys() == tensors.keys() == tensor_shapes(config).keys()
    for name, tensor in saved.items():
        assert tensor.dtype == tensors[name].dtype, name
        assert torch.equal(tensor, tensors[name]), name
    assert read_config(tmp_path / "saved")["model_type"] == config["model_type"]
    assert torch.equal(ascend.load_model(tmp_path / "saved")(IDS), model(IDS))


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(EXPERT), f"{{dir}}: tensor {EXPERT} is missing from all files"),
    "bias missing": (lambda t: t.pop(BIAS), f"{{dir}}: tensor {BIAS} is missing from all files"),
    "head missing": (lambda t: t.pop("lm_head.weight"), "{dir}: tensor lm_head.weight is missing from all files"),
    "extra": (
        lambda t: t.update({"model.layers.1.mlp.expert.0.up_proj.weight": t[EXPERT].clone()}),
        "{file}: tensor model.layers.1.mlp.expert.0.up_proj.weight has no place in the model of config.json "
        f"(did you mean '{EXPERT}'?)",
    ),
    "a layer too many": (
        lambda t: t.update({"model.layers.9.input_layernorm.weight": torch.ones(64)}),
        "{file}: tensor model.layers.9.input_layernorm.weight has no place in the model of config.json "
        "(did you mean 'model.layers.3.input_layernorm.weight'?)",
    ),
    "wrong shape": (
        lambda t: t.update({EXPERT: torch.zeros(64, 24)}),
        f"{{file}}: tensor {EXPERT} has shape [64, 24], config.json asks for [24, 64]",
    ),
    "fewer dimensions": (
        lambda t: t.update({EXPERT: torch.zeros(24 * 64)}),
        f"{{file}}: tensor {EXPERT} has shape [1536], config.json asks for [24, 64]",
    ),
    "mixed halves": (
        lambda t: t.update({EXPERT: t[EXPERT].half(), "model.norm.weight": t["model.norm.weight"].bfloat16()}),
        "{file}: holds F16 tensors, {file} BF16 ones; convert to one of them",
    ),
    **{
        f"wrong type {name}": (
            lambda t, dtype=dtype: t.update({EXPERT: t[EXPERT].to(dtype)}),
            f"{{file}}: tensor {EXPERT} has dtype {name} and no scale beside it",
        )
        for name, dtype in {"I64": torch.int64, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn}.items()
    },
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_tensors_are_refused(what: str, copy: Path) -> None:
    change, line = WRONG[what]
    tensors = read_tensors(copy)
    change(tensors)
    write_tensors(copy, tensors)
    expected = line.format(dir=copy, file=copy / "model.safetensors")
    assert user_error(ascend.load_model, copy) == expected


def test_a_cut_off_file_is_refused_by_load_model_too(copy: Path) -> None:
    file = copy / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert user_error(ascend.load_model, copy).startswith(f"{file}: cut off within tensor ")


@pytest.mark.slow
def test_refusal_comes_before_allocation(tmp_path: Path) -> None:
    # The full 103 B model as one file with a hole of 206 GB, and a single tensor missing.
    config, _ = demo_config("ling-flash", 0, "bf16", None, {})
    header: dict[str, Any] = {}
    end = 0
    for name, (shape, dtype) in tensor_shapes(config).items():
        nbytes = torch.Size(shape).numel() * (4 if dtype == "F32" else 2)
        if name != "model.layers.31.mlp.experts.255.down_proj.weight":
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
            end += nbytes
    (tmp_path / "config.json").write_text(json.dumps(config))
    content = safetensors(header, b"")
    (tmp_path / "model.safetensors").write_bytes(content)
    os.truncate(tmp_path / "model.safetensors", len(content) + end)
    before, begun = memory("VmHWM"), time.monotonic()
    missing = "tensor model.layers.31.mlp.experts.255.down_proj.weight is missing from all files"
    assert user_error(ascend.load_model, tmp_path) == f"{tmp_path}: {missing}"
    assert memory("VmHWM") - before < 300 << 20
    assert time.monotonic() - begun < 20


def memory(key: str) -> int:
    """Bytes that the kernel counts for this process under a key of /proc/self/status."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith(key + ":"))


def test_tensors_may_lie_at_odd_bytes(demo: Path, copy: Path) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    assert torch.equal(ascend.load_model(copy)(IDS), ascend.load_model(demo)(IDS))


def test_a_tied_head_is_the_embedding_and_a_stored_one_is_passed_over(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "demo", tie_word_embeddings=True)
    model = ascend.load_model(path)
    assert model.lm_head is None
    hidden = model(IDS, output_hidden_states=True, return_dict=True).hidden_states[-1]
    torch.testing.assert_close(model(IDS), hidden @ read_tensors(path)["model.word_embeddings.weight"].T)
    logits = model(IDS)
    write_tensors(path, read_tensors(path) | {"lm_head.weight": torch.zeros(300, 64)})
    assert torch.equal(ascend.load_model(path)(IDS), logits)


def test_a_bias_that_the_config_leaves_out_may_still_be_stored(copy: Path) -> None:
    logits = ascend.load_model(copy)(IDS)
    edit_config(copy, moe_router_enable_expert_bias=False)
    assert torch.equal(ascend.load_model(copy)(IDS), logits)


def test_norm_head_makes_columns_of_unit_length(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "demo", norm_head=True)
    stored = read_tensors(path)["lm_head.weight"].double()
    head = ascend.load_model(path).lm_head.weight
    torch.testing.assert_close(head.double(), stored / stored.square().sum(0).sqrt(), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(head.double(), stored)


@pytest.mark.parametrize(
    ("asked", "given"),
    [(None, "bf16"), ("auto", "bf16"), ("float16", "fp16"), ("torch.float32", "fp32"), (torch.float16, "fp16")],
)
def test_dtype(asked: Any, given: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "demo", "bf16")
    model = ascend.load_model(path, dtype=asked)
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[given]
    tensors = read_tensors(path)
    assert model.dtype == model.model.layers[1].mlp.experts.down.dtype == expected
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].to(expected))
    gate = model.model.layers[1].mlp.gate
    assert gate.weight.dtype == gate.expert_bias.dtype == torch.float32
    assert torch.equal(gate.expert_bias, tensors[BIAS])
    assert model(IDS).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("dtype", "line"),
    [
        ("bfloat61", "dtype bfloat61 is not one of bfloat16, float16, float32 (did you mean 'bfloat16'?)"),
        (torch.int8, "dtype torch.int8 is not one of bfloat16, float16, float32"),
        (7, "dtype 7 is not one of bfloat16, float16, float32"),
    ],
)
def test_an_impossible_dtype_gets_one_line(dtype: Any, line: str, demo: Path) -> None:
    assert user_error(ascend.load_model, demo, dtype=dtype) == line


@pytest.mark.parametrize("text", ["{", "[1]", '{"max_new_tokens": "x"}'])
def test_a_damaged_generation_config_is_refused(text: str, copy: Path) -> None:
    (copy / "generation_config.json").write_text(text)
    line = user_error(ascend.load_model, copy)
    assert line.startswith(f"{copy}/generation_config.json: not readable (")
    assert line.endswith("); correct or remove it")


def test_shards_give_the_same_model_as_one_file(demo: Path, tmp_path: Path) -> None:
    model = ascend.load_model(demo)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 5
    assert all(file.stat().st_size < 80_000 for file in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for file in files:
        with safe_open(file, "pt") as shard:
            assert {name for name, its in index["weight_map"].items() if its == file.name} == set(shard.keys())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read_tensors(tmp_path).values())
    for name, tensor in ascend.load_model(tmp_path).named_parameters():
        assert torch.equal(tensor, model.get_parameter(name)), name
    # Saved over it as one file, no shard and no index of the old ones is left to be taken for the new.
    (tmp_path / "adapter.safetensors").write_bytes(b"somebody else's")
    model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*safetensors*")) == ["adapter.safetensors", "model.safetensors"]
    assert not ascend.load_model(tmp_path).lm_head.weight.any()
