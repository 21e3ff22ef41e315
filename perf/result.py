"""The result file of `perf decode`, `ops` and `serve`: one JSON document, and all of its fields are in this file.

``{"schema": 1, "kind": "decode", "run": {…}, "settings": {…}, "rows": [{…}, …]}``: what was measured and where
(`Run`), how (the kind's settings), and one row per measured point. `KINDS` has settings and rows of each kind. A file
with a field that is not here, or without one that has no default, is refused (`read`): fields with a default are newer
than some committed files. ``python -m perf schema`` prints all of it as JSON Schema. Numbers are never NaN; what is
unknown is null. Times are seconds, memory is bytes, rates per second.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from ascend.errors import UserError, suggest

SCHEMA = 1


class Strict:
    """What pydantic reads: unknown fields are refused, and nothing is turned into another type."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True)
class Machine(Strict):
    """Where it ran. ``device`` as its driver names it, of which ``cards`` took part; host: the processor beside it.

    emulated: an Ascend card in software; its times say nothing. software: driver, CANN, CUDA, as far as they say.
    memory_bytes: of one card (or what the process may use of the host's).
    """

    device: str
    device_type: str
    emulated: bool
    cards: int
    memory_bytes: int | None
    software: dict[str, str]
    host: str
    cores: int
    system: str


@dataclass(frozen=True)
class Model(Strict):
    """What ran. architecture_sha256: of the config without what precision and place change (`perf.machine`).

    weights: "random", or the SHA-256 of samples of the files (`perf.machine.weights_sha256`), null if they were not at
    hand. precision: bf16, fp32, fp8, w8a8, w4a16 … layers: how many decoder layers took part of those there are.
    shape: the sizes that limits are computed from (`ascend.model_shape`), null where the config was not at hand.
    """

    name: str
    architecture_sha256: str | None
    weights: str | None
    precision: str
    layers: int | None
    num_hidden_layers: int | None
    shape: dict[str, int | bool | None] | None


@dataclass(frozen=True)
class Run(Strict):
    """Who measured: command, date (UTC), commit of the checkout ("+changes" if it had any), seed, clock, versions."""

    command: str
    date: str
    commit: str | None
    seed: int
    clock: str
    versions: dict[str, str]
    machine: Machine
    model: Model


@dataclass(frozen=True)
class DecodeSettings(Strict):
    """Of `perf decode`. prompt_length, new_tokens: of each generation; threads: of the CPU.

    rounds: those asked for; rows have fewer values where rounds were left out, or the run was interrupted. kv: the
    cache's format, null for the model's dtype. filled: no prompt was run, the cache held random values. drafts: of
    speculative steps, a number or "auto", null for none. acceptance: tokens that such a step was made to keep on
    average, null where the drafts decided (with "auto", what `ascend.draft_length` takes for typical).
    """

    prompt_length: int
    new_tokens: int
    rounds: int
    threads: int | None
    kv: str | None = None
    filled: bool = False
    drafts: str | None = None
    acceptance: float | None = None


@dataclass(frozen=True)
class DecodeRow(Strict):
    """One engine at one batch size.

    captured: whether its step is a replayed graph, null where the engine does not tell. random_weights: whatever
    `Model.weights` says, this engine had random ones. step_seconds: seconds of one decode step, one value a round.
    read_rate: bytes per second that a plain read reached on the same device, mean of before and after the same round's
    turns; sheet_rate: what the vendor says. distinct_experts: of a layer that a step
    hit, as this project's engine counted, null where it did not take part (uniform routing is then assumed).
    bytes_per_step, flops_per_step: the fewest (`ascend.cost`), at ``context`` tokens a row. share_of_read_rate,
    share_of_sheet: bytes_per_step over the time, of those rates. memory_bytes: what the engine's process held resident
    (CPU) or its allocator reserved (a card) after a generation, at its most; what an earlier batch size took and was
    not given back is in it. watts: mean of all cards while it decoded.

    drafts, tokens_per_step: of a speculative step (engine "speculative"), what it gained a row on average; its bytes
    and FLOPs are those of a verification and of the draft head. prefill_seconds: until the first token, one value a
    round, from the same generations; prefill_flops: the fewest. matmul_rate: of a large product in the run's dtype,
    quantised weights or not; share_of_matmul_rate: of prefill. All of prefill is empty or null where none was run.
    kernels_per_layer: launches and copies of a step over the decoder layers, null where nobody counted.
    """

    engine: str
    version: str
    captured: bool | None
    random_weights: bool
    batch: int
    context: int
    step_seconds: list[float]
    tokens_per_second: float
    distinct_experts: float | None
    bytes_per_step: float
    flops_per_step: float
    read_rate: list[float]
    share_of_read_rate: float
    sheet_rate: float | None
    share_of_sheet: float | None
    memory_bytes: int | None
    watts: float | None
    drafts: int = 0
    tokens_per_step: float = 1.0
    prefill_seconds: list[float] = field(default_factory=list)
    prefill_flops: float | None = None
    matmul_rate: list[float] = field(default_factory=list)
    share_of_matmul_rate: float | None = None
    kernels_per_layer: float | None = None


@dataclass(frozen=True)
class OpsSettings(Strict):
    """Of `perf ops`. walked_bytes: weights that are walked through in turn, at least, so that no cache holds them.

    width: of an expert on a rank, where that is a part of the model's.
    """

    rounds: int
    threads: int | None
    captured: bool
    walked_bytes: int
    width: int | None = None


@dataclass(frozen=True)
class OpsRow(Strict):
    """One op, as one implementation does it, at one size.

    sizes: the letters of its shapes. copies: sets of weights that were walked through. call_seconds: seconds of one
    call, one value a round. bytes, flops: the fewest of one call. read_rate, matmul_rate: measured in the same rounds,
    the products in the op's own precision (fp32, fp16), of quantised weights in bf16: a W8A8 op may exceed that rate.
    """

    op: str
    implementation: str
    precision: str
    sizes: dict[str, int]
    copies: int
    call_seconds: list[float]
    bytes: float
    flops: float
    read_rate: list[float]
    matmul_rate: list[float]
    share_of_read_rate: float
    share_of_matmul_rate: float


@dataclass(frozen=True)
class ServeSettings(Strict):
    """Of `perf serve`. workload_sha256: of the first requests' token ids and lengths, the same at two sites or not.

    client: the load client and its version. engine: what the server says it is. requests: of all rows together;
    input_tokens, output_tokens: of a request, mean. service_level: milliseconds by ``ttft``, ``tpot``, ``e2el`` that a
    request must keep to count as good.
    """

    engine: str
    client: str
    workload: str
    workload_sha256: str
    requests: int
    input_tokens: int
    output_tokens: int
    service_level: dict[str, float]


@dataclass(frozen=True)
class ServeRow(Strict):
    """One run of the load client. One of max_concurrency (closed loop) and request_rate (open loop) is set.

    prompts_sha256: of all token ids, lengths and arrival times that were sent in this run. result: what the client
    reported, its own keys (`vllm bench serve`'s), without texts. watts: as in `DecodeRow`.
    """

    max_concurrency: int | None
    request_rate: float | None
    repeat: int
    prompts_sha256: str
    result: dict[str, Any]
    watts: float | None


KINDS: dict[str, tuple[type, type]] = {
    "decode": (DecodeSettings, DecodeRow),
    "ops": (OpsSettings, OpsRow),
    "serve": (ServeSettings, ServeRow),
}


@dataclass(frozen=True)
class Result:
    """One result file."""

    kind: str
    run: Run
    settings: Any
    rows: list[Any]


def document(result: Result) -> dict[str, Any]:
    """Return the result as it stands in the file."""
    head = {"schema": SCHEMA, "kind": result.kind, "run": asdict(result.run), "settings": asdict(result.settings)}
    made: dict[str, Any] = finite(head | {"rows": [asdict(row) for row in result.rows]})
    return made


def write(file: Path, result: Result) -> None:
    """Write the file, mode 0640, whole or not at all. Raises `UserError` where it cannot be."""
    write_text(file, json.dumps(document(result), indent=1, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write any text file as `write` does."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.chmod(0o640)
        part.replace(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)


def read(file: Path) -> Result:
    """Read a result file. Raises `UserError` that names the first field that is unknown, missing or of a wrong type."""
    return parse(load_json(file), str(file))


def load_json(file: Path) -> Any:
    """Read any JSON file; NaN and infinity, which JSON does not have, are refused. Raises `UserError`."""
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number, parse_float=_finite_number)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error})") from None


def _finite_number(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def parse(loaded: Any, where: str) -> Result:
    """Check a loaded document and make a `Result` of it; ``where`` names it in errors."""
    parts = ("schema", "kind", "run", "settings", "rows")
    if not isinstance(loaded, dict) or not set(parts) <= set(loaded):
        raise UserError(f"{where}: not a result of `perf`: {', '.join(parts[:-1])} or rows is missing")
    for key in sorted(set(loaded) - set(parts)):
        raise UserError(f"{where}: unknown field '{key}'{suggest(key, parts)}")
    if loaded["schema"] != SCHEMA:
        raise UserError(f"{where}: schema {loaded['schema']!r}, this version reads {SCHEMA}; measure again")
    if not isinstance(loaded["kind"], str) or loaded["kind"] not in KINDS:
        raise UserError(f"{where}: unknown kind {loaded['kind']!r}{suggest(str(loaded['kind']), KINDS)}")
    settings, row = KINDS[loaded["kind"]]
    if not isinstance(loaded["rows"], list) or not loaded["rows"]:
        raise UserError(f"{where}: it holds no rows: nothing was measured")
    return Result(
        loaded["kind"],
        _checked(Run, loaded["run"], f"{where}: run"),
        _checked(settings, loaded["settings"], f"{where}: settings"),
        [_checked(row, one, f"{where}: rows.{index}") for index, one in enumerate(loaded["rows"])],
    )


def json_schema() -> dict[str, Any]:
    """Return the schema of all kinds as JSON Schema, by kind."""
    from pydantic import TypeAdapter

    run = TypeAdapter(Run).json_schema()
    return {
        kind: {"run": run, "settings": TypeAdapter(settings).json_schema(), "rows": TypeAdapter(row).json_schema()}
        for kind, (settings, row) in KINDS.items()
    }


def _checked(kind: type, value: Any, where: str) -> Any:
    try:
        from pydantic import TypeAdapter, ValidationError
    except ImportError:
        raise UserError("reading result files needs pydantic 2: pip install pydantic") from None
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value))  # strict: from Python it would ask for instances
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if not first["loc"]:
            raise UserError(f"{where}: should be an object with named fields") from None
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            known = {field.name for part in (kind, Machine, Model) for field in fields(part)}
            raise UserError(f"{where}.{name}: unknown field{suggest(name.split('.')[-1], known)}") from None
        raise UserError(f"{where}.{name}: {first['msg'].lower()}") from None


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null in their place, at any depth."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
