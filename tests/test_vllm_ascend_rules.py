"""Converted directories against what vllm-ascend's loader asks for (`tests.vllm_ascend_rules`), whole and faulty."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.engine import convert, prepare
from convert.plan import Request
from tests.quantised import quantised_checkpoint
from tests.tiny import checkpoint, read_config, read_tensors, write_tensors
from tests.vllm_ascend_rules import problems

pytestmark = pytest.mark.beside

EXPERT = "model.layers.1.mlp.experts.3.up_proj"
REQUESTS = {
    "w8a8": Request("w8a8"),
    "modelslim": Request("w8a8", layout="modelslim"),
    "w4a16": Request("w4a16"),
    "bf16": Request("bf16"),
    "less": Request(
        "w8a8", ignore=("model.layers.2.attention.*", "model.layers.0.mlp.*", "model.layers.1.mlp.experts.*")
    ),
    "less-modelslim": Request(
        "w8a8", layout="modelslim", ignore=("*.attention.dense", "*.shared_experts.*", "*.2.mlp.e*")
    ),
    "fp8": Request("fp8"),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("converted")
    source = checkpoint(root / "source", dtype="bf16")
    for name, request in REQUESTS.items():
        convert(prepare(source, root / name, request))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in REQUESTS if name != "fp8"])
def test_what_we_convert_is_what_it_loads(name: str, converted: Path) -> None:
    assert problems(converted / name) == []


@pytest.mark.parametrize("modelslim", [False, True])
def test_so_is_what_the_tests_write_by_themselves(modelslim: bool, converted: Path, tmp_path: Path) -> None:
    path = quantised_checkpoint(converted / "source", tmp_path / "out", "w8a8", modelslim=modelslim)
    assert problems(path) == []


def test_fp8_is_for_another_chip(converted: Path) -> None:
    assert problems(converted / "fp8") == ["quant_method fp8 is for another chip (utils.py:132)"]


def described(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description of a ModelSlim directory, or the quantization_config of another."""
    file = path / "quant_model_description.json"
    if file.exists():
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    else:
        config = read_config(path)
        change(config["quantization_config"])
        (path / "config.json").write_text(json.dumps(config))


def stored(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a directory."""
    tensors = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors)


def leave_out(described: dict[str, Any], *names: str) -> None:
    """Take modules from the list of those that are not quantised."""
    described["ignore"] = [entry for entry in described["ignore"] if entry not in names]


FAULTS: list[tuple[str, Callable[[Path], None], str]] = [
    # What a plain list of the tensors lacks, reference/vllm_ascend.md item 3.
    (
        "modelslim",
        lambda path: described(path, lambda d: d.pop("model.layers.1.mlp.experts.weight")),
        "model.layers.1.mlp.experts: KeyError: 'model.layers.1.mlp.experts.weight' in quant_model_description.json",
    ),
    (
        "modelslim",
        lambda path: described(path, lambda d: d.update({"model.layers.0.mlp.up_proj.weight": "FLOAT"})),
        "model.layers.0.mlp.gate_up_proj: its parts are of different types: ['FLOAT', 'W8A8_DYNAMIC']",
    ),
    (  # One expert that is float makes the layer float, which its tensors are not.
        "modelslim",
        lambda path: described(path, lambda d: d.update({f"{EXPERT}.weight": "FLOAT"})),
        f"{EXPERT}.weight: I8 [24, 64], wanted BF16 or F16 or F32 [24, 64]",
    ),
    (
        "modelslim",
        lambda path: described(path, lambda d: d.update({"model.layers.1.mlp.experts.weight": "W4A4"})),
        "model.layers.1.mlp.experts: no scheme W4A4 for moe (methods/registry.py:52)",
    ),
    (
        "w8a8",
        lambda path: stored(path, lambda t: t.pop(f"{EXPERT}.weight_scale")),
        f"{EXPERT}.weight_scale: missing",
    ),
    (
        "w8a8",
        lambda path: stored(path, lambda t: t.update({f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"][:, 0]})),
        f"{EXPERT}.weight_scale: BF16 [24], wanted BF16 or F16 or F32 [24, 1]",
    ),
    (
        "w8a8",
        lambda path: described(path, lambda d: d["ignore"].append("model.layers.0.attention.dense")),
        "model.layers.0.attention.dense.weight: I8 [64, 64], wanted BF16 or F16 or F32 [64, 64]",
    ),
    (
        "w8a8",
        lambda path: described(
            path, lambda d: d["config_groups"]["group_0"]["input_activations"].update(dynamic=False)
        ),
        "model.layers.0.attention.query_key_value: no compressed-tensors compatible quantization type (:378)",
    ),
    (  # Without the key at the top level it takes groups for 32 wide.
        "w4a16",
        lambda path: described(path, lambda d: d.pop("group_size")),
        "model.layers.1.mlp.experts.0.gate_proj.weight_scale: BF16 [24, 8], wanted BF16 or F16 [24, 2]",
    ),
    (
        "w4a16",
        lambda path: described(path, lambda d: d["ignore"].remove("model.layers.1.attention.dense")),
        "model.layers.1.attention.dense: no scheme W4A16 for linear (methods/registry.py:52)",
    ),
    (
        "w4a16",
        lambda path: described(
            path, lambda d: leave_out(d, "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_up_proj")
        ),
        "model.layers.0.mlp.gate_up_proj: ignore names one of its parts and not the other",
    ),
    (
        "bf16",
        lambda path: stored(path, lambda t: t.update({f"{EXPERT}.weight_scale": torch.ones(24, 1)})),
        f"{EXPERT}.weight_scale: no parameter has this name",
    ),
]


@pytest.mark.parametrize(("name", "fault", "said"), FAULTS)
def test_what_it_would_stumble_over_is_told(
    name: str, fault: Callable[[Path], None], said: str, converted: Path, tmp_path: Path
) -> None:
    shutil.copytree(converted / name, tmp_path / "faulty")
    fault(tmp_path / "faulty")
    found = problems(tmp_path / "faulty")
    assert any(said in line for line in found), found
