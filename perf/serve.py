"""`python -m perf serve`: how fast a running OpenAI endpoint (vLLM, vLLM-Ascend, SGLang) answers, and how much.

Closed loop (``--concurrency``): so many users, each of whom asks again once answered; gives the throughput at that
load. A stall blocks all users, who send nothing meanwhile: few requests see it, and percentiles are those of requests
that were sent, not of those that would have been. Open loop (``--rate``): arrivals are drawn before the run and wait
for nobody, so a stall meets everyone who arrives in it, and the percentiles are what users would see.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ascend.arguments import Parser
from ascend.errors import UserError, suggest
from perf import machine, result
from perf.arguments import numbers, out_file
from perf.load.checks import check, check_prefix_cache
from perf.load.client import LoadClient, check_installed
from perf.load.endpoint import KEY_VARIABLES, connect, prefix_cache_hits, read_key
from perf.load.points import Point, closed_loop, open_loop
from perf.load.site import check_fits, machine_of, model_of, token_ids
from perf.load.table import summary, table
from perf.load.workloads import WORKLOADS, Workload, identity, lengths, workload
from perf.power import PowerMeter
from perf.result import Result, ServeRow, ServeSettings

LEVELS = ("ttft", "tpot", "e2el")
CONCURRENCY = "1,2,4,8,16,32,64,128"


def main(argv: Sequence[str]) -> int:
    """Measure every point, print a table, write the result file. Nothing is written if one request fails."""
    args = _parse(argv)
    work = workload(args.workload, args.scale)
    points = [open_loop(rate, args.requests) for rate in args.rate or ()] or [
        closed_loop(users, args.requests) for users in args.concurrency
    ]
    model, ids = model_of(args.model, args.precision), token_ids(args.model)
    endpoint = connect(args.base_url, args.model, args.served_model_name, read_key(args.api_key_file))
    check_fits(work, endpoint)
    site, device, cards = machine_of(args.cards, endpoint)
    check_installed()
    with LoadClient(endpoint, work, args.seed, ids, args.goodput, args.timeout, args.verbose) as client:
        rows: list[ServeRow] = []
        for point in points:
            client.warm_up(point)
            for repeat in range(args.repeats):
                run = Point(point.max_concurrency, point.request_rate, point.requests, repeat)
                asked, known = lengths(work, args.seed, run.requests), prefix_cache_hits(endpoint)
                with PowerMeter(device, cards) as power:
                    measured, prompts = client.measure(run)
                check(measured, run, asked)
                check_prefix_cache(run, known, prefix_cache_hits(endpoint), sum(prompt for prompt, _ in asked))
                rows.append(ServeRow(run.max_concurrency, run.request_rate, repeat, prompts, measured, power.watts))
                _progress(run, args.repeats, measured)
    settings = ServeSettings(
        engine=endpoint.engine,
        client=client.version,
        workload=work.name,
        workload_sha256=identity(work, args.seed, ids),
        requests=sum(point.requests for point in points) * args.repeats,
        **_mean_lengths(work, args.seed, points),
        service_level=args.goodput,
    )
    head = machine.this_run(["serve", *argv], args.seed, site, model)
    result.write(args.out, Result("serve", head, settings, rows))
    print(f"{model.name}, {model.precision}, on {site.cards} x {site.device}; {endpoint.engine}; {work.name}")
    print(table(rows))
    print(f"median of {args.repeats} runs a point, latencies in ms; all of it: {args.out}")
    if args.json:
        print(json.dumps({"file": str(args.out), "workload_sha256": settings.workload_sha256, "points": summary(rows)}))
    return 0


def _mean_lengths(work: Workload, seed: int, points: Sequence[Point]) -> dict[str, int]:
    asked = [pair for point in points for pair in lengths(work, seed, point.requests)]
    return {
        "input_tokens": round(statistics.fmean(prompt for prompt, _ in asked)),
        "output_tokens": round(statistics.fmean(answer for _, answer in asked)),
    }


def _progress(run: Point, repeats: int, measured: dict[str, Any]) -> None:
    print(
        f"{run}, run {run.repeat + 1} of {repeats}: {run.requests} requests in {measured['duration']:.1f} s, "
        f"{measured['output_throughput']:.1f} tok/s out",
        file=sys.stderr,
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("perf serve", __doc__ or "")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="of the server; default %(default)s")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="the checkpoint that is served")
    parser.add_argument("--served-model-name", metavar="NAME", help="if the server calls it otherwise")
    parser.add_argument("--workload", default="short-chat", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="times all lengths; 0.125 for a demo on a CPU")
    parser.add_argument("--concurrency", metavar="N,…", help=f"users at once; default {CONCURRENCY}")
    parser.add_argument("--rate", metavar="R,…", help="arrivals per second, in place of --concurrency")
    parser.add_argument(
        "--requests", type=int, metavar="N", help="at most so many a run; default: 4 a user, 16 at least"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each point, with other prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--goodput", default="", metavar="ttft:500,tpot:50", help="ms that a good request keeps to")
    parser.add_argument("--cards", metavar="4xH20-96G", help="cards the server uses; needed for other machines")
    parser.add_argument("--precision", help="if the server computes in another one than the checkpoint's config says")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help=f"or {' or '.join(KEY_VARIABLES)}")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds a run may take")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the result file, for perf compare")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--verbose", action="store_true", help="let the load client print what it has to say")
    if any(part.partition("=")[0] == "--api-key" for part in argv):
        raise UserError("--api-key: every user of this machine could read it; use --api-key-file or the environment")
    args = parser.read(argv)
    if args.rate and args.concurrency:
        raise UserError("--concurrency and --rate exclude each other: users wait for answers, arrivals do not")
    args.concurrency = numbers("--concurrency", args.concurrency or CONCURRENCY)
    args.rate = _rates(args.rate) if args.rate else []
    args.goodput = _service_level(args.goodput)
    if (
        args.repeats < 1
        or (args.requests is not None and args.requests < 1)
        or not (0 < args.scale < 1e6 and 0 < args.timeout < 1e9)
    ):
        raise UserError("--repeats and --requests must be at least 1, --scale and --timeout above 0")
    out_file("--out", args.out)
    return args


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1e6 for rate in rates) or len(set(rates)) < len(rates):
        raise UserError(f"--rate '{text}' is not a list of different numbers above 0, such as 0.5,1,2")
    return rates


def _service_level(text: str) -> dict[str, float]:
    level: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, limit = part.partition(":")
        if name not in LEVELS:
            raise UserError(f"--goodput: unknown latency '{name}'{suggest(name, LEVELS)}; there is {', '.join(LEVELS)}")
        try:
            level[name] = float(limit)
        except ValueError:
            level[name] = 0.0
        if not 0 < level[name] < 1e9:
            raise UserError(f"--goodput '{part}': say milliseconds, as in ttft:500,tpot:50")
    return level
