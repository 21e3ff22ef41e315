"""What `perf decode` and `perf ops` run: a checkpoint directory, or a known shape with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ascend.checkpoint import read_config
from ascend.cost import kv_bytes_per_card, parameters, weight_bytes
from ascend.devices.base import Device
from ascend.errors import UserError, suggest
from ascend.model_shape import DENSE_36B, ModelShape
from ascend.precision import Precision
from convert.demo_config import SIZES, demo_config
from perf.machine import checkpoint_model, model_of
from perf.result import Model

# Known only here: a dense model of the same engine, all of whose layers are dense and whose whole heads are rotated.
DENSE = {"dense-36b": DENSE_36B}
KNOWN = (*SIZES, *DENSE)


def open_model(text: str, layers: int | None, precision: str, scratch: Path) -> tuple[Path, dict[str, Any], Model]:
    """Return the model's directory, its config, and how a result names it.

    ``text`` is a checkpoint directory, a directory with a ``config.json`` alone, or one of `KNOWN`; the last two mean
    random weights, of the first ``layers`` layers if that is given, and no MTP layers; their ``config.json`` is written
    to ``scratch``. Raises `UserError` for anything else.
    """
    if Path(text).is_dir():
        config, name = read_config(Path(text)), Path(text).resolve().name
        if any(Path(text).glob("*.safetensors*")):
            if layers is not None:
                raise UserError(f"--layers cuts models of random weights; {text} is a checkpoint, measured whole")
            return Path(text), config, checkpoint_model(text, precision)
    elif text in SIZES:
        config, name = demo_config(text, 0, "bf16", None, {})[0], text
    elif text in DENSE:
        sizes = {key: value for key, value in vars(DENSE[text]).items() if value is not None}
        changes = sizes | {"partial_rotary_factor": 1.0, "max_position_embeddings": 131072}
        config, name = demo_config("small", 0, "bf16", None, changes)[0], text
    else:
        raise UserError(f"--model {text}: neither a directory nor one of {', '.join(KNOWN)}{suggest(text, KNOWN)}")
    missing = next((key for key in ("num_hidden_layers", "first_k_dense_replace") if key not in config), None)
    if missing is not None:
        raise UserError(f"{text}: its config.json has no {missing}")
    whole = config["num_hidden_layers"]
    dense = config["first_k_dense_replace"]
    least, what = (1, "are needed") if dense >= whole else (dense + 1, "make a dense and an MoE layer")
    if layers is not None and not least <= layers <= whole:
        raise UserError(f"--layers {layers}: {name} has {whole}, of which at least {least} {what}")
    model = model_of(name, config, "random", precision, layers)
    config |= {"num_hidden_layers": layers or whole, "num_nextn_predict_layers": 0}
    (scratch / "config.json").write_text(json.dumps(config))
    return scratch, config, model


def check_memory(
    device: Device, shape: ModelShape, stored: dict[str, Precision], sequences: int, length: int, kv_bytes: float
) -> None:
    """Raise `UserError` if the device has not the memory that these engines need beside one another, before they start.

    ``stored``: by engine the formats of its weights. The fewest bytes: weights, caches of ``sequences`` rows of
    ``length`` tokens, and while a model is quantised one layer that is not yet; a pass's own tensors come on top.
    """
    needed = 0.0
    for precision in stored.values():
        cache = kv_bytes_per_card(shape, sequences, length, bytes_per_value=kv_bytes)
        counted, plain = parameters(shape), precision.plain.bytes_per_weight
        moe = max(1, shape.num_hidden_layers - shape.first_k_dense_replace)
        unquantised = counted.routed_experts / moe * plain if precision.experts != precision.plain else 0.0
        needed += weight_bytes(shape, precision).total + max(cache, unquantised)
    free = device.memory().free
    if needed > free:
        raise UserError(
            f"{', '.join(stored)} need {needed / 1e9:.1f} GB for weights and cache, {device} has {free / 1e9:.1f} GB "
            "free; give fewer --layers, another --quantise, a smaller --batch, or fewer engines"
        )
