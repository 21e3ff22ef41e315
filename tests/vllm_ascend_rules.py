"""What vllm-ascend 0.23.0 asks of a quantised directory of this architecture on a 910B, written down from its source.

Files and lines are those of its tag v0.23.0 (commit 5cb98caaa), below `vllm_ascend/quantization/` unless they say vLLM,
which is vLLM 0.23.0. For one card: on more, the shapes are divided. Shapes: O outputs, I inputs of a matrix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend.checkpoint import TensorEntry, open_checkpoint

FLOAT = "FLOAT"
# methods/w8a8_dynamic.py:48, 155, methods/w4a16.py:111, and others this toolkit does not write.
SCHEMES = {("W8A8_DYNAMIC", "linear"), ("W8A8_DYNAMIC", "moe"), ("W4A16", "moe")}
# packed_modules_mapping of vLLM's class (models/bailing_moe.py); modelslim_config.py:630 has none for bailing_moe.
FUSED = {"query_key_value": ("query_key_value",), "gate_up_proj": ("gate_proj", "up_proj")}
HALF = ("BF16", "F16")
# A parameter's tensor: the dtypes that are copied into it without a loss, its shape, and whether it must be there.
Parameter = tuple[tuple[str, ...], tuple[int, ...], bool]
_PACKED = 8  # methods/w4a16.py:182
_DEFAULT_GROUP = 32  # methods/w4a16.py:185, where the top level of quantization_config has no group_size


@dataclass(frozen=True)
class Module:
    """A layer as vLLM builds it, and the matrices of the checkpoint in it, by name without ``.weight``."""

    prefix: str
    kind: str
    parts: dict[str, tuple[int, int]]


def problems(path: Path) -> list[str]:
    """Say what the loader would stumble over, one line each; none for a directory that it takes."""
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    layers = config["num_hidden_layers"]  # those of MTP are passed over
    tensors = {name: entry for name, entry in checkpoint.tensors.items() if _layer(name) < layers}
    method = _method(path, config)
    if method is None:
        return [f"quant_method {config['quantization_config']['quant_method']} is for another chip (utils.py:132)"]
    found, expected = [], set()
    for module in modules(config):
        try:
            scheme = method(module)
        except ValueError as error:
            found.append(f"{module.prefix}: {error}")
            continue
        if scheme != FLOAT and (scheme, module.kind) not in SCHEMES:
            found.append(f"{module.prefix}: no scheme {scheme} for {module.kind} (methods/registry.py:52)")
            continue
        for part, shape in module.parts.items():
            parameters = _parameters(scheme, *shape, config)
            expected |= {f"{part}.{end}" for end in parameters}
            found += list(_misfits(part, parameters, tensors))
    for name, entry in tensors.items():
        if name not in expected and entry.dtype not in (*HALF, "F32"):
            found.append(f"{name}: {entry.dtype}, and no parameter would take it")
        if name not in expected and re.search(r"\.weight_\w+$", name):
            found.append(f"{name}: no parameter has this name")
    return found


def modules(config: dict[str, Any]) -> Iterator[Module]:
    """The layers with matrices that may be quantised; the router is made without a quantization (vLLM bailing_moe)."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["moe_intermediate_size"]
    shared = config.get("moe_shared_expert_intermediate_size", width) * config["num_shared_experts"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        attention = {
            "query_key_value": ((heads + 2 * kv_heads) * head_dim, hidden),
            "dense": (hidden, heads * head_dim),
        }
        for name, shape in attention.items():
            yield Module(f"{at}.attention.{name}", "linear", {f"{at}.attention.{name}": shape})
        if layer < config["first_k_dense_replace"]:
            yield from _mlp(f"{at}.mlp", hidden, config["intermediate_size"])
            continue
        if shared:
            yield from _mlp(f"{at}.mlp.shared_experts", hidden, shared)
        experts: dict[str, tuple[int, int]] = {}
        for expert in range(config["num_experts"]):
            for module in _mlp(f"{at}.mlp.experts.{expert}", hidden, width):
                experts |= module.parts
        yield Module(f"{at}.mlp.experts", "moe", experts)


def _mlp(at: str, hidden: int, width: int) -> Iterator[Module]:
    gate_up = {f"{at}.{part}": (width, hidden) for part in FUSED["gate_up_proj"]}
    yield Module(f"{at}.gate_up_proj", "linear", gate_up)
    yield Module(f"{at}.down_proj", "linear", {f"{at}.down_proj": (hidden, width)})


def _layer(name: str) -> int:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _method(path: Path, config: dict[str, Any]) -> Callable[[Module], str] | None:
    """Find the method as utils.py:112-138 does; what it returns names a module's scheme or raises ValueError."""
    described = config.get("quantization_config") or {}
    file = path / "quant_model_description.json"  # modelslim_config.py, MODELSLIM_CONFIG_FILENAME
    if file.exists():
        description = json.loads(file.read_text())

        def by_description(module: Module) -> str:
            if described:  # vLLM config/model.py refuses two methods that differ
                raise ValueError("config.json has a quantization_config beside the description")
            return _described(module, description)

        return by_description
    if described.get("quant_method") == "compressed-tensors":
        return lambda module: _compressed(module, described)
    return None if described else lambda module: FLOAT


def _described(module: Module, description: dict[str, str]) -> str:
    """modelslim_config.py:348-382 and 681-708."""
    name = module.prefix.rpartition(".")[2]
    beginning = module.prefix.removesuffix(name)
    keys = [f"{beginning}{part}.weight" for part in FUSED.get(name, (name,))]
    missing = [key for key in keys if key not in description]
    if name not in FUSED and any(
        key.startswith(module.prefix) and key.endswith(".weight") and value == FLOAT
        for key, value in description.items()
    ):
        return FLOAT  # asked first, and any one key that begins so decides
    if missing:
        raise ValueError(f"KeyError: '{missing[0]}' in quant_model_description.json")
    types = {description[key] for key in keys}
    if len(types) > 1:
        raise ValueError(f"its parts are of different types: {sorted(types)}")
    return types.pop()


def _compressed(module: Module, described: dict[str, Any]) -> str:
    """compressed_tensors_config.py:279-307 and 342-439; the matching is vLLM's compressed_tensors/utils.py."""
    # Of the experts the first one's gate_proj stands for all (:186).
    name = f"{module.prefix}.0.gate_proj" if module.kind == "moe" else module.prefix
    end = name.rpartition(".")[2]
    parts = [name.removesuffix(end) + part for part in FUSED.get(end, (end,))]
    matched = [any(_matches(part, entry) for entry in described["ignore"]) for part in parts]
    if name in described["ignore"] or all(matched):
        return FLOAT
    if any(matched):
        raise ValueError("ignore names one of its parts and not the other")
    (group,) = described["config_groups"].values()
    if group["targets"] != [
        "Linear"
    ]:  # every linear layer's class has it in its name; :100-109 copies it to the experts
        raise ValueError(f"no target matches: {group['targets']}")
    weights, tokens = group["weights"], group["input_activations"]
    symmetric = weights["type"] == "int" and weights["symmetric"] and not weights["dynamic"]
    if described["format"] == "int-quantized" and tokens and symmetric:  # :391-400
        kinds = (weights["num_bits"], tokens["num_bits"], weights["strategy"], tokens["strategy"])
        if kinds == (8, 8, "channel", "token") and tokens["symmetric"] and tokens["dynamic"]:
            return "W8A8_DYNAMIC"
    if tokens is None and symmetric and (weights["num_bits"], weights["strategy"]) == (4, "group"):  # :425-439
        return "W4A16"
    raise ValueError("no compressed-tensors compatible quantization type (:378)")


def _matches(name: str, entry: str) -> bool:
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else name == entry


def _parameters(scheme: str, outputs: int, inputs: int, config: dict[str, Any]) -> dict[str, Parameter]:
    """The tensors of a matrix by the ends of their names; scales are parameters of the model's dtype, F32 is copied."""
    if (
        scheme == "W8A8_DYNAMIC"
    ):  # methods/w8a8_dynamic.py:61-73, 188-212; the offset is not asked for, method_adapters.py:138
        channel = (outputs, 1)
        return {
            "weight": (("I8",), (outputs, inputs), True),
            "weight_scale": ((*HALF, "F32"), channel, True),
            "weight_offset": ((*HALF, "F32"), channel, False),
        }
    if scheme == "W4A16":  # methods/w4a16.py:203-246
        group = config["quantization_config"].get("group_size", _DEFAULT_GROUP)
        return {
            "weight_packed": (("I32",), (outputs, inputs // _PACKED), True),
            "weight_scale": (HALF, (outputs, inputs // group), True),
            "weight_shape": (("I32", "I64"), (2,), True),
        }
    return {"weight": ((*HALF, "F32"), (outputs, inputs), True)}


def _misfits(part: str, parameters: dict[str, Parameter], tensors: dict[str, TensorEntry]) -> Iterator[str]:
    for end, (dtypes, shape, must) in parameters.items():
        entry = tensors.get(f"{part}.{end}")
        if entry is None:
            if must:
                yield f"{part}.{end}: missing"
        elif entry.dtype not in dtypes or entry.shape != shape:
            yield f"{part}.{end}: {entry.dtype} {list(entry.shape)}, wanted {' or '.join(dtypes)} {list(shape)}"
