"""Quantising a loaded model in memory: W8A8 or FP8 (all projections but router and head), or W4A16 (experts alone)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ascend.devices import get_device
from ascend.errors import UserError, suggest
from ascend.weights import MLP
from ascend.weights_quantised import FORMATS, quantised
from ops import layout
from ops.quantise import INT4_GROUP

if TYPE_CHECKING:
    from ascend.config import BailingMoeV2Config
    from ascend.model import BailingMoeV2ForCausalLM
    from ascend.parallel import Parallel

WHOLE_WIDTH = 64  # of an expert on a rank: what the NPU's op that quantises SwiGLU's result takes multiples of


def check_format(name: str) -> None:
    """Raise `UserError` unless ``name`` is a format that `quantise_model` knows."""
    if name not in FORMATS:
        raise UserError(f"unknown quantisation '{name}'{suggest(name, FORMATS)}; there is {', '.join(FORMATS)}")


def check_on(device: torch.device, dtype: torch.dtype, to: str, config: BailingMoeV2Config, parallel: Parallel) -> None:
    """Raise `UserError` if a model of ``dtype`` cannot be quantised to ``to`` there, divided so."""
    width = len(parallel.expert_width(config.moe_intermediate_size))
    if parallel.strategy == "mc2":
        raise UserError(f"expert-parallel strategy mc2 runs whole experts alone, not {to}; choose another strategy")
    if to == "w4a16":
        for name, inputs in (("hidden_size", config.hidden_size), ("the experts' width on a rank", width)):
            if inputs % min(INT4_GROUP, inputs) or inputs % 8:
                raise UserError(f"{name} {inputs} does not divide into groups of {INT4_GROUP} for w4a16; use w8a8")
    if to not in get_device(str(device)).quantised_formats():
        raise UserError(f"{device} does not compute in {to}; use w8a8")
    if layout.is_own(device):
        if dtype is torch.float32:
            raise UserError(f"{device} computes with quantised weights in bf16 or fp16 alone; give dtype='bfloat16'")
        if to == "w8a8" and width % WHOLE_WIDTH:
            raise UserError(
                f"{device} takes w8a8 experts of whole {WHOLE_WIDTH}s, not {width} wide on a rank; use w4a16"
            )


def quantise_model(model: BailingMoeV2ForCausalLM, to: str) -> None:
    """Round the weights of all layers to ``to``, by nearest, in place; `ops.quantise` defines how.

    Router, norms, embedding, head and the MTP layers' ``eh_proj`` keep their precision. Raises `UserError` for an
    unknown format, a model that is quantised already, or one whose weights are in a device's layout already.
    """
    check_format(to)
    if model.quantised or model.model.laid_out:
        raise UserError("only a model as it was loaded can be quantised: give `quantise` to `ascend.load_model`")
    for layer in model.model.layers:
        quantise_layer(layer, to)
    model.quantised = to


def quantise_layer(layer: Any, to: str) -> None:
    """Round the weights of one `DecoderLayer` as `quantise_model` does all."""
    attention, mlp = layer.attention, layer.mlp
    attention.query_key_value, attention.dense = (
        quantised(attention.query_key_value, to),
        quantised(attention.dense, to),
    )
    if isinstance(mlp, MLP):
        layer.mlp = quantised(mlp, to)
    else:
        mlp.experts, mlp.shared_experts = quantised(mlp.experts, to), quantised(mlp.shared_experts, to)
