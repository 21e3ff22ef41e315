"""What is asked: fixed workloads of exact lengths, the same token ids at every site that gives the same seed.

Prompts are lists of token ids, since a text has other lengths under another tokenizer. They come from SHAKE-256, whose
output no version of Python or of a library changes. Random ids cost a server what text of that length costs, except
where speculative decoding guesses them: acceptance on random ids says nothing.
"""

from __future__ import annotations

import hashlib
import math
import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ascend.errors import UserError, suggest

LEAST_INPUT, LEAST_OUTPUT = 8, 4  # tokens, of a scaled workload
IDENTITY_REQUESTS = 16


@dataclass(frozen=True)
class Workload:
    """Prompt and answer lengths in tokens, each from the first to the second figure, all equally often."""

    name: str
    input_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    source: str


# Shapes of benchmarks are lengths only, not their data. "estimated": no published statistic was found.
_EVALSCOPE = "characters in EvalScope's benchmark page"
_TABLE = (
    Workload("short-chat", (128, 512), (256, 256), "chosen: a question with some context, an answer of a paragraph"),
    Workload("record-8k", (7680, 7680), (512, 512), "chosen: a patient's record; 8,192 tokens with the answer"),
    Workload("record-32k", (32256, 32256), (512, 512), "chosen: a long record; 32,768 tokens with the answer"),
    Workload("long-answer", (256, 256), (2048, 2048), "chosen: a short question answered at length"),
    Workload(
        "humaneval",
        (80, 270),
        (100, 400),
        "prompts estimated as 280 to 950 characters with the instruction, 3.5 a token; answers estimated",
    ),
    Workload(
        "gsm8k",
        (450, 534),
        (100, 300),
        f"1,800 to 2,575 (mean 1,967) {_EVALSCOPE}, four examples before the question; 4 a token, so that the mean "
        "is met; answers estimated",
    ),
    Workload(
        "math-500",
        (55, 96),
        (300, 1500),
        f"means of 193 (level 1) to 337 (level 5) {_EVALSCOPE}; 3.5 a token; answers estimated",
    ),
)
WORKLOADS = {workload.name: workload for workload in _TABLE}


@dataclass(frozen=True)
class Request:
    """One prompt as token ids, and how many tokens must answer it."""

    prompt: list[int]
    output_tokens: int


def workload(name: str, scale: float = 1.0) -> Workload:
    """Return the workload, all lengths times ``scale``, which its name then says. Raises `UserError` if unknown."""
    if name not in WORKLOADS:
        raise UserError(f"unknown workload '{name}'{suggest(name, WORKLOADS)}; there is {', '.join(WORKLOADS)}")
    found = WORKLOADS[name]
    if scale == 1.0:
        return found
    low, high = (max(LEAST_INPUT, round(length * scale)) for length in found.input_tokens)
    least, most = (max(LEAST_OUTPUT, round(length * scale)) for length in found.output_tokens)
    return replace(found, name=f"{name} x{scale:g}", input_tokens=(low, high), output_tokens=(least, most))


def lengths(work: Workload, seed: int, count: int) -> list[tuple[int, int]]:
    """Return prompt and answer length of the first ``count`` requests: the same at every point and repeat."""
    (low, high), (least, most) = work.input_tokens, work.output_tokens
    drawn = _words(f"lengths {seed}", 2 * count)
    return [
        (low + drawn[2 * i] % (high - low + 1), least + drawn[2 * i + 1] % (most - least + 1)) for i in range(count)
    ]


def requests(work: Workload, seed: int, label: str, count: int, ids: range) -> list[Request]:
    """Return requests of token ids in ``ids``. Another ``label`` gives other prompts of the same lengths."""
    return [
        Request([ids[word % len(ids)] for word in _words(f"prompt {seed} {label} {index}", length)], answer)
        for index, (length, answer) in enumerate(lengths(work, seed, count))
    ]


def arrivals(seed: int, label: str, count: int, rate: float) -> list[float]:
    """Return when each request arrives, in seconds from the first: a Poisson process of ``rate`` per second.

    All times are then scaled so that the mean rate is exact, as `vllm bench serve` does.
    """
    gaps = [-math.log1p(-word / 2**32) for word in _words(f"arrivals {seed} {label}", count - 1)]
    scale = (count - 1) / rate / sum(gaps) if gaps else 0.0
    times = [0.0]
    for gap in gaps:
        times.append(times[-1] + gap * scale)
    return times


def sha256(asked: Iterable[Request], times: Iterable[float] = ()) -> str:
    """Return the SHA-256 of all lengths and token ids, and of arrival times to the microsecond."""
    digest = hashlib.sha256()
    for request in asked:
        digest.update(_bytes(array("I", [len(request.prompt), request.output_tokens, *request.prompt])))
    digest.update(" ".join(f"{time:.6f}" for time in times).encode())
    return digest.hexdigest()


def identity(work: Workload, seed: int, ids: range) -> str:
    """Return the SHA-256 that stands for the workload, whatever part of it a sweep sends: of its first requests."""
    return sha256(requests(work, seed, "identity", IDENTITY_REQUESTS, ids))


def _words(label: str, count: int) -> array[int]:
    """Return ``count`` words of 32 bits that the label alone decides."""
    words = array("I", hashlib.shake_256(label.encode()).digest(4 * count))
    if sys.byteorder == "big":
        words.byteswap()
    return words


def _bytes(words: array[int]) -> bytes:
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
