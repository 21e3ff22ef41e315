"""What `perf compare` compares: one system under one kind of load, read from a result file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascend.errors import UserError
from perf.result import Result, Run, load_json, parse


@dataclass(frozen=True)
class Metric:
    """One figure of a point: what people call it, its unit, and whether more is better."""

    label: str
    unit: str
    more_is_better: bool


# Keys as `vllm bench serve` writes them; `perf decode` has the first two.
METRICS: dict[str, Metric] = {
    "output_throughput": Metric("output tokens/s", "tok/s", True),
    "median_tpot_ms": Metric("TPOT, median", "ms", False),
    "p99_tpot_ms": Metric("TPOT, p99", "ms", False),
    "median_ttft_ms": Metric("TTFT, median", "ms", False),
    "p99_ttft_ms": Metric("TTFT, p99", "ms", False),
    "p99_itl_ms": Metric("ITL, p99", "ms", False),
    "median_e2el_ms": Metric("whole answer, median", "ms", False),
    "p99_e2el_ms": Metric("whole answer, p99", "ms", False),
    "total_token_throughput": Metric("all tokens/s", "tok/s", True),
    "request_throughput": Metric("answers/s", "1/s", True),
    "request_goodput": Metric("answers/s within the service level", "1/s", True),
}
# What the load of a point is counted in.
AXES = {"batch": "rows decoded together", "concurrency": "requests at a time", "rate": "requests/s arriving"}


@dataclass(frozen=True)
class Point:
    """One load.

    samples: by metric, a value for each round or repeat. watts: of all cards, None if unknown. work: what says that two
    points did the same work (hashes of what was sent), where the file tells.
    """

    axis: str
    load: float
    samples: Mapping[str, list[float]]
    watts: float | None = None
    share_of_read_rate: float | None = None
    work: tuple[str, ...] = ()


@dataclass(frozen=True)
class System:
    """One engine on one machine, as one file has it.

    label: what the report calls it. source: the file. tool: what measured. cards: None where the file does not say.
    settings: what must be the same for two systems to be comparable, by name. paired: systems of the same value were
    measured in turns, so that their rounds can be compared one by one. lengths: tokens of a request's prompt and
    answer, means. run: None for files of other tools. threads: of an engine on the CPU. weights: "random", or the
    checkpoint's hash. captured: whether the decode step is a replayed graph, None where that is not known.
    """

    label: str
    source: str
    tool: str
    engine: str
    points: tuple[Point, ...]
    cards: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    paired: str | None = None
    lengths: tuple[float, float] | None = None
    run: Run | None = None
    threads: int | None = None
    weights: str | None = None
    captured: bool | None = None


def read_systems(file: Path, label: str | None = None) -> list[System]:
    """Read a result file of any tool that is known. Raises `UserError`, one line, for any other file."""
    loaded = load_json(file)
    if isinstance(loaded, dict) and "schema" in loaded:
        result = parse(loaded, str(file))
        if result.kind not in _READERS:
            raise UserError(f"{file}: a result of `perf {result.kind}`; compare takes those of decode and serve")
        return _READERS[result.kind](result, str(file), label)
    from perf.compare.foreign import read_foreign

    return read_foreign(loaded, str(file), label)


def _decode(result: Result, source: str, label: str | None) -> list[System]:
    systems = []
    seen = [(row.engine, row.batch) for row in result.rows]
    for number, row in enumerate(result.rows):
        _refuse(source, number, not row.step_seconds or min(row.step_seconds) <= 0, "step_seconds must be above 0")
        _refuse(source, number, row.batch < 1, "batch must be at least 1")
        _refuse(source, number, seen.index((row.engine, row.batch)) < number, "this engine and batch stand there twice")
    for engine in dict.fromkeys(row.engine for row in result.rows):
        rows = [row for row in result.rows if row.engine == engine]
        points = tuple(
            Point(
                "batch",
                row.batch,
                {
                    "output_throughput": [row.batch * row.tokens_per_step / seconds for seconds in row.step_seconds],
                    "median_tpot_ms": [1e3 * seconds / row.tokens_per_step for seconds in row.step_seconds],
                },
                row.watts,
                row.share_of_read_rate,
            )
            for row in rows
        )
        settings = {
            "prompt length": result.settings.prompt_length,
            "new tokens": result.settings.new_tokens,
            "layers": result.run.model.layers,
            "cache": result.settings.kv,
            "filled": result.settings.filled,
        }
        where = label or f"{result.run.machine.device}, {result.run.model.precision}"
        systems.append(
            System(
                f"{where}, {engine}",
                source,
                "perf decode",
                rows[0].version,
                points,
                result.run.machine.cards,
                settings,
                source,
                run=result.run,
                threads=result.settings.threads,
                weights="random" if rows[0].random_weights else result.run.model.weights,
                captured=rows[0].captured,
            )
        )
    return systems


def _serve(result: Result, source: str, label: str | None) -> list[System]:
    points: dict[tuple[str, float], list[Any]] = {}
    for number, row in enumerate(result.rows):
        if (row.max_concurrency is None) == (row.request_rate is None):
            raise UserError(f"{source}: rows.{number}: one of max_concurrency and request_rate must be set, not both")
        failed, completed = row.result.get("failed"), row.result.get("completed")
        _refuse(source, number, failed != 0 or not completed, f"{failed} requests failed, {completed} were answered")
        _refuse(source, number, (row.max_concurrency or row.request_rate or 0) <= 0, "its load must be above 0")
        axis = ("rate", row.request_rate) if row.max_concurrency is None else ("concurrency", row.max_concurrency)
        points.setdefault(axis, []).append(row)
    settings = {
        "workload": result.settings.workload,
        "workload's hash": result.settings.workload_sha256,
        "service level": result.settings.service_level,
    }
    run = result.run
    made = tuple(
        Point(
            axis,
            load,
            _samples([row.result for row in rows]),
            _mean([row.watts for row in rows]),
            work=tuple(sorted(row.prompts_sha256 for row in rows)),
        )
        for (axis, load), rows in sorted(points.items())
    )
    cards = run.machine.cards
    many = f"{cards} x " if cards > 1 else ""
    name = label or f"{many}{run.machine.device}, {run.model.precision}"
    lengths = (result.settings.input_tokens, result.settings.output_tokens)
    return [
        System(
            name,
            source,
            "perf serve",
            result.settings.engine,
            made,
            cards,
            settings,
            lengths=lengths,
            run=run,
            weights=run.model.weights,
        )
    ]


def _refuse(source: str, number: int, wrong: bool, why: str) -> None:
    if wrong:
        raise UserError(f"{source}: rows.{number}: {why}")


def _samples(results: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the figures that every repeat has; what the client did not reckon (goodput without a level) is null."""
    found: dict[str, list[Any]] = {key: [one.get(key) for one in results] for key in METRICS}
    return {key: values for key, values in found.items() if all(type(value) in (int, float) for value in values)}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


_READERS: dict[str, Callable[[Result, str, str | None], list[System]]] = {"decode": _decode, "serve": _serve}
