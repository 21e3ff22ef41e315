"""`python -m convert eagle3-init DIR --model MODEL`: an EAGLE3 draft head of the published shape, with random weights.

For trying the serving path and for timing it; such a head agrees with its model by chance alone, so it never pays.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ascend.arguments import Parser
from ascend.checkpoint import SINGLE, read_config
from ascend.config import BailingMoeV2Config
from ascend.eagle3_config import Eagle3Config, tensor_shapes
from ascend.errors import UserError
from convert.demo_config import DTYPES
from convert.staging import staged_directory

NOTE = "RANDOM WEIGHTS: a draft head for tests. It is not trained, so hardly any of its drafts is right."


@dataclass(frozen=True)
class Head:
    """A head that was written."""

    path: str
    parameters: int
    draft_vocab_size: int
    note: str = NOTE


def write_head(
    path: str | os.PathLike[str],
    model: str | os.PathLike[str],
    seed: int = 0,
    dtype: str = "bf16",
    draft_vocab_size: int | None = None,
) -> Head:
    """Write a head for the checkpoint in ``model`` to the new directory ``path``: `config.json`, `model.safetensors`.

    The names are SpecForge's, the shape is that of Ling-flash-2.0's published head; ``draft_vocab_size`` is 32000 or
    the model's if not given. Only the model's `config.json` is read. Raises `UserError` for a directory that is not
    empty, a vocabulary larger than the model's, or a model that is none of this architecture.
    """
    target = Path(path).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there and not empty: give a new directory")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is no directory: make it first, or give another place")
    config = BailingMoeV2Config(**read_config(Path(model)))
    shape = Eagle3Config.published(config)
    if draft_vocab_size is not None:
        if not 0 < draft_vocab_size <= shape.vocab_size:
            raise UserError(f"draft vocabulary {draft_vocab_size} is not between 1 and the model's {shape.vocab_size}")
        shape = replace(shape, draft_vocab_size=draft_vocab_size)
    tensors = _tensors(shape, seed, getattr(torch, DTYPES[dtype]))
    with staged_directory(target) as staging:
        (staging / "config.json").write_text(json.dumps(_config(shape, config, dtype), indent=2) + "\n")
        save_file(tensors, staging / SINGLE)
    parameters = sum(one.numel() for one in tensors.values() if one.is_floating_point())
    return Head(str(target), parameters, shape.draft_vocab_size)


def _config(shape: Eagle3Config, model: BailingMoeV2Config, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "draft_vocab_size": shape.draft_vocab_size,
        # The layers whose output is taken, as SpecForge counts.
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in shape.tapped],
            "use_aux_hidden_state": True,
        },
        "eos_token_id": model.eos_token_id,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": shape.num_key_value_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": DTYPES[dtype],
        "vocab_size": shape.vocab_size,
        "note": NOTE,
    }


def _tensors(shape: Eagle3Config, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(size, dtype=dtype)
        if len(size) == 1
        else torch.empty(size).normal_(0.0, 0.02, generator=generator).to(dtype)
        for name, size in tensor_shapes(shape).items()
    }
    if shape.draft_vocab_size == shape.vocab_size:  # vLLM has no place for the tables then
        return tensors
    drafted = torch.arange(shape.draft_vocab_size)
    target = drafted * shape.vocab_size // shape.draft_vocab_size  # spread over the vocabulary
    tensors["d2t"] = target - drafted
    tensors["t2d"] = torch.zeros(shape.vocab_size, dtype=torch.bool).index_fill(0, target, True)
    return tensors


def main(argv: Sequence[str]) -> int:
    """Run `python -m convert eagle3-init DIR`; ``argv`` begins with the command."""
    parser = Parser("convert eagle3-init", f"Write an EAGLE3 draft head. {NOTE}")
    parser.add_argument("dir", metavar="DIR", help="directory to make")
    parser.add_argument("--model", required=True, metavar="MODEL", help="checkpoint it is to draft for")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the weights (default 0)")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES), help="default bf16")
    parser.add_argument("--draft-vocab-size", type=int, metavar="N", help="default 32000, or the model's if smaller")
    args = parser.read(argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a plain SIGTERM would leave the staging directory behind
    head = write_head(args.dir, args.model, args.seed, args.dtype, args.draft_vocab_size)
    print(f"{head.path}: {head.parameters:,} parameters, {head.draft_vocab_size:,} tokens, {args.dtype}\n{NOTE}")
    return 0
