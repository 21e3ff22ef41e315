"""What is never reported: runs with failed requests, with other work than was asked for, or with a client too slow."""

from __future__ import annotations

import statistics
from typing import Any

from ascend.errors import UserError
from perf.load.client import failures
from perf.load.points import Point

# Open loop: a request that goes out late is timed from then, not from when it arrived. The latest may be this late.
LAG_SECONDS, LAG_SHARE_OF_TTFT = 0.020, 0.05
KNOWN_SHARE = 0.01  # of a run's prompt tokens that the server's prefix cache may know: prompts begin alike by chance
BUSY = 0.9  # of one core: above it, the client's own work is what was measured


def check(result: dict[str, Any], point: Point, lengths: list[tuple[int, int]]) -> None:
    """Raise `UserError` if the run must not be reported. ``lengths``: prompt and answer tokens that were asked for."""
    if result["failed"] or result["completed"] != len(lengths):
        raise UserError(f"{point}: {failures(result)}; nothing is reported")
    for what, answered, asked in (
        ("answered with", result["output_lens"], [answer for _, answer in lengths]),
        ("counted a prompt of", result["input_lens"], [prompt for prompt, _ in lengths]),
    ):
        wrong = [index for index, (is_, wants) in enumerate(zip(answered, asked, strict=True)) if is_ != wants]
        if wrong:
            first = wrong[0]
            raise UserError(
                f"{point}: the server {what} {answered[first]} tokens in place of {asked[first]} "
                f"({len(wrong)} of {len(asked)} requests); it must honour ignore_eos and max_tokens and send usage"
            )
    if result["client_cpu_share"] > BUSY:
        raise UserError(
            f"{point}: the load client itself was busy {result['client_cpu_share']:.0%} of the time, so its own speed "
            "was measured; run it on a faster or idler machine"
        )
    if point.request_rate is not None:
        late = lag(result)
        allowed = max(LAG_SECONDS, LAG_SHARE_OF_TTFT * statistics.median(result["ttfts"]))
        if late > allowed:
            raise UserError(
                f"{point}: a request went out {late * 1e3:.0f} ms after its arrival ({allowed * 1e3:.0f} ms are "
                "allowed), so waiting would be left out of the latencies; run the client on an idler machine"
            )


def check_prefix_cache(point: Point, before: float | None, after: float | None, prompt_tokens: int) -> None:
    """Raise `UserError` if the server knew prompts of the run; ``before``, ``after``: its count of such tokens."""
    if before is None or after is None:
        return
    known = after - before
    if known > KNOWN_SHARE * prompt_tokens:
        raise UserError(
            f"{point}: the server knew {known:.0f} of {prompt_tokens} prompt tokens from an earlier run (prefix cache)"
            ": restart it or take another --seed"
        )


def lag(result: dict[str, Any]) -> float:
    """Return by how many seconds the latest request missed its scheduled arrival, against the one that kept it best."""
    late = [sent - due for sent, due in zip(result["start_times"], result["scheduled_times"], strict=True)]
    return float(max(late) - min(late))
