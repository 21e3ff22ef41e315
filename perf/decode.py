"""`python -m perf decode`: decode tokens per second, this engine and its peers on one machine in one run.

Per round and batch size every engine generates twice from the same prompts, a few tokens and many; the difference is
decode alone, without prefill and start-up. The engines take turns within a round, so that what else happens on the
machine meets all of them, and the ratios are made per round before their median is taken. The share of the memory
bandwidth is the fewest bytes a step must read (`ascend.cost`, with the experts that this engine's routing hit) over its
time, against the read rate measured in the same round on the same device (`perf.rates`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ascend.cost import decode_work
from ascend.devices import get_device
from ascend.devices.base import Device
from ascend.devices.cpu import CpuDevice
from ascend.errors import UserError
from ascend.model_shape import ModelShape
from ascend.precision import FP32, PRECISIONS, precision
from ascend.progress import Progress
from perf.arguments import Parser, names, numbers, out_file
from perf.engines import ENGINES, Setting
from perf.machine import this_run
from perf.models import open_model
from perf.power import PowerMeter
from perf.result import DecodeRow, DecodeSettings, Machine, Result, document, write
from perf.worker import RATES, Worker

FEW = 8
FORMATS = ("w8a8", "w4a16")  # `ascend.quantisation` knows them, and takes torch to import
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
EMULATED = "npu-emulated"


@dataclass
class Seen:
    """What one engine did at one batch size, round by round."""

    step_seconds: list[float]
    memory_bytes: list[int]
    watts: list[float]


def main(argv: Sequence[str]) -> int:
    """Run the comparison and print a table; with ``--json`` the last line is one JSON document."""
    args = _parse(argv)
    device, name, environ = _device(args.device)
    stored = args.quantise or SHORT[args.dtype]
    with tempfile.TemporaryDirectory(prefix="decode-") as scratch:
        folder, config, model = open_model(args.model, args.layers, stored, Path(scratch))
        setting = Setting(
            model=folder,
            device=name,
            dtype=args.dtype,
            quantise=args.quantise,
            threads=args.threads,
            max_batch=max(args.batch),
            max_length=args.prompt_length + FEW + args.new_tokens,
            capture=not args.eager,
            seed=args.seed,
        )
        workers = {one: Worker(one, setting, environ, args.verbose) for one in (RATES, *args.engines)}
        try:
            ready = {one: worker.answer() for one, worker in workers.items()}
            rounds = _rounds(args, workers, device)
        finally:
            for worker in workers.values():
                worker.stop()
    machine = Machine(**ready[RATES]["machine"])
    versions = {one: ready[one]["version"] for one in args.engines}
    captured = any(ready[one]["captured"] for one in args.engines)
    rows = [
        _row(args, config, one, versions[one], batch, rounds, ready[RATES]["sheet_rate"])
        for batch in args.batch
        for one in args.engines
    ]
    threads = args.threads if isinstance(device, CpuDevice) else None
    settings = DecodeSettings(args.prompt_length, args.new_tokens, args.rounds, threads, captured)
    result = Result("decode", this_run(["decode", *argv], args.seed, machine, model, **versions), settings, rows)
    if args.out is not None:
        write(args.out, result)
    _print(result)
    if args.json:
        print(json.dumps(document(result), allow_nan=False))
    return 0


def _device(text: str) -> tuple[Device, str, dict[str, str]]:
    """Return the device (of an emulated card the CPU beside it), torch's name for it, and its workers' environment."""
    environ = dict(os.environ)  # before the look for one device tells torch not to load the others
    if text == EMULATED:
        from ascend.emulator.__main__ import environment

        return CpuDevice(), "npu:0", environment()
    device = get_device(text)
    return device, str(device), environ


@dataclass(frozen=True)
class Rounds:
    """All that was measured: by (engine, batch), the read rates by batch, the experts that a step hit by batch."""

    seen: dict[tuple[str, int], Seen]
    read_rate: dict[int, list[float]]
    distinct_experts: dict[int, float | None]


def _rounds(args: argparse.Namespace, workers: dict[str, Worker], device: Device) -> Rounds:
    """Let every engine take its turns; the first round warms up and is not kept."""
    seen = {(name, batch): Seen([], [], []) for name in args.engines for batch in args.batch}
    read_rate: dict[int, list[float]] = {batch: [] for batch in args.batch}
    distinct: dict[int, float | None] = dict.fromkeys(args.batch)
    with Progress("measuring", (args.rounds + 1) * len(args.batch) * len(args.engines), "turns") as progress:
        for number in range(args.rounds + 1):
            for batch in args.batch:
                rate = workers[RATES].answer(read=True)["read_rate"]
                turn = number % len(args.engines)
                for name in args.engines[turn:] + args.engines[:turn]:
                    request = {"batch": batch, "prompt_length": args.prompt_length, "seed": args.seed + number}
                    few = workers[name].answer(**request, new_tokens=FEW)["seconds"]
                    with PowerMeter(device) as power:
                        many = workers[name].answer(**request, new_tokens=FEW + args.new_tokens)
                    if number:
                        one = seen[name, batch]
                        one.step_seconds.append((many["seconds"] - few) / args.new_tokens)
                        one.memory_bytes.append(many["memory_bytes"])
                        one.watts += [] if power.watts is None else [power.watts]
                    elif name == "lean":
                        answer = workers[name].answer(**request, distinct_experts=True)
                        distinct[batch] = answer["distinct_experts"]
                    progress.advance(1)
                if number:
                    read_rate[batch].append(rate)
    return Rounds(seen, read_rate, distinct)


def _row(
    args: argparse.Namespace, config: dict[str, Any], name: str, version: str, batch: int, rounds: Rounds, sheet: Any
) -> DecodeRow:
    seen, rates = rounds.seen[name, batch], rounds.read_rate[batch]
    if min(seen.step_seconds) <= 0:
        raise UserError(
            f"{name}, batch {batch}: {args.new_tokens} more tokens took no more time; give --new-tokens more"
        )
    context = args.prompt_length + FEW + args.new_tokens // 2
    nbytes, flops = _cost(args, config, batch, context, rounds.distinct_experts[batch])
    shares = [nbytes / seconds / rate for seconds, rate in zip(seen.step_seconds, rates, strict=True)]
    median = statistics.median(seen.step_seconds)
    return DecodeRow(
        engine=name,
        version=version,
        batch=batch,
        context=context,
        step_seconds=seen.step_seconds,
        tokens_per_second=batch / median,
        distinct_experts=rounds.distinct_experts[batch],
        bytes_per_step=nbytes,
        flops_per_step=flops,
        read_rate=rates,
        share_of_read_rate=statistics.median(shares),
        sheet_rate=sheet,
        share_of_sheet=nbytes / median / sheet if sheet else None,
        memory_bytes=max(seen.memory_bytes),
        watts=statistics.mean(seen.watts) if seen.watts else None,
    )


def _cost(
    args: argparse.Namespace, config: dict[str, Any], batch: int, context: int, distinct: float | None
) -> tuple[float, float]:
    """Return the fewest bytes and FLOPs of a decode step; the engines keep the router in fp32."""
    plain = "fp32" if args.dtype == "float32" else "bf16"
    stored = replace(precision(args.quantise or plain), plain=PRECISIONS[plain].plain, router=FP32)
    kv_bytes = stored.plain.bytes_per_weight
    work = decode_work(ModelShape.from_config(config), stored, batch, context, kv_bytes=kv_bytes, distinct=distinct)
    return sum(part.nbytes for part in work.values()), sum(part.flops for part in work.values())


def _print(result: Result) -> None:
    run, settings, rows = result.run, result.settings, result.rows
    machine, model = run.machine, run.model
    if machine.emulated:
        print("EMULATED CARD: every time below is this computer's, and says nothing of an Ascend card's speed")
    rates = sorted(rate / 1e9 for row in rows for rate in row.read_rate)
    sheet = f", {rows[0].sheet_rate / 1e9:.0f} on paper" if rows[0].sheet_rate else ""
    threads = f", {settings.threads} threads" if settings.threads else ""
    depth = "" if model.layers == model.num_hidden_layers else f", {model.layers} of {model.num_hidden_layers} layers"
    weights = "random weights" if model.weights == "random" else "a checkpoint"
    print(f"{machine.device}{threads}; {model.name}{depth}, {weights}, {model.precision}; {run.date}")
    middle = statistics.median(rates)
    print(f"read rate in the same run: {rates[0]:.1f} to {rates[-1]:.1f} GB/s, median {middle:.1f}{sheet}")
    head = f"{'engine':<14}{'batch':>6}{'tok/s':>10}{'ms/step':>10}{'min':>8}{'max':>8}{'of read':>9}{'of sheet':>9}"
    print(f"{head}{'memory GB':>11}{'W':>7}{'ratio':>7}")
    for row in rows:
        first = next(one for one in rows if one.batch == row.batch)
        ratio = statistics.median(a / b for a, b in zip(row.step_seconds, first.step_seconds, strict=True))
        shares = f"{row.share_of_read_rate:>9.0%}" + (
            f"{row.share_of_sheet:>9.0%}" if row.share_of_sheet else f"{'-':>9}"
        )
        memory = f"{row.memory_bytes / 1e9:>11.1f}" if row.memory_bytes else f"{'-':>11}"
        watts = f"{row.watts:>7.0f}" if row.watts else f"{'-':>7}"
        low, median, high = (1e3 * f(row.step_seconds) for f in (min, statistics.median, max))
        times = f"{row.tokens_per_second:>10.1f}{median:>10.2f}{low:>8.2f}{high:>8.2f}"
        print(f"{row.engine:<14}{row.batch:>6}{times}{shares}{memory}{watts}{ratio:>7.2f}")
    print(f"ratio: how many times as fast {rows[0].engine} is, median of the rounds' ratios")
    print("of read: the fewest bytes of a step over its time, as a share of the read rate of the same round")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("decode", "Decode speed of this engine and its peers; perf/README.md says how to read it.")
    parser.add_argument("--model", required=True, help="checkpoint directory, or ling-flash … for random weights")
    parser.add_argument("--layers", type=int, help="of a model with random weights, only the first so many")
    parser.add_argument("--device", default="cpu", help=f"cpu, cuda[:i], npu[:i] or {EMULATED}")
    parser.add_argument("--engines", default="lean", help=f"of {','.join(ENGINES)}; ratios are against the first")
    parser.add_argument("--batch", default="1,8,32", help="rows decoded together, one or several")
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64, help=f"decode steps timed, after {FEW} untimed ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of CPU engines")
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(SHORT))
    parser.add_argument("--quantise", choices=FORMATS, help="in memory, once loaded; the lean engine alone does it")
    parser.add_argument("--eager", action="store_true", help="capture no graph of the decode step")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and prompts")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result file that `perf compare` reads")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--verbose", action="store_true", help="let the engines print what they have to say")
    args = parser.read(argv)
    args.engines = names("--engines", args.engines, ENGINES)
    args.batch = numbers("--batch", args.batch)
    out_file("--out", args.out)
    if min([args.prompt_length, args.new_tokens, args.rounds, args.threads]) < 1:
        raise UserError("--prompt-length, --new-tokens, --rounds and --threads must be at least 1")
    cores = len(os.sched_getaffinity(0))
    if args.threads > cores:
        raise UserError(f"--threads {args.threads} is more than the {cores} cores this process may use")
    return args
