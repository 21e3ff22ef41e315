"""`python -m perf decode`: decode tokens per second, this engine and its peers on one machine in one run.

Per round and batch size every engine generates twice from the same prompts, a few tokens and many; the difference is
decode alone, without prefill and start-up. The engines take turns within a round, so that what else happens on the
machine meets all of them, and the ratios are made per round before their median is taken. The share of the memory
bandwidth is the fewest bytes a step must read (`ascend.cost`, uniform routing) over its time, against the read rate
measured in the same round by `CpuDevice.measure_bandwidth`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ascend.checkpoint import open_checkpoint
from ascend.devices import get_device
from ascend.devices.cpu import CpuDevice
from ascend.errors import UserError, suggest
from perf.engines import ENGINES

FEW = 8


def main(argv: Sequence[str]) -> int:
    """Run the comparison and print a table; with ``--json`` the last line is one JSON document."""
    args = _parse(argv)
    device = get_device(args.device)
    if not isinstance(device, CpuDevice):
        raise UserError(f"perf decode measures on the CPU so far, not on {device}; use --device cpu")
    checkpoint = open_checkpoint(args.model)
    if args.threads > device.cores():
        raise UserError(f"--threads {args.threads} is more than the {device.cores()} cores this process may use")
    workers = {name: Worker(name, args) for name in args.engines}
    try:
        versions = {name: worker.ready() for name, worker in workers.items()}
        rounds = [_round(args, workers, device, number) for number in range(args.rounds + 1)][1:]  # the first warms up
    finally:
        for worker in workers.values():
            worker.stop()
    document = {
        "command": " ".join([Path(sys.executable).name, "-m", "perf", "decode", *argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": device.name(), "cores": device.cores(), "platform": platform.machine()},
        "config_sha256": hashlib.sha256((checkpoint.path / "config.json").read_bytes()).hexdigest(),
        "checkpoint_bytes": checkpoint.nbytes,
        "dtype": args.dtype,
        "threads": args.threads,
        "prompt_length": args.prompt_length,
        "new_tokens": args.new_tokens,
        "engines": versions,
        "rows": [row for batch in args.batch for row in _rows(args, checkpoint.config, rounds, batch)],
        "rounds": rounds,
    }
    _print(document)
    if args.json:
        print(json.dumps(document))
    return 0


class Worker:
    """An engine in its own process; see `perf.engines`."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        options = ["--model", args.model, "--device", args.device, "--dtype", args.dtype]
        options += ["--threads", str(args.threads), "--max-batch", str(max(args.batch))]
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "perf.engines", name, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else subprocess.DEVNULL,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            text=True,
        )

    def ready(self) -> dict[str, Any]:
        """Wait until the model is loaded; returns the engine's versions."""
        return self._answer()

    def seconds(self, **request: int) -> float:
        """Have one generation made; returns what it took."""
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return float(self._answer()["seconds"])

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(
                f"engine {self.name} ended with code {self.process.wait()}; run again with --verbose to see why"
            )
        return dict(json.loads(line))


def _round(args: argparse.Namespace, workers: dict[str, Worker], device: CpuDevice, number: int) -> dict[str, Any]:
    """One turn of every engine at every batch size: seconds per decode step, and the read rate beside them."""
    import torch

    torch.set_num_threads(args.threads)
    steps: dict[str, dict[str, float]] = {}
    bandwidth = {}
    for batch in args.batch:
        bandwidth[str(batch)] = device.measure_bandwidth()
        order = list(workers)[number % len(workers) :] + list(workers)[: number % len(workers)]
        for name in order:
            request = {"batch": batch, "prompt_length": args.prompt_length, "seed": number}
            few = workers[name].seconds(**request, new_tokens=FEW)
            many = workers[name].seconds(**request, new_tokens=FEW + args.new_tokens)
            steps.setdefault(name, {})[str(batch)] = (many - few) / args.new_tokens
    return {"seconds_per_step": steps, "bytes_per_second": bandwidth}


def _rows(
    args: argparse.Namespace, config: dict[str, Any], rounds: list[dict[str, Any]], batch: int
) -> list[dict[str, Any]]:
    from ascend.config import BailingMoeV2Config
    from ascend.cost import decode_bytes

    width = {"bfloat16": 2, "float16": 2, "float32": 4}[args.dtype]
    context = args.prompt_length + FEW + args.new_tokens // 2
    nbytes = decode_bytes(BailingMoeV2Config(**config), batch, context, width)
    rows = []
    for name in args.engines:
        seconds = [r["seconds_per_step"][name][str(batch)] for r in rounds]
        first = [r["seconds_per_step"][args.engines[0]][str(batch)] for r in rounds]
        shares = [nbytes / s / r["bytes_per_second"][str(batch)] for s, r in zip(seconds, rounds, strict=True)]
        rows.append(
            {
                "engine": name,
                "batch": batch,
                "tokens_per_second": batch / statistics.median(seconds),
                "ms_per_step": 1e3 * statistics.median(seconds),
                "ms_per_step_min": 1e3 * min(seconds),
                "ms_per_step_max": 1e3 * max(seconds),
                "first_engine_is_faster_by": statistics.median(s / f for s, f in zip(seconds, first, strict=True)),
                "bytes_per_step": nbytes,
                "share_of_bandwidth": statistics.median(shares),
            }
        )
    return rows


def _print(document: dict[str, Any]) -> None:
    machine = document["machine"]
    rates = sorted(rate / 1e9 for r in document["rounds"] for rate in r["bytes_per_second"].values())
    print(f"{machine['cpu']}, {document['threads']} threads, {document['dtype']}; {document['date']}")
    print(f"read rate in the same run: {rates[0]:.1f} to {rates[-1]:.1f} GB/s, median {statistics.median(rates):.1f}")
    print(f"{'engine':<14}{'batch':>6}{'tok/s':>10}{'ms/step':>10}{'min':>8}{'max':>8}{'bandwidth':>11}{'ratio':>8}")
    for row in document["rows"]:
        print(
            f"{row['engine']:<14}{row['batch']:>6}{row['tokens_per_second']:>10.1f}{row['ms_per_step']:>10.2f}"
            f"{row['ms_per_step_min']:>8.2f}{row['ms_per_step_max']:>8.2f}{row['share_of_bandwidth']:>11.0%}"
            f"{row['first_engine_is_faster_by']:>8.2f}"
        )
    print(f"ratio: how many times as fast {document['rows'][0]['engine']} is, median of the rounds' ratios")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf decode", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="checkpoint; `convert demo --size small` for CPUs"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engines", default="lean", help=f"of {','.join(ENGINES)}; ratios are against the first")
    parser.add_argument("--batch", default="1,8,32", help="rows decoded together, one or several")
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64, help=f"decode steps timed, after {FEW} untimed ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--verbose", action="store_true", help="let the engines print what they have to say")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"unknown argument '{unknown[0]}'{suggest(unknown[0].split('=')[0], known)}; see --help")
    args.engines = args.engines.split(",")
    for name in args.engines:
        if name not in ENGINES:
            raise UserError(
                f"--engines: unknown engine '{name}'{suggest(name, ENGINES)}; there is {', '.join(ENGINES)}"
            )
    try:
        args.batch = [int(part) for part in args.batch.split(",")]
    except ValueError:
        raise UserError(f"--batch '{args.batch}' is not a list of numbers such as 1,8,32") from None
    if min([*args.batch, args.prompt_length, args.new_tokens, args.rounds, args.threads]) < 1:
        raise UserError("--batch, --prompt-length, --new-tokens, --rounds and --threads must be at least 1")
    return args
