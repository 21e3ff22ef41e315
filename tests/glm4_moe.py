"""The oracle of `test_model.py`: transformers' Glm4Moe, the same architecture by other names, fed our checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

RENAMED = {
    "model.word_embeddings.": "model.embed_tokens.",
    ".attention.dense.": ".self_attn.o_proj.",
    ".attention.query_layernorm.": ".self_attn.q_norm.",
    ".attention.key_layernorm.": ".self_attn.k_norm.",
    ".mlp.gate.expert_bias": ".mlp.gate.e_score_correction_bias",
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a checkpoint's configuration and tensors, as stored."""
    tensors: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return json.loads((path / "config.json").read_text()), tensors


def main_model(path: Path, scratch: Path) -> Glm4MoeForCausalLM:
    """Return the decoder layers and the head of a checkpoint as Glm4Moe, fp32."""
    config, tensors = read(path)
    depth = config["num_hidden_layers"]
    kept = {
        name: t
        for name, t in tensors.items()
        if not any(name.startswith(f"model.layers.{depth + i}.") for i in range(9))
    }
    return _glm(config, kept, scratch)


def mtp_model(path: Path, scratch: Path, layer: int) -> Glm4MoeForCausalLM:
    """Return MTP layer ``layer`` of a checkpoint as a Glm4Moe of one layer, its final norm as the model's norm."""
    config, tensors = read(path)
    prefix = f"model.layers.{config['num_hidden_layers'] + layer}."
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    kept = {f"model.layers.0.{name}": t for name, t in own.items() if name.split(".")[0] not in MTP_ONLY}
    kept["model.norm.weight"] = own["final_layernorm.weight"]
    kept |= {name: tensors[name] for name in ("model.word_embeddings.weight", "lm_head.weight") if name in tensors}
    return _glm(config | {"num_hidden_layers": 1, "first_k_dense_replace": 0}, kept, scratch)


MTP_ONLY = ("enorm", "hnorm", "eh_proj", "final_layernorm")


def _glm(config: dict[str, Any], tensors: dict[str, Tensor], scratch: Path) -> Glm4MoeForCausalLM:
    renamed = {}
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    for name, tensor in tensors.items():
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        if ".attention.query_key_value." in name:
            parts = tensor.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
            for letter, part in zip("qkv", parts, strict=True):
                renamed[name.replace(".attention.query_key_value.", f".self_attn.{letter}_proj.")] = part.clone()
        else:
            renamed[name] = tensor
    rope = {"rope_theta": config["rope_theta"], "partial_rotary_factor": config["partial_rotary_factor"]}
    rope |= config["rope_scaling"] or {}
    rope["rope_type"] = rope.pop("type", "default")
    glm = Glm4MoeConfig(
        **{key: config[key] for key in SAME},
        n_routed_experts=config["num_experts"],
        n_shared_experts=config["num_shared_experts"],
        attention_bias=config["use_qkv_bias"],
        rope_parameters=rope,
        num_nextn_predict_layers=0,
    )
    scratch.mkdir(parents=True)
    glm.architectures = ["Glm4MoeForCausalLM"]
    glm.save_pretrained(scratch)
    save_file(renamed, scratch / "model.safetensors", {"format": "pt"})
    model, info = Glm4MoeForCausalLM.from_pretrained(scratch, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], f"the oracle lacks weights: {info['missing_keys']}"
    return model.eval()


SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "moe_intermediate_size",
    "num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace", "norm_topk_prob",
    "routed_scaling_factor", "use_qk_norm", "tie_word_embeddings",
)  # fmt: skip
