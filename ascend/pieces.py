"""Where each tensor of a checkpoint goes: from its names to the model's fused, stacked and divided weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ascend.model import BailingMoeV2ForCausalLM

# The model fuses and stacks what the checkpoint stores apart. Per parameter of the model: the checkpoint's tensors that
# form it, in the order of its rows. A stacked parameter [E, …] has them once per expert. All other names are the same.
PARTS = {"gate_up": ("gate_proj.weight", "up_proj.weight"), "down": ("down_proj.weight",)}


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint, or the rows and columns of it that this rank holds, and its place in the model.

    ``is_zero``: another rank holds it, here it counts for nothing.
    """

    name: str
    place: Tensor
    rows: range | None = None
    columns: range | None = None
    is_zero: bool = False

    def of(self, stored: Tensor) -> Tensor:
        """The part of the whole tensor that goes to the place."""
        if self.rows is not None:
            stored = stored[self.rows.start : self.rows.stop]
        if self.columns is not None:
            stored = stored[:, self.columns.start : self.columns.stop]
        return stored


def checkpoint_tensors(model: BailingMoeV2ForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checkpoint of a whole ``model``: its name there, and its place as a view."""
    for piece in checkpoint_pieces(model):
        yield piece.name, piece.place


def checkpoint_pieces(model: BailingMoeV2ForCausalLM) -> Iterator[Piece]:
    """Yield all that the parameters of ``model`` are made of; a tensor may come more than once, in parts or copies."""
    for name, parameter in model.named_parameters():
        prefix, _, leaf = name.rpartition(".")
        if leaf not in PARTS:
            yield from _projection(model, name, parameter.data)
        elif parameter.ndim == 2:
            config = model.config
            shared = prefix.endswith("shared_experts")
            width = model.parallel.share(config.shared_intermediate_size if shared else config.intermediate_size)
            yield from _mlp(prefix, leaf, parameter.data, width)
        else:
            width = model.parallel.expert_width(model.config.moe_intermediate_size)
            experts = model.parallel.local_experts(model.config.num_experts, _layer(name))
            for expert, weight in zip(experts, parameter.data, strict=True):
                yield from _mlp(f"{prefix}.{expert}", leaf, weight, width)


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].partition(".")[0])


def _mlp(prefix: str, leaf: str, weight: Tensor, width: range) -> Iterator[Piece]:
    for part, place in zip(PARTS[leaf], weight.chunk(len(PARTS[leaf])), strict=True):
        rows, columns = (None, width) if leaf == "down" else (width, None)
        yield Piece(f"{prefix}.{part}", place, rows, columns)


def _projection(model: BailingMoeV2ForCausalLM, name: str, place: Tensor) -> Iterator[Piece]:
    config, parallel = model.config, model.parallel
    if parallel.tensor.size == 1:
        yield Piece(name, place)
    elif ".query_key_value." in name:
        N, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        query, key = parallel.heads(config)
        # [q heads | k heads | v heads], here and there.
        begin = 0
        for heads, offset in ((query, 0), (key, N), (key, N + G)):
            rows = range((offset + heads.start) * D, (offset + heads.stop) * D)
            yield Piece(name, place[begin : begin + len(rows)], rows)
            begin += len(rows)
    elif name.endswith("attention.dense.weight"):
        query, _ = parallel.heads(config)
        yield Piece(name, place, columns=range(query.start * config.head_dim, query.stop * config.head_dim))
    elif name.endswith("attention.dense.bias"):
        yield Piece(name, place, is_zero=parallel.tensor.rank > 0)  # partial sums are added up: one rank brings it
    elif name == "lm_head.weight":
        yield Piece(name, place, parallel.vocabulary(config.vocab_size))
    else:
        yield Piece(name, place)
