"""What `perf decode` and `perf ops` run: a checkpoint directory, or a known shape with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ascend.checkpoint import read_config
from ascend.errors import UserError, suggest
from convert.demo_config import SIZES, demo_config
from perf.machine import checkpoint_model, model_of
from perf.result import Model


def open_model(text: str, layers: int | None, precision: str, scratch: Path) -> tuple[Path, dict[str, Any], Model]:
    """Return the model's directory, its config, and how a result names it.

    ``text`` is a checkpoint directory, a directory with a ``config.json`` alone, or one of `SIZES`; the last two mean
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
    else:
        raise UserError(f"--model {text}: neither a directory nor one of {', '.join(SIZES)}{suggest(text, SIZES)}")
    missing = next((key for key in ("num_hidden_layers", "first_k_dense_replace") if key not in config), None)
    if missing is not None:
        raise UserError(f"{text}: its config.json has no {missing}")
    whole = config["num_hidden_layers"]
    if layers is not None and not config["first_k_dense_replace"] < layers <= whole:
        least = config["first_k_dense_replace"] + 1
        raise UserError(
            f"--layers {layers}: {name} has {whole}, of which at least {least} make a dense and an MoE layer"
        )
    model = model_of(name, config, "random", precision, layers)
    config |= {"num_hidden_layers": layers or whole, "num_nextn_predict_layers": 0}
    (scratch / "config.json").write_text(json.dumps(config))
    return scratch, config, model
