"""Which model on which machine: the facts of the side that is measured, as far as they can be known from here."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ascend.checkpoint import read_config
from ascend.devices import Device, get_device, lookup
from ascend.devices.facts import TABLE
from ascend.errors import UserError, suggest
from ascend.precision import PRECISIONS
from perf import machine
from perf.load.endpoint import Endpoint
from perf.load.workloads import Workload
from perf.result import Machine, Model

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
NAMES = (*PRECISIONS, "fp16")
NAMED = {"device": "as --cards names it; nobody has seen it"}
LEAST_IDS = 128  # fewer would make prompts of the shortest length alike


def model_of(directory: Path, precision: str | None) -> Model:
    """Describe the checkpoint that is served. If only its ``config.json`` is here, ``weights`` is null."""
    if precision is not None and precision not in NAMES:
        raise UserError(f"--precision: unknown '{precision}'{suggest(precision, NAMES)}; there is {', '.join(NAMES)}")
    config = read_config(directory)
    told_elsewhere = (directory / "quant_model_description.json").is_file()  # as Ascend's tools do
    precision = precision or (None if told_elsewhere else _precision(config))
    if precision is None:
        raise UserError(f"{directory}: its config does not tell the precision; say --precision, as in --precision w8a8")
    if any(directory.glob("*.safetensors")):
        return machine.checkpoint_model(directory, precision)
    return machine.model_of(directory.resolve().name, config, None, precision)


def machine_of(cards: str | None, endpoint: Endpoint) -> tuple[Machine, Device | None, int]:
    """Describe the server's machine; with it this machine's device, where it can be asked for watts, and its cards.

    ``cards``: None is the CPU here; "4" is so many of this machine's cards; "4xH20-96G" names cards that may be
    elsewhere. Raises `UserError` where it cannot be known.
    """
    named = re.fullmatch(r"(\d+)(?:x(.+))?", cards) if cards is not None else None
    if cards is not None and (named is None or int(named[1]) < 1):
        raise UserError(f"--cards '{cards}' is neither a number such as 4 nor one with a name such as 4xH20-96G")
    if named is not None and named[2]:
        return _named(int(named[1]), named[2], endpoint), None, int(named[1])
    if not endpoint.is_local:
        raise UserError(
            f"{endpoint.base_url} is another machine: say which cards serve there, as in --cards 4xH20-96G; known are "
            f"{', '.join(TABLE)}"
        )
    device = get_device("auto")
    if device.type != "cpu" and named is None:
        raise UserError(f"say how many of this machine's cards the server uses, as in --cards {device.count()}")
    count = int(named[1]) if named else 1
    if count > device.count():
        raise UserError(f"--cards {count}: this machine has {device.count()} of '{device.name()}'")
    return machine.describe(device, count), device, count


def token_ids(directory: Path) -> range:
    """Return the widest range of ids that are words of the tokenizer, none of them an added (special) token."""
    size = int(read_config(directory)["vocab_size"])
    tokenizer = directory / "tokenizer.json"
    added: list[int] = []
    if tokenizer.is_file():
        try:
            document = json.loads(tokenizer.read_text(encoding="utf-8"))
            added = sorted({int(one["id"]) for one in document["added_tokens"]})
            size = min(size, 1 + max([*document["model"]["vocab"].values(), *added]))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(f"{tokenizer}: cannot be read ({type(error).__name__})") from None
    edges = [-1, *(one for one in added if one < size), size]
    gaps = [range(low + 1, high) for low, high in itertools.pairwise(edges)]
    widest = max(gaps, key=len)
    if len(widest) < LEAST_IDS:
        raise UserError(
            f"{directory}: only {len(widest)} token ids in a row are no special tokens, {LEAST_IDS} are needed"
        )
    return widest


def check_fits(work: Workload, endpoint: Endpoint) -> None:
    """Raise `UserError` if the server's context is too short for the workload."""
    longest = work.input_tokens[1] + work.output_tokens[1]
    if endpoint.max_model_len is not None and longest > endpoint.max_model_len:
        raise UserError(
            f"workload '{work.name}' needs {longest:,} tokens, the server takes {endpoint.max_model_len:,} "
            "(max_model_len); start it with a longer one, or take another --workload or a smaller --scale"
        )


def _named(count: int, name: str, endpoint: Endpoint) -> Machine:
    if name not in TABLE:
        raise UserError(f"--cards: unknown card '{name}'{suggest(name, TABLE)}; known are {', '.join(TABLE)}")
    kind = "npu" if name.startswith("910") else "cpu" if name == "CPU" else "cuda"
    memory = lookup(name).memory.value
    here = machine.describe(get_device("cpu"), count)
    named = replace(
        here, device=name, device_type=kind, cards=count, memory_bytes=int(memory) if memory else None, software=NAMED
    )
    return named if endpoint.is_local else replace(named, host="unknown, measured from elsewhere", cores=0, system="")


def _precision(config: dict[str, Any]) -> str | None:
    """Return the precision as `python -m convert` names it, from ``quantization_config`` or the dtype."""
    quantised = config.get("quantization_config")
    if not quantised:
        return DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))
    method = str(quantised.get("quant_method"))
    if method == "fp8":
        return "fp8"
    if method == "compressed-tensors":
        first: dict[str, Any] = next(iter(quantised.get("config_groups", {}).values()), {})
        weights, activations = first.get("weights") or {}, first.get("input_activations") or {}
        if weights.get("type") == "float" and weights.get("num_bits") == 8:
            return "fp8"
        return f"w{weights['num_bits']}a{activations.get('num_bits', 16)}" if "num_bits" in weights else None
    return f"w{quantised['bits']}a16" if "bits" in quantised else None
