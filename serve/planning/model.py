"""The model of a plan: its sizes, and the bytes that an engine will hold of it, from real files where there are any.

Light: no torch, no transformers. MTP layers are counted apart: the engine loads them only to draft (`drafter.py`).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ascend.checkpoint import INDEX, SINGLE, open_checkpoint, read_config
from ascend.cost import FP32_BYTES, weight_bytes
from ascend.errors import UserError, suggest
from ascend.model_shape import ModelShape, context_limit
from ascend.precision import FP32, PRECISIONS, Precision
from ascend.stored import PLAIN, stored_weights
from convert.classes import layer_of, tensor_class
from convert.demo_config import SIZES, demo_config
from convert.inspect import checked_shape, mtp_count, mtp_part

DEFAULT_CONTEXT = 32768  # of `BailingMoeV2Config`
LONGEST = 10**8  # tokens: what says more is broken
YARN_FACTOR = 4.0  # how far the family's own pages extend the context: 32K to 128K
KNOWN = (*SIZES, "antangelmed")
PRECISION_OF = {PLAIN: "bf16", "fp8": "fp8", "fp8-channel": "fp8", "w8a8": "w8a8", "w4a16": "w4a16"}


@dataclass(frozen=True)
class PlannedModel:
    """A model to be served.

    config: as its `config.json` says. precision: what it is stored in, a name of `PRECISIONS`. stored: by class of
    tensor (`convert.classes`) and beside it whether quantised, (weights, bytes as stored); empty without files.
    mtp_layers: as the config says, and as are in the files; stored_mtp: of those, as ``stored``.
    """

    name: str
    config: Mapping[str, Any] = field(hash=False)
    shape: ModelShape
    precision: str = "bf16"
    stored: Mapping[str, Stored] = field(default_factory=dict, hash=False)
    mtp_layers: int = 0
    stored_mtp: Mapping[str, Stored] = field(default_factory=dict, hash=False)

    @property
    def context(self) -> int:
        """Tokens that the positions of `config.json` reach. Raises `UserError` for a number that cannot be."""
        try:
            reached = context_limit(self.config)
        except (OverflowError, ValueError):  # a factor that is no number, or infinite
            reached = -1
        if reached is None:
            return DEFAULT_CONTEXT
        if isinstance(reached, bool) or not 1 <= reached <= LONGEST:
            raise UserError(f"{self.name}: config.json lets positions reach {reached}; no model of this kind does")
        return reached

    @property
    def is_yarn(self) -> bool:
        """Whether `config.json` already stretches the positions."""
        return rope_settings(self.config).get("rope_type") == "yarn"

    @property
    def longest(self) -> int:
        """Tokens that positions can be stretched to: as configured, or by YaRN with the family's own factor."""
        return self.context if self.is_yarn else int(self.context * YARN_FACTOR)

    def nbytes(self, precision: str, wide: int = 2) -> dict[str, float]:
        """Bytes by class that an engine holds, with ``wide`` bytes per value of what is not quantised.

        From the files if they are in that precision, else by formula. The router's weights are in fp32 where the
        config says so (`router_dtype`; vllm/model_executor/models/bailing_moe.py), its bias always.
        """
        if self.stored and precision == self.precision:
            return self._held(self.stored, wide)
        return vars(weight_bytes(self.shape, self._formula(precision, wide)))

    def mtp_nbytes(self, precision: str, wide: int = 2) -> dict[str, float]:
        """The same of the MTP layers."""
        if self.stored_mtp and precision == self.precision:
            return self._held(self.stored_mtp, wide)
        layers = mtp_part(self.shape, self.mtp_layers, self._formula(precision, wide))
        H = self.shape.hidden_size
        own = self.mtp_layers * (2 * H * H + 3 * H) - H  # among the norms there
        return vars(layers) | {"norms": layers.norms - own * wide, "mtp": float(own * wide)}

    def _formula(self, precision: str, wide: int) -> Precision:
        return replace(PRECISIONS[precision], router=FP32 if self._router_wide(wide) == FP32_BYTES else None)

    def _router_wide(self, wide: int) -> int:
        return FP32_BYTES if self.config.get("router_dtype", "fp32") == "fp32" else wide

    def _held(self, stored: Mapping[str, Stored], wide: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, one in stored.items():
            plain = one.plain * (self._router_wide(wide) if name == "router" else wide)
            found[name] = one.quantised + plain + one.bias * FP32_BYTES
        return found


@dataclass(frozen=True)
class Stored:
    """A class of tensors in the files: bytes of quantised ones and their scales, values of plain ones, of biases."""

    quantised: int = 0
    plain: int = 0
    bias: int = 0


def open_model(text: str) -> PlannedModel:
    """Return the model that ``text`` names: a directory, a ``config.json`` alone, or one of `KNOWN`.

    Raises `UserError` for anything else, and for a broken directory.
    """
    path = Path(text)
    if path.is_file() and path.name == "config.json":
        return model_of(read_config(path.parent), path.resolve().parent.name)
    if path.is_dir():
        return model_in(path)
    name = text.casefold()
    if name not in KNOWN:
        raise UserError(
            f"--model {text}: no such directory or config.json, and none of {', '.join(KNOWN)}{suggest(name, KNOWN)}"
        )
    if name == "antangelmed":
        return model_of(demo_config("ling-flash", 0, "bf16", YARN_FACTOR, {})[0], name)
    return model_of(demo_config(name, 0, "bf16", None, {})[0], name)


def model_of(config: Mapping[str, Any], name: str) -> PlannedModel:
    """Return the model of a `config.json` without weights: in BF16 unless it names a quantisation."""
    quantisation = config.get("quantization_config")
    precision = _described(quantisation) if isinstance(quantisation, dict) else "bf16"
    return PlannedModel(name, config, checked_shape(config), precision, mtp_layers=mtp_count(config))


def model_in(path: Path) -> PlannedModel:
    """Return the model in a directory, read from headers alone; a directory without weights is its `config.json`."""
    config, name = read_config(path), path.resolve().name
    if not ((path / INDEX).is_file() or (path / SINGLE).is_file()):
        return model_of(config, name)
    shape = checked_shape(config)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    mtp: dict[str, Counter[str]] = defaultdict(Counter)
    found = set()
    formats: dict[str, set[str]] = defaultdict(set)
    for one in stored_weights(open_checkpoint(path, beside_pickles=True).tensors).values():
        kind, layer = tensor_class(one.name), layer_of(one.name) or 0
        is_mtp = layer >= shape.num_hidden_layers
        counter = (mtp if is_mtp else counts)[kind]
        if one.format != PLAIN:
            counter["quantised"] += one.nbytes
        else:
            counter["bias" if one.name.endswith(".expert_bias") else "plain"] += math.prod(one.shape)
        if is_mtp:
            found.add(layer)
        elif len(one.shape) == 2:
            formats[kind].add(one.format)
    layers = min(mtp_count(config), len(found))
    return PlannedModel(name, config, shape, _precision(formats), _stored(counts), layers, _stored(mtp))


def _stored(counts: Mapping[str, Counter[str]]) -> dict[str, Stored]:
    return {kind: Stored(one["quantised"], one["plain"], one["bias"]) for kind, one in counts.items()}


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings in one dictionary, as vLLM wants them: type and theta always among them."""
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(key), dict):
            rope |= config[key]
    kind = rope.pop("type", None)
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 600000.0
    settings = {"rope_type": rope.pop("rope_type", None) or kind or "default", "rope_theta": theta}
    head_dim, rotary_dim = config.get("head_dim"), config.get("rotary_dim")
    factor = config.get("partial_rotary_factor")
    if factor is None and isinstance(head_dim, int) and isinstance(rotary_dim, int) and head_dim:
        factor = rotary_dim / head_dim
    return settings | ({} if factor is None else {"partial_rotary_factor": factor}) | rope


def _precision(formats: Mapping[str, set[str]]) -> str:
    """The precision that describes stored formats: the experts decide, attention tells INT4 in all from in experts."""
    experts = next(iter(sorted(formats["routed_experts"] - {PLAIN})), PLAIN)
    precision = PRECISION_OF[experts]
    return "w4a16-all" if precision == "w4a16" and "w4a16" in formats["attention"] else precision


def _described(quantisation: Mapping[str, Any]) -> str:
    if quantisation.get("quant_method") == "fp8":
        return "fp8"
    text = str(quantisation.get("config_groups"))
    return "w4a16" if "'num_bits': 4" in text else "w8a8" if "'num_bits': 8" in text else "bf16"
