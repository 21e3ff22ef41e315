"""Result files of other load tools, as `perf compare` takes them. Each tool is a table of where its figures stand.

Read are the formats of `vllm bench serve --save-result` (vLLM 0.32), guidellm 0.8 (``benchmarks.json``, its schema 2)
and aiperf 0.13 (``profile_export_aiperf.json``, its schema 1.4). Every key was checked in the source of vLLM 0.32.0,
guidellm 0.8.1 and aiperf 0.13.0, and on files that these three wrote against a server of known times.

Such a file does not say device, versions or weights; what it says of the work done becomes `System.settings`. Lengths
are means over the file's requests in whole tokens, as the tool counted them. What the tools mean by the same word:

- TPOT is a request's time after its first token over its further tokens. guidellm calls that inter-token latency, and
  its percentiles count a request once for each of these tokens; its own "time per output token" has the first token in
  it and is not read. aiperf too calls it inter-token latency. guidellm has no percentiles of single gaps (ITL).
- A run of vLLM without rate and limit sends all at once: as many at a time as there were requests.
- Goodput is not read: vLLM's file does not say for which service level it was counted.
- guidellm's requests cut off by a time limit are no failures; their tokens are in its tokens/s and in nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ascend.errors import UserError
from perf.compare.systems import Point, System


@dataclass(frozen=True)
class Format:
    """Where one tool's file says what. Paths are keys joined by dots; a number in one is an index of a list.

    signs: what a file of this tool has, by which it is known. runs: the list of runs, None where the file is one run;
    the paths after it start at a run, those before at the file. failed: requests that failed, or their share. must: the
    values that a run must have to be compared. concurrency, rate: the load, the first that holds a number counts, a
    rate before a concurrency. limit: of requests at a time, beside a rate. completed: requests; input_tokens,
    output_tokens: of all of them. metrics: by key of `METRICS`, the path and the factor to its unit; a zero there means
    that the tool had nothing to count.
    """

    tool: str
    signs: tuple[str, ...]
    version: str | None
    runs: str | None
    failed: str
    must: Mapping[str, tuple[Any, ...]]
    model: str
    concurrency: tuple[str, ...]
    rate: str
    limit: str
    completed: str
    input_tokens: str
    output_tokens: str
    metrics: Mapping[str, tuple[str, float]]


def _latencies(keys: Mapping[str, tuple[str, float]], median: str, p99: str) -> dict[str, tuple[str, float]]:
    """Median and 99th percentile of each latency, which stand beside each other below its own path."""
    return {
        f"{name}_{key}_ms": (f"{path}.{place}", factor)
        for key, (path, factor) in keys.items()
        for name, place in (("median", median), ("p99", p99))
    }


_OF_VLLM = (
    "output_throughput", "total_token_throughput", "request_throughput",
    "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "p99_itl_ms", "median_e2el_ms", "p99_e2el_ms",
)  # fmt: skip
FORMATS = (
    Format(
        tool="vllm bench serve",
        signs=("model_id", "endpoint_type", "request_throughput"),
        version=None,
        runs=None,
        failed="failed",
        must={"ramp_up_strategy": (None,)},
        model="model_id",
        concurrency=("max_concurrency", "completed"),
        rate="request_rate",
        limit="max_concurrency",
        completed="completed",
        input_tokens="total_input_tokens",
        output_tokens="total_output_tokens",
        metrics={key: (key, 1.0) for key in _OF_VLLM},
    ),
    Format(
        tool="guidellm",
        signs=("metadata.guidellm_version", "benchmarks"),
        version="metadata.guidellm_version",
        runs="benchmarks",
        failed="metrics.request_totals.errored",
        must={"config.strategy.type_": ("synchronous", "concurrent", "throughput", "constant", "poisson")},
        model="config.backend.model",
        concurrency=("config.strategy.streams", "config.strategy.max_concurrency"),
        rate="config.strategy.rate",
        limit="config.strategy.max_concurrency",
        completed="metrics.request_totals.successful",
        input_tokens="metrics.prompt_token_count.successful.total_sum",
        output_tokens="metrics.output_token_count.successful.total_sum",
        metrics={
            "output_throughput": ("metrics.output_tokens_per_second.total.mean", 1.0),
            "total_token_throughput": ("metrics.tokens_per_second.total.mean", 1.0),
            "request_throughput": ("metrics.requests_per_second.successful.mean", 1.0),
        }
        | _latencies(
            {
                "ttft": ("metrics.time_to_first_token_ms.successful", 1.0),
                "tpot": ("metrics.inter_token_latency_ms.successful", 1.0),
                "e2el": ("metrics.request_latency.successful", 1e3),  # seconds
            },
            "median",
            "percentiles.p99",
        ),
    ),
    Format(
        tool="aiperf",
        signs=("aiperf_version", "input_config"),
        version="aiperf_version",
        runs=None,
        failed="request_error_rate.avg",
        must={
            "was_cancelled": (False,),
            "is_complete": (True,),
            "input_config.phases.-1.type": ("concurrency", "constant", "poisson"),
        },
        model="input_config.models.items.0.name",
        concurrency=("input_config.phases.-1.concurrency",),  # a warm-up comes before it
        rate="input_config.phases.-1.rate",
        limit="input_config.phases.-1.concurrency",
        completed="request_count.avg",
        input_tokens="total_isl.avg",
        output_tokens="total_osl.avg",
        metrics={
            "output_throughput": ("output_token_throughput.avg", 1.0),
            "total_token_throughput": ("total_token_throughput.avg", 1.0),
            "request_throughput": ("request_throughput.avg", 1.0),
            "p99_itl_ms": ("inter_chunk_latency.p99", 1.0),
        }
        | _latencies(
            {
                "ttft": ("time_to_first_token", 1.0),
                "tpot": ("inter_token_latency", 1.0),
                "e2el": ("request_latency", 1.0),
            },
            "p50",
            "p99",
        ),
    ),
)


def read_foreign(loaded: Any, file: str, label: str | None) -> list[System]:
    """Return the one system that a loaded result file of another tool describes; ``file`` names it in errors.

    Raises `UserError`, one line, for a file of no known tool, a run that failed in part, and one without a load.
    """
    known = [one for one in FORMATS if all(_at(loaded, sign) is not None for sign in one.signs)]
    if not known:
        names = ", ".join(one.tool for one in FORMATS)
        raise UserError(f"{file}: a file of no known tool; read are `perf decode`, `perf serve`, {names}")
    form = known[0]
    runs = loaded if form.runs is None else _at(loaded, form.runs)
    runs = runs if isinstance(runs, list) else [runs]
    if not runs:
        raise UserError(f"{file}: {form.tool} wrote no run into it")
    points: dict[tuple[str, float], list[Mapping[str, float]]] = {}
    for number, run in enumerate(runs):
        where = file if form.runs is None else f"{file}: {form.runs}.{number}"
        _check(form, run, where)
        points.setdefault(_load(form, run, where), []).append(_figures(form, run, where))
    model, lengths = _model(form, runs, file), _lengths(form, runs)
    version = f" {_at(loaded, form.version)}" if form.version else ""
    return [
        System(
            label=label or f"{model}, {form.tool}",
            source=file,
            tool=form.tool + version,
            engine="unknown",
            points=tuple(
                Point(axis, load, {key: [one[key] for one in figures] for key in _in_all(figures)})
                for (axis, load), figures in sorted(points.items())
            ),
            settings={
                "model": model,
                "input tokens": round(lengths[0]),
                "output tokens": round(lengths[1]),
                **_limit(form, runs, file),
            },
            lengths=lengths,
        )
    ]


def _check(form: Format, run: Any, where: str) -> None:
    """Refuse a run that is not whole: figures of the requests that went well would flatter the server."""
    failed = _number(_at(run, form.failed))
    if failed is None:
        raise UserError(f"{where}: {form.tool} does not say whether requests failed ({form.failed}); measure again")
    if failed:
        raise UserError(f"{where}: requests failed ({form.failed} is {failed:g}); such a run is not compared")
    for path, wanted in form.must.items():
        if _at(run, path) not in wanted:
            can = " or ".join(repr(one) for one in wanted)
            raise UserError(f"{where}: {path} is {_at(run, path)!r}; a run that can be compared has {can}")
    for path in (form.completed, form.input_tokens, form.output_tokens):
        if not _number(_at(run, path)):
            raise UserError(f"{where}: {path} is {_at(run, path)!r}: nothing was measured")


def _load(form: Format, run: Any, where: str) -> tuple[str, float]:
    for axis, paths in (("rate", (form.rate,)), ("concurrency", form.concurrency)):
        for path in paths:
            load = _number(_at(run, path))
            if load:
                return axis, load
    places = ", ".join((form.rate, *form.concurrency))
    raise UserError(f"{where}: no load that one can compare under: none of {places} holds a number")


def _figures(form: Format, run: Any, where: str) -> Mapping[str, float]:
    found = {key: (_number(_at(run, path)), factor) for key, (path, factor) in form.metrics.items()}
    figures = {key: number * factor for key, (number, factor) in found.items() if number}
    if "output_throughput" not in figures:
        raise UserError(f"{where}: no {form.metrics['output_throughput'][0]}: not a run that generated text")
    return figures


def _lengths(form: Format, runs: list[Any]) -> tuple[float, float]:
    """Tokens of a request's prompt and answer, means over the file."""
    completed, inputs, outputs = (
        sum(_number(_at(run, path)) or 0.0 for run in runs)
        for path in (form.completed, form.input_tokens, form.output_tokens)
    )
    return inputs / completed, outputs / completed


def _limit(form: Format, runs: list[Any], file: str) -> dict[str, float]:
    """How many requests at a time an arrival rate was held to, as a setting; none where no run could reach it."""
    limits = set()
    for run in runs:
        limit, completed = _number(_at(run, form.limit)), _number(_at(run, form.completed))
        if _number(_at(run, form.rate)):
            limits.add(limit if limit and completed and limit < completed else None)
    if len(limits) > 1:
        raise UserError(f"{file}: its arrival rates were measured under different limits of requests at a time")
    limit = limits.pop() if limits else None
    return {} if limit is None else {"requests at a time, at most": limit}


def _model(form: Format, runs: list[Any], file: str) -> str:
    """The model's last name: the folder it lies in may differ with the site."""
    names = {str(_at(run, form.model) or "unknown").rstrip("/").rpartition("/")[2] for run in runs}
    if len(names) > 1:
        raise UserError(f"{file}: runs of several models in one file: {', '.join(sorted(names))}")
    return names.pop()


def _in_all(figures: list[Mapping[str, float]]) -> list[str]:
    return [key for key in figures[0] if all(key in one for one in figures)]


def _at(value: Any, path: str) -> Any:
    """Return what stands at a path, None where there is nothing."""
    for key in path.split("."):
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.lstrip("-").isdigit() and -len(value) <= int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
