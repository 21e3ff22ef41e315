"""Small checkpoints for the tests: written by the project's own demo, in fp32 unless a test says otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from ascend.errors import UserError
from convert.demo import write_demo

# Every part of the architecture, as small as it goes: a dense layer, two MoE layers in groups, an MTP layer.
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 1,
}


def checkpoint(path: Path, dtype: str = "fp32", **overrides: Any) -> Path:
    """Write a small random checkpoint and return its directory; ``overrides`` are keys of `config.json`."""
    write_demo(path, dtype=dtype, **SHAPE | overrides)
    return path


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` as it is written."""
    return json.loads((path / "config.json").read_text())


def edit_config(path: Path, **changes: Any) -> Path:
    """Change keys of `config.json` after the weights were written; returns ``path``."""
    (path / "config.json").write_text(json.dumps(read_config(path) | changes))
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, read by the safetensors library."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Replace the weights of a single-file checkpoint; returns ``path``."""
    save_file(tensors, path / "model.safetensors")
    return path


def user_error(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Call what must raise a `UserError` and return its text, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
