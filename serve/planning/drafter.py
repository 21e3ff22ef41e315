"""What drafts tokens for the model to verify, and what it takes of a card. Letters: K drafts a step.

The answers stay the model's own. Whether it pays is told by `gain.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ascend.eagle3_config import EMBEDDING, open_head, tensor_shapes
from ascend.errors import UserError
from serve.planning.model import PlannedModel
from serve.planning.wanted import METHODS, Wanted

NGRAM_DRAFTS = 3
NGRAM_WINDOW = 4  # tokens that must be seen again
HEAD_DRAFTS = (3, 1, 2, 5, 7)  # of an EAGLE3 head, what is tried; the first where no figure says which is best


@dataclass(frozen=True)
class Drafter:
    """tokens: K. path: of an EAGLE3 head. is_fixed: K was asked for, so it is not left off where it does not pay.

    nbytes: of weights that are divided as the model's are, by class; divided, whole: of the others, divided among the
    cards of a tensor-parallel group, or on each. layers: with keys and values of their own, of these heads.
    """

    method: str = "off"
    tokens: int = 0
    path: str = ""
    is_fixed: bool = True
    nbytes: Mapping[str, float] = field(default_factory=dict, hash=False)
    divided: float = 0.0
    whole: float = 0.0
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0

    def __str__(self) -> str:
        return f"{self.method}:{self.path}" if self.path else self.method

    def weights(self, nbytes: Mapping[str, float], tensor: int) -> dict[str, float]:
        """The model's bytes by class with these among them, for cards of which ``tensor`` share a copy."""
        names = {*nbytes, *self.nbytes}
        both = {name: nbytes.get(name, 0.0) + self.nbytes.get(name, 0.0) for name in names}
        return both | {"other": both.get("other", 0.0) + self.divided / tensor + self.whole}

    def kv_bytes_per_token(self, tensor: int, kv_bytes: float) -> float:
        """Keys and values of one token on a card; it holds one head at least."""
        return 2 * self.layers * max(1, self.kv_heads // tensor) * self.head_dim * kv_bytes

    def engine_setting(self) -> dict[str, Any]:
        """vLLM's ``--speculative-config``."""
        setting: dict[str, Any] = {"method": self.method, "num_speculative_tokens": self.tokens}
        if self.method == "ngram":
            setting["prompt_lookup_max"] = NGRAM_WINDOW
        return setting | ({"model": self.path} if self.path else {})


OFF = Drafter()


def drafters(wanted: Wanted, model: PlannedModel, precision: str) -> list[Drafter]:
    """Return what was asked for, with the numbers of drafts to choose from. Raises `UserError` for what cannot be."""
    text, asked = wanted.speculative or "off", wanted.speculative_tokens
    method, _, rest = text.partition(":")
    if method == "ngram" and rest:
        if asked or not rest.isdecimal() or int(rest) < 1:
            raise UserError(f"--speculative {text}: write ngram or ngram:3, with one draft or more")
        asked = int(rest)
    elif (rest and method != "eagle3") or (method == "eagle3" and not rest) or method not in ("off", *_KINDS):
        raise UserError(f"--speculative {text}: there is {', '.join(METHODS)}")
    if method == "off":
        if asked:
            raise UserError(f"--speculative-tokens {asked} without --speculative: say what drafts: {METHODS[1:]}")
        return [OFF]
    made, numbers = _KINDS[method](model, precision, rest)
    if asked:
        return [replace(made, tokens=asked)]
    return [replace(made, tokens=tokens, is_fixed=method == "ngram") for tokens in numbers]


def _ngram(model: PlannedModel, precision: str, _: str) -> tuple[Drafter, tuple[int, ...]]:
    return Drafter("ngram"), (NGRAM_DRAFTS,)


def _mtp(model: PlannedModel, precision: str, _: str) -> tuple[Drafter, tuple[int, ...]]:
    if not model.mtp_layers:
        raise UserError(
            f"--speculative mtp: {model.name} has no MTP layer; what would do: without --speculative, or a draft head, "
            "eagle3:DIR"
        )
    shape = model.shape
    drafter = Drafter("mtp", nbytes=model.mtp_nbytes(precision), layers=model.mtp_layers)
    return replace(drafter, kv_heads=shape.num_key_value_heads, head_dim=shape.head_dim), (model.mtp_layers,)


def _eagle3(model: PlannedModel, precision: str, path: str) -> tuple[Drafter, tuple[int, ...]]:
    directory = Path(path).expanduser().absolute()
    if not directory.is_dir():
        raise UserError(f"--speculative eagle3:{path}: no such directory; it takes one with a draft head")
    config, names = open_head(directory, model.shape)
    sizes = {name: math.prod(size) * 2.0 for name, size in tensor_shapes(config).items()}
    if EMBEDDING in names:
        sizes[EMBEDDING] = config.vocab_size * config.hidden_size * 2.0
    whole = sizes.pop("fc.weight")
    drafter = Drafter("eagle3", path=str(directory), divided=sum(sizes.values()), whole=whole, layers=1)
    return replace(drafter, kv_heads=config.num_key_value_heads, head_dim=config.head_dim), HEAD_DRAFTS


_KINDS = {"ngram": _ngram, "mtp": _mtp, "eagle3": _eagle3}
