"""Whether a checkpoint's weights are those that its `config.json` asks for, in formats that an engine will see as such.

Told from headers, `config.json` and `quant_model_description.json`; `values.py` looks at the numbers. Works on any
checkpoint, also one that another tool has made. Every function returns what is wrong, a line each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ascend.checkpoint import Checkpoint, open_checkpoint
from ascend.errors import UserError, suggest
from ascend.stored import PLAIN, StoredWeight, stored_weights
from convert.classes import MATRICES, tensor_class
from convert.described import check_described
from convert.shapes import Shape, tensor_shapes
from convert.values import Advance, check_values

MOST_EXPERTS = 1_000_000  # in all layers; the largest model of this family has 8,192
DTYPE_OF = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def check_content(directory: Path, advance: Advance = lambda nbytes: None) -> list[str]:
    """Check names, shapes, formats, their description and, where these are right, every value."""
    try:
        checkpoint = open_checkpoint(directory)
        weights = stored_weights(checkpoint.tensors)
        problems = list(check_weights(checkpoint, weights)) + list(check_described(checkpoint, weights))
    except UserError as problem:
        return [str(problem)]
    return problems or list(check_values(weights, advance))


def check_weights(checkpoint: Checkpoint, weights: Mapping[str, StoredWeight]) -> Iterator[str]:
    """Every weight of the model is there, of the right shape, in a format that fits its class; none is extra."""
    wanted, optional = _wanted(checkpoint)
    for name, shape in wanted.items():
        one = weights.get(name)
        if one is None:
            if name not in optional:
                yield f"{checkpoint.path}: tensor {name} is missing from all files"
        elif one.shape != shape:
            yield (f"{one.values.file}: tensor {name} has shape {list(one.shape)}, config.json asks for {list(shape)}")
        elif one.format != PLAIN and tensor_class(name) not in MATRICES:
            yield (
                f"{one.values.file}: tensor {name} is {one.format}; {tensor_class(name)} must keep its precision, "
                "no engine reads it otherwise"
            )
    for name, one in weights.items():
        if name not in wanted:
            yield (f"{one.values.file}: tensor {name} has no place in the model of config.json{suggest(name, wanted)}")
    yield from _check_dtypes(checkpoint, weights)


def _wanted(checkpoint: Checkpoint) -> tuple[dict[str, Shape], set[str]]:
    """The shape of every tensor that may be there, and the names of those that need not be."""
    from ascend.config import BailingMoeV2Config  # transformers is slow to import

    try:
        config = BailingMoeV2Config(**{**checkpoint.config, "quantization_config": None})
    except UserError as problem:
        raise UserError(f"{checkpoint.path}: {problem}") from None
    experts = (config.num_hidden_layers + config.num_nextn_predict_layers) * config.num_experts
    if experts > MOST_EXPERTS:
        raise UserError(f"{checkpoint.path / 'config.json'}: asks for {experts:,} experts; the file is damaged")
    keys = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    whole = {"moe_router_enable_expert_bias": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    wanted = {name: shape for name, (shape, _) in tensor_shapes(keys | whole).items()}
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if not config.moe_router_enable_expert_bias:
        optional |= {name for name in wanted if name.endswith(".expert_bias")}
    return wanted, optional


def _check_dtypes(checkpoint: Checkpoint, weights: Mapping[str, StoredWeight]) -> Iterator[str]:
    """Plain tensors have one half type, and the embedding the one that `config.json` says; fp32 among them is fine."""
    halves = {one.values.dtype: one.values for one in weights.values() if one.values.dtype in ("BF16", "F16")}
    if len(halves) == 2:
        yield f"{halves['F16'].file}: holds F16 tensors, {halves['BF16'].file} BF16 ones; convert to one of them"
    said = checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype")
    embedding = weights.get("model.word_embeddings.weight")
    if embedding is not None and said is not None and DTYPE_OF.get(str(said)) != embedding.values.dtype:
        file, found = checkpoint.path / "config.json", embedding.values.dtype
        yield f"{file}: says {said}, model.word_embeddings.weight is {found}"
