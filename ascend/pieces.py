"""Where each tensor of a checkpoint goes: from its names to the model's fused, stacked and divided weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ascend.stored import FP8_BLOCK, StoredWeight
from ascend.weights import Experts

if TYPE_CHECKING:
    from ascend.model import BailingMoeV2ForCausalLM

# The model fuses and stacks what the checkpoint stores apart. Per parameter of the model: the checkpoint's tensors that
# form it, in the order of its rows. A stacked parameter [E, …] has them once per expert. All other names are the same.
PARTS = {"gate_up": ("gate_proj.weight", "up_proj.weight"), "down": ("down_proj.weight",)}
# A parameter that holds scales, and the one whose values they scale: both are parts of the same weights.
SCALES = {"scale": "weight", "gate_up_scale": "gate_up", "down_scale": "down"}
INT4_PER_WORD = 8


@dataclass(frozen=True)
class Piece:
    """A weight of the checkpoint, or the rows and columns of it that this rank holds, and its place in the model.

    part: which tensor of the weight, as `StoredWeight.entries` calls it; rows and columns are the weight's in any case.
    ``is_zero``: another rank holds it, here it counts for nothing.
    """

    name: str
    place: Tensor
    rows: range | None = None
    columns: range | None = None
    is_zero: bool = False
    part: str = "values"

    def of(self, stored: Tensor, units: tuple[int, int | None] = (1, 1)) -> Tensor:
        """What of the stored tensor goes to the place; ``units`` as `units_of` gives them."""
        for dimension, (part, unit) in enumerate(zip((self.rows, self.columns), units, strict=True)):
            if part is not None and unit is not None:
                stored = stored.narrow(dimension, part.start // unit, -(-len(part) // unit))
        return stored if units[1] is not None else stored.view(self.place.shape)


# How many rows and columns of a weight one element of its tensor stands for, where it is not one; None: all of them.
_UNITS = {
    ("w8a8", "scale"): (1, None),
    ("w4a16", "values"): (1, INT4_PER_WORD),
    ("fp8", "scale"): (FP8_BLOCK, FP8_BLOCK),
}


def units_of(weight: StoredWeight, part: str) -> tuple[int, int | None]:
    """How many rows and columns of a weight one element of a part of it stands for; None: all of them."""
    if (weight.format, part) == ("w4a16", "scale"):
        return 1, int4_group(weight)
    return _UNITS.get((weight.format, part), (1, 1))


def int4_group(weight: StoredWeight) -> int:
    """Inputs of a w4a16 weight that share a scale."""
    assert weight.scale is not None, "which every quantised weight has"
    return weight.shape[1] // weight.scale.shape[1]


def checkpoint_tensors(model: BailingMoeV2ForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checkpoint of a whole ``model``: its name there, and its place as a view."""
    for piece in checkpoint_pieces(model):
        yield piece.name, piece.place


def checkpoint_pieces(model: BailingMoeV2ForCausalLM) -> Iterator[Piece]:
    """Yield all that the parameters of ``model`` are made of; a tensor may come more than once, in parts or copies."""
    for path, _ in model.named_modules():
        yield from module_pieces(model, path)


def module_pieces(model: BailingMoeV2ForCausalLM, path: str) -> Iterator[Piece]:
    """Yield what the parameters of one module of ``model`` are made of, those of its children aside."""
    config, parallel, module = model.config, model.parallel, model.get_submodule(path)
    for name, parameter in module.named_parameters(recurse=False):
        leaf, part = (SCALES[name], "scale") if name in SCALES else (name, "values")
        if leaf not in PARTS:
            yield from _projection(model, f"{path}.{leaf}", parameter.data, part)
        elif isinstance(module, Experts):
            width = parallel.expert_width(config.moe_intermediate_size)
            experts = parallel.local_experts(config.num_experts, _layer(path))
            for expert, place in zip(experts, parameter.data, strict=True):
                yield from _mlp(f"{path}.{expert}", leaf, place, width, part)
        else:
            shared = path.endswith("shared_experts")
            width = parallel.share(config.shared_intermediate_size if shared else config.intermediate_size)
            yield from _mlp(path, leaf, parameter.data, width, part)


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].partition(".")[0])


def _mlp(prefix: str, leaf: str, parameter: Tensor, width: range, part: str) -> Iterator[Piece]:
    for name, place in zip(PARTS[leaf], parameter.chunk(len(PARTS[leaf])), strict=True):
        rows, columns = (None, width) if leaf == "down" else (width, None)
        yield Piece(f"{prefix}.{name}", place, rows, columns, part=part)


def _projection(model: BailingMoeV2ForCausalLM, name: str, place: Tensor, part: str) -> Iterator[Piece]:
    config, parallel = model.config, model.parallel
    if parallel.tensor.size == 1:
        yield Piece(name, place, part=part)
    elif ".query_key_value." in name:
        N, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        query, key = parallel.heads(config)
        # [q heads | k heads | v heads], here and there. The scale of a block stands for many rows.
        per_head = place.shape[0] / (len(query) + 2 * len(key))
        heads = ((query, 0), (key, N), (key, N + G))
        places = place.split([round(per_head * len(one)) for one, _ in heads])
        for (one, offset), its in zip(heads, places, strict=True):
            yield Piece(name, its, range((offset + one.start) * D, (offset + one.stop) * D), part=part)
    elif name.endswith("attention.dense.weight"):
        query, _ = parallel.heads(config)
        columns = range(query.start * config.head_dim, query.stop * config.head_dim)
        yield Piece(name, place, columns=columns, part=part)
    elif name.endswith("attention.dense.bias"):
        yield Piece(name, place, is_zero=parallel.tensor.rank > 0)  # partial sums are added up: one rank brings it
    elif name == "lm_head.weight":
        yield Piece(name, place, parallel.vocabulary(config.vocab_size))
    else:
        yield Piece(name, place, part=part)
