"""Quantised checkpoints for the tests, written from a plain one by `ops.quantise` and safetensors and by nothing else.

So they are a second opinion on what `convert` writes, and what the loaders of others read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ops import quantise
from tests.tiny import read_config, read_tensors

MATRIX = r"attention\.(query_key_value|dense)\.weight|mlp\.(.*\.)?(gate|up|down)_proj\.weight"
EXPERT = r"mlp\.experts\.\d+\.\w+_proj\.weight"
QUANTISED = {"fp8": MATRIX, "w8a8": MATRIX, "w4a16": EXPERT}  # by format: the ends of the names of what is rounded
Parts = dict[str, Tensor]  # the tensors of a weight, by the ends of their names


def quantised_checkpoint(
    src: Path,
    dst: Path,
    format: str,
    leave_out: Iterable[str] = (),
    modelslim: bool = False,
    group: int | None = None,
) -> Path:
    """Write ``src`` to ``dst`` with its weights in a format; returns ``dst``.

    leave_out: patterns (anywhere in a tensor's name) of what stays plain. modelslim: w8a8 in ModelSlim's form. group:
    of int4; None: 128, or all inputs where they are fewer, as the model does in memory.
    """
    shutil.copytree(src, dst, ignore=shutil.ignore_patterns("*.safetensors*", "manifest.json"))
    keep = [re.compile(one) for one in leave_out]
    stored: Parts = {}
    plain: list[str] = []
    described: dict[str, str] = {}
    for name, tensor in read_tensors(src).items():
        module = name.removesuffix(".weight")
        if re.search(rf"({QUANTISED[format]})$", name) and not any(one.search(name) for one in keep):
            parts = _parts(tensor, format, modelslim, group)
            if modelslim and ".mlp.experts." in name:
                described[f"{module.partition('.experts.')[0]}.experts.weight"] = "W8A8_DYNAMIC"
        else:
            parts = {name.removeprefix(f"{module}."): tensor} if name != module else {"": tensor}
            plain += [module] if re.search(rf"({MATRIX})$", name) else []
        for end, part in parts.items():
            full = f"{module}.{end}" if end else name
            stored[full] = part.contiguous()
            described[full] = "W8A8_DYNAMIC" if len(parts) > 1 else "FLOAT"
    save_file(stored, dst / "model.safetensors", {"format": "pt"})
    config = read_config(src)
    if modelslim:
        text = described | {"model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0", "group_size": 0}
        (dst / "quant_model_description.json").write_text(json.dumps(text))
    else:
        config["quantization_config"] = quantization_config(format, plain, group or quantise.INT4_GROUP)
    (dst / "config.json").write_text(json.dumps(config))
    return dst


def _parts(weight: Tensor, format: str, modelslim: bool, group: int | None) -> Parts:
    if format == "fp8":
        values, scale = quantise.fp8_weight(weight)
        return {"weight": values, "weight_scale_inv": scale}
    if format == "w8a8":
        values, scale = quantise.int8_weight(weight)
        if modelslim:
            return {
                "weight": values,
                "weight_scale": scale[:, None].float(),
                "weight_offset": torch.zeros(len(scale), 1),
            }
        return {"weight": values, "weight_scale": scale[:, None]}
    packed, scale = quantise.int4_weight(weight, group or min(quantise.INT4_GROUP, weight.shape[1]))
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}


def quantization_config(format: str, plain: list[str], group: int = quantise.INT4_GROUP) -> dict[str, Any]:
    """What `config.json` says of a format; ``plain``: the modules that were left out."""
    if format == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [quantise.FP8_BLOCK, quantise.FP8_BLOCK],
            "modules_to_not_convert": ["lm_head", *plain],
        }
    scheme = {"type": "int", "symmetric": True, "dynamic": False}
    weights: dict[str, Any] = {"num_bits": 8, "strategy": "channel"}
    tokens: dict[str, Any] | None = scheme | {"num_bits": 8, "strategy": "token", "dynamic": True}
    if format == "w4a16":
        weights, tokens = {"num_bits": 4, "strategy": "group", "group_size": group}, None
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if format == "w8a8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme | weights, "input_activations": tokens}},
        "ignore": ["lm_head", r"re:.*mlp\.gate$", r"re:.*eh_proj$", *plain],
    }
