"""`python -m convert inspect DIR|config.json`: what a checkpoint is, in one screen, told from its headers alone.

Nothing is loaded or run: a directory with code or pickles in it is described, too. Light: no torch.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ascend.arguments import Parser
from ascend.checkpoint import INDEX, PICKLE_SUFFIXES, SINGLE, open_checkpoint, read_config
from ascend.cost import ByPart, active_parameters, parameters, weight_bytes
from ascend.errors import UserError
from ascend.model_shape import ModelShape
from ascend.precision import PRECISIONS, Precision
from ascend.stored import PLAIN, stored_weights
from convert.cards import Fit, fits
from convert.classes import CLASSES, layer_of, tensor_class
from convert.inspect_page import page

LIMIT = 10**9  # of any size in a config: beyond it the config is no model's
LAYER_LIMIT = 10_000
DEFAULT_CONTEXT = 32768  # of `BailingMoeV2Config`
WOULD_WEIGH = ("bf16", "fp8", "w8a8", "w4a16")


@dataclass(frozen=True)
class Held:
    """The tensors of one class: parameters are counted unpacked, bytes as stored, scales included."""

    tensors: int
    parameters: int
    nbytes: int
    formats: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What there is to say. ``held`` is empty, and ``would_weigh`` is not, where only a `config.json` was given."""

    path: str
    model: Mapping[str, Any]
    parameters: Mapping[str, float]
    held: Mapping[str, Held]
    files: Mapping[str, Any]
    cards: Mapping[str, list[Fit]]
    would_weigh: Mapping[str, float]
    remarks: tuple[str, ...] = ()


def inspect(path: str | Path) -> Report:
    """Describe a checkpoint directory, or a `config.json`. Raises `UserError` for a broken or unknown one."""
    path = Path(path)
    if path.is_file() and path.name != "config.json":
        raise UserError(f"{path}: give a checkpoint directory or its config.json")
    directory = path.parent if path.is_file() else path
    config = read_config(directory)
    shape = checked_shape(config)
    mtp_layers = mtp_count(config)
    context = _count(config, "max_position_embeddings") or DEFAULT_CONTEXT
    model = _model(config, shape, mtp_layers, context)
    counted = {"total": parameters(shape).total, "active": _active(shape), "mtp": mtp_part(shape, mtp_layers).total}
    files = _files(directory, config)
    has_weights = (directory / INDEX).is_file() or (directory / SINGLE).is_file()
    if path.is_file() or not has_weights:
        would_weigh = {name: _planned(shape, mtp_layers, PRECISIONS[name]) for name in WOULD_WEIGH}
        cards = {name: fits(shape, parts, {name}, context) for name, parts in would_weigh.items()}
        weighs = {name: sum(parts.values()) for name, parts in would_weigh.items()}
        return Report(str(path), model, counted, {}, files, cards, weighs)

    checkpoint = open_checkpoint(directory, beside_pickles=True)
    weights = stored_weights(checkpoint.tensors).values()
    held: dict[str, Held] = {}
    for name in (*CLASSES, "other"):
        of_class = [one for one in weights if tensor_class(one.name) == name]
        if of_class:
            kinds = Counter(one.values.dtype if one.format == PLAIN else one.format for one in of_class)
            held[name] = Held(
                len(of_class),
                sum(math.prod(one.shape) for one in of_class),
                sum(one.nbytes for one in of_class),
                tuple(kind for kind, _ in kinds.most_common()),
            )
    stored_mtp = {layer for one in weights if (layer := layer_of(one.name) or 0) >= shape.num_hidden_layers}
    files = {**files, "tensor_bytes": checkpoint.nbytes, "mtp_layers": len(stored_mtp)}
    formats = {one.format for one in weights}
    cards = {"stored": fits(shape, {name: one.nbytes for name, one in held.items()}, formats, context)}
    no_bias = shape.num_experts * (model["moe_layers"] + mtp_layers) if model["has_expert_bias"] is False else 0
    remarks = _remarks(held, counted["total"] + counted["mtp"] - no_bias, mtp_layers, len(stored_mtp))
    return Report(str(path), model, counted, held, files, cards, {}, remarks)


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as plain values."""
    document = {field.name: getattr(report, field.name) for field in fields(report)}
    document["held"] = {name: asdict(one) for name, one in report.held.items()}
    document["cards"] = {name: [asdict(fit) for fit in found] for name, found in report.cards.items()}
    return document


def main(argv: Sequence[str]) -> int:
    """Run `python -m convert inspect` with ``argv``."""
    parser = Parser("convert inspect", "Describe a checkpoint, or what a config.json stands for, from headers alone.")
    parser.add_argument("path", metavar="DIR|config.json")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.read(argv)
    report = inspect(args.path)
    print(json.dumps(as_json(report)) if args.json else page(report))
    return 0


def checked_shape(config: Mapping[str, Any]) -> ModelShape:
    """Return the sizes of a `config.json`. Raises `UserError` for those that no model of this architecture has."""
    shape = ModelShape.from_config(config)
    for field in fields(shape):
        value = getattr(shape, field.name)
        limit = LAYER_LIMIT if field.name == "num_hidden_layers" else LIMIT
        if isinstance(field.default, bool):
            if not isinstance(value, bool):
                raise UserError(f"config.json: {field.name} is {_short(value)}, it must be true or false")
        elif value is not None and value > limit:
            raise UserError(f"config.json: {field.name} is {_short(value)}, no model of this architecture is so large")
    return shape


def mtp_count(config: Mapping[str, Any]) -> int:
    """The MTP layers that a `config.json` names. Raises `UserError` for what is no number of layers."""
    return _count(config, "num_nextn_predict_layers", LAYER_LIMIT)


def _count(config: Mapping[str, Any], key: str, limit: int = LIMIT) -> int:
    """Return a number that `ModelShape` does not hold; a missing one is 0."""
    value = config.get(key)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise UserError(f"config.json: {key} is {_short(value)}, it must be an integer from 0 to {limit}")
    return value


def _model(config: Mapping[str, Any], shape: ModelShape, mtp_layers: int, context: int) -> dict[str, Any]:
    moe = sum(shape.is_moe_layer(layer) for layer in range(shape.num_hidden_layers))
    ropes = [rope for key in ("rope_parameters", "rope_scaling") if isinstance(rope := config.get(key), dict)]
    yarn = next((rope for rope in ropes if rope.get("rope_type", rope.get("type")) not in (None, "default")), None)
    architectures = config.get("architectures")
    quantization = config.get("quantization_config")
    return {
        "architecture": architectures[0] if isinstance(architectures, list) and architectures else None,
        "model_type": config["model_type"],
        "dtype": config.get("torch_dtype") or config.get("dtype"),
        "dense_layers": shape.num_hidden_layers - moe,
        "moe_layers": moe,
        "mtp_layers": mtp_layers,
        "context": context,
        "yarn": yarn,
        "has_expert_bias": config.get("moe_router_enable_expert_bias", True),
        "quantization_config": quantization if isinstance(quantization, dict) else None,
        "quantization": _in_words(quantization),
        **asdict(shape),
    }


def _in_words(quantization: Any) -> str:
    """Say what `quantization_config` promises."""
    if quantization is None:
        return "none"
    if not isinstance(quantization, dict):
        return f"malformed: {_short(quantization)}"
    method = _short(quantization.get("quant_method"))
    if method == "fp8":
        block = quantization.get("weight_block_size")
        kept = quantization.get("modules_to_not_convert")
        where = f"blocks of {_short(block)}" if block else "no blocks"
        return f"fp8 {_short(quantization.get('fmt', 'e4m3'))}, {where}{_but(kept)}"
    groups = quantization.get("config_groups")
    schemes = []
    for group in groups.values() if isinstance(groups, dict) else []:
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            bits, kind = (_short(weights.get(key)) for key in ("num_bits", "type"))
            of = _short(weights.get("strategy"))
            activations = group.get("input_activations")
            too = ", activations too" if isinstance(activations, dict) else ""
            size = f" of {_short(weights['group_size'])}" if weights.get("group_size") else ""
            schemes.append(f"{kind}{bits} per {of}{size}{too}")
    layout = f" ({_short(quantization['format'])})" if quantization.get("format") else ""
    return f"{method}{layout}{': ' if schemes else ''}{'; '.join(schemes)}{_but(quantization.get('ignore'))}"


def _but(kept: Any) -> str:
    return f"; {len(kept)} modules or patterns left out" if isinstance(kept, list) and kept else ""


def mtp_part(shape: ModelShape, mtp_layers: int, precision: Precision | None = None) -> ByPart:
    """Count the MTP layers, in weights or bytes: layers with experts, and what only they have, which is plain."""
    if not mtp_layers:
        return ByPart(*(0.0 for _ in fields(ByPart)))
    layers = replace(shape, num_hidden_layers=mtp_layers, first_k_dense_replace=0)
    part = weight_bytes(layers, precision) if precision else parameters(layers)
    H = shape.hidden_size
    own = mtp_layers * (2 * H * H + 3 * H) - H  # eh_proj [H, 2H] and three norms a layer; the final norm is the model's
    size = precision.plain.bytes_per_weight if precision else 1
    return replace(part, embedding=0.0, head=0.0, norms=part.norms + own * size)


def _planned(shape: ModelShape, mtp_layers: int, precision: Precision) -> dict[str, float]:
    """Bytes by class that a checkpoint of this precision would have."""
    main, mtp = weight_bytes(shape, precision), mtp_part(shape, mtp_layers, precision)
    return {name: value + getattr(mtp, name) for name, value in vars(main).items()}


def _active(shape: ModelShape) -> float:
    """Weights that a token passes through, embedding and head among them: the family's "6.1 B activated"."""
    part = parameters(shape)
    return active_parameters(shape) + part.embedding + part.head


def _files(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Say what lies there beside the weights."""
    try:
        sizes = {file.name: file.stat().st_size for file in sorted(directory.iterdir()) if file.is_file()}
    except OSError as error:
        raise UserError(f"{directory}: cannot be read: {error.strerror}") from None
    auto_map = config.get("auto_map")
    return {
        "count": len(sizes),
        "disk_bytes": sum(sizes.values()),
        "shards": sum(name.endswith(".safetensors") for name in sizes),
        "tokenizer": bool({"tokenizer.json", "tokenizer.model"} & sizes.keys()),
        "chat_template": _has_chat_template(directory, sizes.keys()),
        "generation_config": "generation_config.json" in sizes,
        "manifest": "manifest.json" in sizes,
        "code": [name for name in sizes if name.endswith(".py")],
        "pickles": [name for name in sizes if Path(name).suffix.lower() in PICKLE_SUFFIXES],
        "auto_map": sorted(map(str, auto_map)) if isinstance(auto_map, dict) else [],
    }


def _has_chat_template(directory: Path, names: Sequence[str] | Any) -> bool:
    if {"chat_template.jinja", "chat_template.json"} & set(names):
        return True
    try:
        value = json.loads((directory / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value.get("chat_template"))


def _remarks(held: Mapping[str, Held], expected: float, mtp_layers: int, stored: int) -> tuple[str, ...]:
    """Say where the files and the config differ; it stands for ``expected`` parameters."""
    remarks = []
    found = sum(one.parameters for one in held.values())
    if found != expected:
        remarks.append(f"the files hold {found:,} parameters, config.json stands for {expected:,.0f}")
    if stored != mtp_layers:
        remarks.append(f"the files hold {stored} MTP layers, config.json says {mtp_layers}")
    if "other" in held:
        remarks.append(f"{held['other'].tensors} tensors are none of this architecture's")
    return tuple(remarks)


def _short(value: Any) -> str:
    """A value of a config in a message, cut to what fits."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
