"""The canary: before a server counts as ready, it gives recorded tokens the log-probabilities that were recorded.

Wrong weights, a sick card or a wrong setting (rope, quantisation) show there, where a fluent answer may not. They are
recorded by `python -m convert canary DIR` beside the manifest; else by the first start whose manifest was verified, for
this device, precision and engine; where nothing vouches for the weights, they must at least be numbers.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend.checkpoint import read_config
from ascend.errors import UserError
from ascend.model_shape import context_limit
from convert.canary_record import CANARY, Canary, canary_prompts, canary_text, differences, noise_of, read_canary
from convert.manifest import MANIFEST
from serve.settings import LaunchSettings
from serve.state import printable
from serve.watch.ready import EngineError, Server, call

TIMEOUT = 300.0  # seconds for one prompt: the first of its length may compile kernels
UNIFORM = 1e-6  # nats by which log-probabilities differ if a model says anything at all
DIRECTORY = "canary"  # in the state directory: what first starts recorded
_TOO_LONG = re.compile(r"context length|max_model_len|max_total_tokens|too long|longer than", re.IGNORECASE)


class CanaryError(EngineError):
    """The server computes something else than was recorded: wrong weights, a wrong setting, or a sick card."""


@dataclass(frozen=True)
class Limits:
    """How far log-probabilities may be from the recorded ones, in nats: half of them, nine in ten, all."""

    median: float
    tenth: float
    largest: float = math.inf


# Order of addition alone: vLLM's CPU engine and `ascend` differ by 1e-5 there (tests/test_quantised_server.py).
FP32 = Limits(1e-3, 1e-3, 1e-3)
# By how much a server in 16 bits may differ more than the record's twins (half of all, a tenth). Seen: up to 1.07 and
# 1.36, see MANTISSA_STEPS in `convert.canary`; the most is of w4a16. With activations in INT8, as `ascend` has them,
# 2.1 and 2.7. No card has been measured. What they find, of the `tiny` demo in bf16 with three seeds: a doubled norm, a
# final norm off by a tenth, a flipped highest bit of an exponent, swapped layers, another rope_theta: always. One of 16
# experts of one layer set to zero: 12 times of 18. So in bf16 it hears some of the small faults; in fp32, all of these.
TWIN_FACTORS = (1.7, 2.0)
QUANTISED_FACTORS = (3.0, 4.0)
FLOOR = Limits(0.02, 0.05)  # for a model that rounding hardly moves
# Recorded by the same engine on the same kind of device, where a start differs from another by nothing (seen: 0) or by
# the number of cards. Half of what bf16 costs `tiny` at one position in ten, for want of the model's own figures.
SAME_ENGINE = Limits(0.1, 0.5)


def check_canary(server: Server, settings: LaunchSettings) -> str:
    """Compare, or record, and return the line to announce.

    Raises `CanaryError` if the figures are wrong, `EngineError` if there are none.
    """
    if settings.canary == "off":
        return "off, as asked: nothing was compared"
    try:
        return _check(server, settings)
    except (UserError, OSError) as error:  # of a record, or a model directory, that cannot be read
        raise EngineError(str(error)) from None


def _check(server: Server, settings: LaunchSettings) -> str:
    vocab_size = _vocab_size(server.model)
    found = [_logprobs(server, settings.engine, prompt) for prompt in canary_prompts(vocab_size)]
    flat = [one for row in found for one in row]
    if not flat:
        return "not compared: the server takes no prompt that is long enough"
    if not all(map(math.isfinite, flat)):
        raise CanaryError("the server's log-probabilities are no numbers: wrong weights, or a sick card")
    if max(flat) - min(flat) < UNIFORM:
        raise CanaryError("the server finds all tokens equally probable: its weights are empty, or a card is sick")
    limit = context_limit(read_config(server.model))
    if settings.max_model_len is not None and limit is not None and settings.max_model_len > limit:
        said = "not compared: YaRN is switched on beyond config.json, and changes every position"
        return f"{len(flat)} log-probabilities are numbers; {said}"
    precision = _precision(server)
    beside = server.model / CANARY
    if beside.exists():
        record = read_canary(beside)
        if record.vocab_size != vocab_size:
            raise EngineError(f"{beside}: is of a model with another vocabulary: `python -m convert canary` it anew")
        limits = _limits(record, precision, server.device)
        return _compared(found, record, limits, f"{precision}, recorded by `convert canary`")
    if settings.verify == "off" or not (server.model / MANIFEST).exists():
        return f"{len(flat)} log-probabilities are numbers; not compared: nothing vouches for the weights"
    file = _recorded_at(server, settings.engine, precision)
    if file.exists():
        limits = FP32 if precision == "fp32" else SAME_ENGINE
        return _compared(found, read_canary(file), limits, f"{precision}, recorded here by an earlier start")
    if not all(found):
        return f"{len(flat)} log-probabilities are numbers; not recorded: the server takes no prompt as long as all are"
    _write(file, canary_text(Canary(vocab_size, precision, found, None)))
    return f"recorded, not compared: {len(flat)} log-probabilities in {precision}; later starts are held to them"


def _compared(found: list[list[float]], record: Canary, limits: Limits, what: str) -> str:
    deltas = differences(found, record.logprobs)
    noise = noise_of(deltas)
    said = f"half within {noise.median:.2g} (limit {limits.median:.2g}), nine in ten within {noise.tenth:.2g} "
    said += f"({limits.tenth:.2g})"
    if limits.largest < math.inf:
        said = f"all within {deltas[-1]:.2g} (limit {limits.largest:.2g})"
    if noise.median > limits.median or noise.tenth > limits.tenth or deltas[-1] > limits.largest:
        raise CanaryError(
            f"the server computes something else than was recorded ({what}): of {len(deltas)} log-probabilities {said}"
            "; wrong weights, a wrong setting or a sick card: `python -m convert verify DIR`, then `serve doctor`"
        )
    return f"{len(deltas)} log-probabilities as recorded ({what}): {said}"


def _limits(record: Canary, precision: str, device: str) -> Limits:
    """Limits for this model: a multiple of what rounding does to it. On the CPU quantised weights are widened."""
    is_rounded_on_the_way = record.stored in ("w8a8", "fp8") and device != "cpu"
    if precision == "fp32" and not is_rounded_on_the_way:
        return FP32
    if record.noise is None:
        return SAME_ENGINE
    median, tenth = QUANTISED_FACTORS if is_rounded_on_the_way else TWIN_FACTORS
    return Limits(max(FLOOR.median, median * record.noise.median), max(FLOOR.tenth, tenth * record.noise.tenth))


def _vocab_size(model: Path) -> int:
    size = read_config(model).get("vocab_size")
    if type(size) is not int or size < 100:
        raise EngineError(f"{model}: its config.json has no vocab_size")
    return size


def _logprobs(server: Server, kind: str, prompt: list[int]) -> list[float]:
    """Return the log-probabilities of a prompt's tokens from the second on; none if it is too long for the server."""
    if kind == "sglang":
        path = "/generate"
        body: dict[str, Any] = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        body |= {"return_logprob": True, "logprob_start_len": 0}
    else:
        path = "/v1/completions"
        body = {"model": server.name, "prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    try:
        status, answer = call(server, "POST", path, json.dumps(body).encode(), timeout=TIMEOUT)
    except (OSError, http.client.HTTPException) as error:
        raise EngineError(f"no answer to the canary: {type(error).__name__} within {TIMEOUT:.0f} s") from None
    if status == 400 and _TOO_LONG.search(answer.decode(errors="replace")):
        return []
    if status != 200:
        said = printable(answer.decode(errors="replace"))[:300]
        raise CanaryError(f"the server gives no log-probabilities (status {status}): {said}; --canary off goes without")
    try:
        return _read(json.loads(answer), kind, prompt)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise CanaryError("the server's answer to the canary has no log-probability of each token") from None


def _read(answer: Any, kind: str, prompt: Sequence[int]) -> list[float]:
    if kind == "sglang":
        rows = answer["meta_info"]["input_token_logprobs"][1:]
        found = [(int(token), float(logprob)) for logprob, token, *_ in rows]
    else:
        rows = answer["choices"][0]["prompt_logprobs"][1:]
        found = [(token, float(row[str(token)]["logprob"])) for token, row in zip(prompt[1:], rows, strict=True)]
    if [token for token, _ in found] != list(prompt[1:]):
        raise ValueError("of other tokens")
    return [logprob for _, logprob in found]


def _precision(server: Server) -> str:
    """What the engine computes in, as it says at its start; bf16 where it does not say."""
    with suppress(OSError), server.log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if found := re.search(r"Initializing a V1 LLM engine .*\bdtype=torch\.(\w+)", line):
                return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(found[1], found[1])
    return "bf16"


def _recorded_at(server: Server, kind: str, precision: str) -> Path:
    """The file of a first start: of this manifest, device, precision and version of the engine."""
    digest = hashlib.sha256((server.model / MANIFEST).read_bytes()).hexdigest()
    version = "unknown"
    with suppress(OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
        status, answer = call(server, "GET", "/version", timeout=TIMEOUT)
        if status == 200:
            version = re.sub(r"[^\w.+]", "_", str(json.loads(answer)["version"]))[:40]
    return server.log.parent / DIRECTORY / f"{digest[:32]}-{server.device}-{precision}-{kind}-{version}.json"


def _write(file: Path, text: str) -> None:
    """Write whole or not at all; a start is not stopped by a full disk, only the next one compares nothing then."""
    with suppress(OSError):
        file.parent.mkdir(mode=0o750, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        partial.rename(file)
