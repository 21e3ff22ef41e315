"""What the terminal shows of a sweep: one line per point, medians of its repeats."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from perf.result import ServeRow

# The client's key, the heading, and how the figure is written. Latencies are milliseconds.
COLUMNS = (
    ("output_throughput", "out tok/s", ".1f"),
    ("total_token_throughput", "all tok/s", ".1f"),
    ("request_throughput", "req/s", ".2f"),
    ("p50_ttft_ms", "TTFT p50", ".0f"),
    ("p99_ttft_ms", "p99", ".0f"),
    ("p50_tpot_ms", "TPOT p50", ".1f"),
    ("p99_tpot_ms", "p99", ".1f"),
    ("p99_itl_ms", "ITL p99", ".1f"),
    ("p50_e2el_ms", "E2E p50", ".0f"),
    ("p99_e2el_ms", "p99", ".0f"),
    ("request_goodput", "good/s", ".2f"),
)
# Of a server that drafts: the share of drafts that were right, in percent, and the tokens of a verification.
DRAFTING = (
    ("spec_decode_acceptance_rate", "accepted %", ".1f"),
    ("spec_decode_acceptance_length", "tok/step", ".2f"),
)
DRAWN = (
    "The server drafts. Prompts here are drawn token ids, which no draft model was trained on: with real questions\n"
    "other shares of drafts are right, and answers come faster or slower for it."
)
WIDTH = 10


def summary(rows: Sequence[ServeRow]) -> list[dict[str, Any]]:
    """Return one record per point: how hard it was, repeats, and the median over them of each figure of the table."""
    points: dict[tuple[int | None, float | None], list[ServeRow]] = {}
    for row in rows:
        points.setdefault((row.max_concurrency, row.request_rate), []).append(row)
    return [
        {"max_concurrency": concurrency, "request_rate": rate, "repeats": len(runs)}
        | {key: _median([run.result.get(key) for run in runs]) for key, _, _ in (*COLUMNS, *DRAFTING)}
        | {"watts": _median([run.watts for run in runs])}
        for (concurrency, rate), runs in points.items()
    ]


def table(rows: Sequence[ServeRow]) -> str:
    """Return the summary as text; with columns on drafts, and what they are worth, if the server drafts."""
    points = summary(rows)
    drafts = any(point[key] is not None for point in points for key, _, _ in DRAFTING)
    columns = (*COLUMNS, *DRAFTING) if drafts else COLUMNS
    lines = [f"{'load':<8}" + "".join(f"{heading:>{WIDTH}}" for _, heading, _ in columns)]
    for point in points:
        load = f"{point['request_rate']:g}/s" if point["request_rate"] else str(point["max_concurrency"])
        figures = ("-" if point[key] is None else format(point[key], form) for key, _, form in columns)
        lines.append(f"{load:<8}" + "".join(f"{figure:>{WIDTH}}" for figure in figures))
    return "\n".join([*lines, DRAWN] if drafts else lines)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) == len(values) else None
