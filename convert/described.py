"""Whether what a checkpoint says of its formats is how its weights are stored: engines believe what it says.

`quantization_config` of `config.json` ("fp8", "compressed-tensors"), and `quant_model_description.json` of ModelSlim.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ascend.checkpoint import Checkpoint, parse_json
from ascend.stored import FP8_BLOCK, PLAIN, StoredWeight
from convert.classes import MATRICES, tensor_class

DESCRIPTION = "quant_model_description.json"
_MODELSLIM = {"FLOAT": PLAIN, "W8A8_DYNAMIC": "w8a8"}
_ENDS = ("weight_scale", "weight_offset")
_NOT_TENSORS = ("model_quant_type", "version", "group_size")
# compressed-tensors: what the `weights` of a group say, and the `format` that goes with it.
_SCHEMES = {
    ("int", 8, "channel"): ("w8a8", "int-quantized"),
    ("int", 4, "group"): ("w4a16", "pack-quantized"),
    ("float", 8, "block"): ("fp8", "float-quantized"),
    ("float", 8, "channel"): ("fp8-channel", "float-quantized"),
}


def check_described(checkpoint: Checkpoint, weights: Mapping[str, StoredWeight]) -> Iterator[str]:
    """Yield a line for each weight that is not stored as it is said to be, and for what cannot be understood."""
    said = checkpoint.config.get("quantization_config")
    file = checkpoint.path / DESCRIPTION
    is_modelslim = file.is_file()
    if said is None and not is_modelslim:
        quantised = [one for one in weights.values() if one.format != PLAIN]
        if quantised:
            yield (
                f"{checkpoint.path / 'config.json'}: has no quantization_config, but {len(quantised)} weights are "
                f"quantised ({quantised[0].name} is {quantised[0].format}): engines would misread them"
            )
    if said is not None:
        for problem in _check_config(said, weights):
            yield f"{checkpoint.path / 'config.json'}: quantization_config {problem}"
    if is_modelslim:
        for problem in _check_modelslim(parse_json(file, file.read_bytes()), checkpoint, weights):
            yield f"{file}: {problem}"


def _check_config(said: Any, weights: Mapping[str, StoredWeight]) -> Iterator[str]:
    try:
        described = _READERS[said["quant_method"]](said)
    except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
        yield f"is not understood ({error!r}); known are quant_method {' and '.join(_READERS)}"
        return
    if all(one.format == PLAIN for one in weights.values()):
        yield "is there, but all weights are plain"
    for one in weights.values():
        module = one.name.removesuffix(".weight")
        if len(one.shape) != 2 or one.name.startswith("model.word_embeddings."):
            continue  # engines see no linear layer there
        form, group = described(module)
        if one.format != form:
            yield f"says {module} is {form}, it is stored as {one.format}"
        elif (
            group is not None
            and one.scale is not None
            and one.shape[1] // one.scale.shape[-1] != min(group, one.shape[1])
        ):
            yield f"says groups of {group}, {module} has {one.scale.shape[-1]} of {one.shape[1]} inputs"


Described = Callable[
    [str], tuple[str, int | None]
]  # of a module: its format, and inputs per scale where there are groups


def _fp8(said: Mapping[str, Any]) -> Described:
    """DeepSeek's and this family's own. What is no MLP or attention needs not be listed: it is never quantised."""
    block = said.get("weight_block_size")
    if block != [FP8_BLOCK, FP8_BLOCK] or said.get("activation_scheme") != "dynamic":
        raise ValueError(f"weight_block_size {block}, activation_scheme {said.get('activation_scheme')}")
    left = list(said.get("modules_to_not_convert") or ())

    def described(module: str) -> tuple[str, int | None]:
        is_plain = tensor_class(f"{module}.weight") not in MATRICES or any(_is_within(module, name) for name in left)
        return (PLAIN if is_plain else "fp8"), None

    return described


def _compressed_tensors(said: Mapping[str, Any]) -> Described:
    groups = []
    for group in said["config_groups"].values():
        weights = group["weights"]
        form, layout = _SCHEMES[weights["type"], weights["num_bits"], weights["strategy"]]
        if weights.get("symmetric") is False:
            raise ValueError("symmetric is false")
        if layout not in (said.get("format"), group.get("format")):
            raise ValueError(f"format {said.get('format')} with weights of {form}")
        size = weights.get("group_size") if form == "w4a16" else None
        if form == "w4a16" and (type(size) is not int or size < 1):
            raise ValueError(f"group_size {size!r}")
        groups.append(([_pattern(target) for target in group["targets"]], form, size))
    left = [_pattern(name) for name in said.get("ignore") or ()]

    def described(module: str) -> tuple[str, int | None]:
        if any(pattern.match(module) for pattern in left):
            return PLAIN, None
        return next(
            ((form, size) for targets, form, size in groups if any(target.match(module) for target in targets)),
            (PLAIN, None),
        )

    return described


_READERS: dict[str, Callable[[Mapping[str, Any]], Described]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
}


def _pattern(text: str) -> re.Pattern[str]:
    """As compressed-tensors matches modules: by name, by ``Linear``, or after ``re:`` by how a name begins."""
    if text == "Linear":
        return re.compile("")
    return re.compile(text[3:] if text.startswith("re:") else re.escape(text) + r"\Z")


def _is_within(module: str, name: str) -> bool:
    """As quant_method fp8 is read: whole parts of the module's name, anywhere in it."""
    return f".{name}." in f".{module}."


def _check_modelslim(
    said: Mapping[str, Any], checkpoint: Checkpoint, weights: Mapping[str, StoredWeight]
) -> Iterator[str]:
    """Every tensor by name, and per MoE layer one key more, which vllm-ascend 0.23 looks up for its experts.

    That is for an architecture which is not in its table of fused modules (quantization/modelslim_config.py).
    """
    wanted: dict[str, str] = {}
    for one in weights.values():
        kind = next((kind for kind, form in _MODELSLIM.items() if form == one.format), None)
        if kind is None:
            yield f"speaks of W8A8, but {one.name} is {one.format}"
            continue
        module = one.name.removesuffix(".weight")
        wanted |= {f"{module}.{end}": kind for end in _ENDS if f"{module}.{end}" in checkpoint.tensors}
        wanted[one.name] = kind
        if kind != "FLOAT" and "weight_offset" not in dict(one.entries()):
            yield f"{module}.weight_offset is missing from all files, and its loader wants one"
        if tensor_class(one.name) == "routed_experts":
            wanted[f"{module.partition('.experts.')[0]}.experts.weight"] = kind
    for name, kind in wanted.items():
        if said.get(name) != kind:
            yield f"says {name} is {said.get(name, 'nothing')}, it is {kind}"
    for name in said:
        if name not in wanted and said[name] in (*_MODELSLIM, "W8A8") and name not in _NOT_TENSORS:
            yield f"names {name}, which is not there"
