"""The demo's sizes and its `config.json`: the keys that the model family's configs carry, all of them consistent."""

from __future__ import annotations

from typing import Any

from ascend.errors import UserError, suggest
from convert.demo_tokenizer import Layout, layout

MARKER = "random_weights_demo"
NOTE = "RANDOM WEIGHTS: a demo of the architecture. Its text means nothing and is no medical advice."

# What every size has in common, under the names and with the values of the family's own configs.
_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "moe_router_enable_expert_bias": True,
    "n_group": 8,
    "norm_topk_prob": True,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000.0,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "use_bias": False,
    "use_cache": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
}
_LING = {"vocab_size": 157184, "head_dim": 128, "num_key_value_heads": 4, "max_position_embeddings": 32768}

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the smallest that vLLM's CPU attention takes
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 64,
        "max_position_embeddings": 4096,
        "num_nextn_predict_layers": 1,
    },
    "tiny-npu": {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,  # what the attention op of an Ascend card takes (128 or 192), and vLLM-Ascend gives it
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 128,
        "max_position_embeddings": 4096,
        "num_nextn_predict_layers": 1,
    },
    "small": {
        "vocab_size": 32768,
        "hidden_size": 1024,
        "intermediate_size": 2304,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_experts": 64,
        "moe_intermediate_size": 256,
        "max_position_embeddings": 32768,
        "num_nextn_predict_layers": 1,
    },
    "ling-mini": _LING
    | {
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "moe_intermediate_size": 512,
    },
    "ling-flash": _LING
    | {
        "hidden_size": 4096,
        "intermediate_size": 9216,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "moe_intermediate_size": 1024,
    },
}
CONFIG_ONLY = ("ling-mini", "ling-flash")  # the real shapes, far too large to be written with random weights
_LING_FIRST_ADDED = 156891

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
# Keys that follow from others unless they are given, and keys that not every config of the family carries.
_DERIVED = ("moe_shared_expert_intermediate_size", "rotary_dim", "eos_token_id", "pad_token_id")
_OPTIONAL = ("norm_head",)


def demo_config(
    size: str, seed: int, dtype: str, yarn: float | None, overrides: dict[str, Any]
) -> tuple[dict[str, Any], Layout]:
    """Return the config of a demo and the layout of its vocabulary.

    ``yarn`` extends the context by that factor, as AntAngelMed does. Keys that depend on one another follow an
    override: the rotary size its factor, the shared experts' width the routed one's, `topk_group` falls to `n_group`.
    """
    for what, value, known in (("size", size, SIZES), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise UserError(f"unknown {what} '{value}'{suggest(value, known)}; there is {', '.join(known)}")
    config = _COMMON | SIZES[size]
    known_keys = {*config, *_DERIVED, *_OPTIONAL}
    for key in overrides:
        if key not in known_keys:
            raise UserError(f"unknown config key '{key}'{suggest(key, known_keys)}")
    if yarn is not None:
        config |= _yarn(yarn, config["max_position_embeddings"])
    config |= overrides

    tokens = layout(config["vocab_size"], _LING_FIRST_ADDED if size in CONFIG_ONLY else None)
    if "topk_group" not in overrides:
        config["topk_group"] = min(config["topk_group"], config["n_group"])
    if "rotary_dim" in overrides:
        config["partial_rotary_factor"] = config["rotary_dim"] / config["head_dim"]
    derived = {
        "rotary_dim": int(config["head_dim"] * config["partial_rotary_factor"]),
        "moe_shared_expert_intermediate_size": config["moe_intermediate_size"],
        "eos_token_id": tokens.id_of("<|endoftext|>"),
        "pad_token_id": tokens.id_of("<|endoftext|>"),
    }
    config = derived | config
    _check(config)
    marker = {"size": size, "seed": seed, "note": NOTE}
    head = {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "torch_dtype": DTYPES[dtype]}
    # The version is the one in the family's files; without it transformers takes an unknown model for a faulty Mistral.
    return head | dict(sorted(config.items())) | {"transformers_version": "4.52.3", MARKER: marker}, tokens


def generation_config(tokens: Layout) -> dict[str, Any]:
    """Return the content of `generation_config.json`: a turn ends at either of two tokens, as in the family's file."""
    start, end, role_end = (tokens.id_of(token) for token in ("<|startoftext|>", "<|endoftext|>", "<|role_end|>"))
    return {
        "bos_token_id": start,
        "eos_token_id": [end, role_end],
        "pad_token_id": end,
        "transformers_version": "4.52.3",
    }


def _yarn(factor: float, original_length: int) -> dict[str, Any]:
    if not 1 < factor <= 1024:
        raise UserError(f"YaRN factor {factor:g} is not between 1 and 1024: how many times longer the context is")
    # Both spellings of the type: transformers and vLLM read `rope_type`, older files and tools `type`.
    kind = {"rope_type": "yarn", "type": "yarn"}
    scaling = kind | {"factor": factor, "original_max_position_embeddings": original_length}
    return {"rope_scaling": scaling, "max_position_embeddings": int(original_length * factor)}


def _check(config: dict[str, Any]) -> None:
    """Refuse a combination that no implementation of the architecture could load."""
    for key in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "n_group", "topk_group"):
        if config[key] < 1:
            raise UserError(f"impossible config: {key} {config[key]} is below 1")
    for key in ("num_nextn_predict_layers", "num_shared_experts", "first_k_dense_replace"):
        if config[key] < 0:
            raise UserError(f"impossible config: {key} {config[key]} is negative")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    num_experts, top_k = config["num_experts"], config["num_experts_per_tok"]
    n_group, topk_group = config["n_group"], config["topk_group"]
    rotary_dim, head_dim = config["rotary_dim"], config["head_dim"]
    for wrong, what in (
        (heads % kv_heads, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"),
        (num_experts % n_group, f"num_experts {num_experts} is no multiple of n_group {n_group}"),
        (num_experts < 2 * n_group, f"num_experts {num_experts} leaves no two experts to each of {n_group} groups"),
        (topk_group > n_group, f"topk_group {topk_group} exceeds n_group {n_group}"),
        (
            top_k * n_group > num_experts * topk_group,
            f"num_experts_per_tok {top_k} exceeds the experts of {topk_group} of {n_group} groups of {num_experts}",
        ),
        (rotary_dim % 2, f"rotary_dim {rotary_dim} is odd"),
        (rotary_dim > head_dim, f"rotary_dim {rotary_dim} exceeds head_dim {head_dim}"),
    ):
        if wrong:
            raise UserError(f"impossible config: {what}")
