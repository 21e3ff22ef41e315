"""What a BailingMoeV2 checkpoint holds: the name, shape and dtype of every tensor, from its `config.json` alone.

Sizes in the comments: H hidden, D head_dim, N query heads, K key/value heads, E experts, I width of an MLP.
Names and shapes are those of the model family's own `modeling_bailing_moe_v2.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Shape = tuple[int, ...]
TensorShapes = dict[str, tuple[Shape, str]]

BYTES_PER_ELEMENT = {"BF16": 2, "F16": 2, "F32": 4}
_SAFETENSORS_DTYPE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def tensor_shapes(config: Mapping[str, Any]) -> TensorShapes:
    """Return ``{name: (shape, dtype)}`` of the unquantised checkpoint that ``config`` (a `config.json`) describes.

    ``dtype`` is a safetensors name (``"BF16"``); only `expert_bias` is always ``"F32"``. MTP layers follow the main
    ones as ``model.layers.{num_hidden_layers + i}``. The order is the model's, from the embedding to the head.
    """
    dtype = _SAFETENSORS_DTYPE[config.get("torch_dtype") or config.get("dtype") or "bfloat16"]
    hidden_size, vocab_size = config["hidden_size"], config["vocab_size"]
    num_layers, num_mtp_layers = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 0

    shapes: dict[str, Shape] = {"model.word_embeddings.weight": (vocab_size, hidden_size)}
    for layer in range(num_layers + num_mtp_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer(config, layer).items()}
    shapes["model.norm.weight"] = (hidden_size,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab_size, hidden_size)
    return {name: (shape, "F32" if name.endswith("expert_bias") else dtype) for name, shape in shapes.items()}


def count(shapes: TensorShapes) -> tuple[int, int]:
    """Return the number of parameters and of bytes that ``shapes`` stands for."""
    sizes = [(math.prod(shape), dtype) for shape, dtype in shapes.values()]
    return sum(size for size, _ in sizes), sum(size * BYTES_PER_ELEMENT[dtype] for size, dtype in sizes)


def _layer(config: Mapping[str, Any], layer: int) -> dict[str, Shape]:
    """One decoder layer, or an MTP layer when ``layer`` lies beyond the main ones."""
    hidden_size = config["hidden_size"]
    is_mtp = layer >= config["num_hidden_layers"]
    shapes = {f"attention.{name}": shape for name, shape in _attention(config).items()}
    if is_mtp or layer >= config["first_k_dense_replace"]:
        shapes |= _moe(config)
    else:
        shapes |= _mlp("mlp", hidden_size, config["intermediate_size"])
    norms = ["input_layernorm", "post_attention_layernorm"]
    if is_mtp:
        norms += ["enorm", "hnorm", "final_layernorm"]
        shapes["eh_proj.weight"] = (hidden_size, 2 * hidden_size)
    return shapes | {f"{norm}.weight": (hidden_size,) for norm in norms}


def _attention(config: Mapping[str, Any]) -> dict[str, Shape]:
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden_size // num_heads
    qkv_size = (num_heads + 2 * config["num_key_value_heads"]) * head_dim  # [q heads | k heads | v heads]
    shapes: dict[str, Shape] = {
        "query_key_value.weight": (qkv_size, hidden_size),  # [(N + 2K)·D, H]
        "dense.weight": (hidden_size, num_heads * head_dim),  # [H, N·D]
    }
    if config.get("use_qkv_bias"):
        shapes["query_key_value.bias"] = (qkv_size,)
    if config.get("use_bias"):
        shapes["dense.bias"] = (hidden_size,)
    if config.get("use_qk_norm"):
        shapes |= {"query_layernorm.weight": (head_dim,), "key_layernorm.weight": (head_dim,)}
    return shapes


def _moe(config: Mapping[str, Any]) -> dict[str, Shape]:
    hidden_size, num_experts, width = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    shapes: dict[str, Shape] = {"mlp.gate.weight": (num_experts, hidden_size)}  # [E, H]
    if config.get("moe_router_enable_expert_bias"):
        shapes["mlp.gate.expert_bias"] = (num_experts,)
    for expert in range(num_experts):
        shapes |= _mlp(f"mlp.experts.{expert}", hidden_size, width)
    if num_shared := config.get("num_shared_experts") or 0:
        # Several shared experts are one MLP of that many times the width.
        shared_width = (config.get("moe_shared_expert_intermediate_size") or width) * num_shared
        shapes |= _mlp("mlp.shared_experts", hidden_size, shared_width)
    return shapes


def _mlp(prefix: str, hidden_size: int, width: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden_size),  # [I, H]
        f"{prefix}.up_proj.weight": (width, hidden_size),
        f"{prefix}.down_proj.weight": (hidden_size, width),  # [H, I]
    }
