"""In which format each module of a model is, as a checkpoint stores its weights; what cannot be computed is refused.

The tensors decide. What `config.json` says of them in ``quantization_config`` is only asked for what tensors do not
show: a scheme that the formats here would compute otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ascend.errors import UserError
from ascend.pieces import Piece, checkpoint_pieces, int4_group, module_pieces, units_of
from ascend.quantisation import projections
from ascend.stored import FP8_BLOCK, PLAIN, StoredWeight
from ascend.weights_quantised import FORMATS, quantised

if TYPE_CHECKING:
    from ascend.model import BailingMoeV2ForCausalLM

T = TypeVar("T")
CONVERT = "`python -m convert {} SRC DST` makes one that loads"
INT4_GROUPS = (8, 128)  # inputs per scale: a multiple of the first, at most the second (the CUDA kernels' limit)


@dataclass(frozen=True)
class ModuleFormat:
    """The format of a module that is quantised; ``groups``: of int4, the inputs per scale of gate_up and of down."""

    name: str
    groups: tuple[int, int] | None = None


def check_described(path: Path, config: Mapping[str, Any]) -> None:
    """Raise `UserError` if ``quantization_config`` says that the values mean something else than they are taken for."""
    described = config.get("quantization_config")
    if described is None:
        return
    for key, value, right in _said(described):
        if value not in right:
            raise UserError(
                f"{path / 'config.json'}: quantization_config has {key} {value!r}, which is not supported; "
                "take the plain checkpoint, or one in a format of `python -m convert`"
            )


def _said(described: Any) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield what is said, by key, with the values that mean what the formats of `ascend.stored` mean."""
    described = described if isinstance(described, dict) else {"quant_method": described}
    yield "quant_method", described.get("quant_method"), ("fp8", "compressed-tensors")
    yield "activation_scheme", described.get("activation_scheme"), (None, "dynamic")
    yield "weight_block_size", described.get("weight_block_size"), (None, [FP8_BLOCK, FP8_BLOCK])
    yield "kv_cache_scheme", described.get("kv_cache_scheme"), (None,)
    yield "transform_config", described.get("transform_config"), (None, {})
    groups = described.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        yield from _said_of_group(f"config_groups.{name}", group if isinstance(group, dict) else {})


def _said_of_group(where: str, group: Mapping[str, Any]) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    weights, activations = group.get("weights"), group.get("input_activations")
    if isinstance(weights, dict):
        yield f"{where}.weights.symmetric", weights.get("symmetric"), (None, True)
        yield f"{where}.weights.actorder", weights.get("actorder"), (None, False, "static", "weight")
        if weights.get("num_bits") == 8 and activations is None:  # a format of 8 bits rounds activations too
            yield f"{where}.input_activations", None, ()
    if isinstance(activations, dict):
        yield f"{where}.input_activations.symmetric", activations.get("symmetric"), (None, True)
        yield f"{where}.input_activations.dynamic", activations.get("dynamic"), (True,)


def module_formats(model: BailingMoeV2ForCausalLM, stored: Mapping[str, StoredWeight]) -> dict[str, ModuleFormat]:
    """Return the format of each module of a whole, plain model that the checkpoint holds quantised, by its path.

    Raises `UserError` for a format that such a module cannot have, modules of which only a part is quantised, and
    quantised weights outside of the modules that can be.
    """
    formats: dict[str, ModuleFormat] = {}
    covered: set[str] = set()
    for number, layer in enumerate(model.model.layers):
        for within, module in projections(layer).items():
            path = f"model.layers.{number}.{within}"
            names = [piece.name for piece in module_pieces(model, path) if piece.name in stored]
            weights = [stored[name] for name in names if name.endswith(".weight")]
            covered.update(names)
            name = _agreed(path, weights, attrgetter("format"), "{}")
            if name == PLAIN:
                continue
            if name not in FORMATS:  # "fp8-channel"
                raise UserError(
                    f"{_where(weights[0])} is in FP8 with a scale per output, which nothing here computes in; "
                    f"{CONVERT.format('fp8')}, or bf16 in its place"
                )
            if type(module) not in FORMATS[name]:
                raise UserError(
                    f"{_where(weights[0])} is {name}, which routed experts alone can be; "
                    f"{CONVERT.format('w8a8')}, or bf16 in its place"
                )
            formats[path] = ModuleFormat(name, _groups(path, weights) if name == "w4a16" else None)
    for weight in stored.values():
        if weight.format != PLAIN and weight.name not in covered:
            raise UserError(
                f"{_where(weight)} is {weight.format}: router, head, embedding, norms and eh_proj must be plain; "
                f"{CONVERT.format('bf16')}"
            )
    return formats


def _where(weight: StoredWeight) -> str:
    return f"{weight.values.file}: tensor {weight.name}"


def _agreed(path: str, weights: list[StoredWeight], key: Callable[[StoredWeight], T], words: str) -> T:
    """Return what all weights of a module have in common; ``words`` say it in an error."""
    first = key(weights[0])
    for weight in weights:
        if key(weight) != first:
            raise UserError(
                f"{_where(weight)} is {words.format(key(weight))}, but {weights[0].name} is {words.format(first)}: "
                f"{path} is computed as one, all of it must be alike; {CONVERT.format('bf16')}"
            )
    return first


def _groups(path: str, weights: list[StoredWeight]) -> tuple[int, int]:
    multiple, most = INT4_GROUPS
    for weight in weights:
        group = int4_group(weight)
        if group % multiple or group > most:
            raise UserError(
                f"{_where(weight)} has int4 groups of {group} inputs, computed are multiples of {multiple} up to "
                f"{most}; {CONVERT.format('bf16')}"
            )
    by_matrix: dict[bool, list[StoredWeight]] = {False: [], True: []}
    for weight in weights:
        by_matrix[weight.name.endswith(".down_proj.weight")].append(weight)
    gate_up, down = (_agreed(path, ones, int4_group, "in int4 groups of {}") for ones in by_matrix.values())
    return gate_up, down


def check_division(model: BailingMoeV2ForCausalLM, stored: Mapping[str, StoredWeight]) -> None:
    """Raise `UserError` if this rank's part of a weight begins or ends within a block or group that shares a scale.

    ``model`` is the rank's, plain as yet.
    """
    for piece in checkpoint_pieces(model):
        weight = stored.get(piece.name)
        if weight is not None and weight.format != PLAIN:
            for part in ("values", "scale"):
                _check_piece(piece, weight, part)


def _check_piece(piece: Piece, weight: StoredWeight, part: str) -> None:
    ours = (("rows", piece.rows), ("columns", piece.columns))
    for (name, span), unit, size in zip(ours, units_of(weight, part), weight.shape, strict=True):
        if span is None or unit is None or span == range(size):
            continue
        if span.start % unit or span.stop % unit:
            wholes = 1 if size % unit else size // unit
            divide = ", ".join(str(ranks) for ranks in range(1, wholes + 1) if wholes % ranks == 0)
            raise UserError(
                f"{_where(weight)} is {weight.format} in {unit} {name} at a time, which this rank's {span.start} to "
                f"{span.stop} of {size} would cut; it divides among so many ranks: {divide}"
            )


def take_formats(model: BailingMoeV2ForCausalLM, formats: Mapping[str, ModuleFormat]) -> None:
    """Replace the modules of a plain model on the meta device by those of their formats, which hold no data as yet."""
    for path, one in formats.items():
        model.set_submodule(path, quantised(model.get_submodule(path), one.name, one.groups))
    model.quantised = "+".join(sorted({one.name for one in formats.values()})) or None
