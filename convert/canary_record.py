"""`canary.json`: log-probabilities that a checkpoint gives to tokens drawn by rule, to hold a running server against.

A JSON object with exactly these keys:

    canary_version  1
    vocab_size      of the model; the tokens follow from it (`canary_prompts`), so that no text is in the file
    stored          what the weights are stored as: bf16, fp32, fp8, w8a8, w4a16 …
    logprobs        per prompt, of its tokens from the second on: numbers up to 0; in fp32, on the weights as stored
    noise           null, or ``{"median": m, "tenth": t}``: how far the same log-probabilities move if hidden
                    states are rounded about as in bf16 (`convert.canary`); half, a tenth of them by more

Only the standard library is imported: the launcher reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ascend.errors import UserError

CANARY = "canary.json"
VERSION = 1
MAX_BYTES = 1 << 20
# Two short ones, and one that is longer than a block of KV cache on any device (128 on NPU and CPU).
PROMPT_LENGTHS = (32, 32, 160)
_MULTIPLIER, _INCREMENT = 6364136223846793005, 1442695040888963407  # Knuth's MMIX, TAOCP 3.3.4


@dataclass(frozen=True)
class Noise:
    """|Δ| of log-probabilities in nats: the median, and what a tenth of them exceeds."""

    median: float
    tenth: float


@dataclass(frozen=True)
class Canary:
    """What the file says; see above."""

    vocab_size: int
    stored: str
    logprobs: list[list[float]]
    noise: Noise | None


def canary_prompts(vocab_size: int) -> list[list[int]]:
    """Return the prompts, as token ids: drawn alike everywhere, none of the first hundredth or the last tenth.

    There the special tokens are, and rows of the embedding that were never trained.
    """
    first, span, state = vocab_size // 100, max(vocab_size * 9 // 10 - vocab_size // 100, 1), 1
    prompts = []
    for length in PROMPT_LENGTHS:
        tokens = []
        for _ in range(length):
            state = (state * _MULTIPLIER + _INCREMENT) % 2**64
            tokens.append(first + (state >> 33) % span)
        prompts.append(tokens)
    return prompts


def differences(found: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> list[float]:
    """Return all |Δ| in rising order; a prompt that ``found`` lacks (empty) is left out."""
    pairs = zip(found, wanted, strict=True)
    return sorted(abs(a - b) for one, other in pairs if one for a, b in zip(one, other, strict=True))


def noise_of(deltas: Sequence[float]) -> Noise:
    """Return the two figures of sorted differences."""
    return Noise(deltas[len(deltas) // 2], deltas[len(deltas) * 9 // 10])


def canary_text(canary: Canary) -> str:
    """Return the file's content; the same figures give the same bytes."""
    return json.dumps({"canary_version": VERSION, **asdict(canary)}, sort_keys=True) + "\n"


def read_canary(file: Path) -> Canary:
    """Read a record. Raises `UserError` for anything but what this version writes."""
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"has more than {MAX_BYTES} bytes")
        value = json.loads(content)
        if not isinstance(value, dict) or value.get("canary_version") != VERSION:
            raise ValueError(f"is not of version {VERSION}")
        return _canary(value)
    except RecursionError:
        problem = "is nested too deep"
    except ValueError as error:
        problem = "is no JSON" if isinstance(error, json.JSONDecodeError) else str(error)
    raise UserError(f"{file}: {problem}; the file is damaged: `python -m convert canary DIR --force` writes it anew")


def _canary(value: dict[str, Any]) -> Canary:
    keys = {"canary_version", "vocab_size", "stored", "logprobs", "noise"}
    if set(value) != keys:
        raise ValueError(f"has not exactly the keys {', '.join(sorted(keys))}")
    if type(value["vocab_size"]) is not int or not 1 < value["vocab_size"] < 2**31:
        raise ValueError("its vocab_size is no size")
    if not isinstance(value["stored"], str) or not value["stored"].isascii() or len(value["stored"]) > 40:
        raise ValueError("its 'stored' is no name")
    rows = value["logprobs"]
    if not isinstance(rows, list) or [len(row) if isinstance(row, list) else -1 for row in rows] != [
        length - 1 for length in PROMPT_LENGTHS
    ]:
        raise ValueError("its logprobs are not one row per prompt")
    if not all(_is_number(one) and one <= 1e-3 for row in rows for one in row):
        raise ValueError("has logprobs that are none")
    noise = value["noise"]
    if noise is None:
        return Canary(value["vocab_size"], value["stored"], rows, None)
    if not isinstance(noise, dict) or set(noise) != {"median", "tenth"}:
        raise ValueError("its noise has not exactly median and tenth")
    if not all(_is_number(one) and one >= 0 for one in noise.values()):
        raise ValueError("its noise is no number")
    return Canary(value["vocab_size"], value["stored"], rows, Noise(**noise))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
