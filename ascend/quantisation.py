"""Quantising a loaded model in memory: W8A8 or FP8 (all projections but router and head), or W4A16 (experts alone)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ascend.devices import get_device
from ascend.errors import UserError, suggest
from ascend.weights import MLP, Experts, Weight
from ascend.weights_quantised import FORMATS, quantised
from ops import layout
from ops.quantise import INT4_GROUP

if TYPE_CHECKING:
    from ascend.config import BailingMoeV2Config
    from ascend.model import BailingMoeV2ForCausalLM
    from ascend.parallel import Parallel

# The modules of a layer that can be; where it has routed experts its "mlp" holds the others, and none of its own.
PROJECTIONS = ("attention.query_key_value", "attention.dense", "mlp", "mlp.experts", "mlp.shared_experts")
WHOLE_WIDTH = 64  # of an expert on a rank: what the NPU's op that quantises SwiGLU's result takes multiples of


def check_format(name: str) -> None:
    """Raise `UserError` unless ``name`` is a format that `quantise_model` knows."""
    if name not in FORMATS:
        raise UserError(f"unknown quantisation '{name}'{suggest(name, FORMATS)}; there is {', '.join(FORMATS)}")


def check_on(device: torch.device, dtype: torch.dtype, to: str, config: BailingMoeV2Config, parallel: Parallel) -> None:
    """Raise `UserError` if a model of ``dtype`` cannot be quantised to ``to`` there, divided so."""
    width = len(parallel.expert_width(config.moe_intermediate_size))
    if to == "w4a16":
        for name, inputs in (("hidden_size", config.hidden_size), ("the experts' width on a rank", width)):
            if inputs % min(INT4_GROUP, inputs) or inputs % 8:
                raise UserError(f"{name} {inputs} does not divide into groups of {INT4_GROUP} for w4a16; use w8a8")
    check_computes(device, dtype, to, width, parallel)


def check_computes(
    device: torch.device, dtype: torch.dtype, to: str, width: int | None, parallel: Parallel, remedy: str = "use {}"
) -> None:
    """Raise `UserError` if the device does not compute in ``to`` with a model of ``dtype``.

    width: of experts in the format on a rank; None: there are none. remedy: what to do, `{}` being another format.
    """
    if parallel.strategy == "mc2" and width is not None:
        raise UserError(f"expert-parallel strategy mc2 runs whole experts alone, not {to}; choose another strategy")
    if to not in get_device(str(device)).quantised_formats():
        raise UserError(f"{device} does not compute in {to}; {remedy.format('w8a8')}")
    if layout.is_own(device):
        if dtype is torch.float32:
            raise UserError(f"{device} computes with quantised weights in bf16 or fp16 alone; give dtype='bfloat16'")
        if to == "w8a8" and width is not None and width % WHOLE_WIDTH:
            raise UserError(
                f"{device} takes w8a8 experts of whole {WHOLE_WIDTH}s, not {width} wide on a rank; "
                f"{remedy.format('w4a16')}"
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
    for path, module in projections(layer).items():
        layer.set_submodule(path, quantised(module, to))


def projections(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a `DecoderLayer` that can be quantised, whole as they are, by their path in it."""
    modules = dict(layer.named_modules())
    return {path: modules[path] for path in PROJECTIONS if isinstance(modules.get(path), Weight | MLP | Experts)}
