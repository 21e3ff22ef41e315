"""A BailingMoeV2 checkpoint as a GGUF file, for llama.cpp, with no tokenizer in it.

Keys and tensors are those that llama.cpp's `conversion/bailing.py` writes and `src/models/bailingmoe2.cpp` reads; their
spelling comes from the `gguf` package. That code takes heads only that are together as wide as the model (Ling's are).
Where they are not, the file says ``glm4moe``: the same graph in `src/models/glm4-moe.cpp`, with one norm of another
name. MTP layers, which llama.cpp would skip, are left out. As llama.cpp's own converter does, norms, router and expert
bias are stored in fp32 whatever the rest is in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend.checkpoint import Checkpoint, open_checkpoint
from ascend.errors import UserError

if TYPE_CHECKING:
    from ascend.config import BailingMoeV2Config

MLP = ("gate_proj", "up_proj", "down_proj")
PLAIN = ("BF16", "F16", "F32")  # of safetensors; anything else is quantised


@dataclass(frozen=True)
class Piece:
    """A tensor of the file: its name as if the checkpoint had it in one, and the checkpoint's tensors stacked in it."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def in_fp32(self) -> bool:
        """Whether it is stored in fp32 in any case."""
        return len(self.shape) == 1 or ".mlp.gate." in self.name


def write_gguf(source: Path, target: Path, dtype: str) -> None:
    """Write the checkpoint directory ``source`` to ``target``, one tensor in memory at a time.

    ``dtype``: torch's name of what matrices are stored in. Raises `UserError` for what llama.cpp's model lacks.
    """
    import gguf
    import numpy as np
    import torch
    from safetensors import safe_open

    from ascend.config import BailingMoeV2Config

    checkpoint = open_checkpoint(source)
    config = BailingMoeV2Config(**checkpoint.config)
    _refuse(config, checkpoint)
    pieces = list(_pieces(config, checkpoint))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BAILINGMOE2, config.num_hidden_layers)
    kinds = {
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "float16": gguf.GGMLQuantizationType.F16,
        "float32": gguf.GGMLQuantizationType.F32,
    }
    stored = [torch.float32 if one.in_fp32 else getattr(torch, dtype) for one in pieces]
    as_wide = config.num_attention_heads * config.head_dim == config.hidden_size
    architecture = gguf.MODEL_ARCH.BAILINGMOE2 if as_wide else gguf.MODEL_ARCH.GLM4_MOE
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    _write_keys(writer, config)
    for piece, torch_dtype in zip(pieces, stored, strict=True):
        name, _, suffix = piece.name.rpartition(".")
        if suffix == "expert_bias":
            name, suffix = piece.name, "bias"
        nbytes = math.prod(piece.shape) * torch_dtype.itemsize
        in_bytes = (*piece.shape[:-1], piece.shape[-1] * torch_dtype.itemsize)  # numpy knows no bf16
        kind = kinds[str(torch_dtype).removeprefix("torch.")]
        spelt = names[name] if as_wide else names[name].replace("ffn_norm", "post_attention_norm")
        writer.add_tensor_info(f"{spelt}.{suffix}", in_bytes, np.dtype(np.uint8), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with ExitStack() as files:
        opened = {
            file: files.enter_context(safe_open(file, framework="pt"))
            for file in {entry.file for entry in checkpoint.tensors.values()}
        }
        for piece, torch_dtype in zip(pieces, stored, strict=True):
            parts = [opened[checkpoint.tensors[one].file].get_tensor(one).to(torch_dtype) for one in piece.parts]
            tensor = parts[0] if len(parts) == 1 else torch.stack(parts)
            writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
    writer.close()


def _refuse(config: BailingMoeV2Config, checkpoint: Checkpoint) -> None:
    from ascend.rope import Rope

    rope = Rope.from_config(config)
    magnitude = 1.0 if rope.factor is None else 1.0 + 0.1 * math.log(rope.factor)  # as llama.cpp computes it
    problems = {
        "it is quantised": any(entry.dtype not in PLAIN for entry in checkpoint.tensors.values()),
        "it has no QK norm": not config.use_qk_norm,
        "it has biases": config.use_qkv_bias or config.use_bias,
        "it has no shared expert": not config.num_shared_experts,
        "it normalises its lm_head": config.norm_head,
        "its YaRN has a magnitude of its own": not math.isclose(rope.attention_factor, magnitude),
        "its YaRN does not truncate": not rope.truncate,
    }
    for problem, found in problems.items():
        if found:
            raise UserError(f"engine llama.cpp: {checkpoint.path}: {problem}, which no GGUF file made here can hold")


def _pieces(config: BailingMoeV2Config, checkpoint: Checkpoint) -> Iterator[Piece]:
    """Yield what the file holds, of the checkpoint's main model; a tied lm_head is stored a second time."""
    yield _piece(checkpoint, "model.word_embeddings.weight")
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for leaf in (
            "input_layernorm.weight",
            "attention.query_key_value.weight",
            "attention.query_layernorm.weight",
            "attention.key_layernorm.weight",
            "attention.dense.weight",
            "post_attention_layernorm.weight",
        ):
            yield _piece(checkpoint, prefix + leaf)
        if not config.is_moe_layer(layer):
            for leaf in MLP:
                yield _piece(checkpoint, f"{prefix}mlp.{leaf}.weight")
            continue
        yield _piece(checkpoint, f"{prefix}mlp.gate.weight")
        if f"{prefix}mlp.gate.expert_bias" in checkpoint.tensors:
            yield _piece(checkpoint, f"{prefix}mlp.gate.expert_bias")
        for leaf in MLP:
            experts = (f"{prefix}mlp.experts.{expert}.{leaf}.weight" for expert in range(config.num_experts))
            yield _piece(checkpoint, f"{prefix}mlp.experts.{leaf}.weight", *experts)
            yield _piece(checkpoint, f"{prefix}mlp.shared_experts.{leaf}.weight")
    yield _piece(checkpoint, "model.norm.weight")
    head = "model.word_embeddings.weight" if config.tie_word_embeddings else "lm_head.weight"
    yield _piece(checkpoint, "lm_head.weight", head)


def _piece(checkpoint: Checkpoint, name: str, *parts: str) -> Piece:
    parts = parts or (name,)
    for part in parts:
        if part not in checkpoint.tensors:
            raise UserError(f"{checkpoint.path}: tensor {part} is missing")
    shape = checkpoint.tensors[parts[0]].shape
    return Piece(name, parts, (len(parts), *shape) if len(parts) > 1 else shape)


def _write_keys(writer: Any, config: BailingMoeV2Config) -> None:
    import gguf

    from ascend.rope import Rope

    rope = Rope.from_config(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(rope.rotary_dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if config.topk_group < config.n_group:  # llama.cpp takes no groups of which all are kept
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.num_shared_experts)
    # llama.cpp multiplies this by the number of shared experts
    writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size // config.num_shared_experts)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_tokenizer_model("none")
