"""Quantising a loaded model in memory: W8A8 (all projections but router and head) or W4A16 (experts alone)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ascend.errors import UserError, suggest
from ascend.weights import FORMATS, MLP

if TYPE_CHECKING:
    from ascend.model import BailingMoeV2ForCausalLM


def check_format(name: str) -> None:
    """Raise `UserError` unless ``name`` is a format that `quantise_model` knows."""
    if name not in FORMATS:
        raise UserError(f"unknown quantisation '{name}'{suggest(name, FORMATS)}; there is {', '.join(FORMATS)}")


def quantise_model(model: BailingMoeV2ForCausalLM, to: str) -> None:
    """Round the weights of all layers to ``to``, by nearest, in place; `ops.quantise` defines how.

    Router, norms, embedding, head and the MTP layers' ``eh_proj`` keep their precision. Raises `UserError` for an
    unknown format, a model that is quantised already, or one whose weights are in a device's layout already.
    """
    check_format(to)
    if model.quantised or model.model.laid_out:
        raise UserError("only a model as it was loaded can be quantised: give `quantise` to `ascend.load_model`")
    for layer in model.model.layers:
        attention, mlp = layer.attention, layer.mlp
        if not isinstance(mlp, MLP):
            mlp.experts = mlp.experts.quantised(to)
        if to != "w8a8":
            continue
        attention.query_key_value, attention.dense = attention.query_key_value.quantised(), attention.dense.quantised()
        if isinstance(mlp, MLP):
            layer.mlp = mlp.quantised()
        elif mlp.shared_experts is not None:
            mlp.shared_experts = mlp.shared_experts.quantised()
    model.quantised = to
