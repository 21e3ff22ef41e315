"""The files beside the weights: which are carried over, which are written anew, which are left out and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ascend.checkpoint import PICKLE_SUFFIXES, Checkpoint
from ascend.errors import UserError
from convert.demo_tokenizer import to_json
from convert.plan import Plan, index

CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.model", "tekken.json",
    "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*", "README*",
)  # fmt: skip
REWRITTEN = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "quant_model_description.json", "manifest.json",
    "manifest.sig", "conversion.json", "conversion.svg", "canary.json",
)  # fmt: skip
CODE_KEYS = ("auto_map", "custom_pipelines")  # they name classes in files of the directory
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Beside:
    """Names of files to copy, and of files (or keys of files) to leave out, with the reason."""

    copied: tuple[str, ...]
    left_out: dict[str, str]


def beside(checkpoint: Checkpoint) -> Beside:
    """Look through the source's directory. What it does not know it leaves out: a target holds nothing unnamed."""
    copied, left_out = [], {}
    for file in sorted(checkpoint.path.iterdir()):
        name = file.name
        if name.endswith(".py"):
            left_out[name] = "code is never run from a model directory"
        elif file.suffix.lower() in PICKLE_SUFFIXES:
            left_out[name] = "a pickle can run code when it is opened"
        elif any(fnmatchcase(name, pattern) for pattern in REWRITTEN):
            continue
        elif file.is_file() and any(fnmatchcase(name, pattern) for pattern in CARRIED):
            copied.append(name)
        else:
            left_out[name] = "a directory" if file.is_dir() else "not a file that a model needs"
    for key in CODE_KEYS:
        if key in checkpoint.config:
            left_out[f"config.json: {key}"] = "it names code to run"
    return Beside(tuple(copied), left_out)


def write_beside(directory: Path, checkpoint: Checkpoint, plan: Plan, files: Beside) -> None:
    """Write all files but weights, report and manifest."""
    for name in files.copied:
        _copy(checkpoint.path / name, directory / name)
    (directory / "config.json").write_text(to_json(_config(checkpoint.config, plan)), encoding="utf-8")
    listed = index(plan)
    if listed is not None:
        (directory / "model.safetensors.index.json").write_text(to_json(listed), encoding="utf-8")
    if plan.request.layout == "modelslim":
        text = to_json(modelslim_description(plan))
        (directory / "quant_model_description.json").write_text(text, encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    if source.name == "tokenizer_config.json":
        try:
            content = json.loads(source.read_bytes())
        except ValueError:
            raise UserError(f"{source}: not readable as JSON; the file is damaged") from None
        if isinstance(content, dict) and any(key in content for key in CODE_KEYS):
            kept = {key: value for key, value in content.items() if key not in CODE_KEYS}
            target.write_text(to_json(kept), encoding="utf-8")
            return
    shutil.copyfile(source, target)


def _config(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the target's `config.json`: the source's, without code, with the new formats and the plain dtype."""
    written = {key: value for key, value in config.items() if key not in (*CODE_KEYS, "quantization_config")}
    dtype = next(item.outputs[0].dtype for item in plan.items() if item.kind == "embedding")
    for key in ("torch_dtype", "dtype"):
        if key in written:
            written[key] = DTYPE_NAMES[dtype]
    if not {"torch_dtype", "dtype"} & written.keys():
        written["torch_dtype"] = DTYPE_NAMES[dtype]
    if plan.quantization_config is not None:
        written["quantization_config"] = plan.quantization_config
    return written


def modelslim_description(plan: Plan) -> dict[str, Any]:
    """Return ModelSlim's `quant_model_description.json`: what each tensor is, and one key more per MoE layer.

    vllm-ascend 0.23 has no mapping of this architecture's experts to their tensors, and looks that key up literally
    (quantization/modelslim_config.py, get_linear_quant_type).
    """
    description: dict[str, Any] = {"model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0", "group_size": 0}
    for item in plan.items():
        kind = "W8A8_DYNAMIC" if item.to == "w8a8" else "FLOAT"
        description |= {output.name: kind for output in item.outputs}
        if item.kind == "routed_experts":
            layer = item.source.name.partition(".experts.")[0]
            description[f"{layer}.experts.weight"] = kind
    return description
