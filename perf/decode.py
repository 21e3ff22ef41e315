"""`python -m perf decode`: decode tokens per second, this engine and its peers on one machine in one run.

Per round and batch size every engine is made ready by two untimed tokens and then generates twice from the same
prompts, a few tokens and many; the difference is decode alone, without prefill and start-up. The engines take turns
within a round, so that what else happens on the machine meets all of them, and the ratios are made per round before
their median is taken; a round in which noise was more than that difference is left out for all. The share of the memory
bandwidth is the fewest bytes a step must read (`ascend.cost`, with the experts that this engine's routing hit) over its
time, against the read rate of the same round on the same device (`perf.rates`; mean of before and after the turns). No
round is left out for that rate: where it moved between rounds by more than 15 % the table says so, and the shares then
say less than the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
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

READY, FEW = 2, 8  # tokens: a prefill and one step
STEADY = 1.15  # largest over smallest read rate, up to which no more is said
EXIT_INTERRUPTED = 130
FORMATS = ("w8a8", "w4a16", "fp8")  # `ascend.quantisation` knows them, and takes torch to import
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
EMULATED = "npu-emulated"


@dataclass(frozen=True)
class Turns:
    """One round at one batch size: by engine what it did, and the rate at which the device read memory around it."""

    read_rate: float
    step_seconds: dict[str, float]
    memory_bytes: dict[str, int]
    watts: dict[str, float | None]


Round = dict[int, Turns]  # by batch size
Distinct = dict[int, float | None]  # experts of a layer that a step hit, by batch size


def main(argv: Sequence[str]) -> int:
    """Run the comparison and print a table; with ``--json`` the last line is one JSON document.

    Returns 130 if it was interrupted after at least one whole round; such rounds are reported.
    """
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
            rounds, distinct = _rounds(args, workers, device)
        finally:
            for worker in workers.values():
                worker.stop()
    machine = Machine(**ready[RATES]["machine"])
    versions = {one: ready[one]["version"] for one in args.engines}
    kept = {batch: _kept(args, rounds, batch) for batch in args.batch}
    rows = [
        _row(args, config, one, batch, kept[batch], distinct[batch], ready)
        for batch in args.batch
        for one in args.engines
    ]
    threads = args.threads if isinstance(device, CpuDevice) else None
    settings = DecodeSettings(args.prompt_length, args.new_tokens, args.rounds, threads)
    result = Result("decode", this_run(["decode", *argv], args.seed, machine, model, **versions), settings, rows)
    if args.out is not None:
        write(args.out, result)
    _print(result)
    if args.json:
        print(json.dumps(document(result), allow_nan=False))
    if len(rounds) < args.rounds:
        print(f"interrupted: {len(rounds)} of {args.rounds} rounds are whole and reported", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _device(text: str) -> tuple[Device, str, dict[str, str]]:
    """Return the device (of an emulated card the CPU beside it), torch's name for it, and its workers' environment."""
    environ = dict(os.environ)  # before the look for one device tells torch not to load the others
    if text == EMULATED:
        from ascend.emulator.__main__ import environment

        return CpuDevice(), "npu:0", environment()
    device = get_device(text)
    return device, str(device), environ


def _rounds(args: argparse.Namespace, workers: dict[str, Worker], device: Device) -> tuple[list[Round], Distinct]:
    """Let every engine take its turns; the first round warms up and is not kept. Ctrl-C keeps the whole rounds."""
    rounds: list[Round] = []
    distinct: Distinct = dict.fromkeys(args.batch)
    try:
        with Progress("measuring", (args.rounds + 1) * len(args.batch) * len(args.engines), "turns") as progress:
            for number in range(args.rounds + 1):
                turns = {batch: _turns(args, workers, device, number, batch, progress) for batch in args.batch}
                if number:
                    rounds.append(turns)
                elif "lean" in args.engines:
                    for batch in args.batch:
                        request = _request(args, number, batch) | {"distinct_experts": True}
                        distinct[batch] = workers["lean"].answer(**request)["distinct_experts"]
    except KeyboardInterrupt:
        if not rounds:
            raise
    return rounds, distinct


def _turns(
    args: argparse.Namespace,
    workers: dict[str, Worker],
    device: Device,
    number: int,
    batch: int,
    progress: Progress,
) -> Turns:
    request, turn = _request(args, number, batch), number % len(args.engines)
    step_seconds, memory_bytes, watts = {}, {}, {}
    before = workers[RATES].answer(read=True)["read_rate"]
    for name in args.engines[turn:] + args.engines[:turn]:
        # What an engine sets up for another batch size (cache, graph) must not be in one of the two times alone.
        workers[name].answer(**request, new_tokens=READY)
        few = workers[name].answer(**request, new_tokens=FEW)["seconds"]
        with PowerMeter(device) as power:
            many = workers[name].answer(**request, new_tokens=FEW + args.new_tokens)
        step_seconds[name] = (many["seconds"] - few) / args.new_tokens
        memory_bytes[name], watts[name] = many["memory_bytes"], power.watts
        progress.advance(1)
    after = workers[RATES].answer(read=True)["read_rate"]
    return Turns((before + after) / 2, step_seconds, memory_bytes, watts)


def _request(args: argparse.Namespace, number: int, batch: int) -> dict[str, Any]:
    return {"batch": batch, "prompt_length": args.prompt_length, "seed": args.seed + number}


def _kept(args: argparse.Namespace, rounds: list[Round], batch: int) -> list[Turns]:
    """Return the rounds of a batch size in which more tokens took every engine more time; the others say nothing."""
    kept = [one[batch] for one in rounds if min(one[batch].step_seconds.values()) > 0]
    if len(kept) < min(2, len(rounds)):
        raise UserError(
            f"batch {batch}: {args.new_tokens} more tokens took no more time in {len(rounds) - len(kept)} of "
            f"{len(rounds)} rounds; give --new-tokens more"
        )
    if len(kept) < len(rounds):
        left = f"{len(rounds) - len(kept)} of {len(rounds)} rounds left out"
        print(f"batch {batch}: {left}: more tokens took an engine no more time", file=sys.stderr)
    return kept


def _row(
    args: argparse.Namespace,
    config: dict[str, Any],
    name: str,
    batch: int,
    rounds: list[Turns],
    distinct: float | None,
    ready: dict[str, dict[str, Any]],
) -> DecodeRow:
    seconds, rates = [one.step_seconds[name] for one in rounds], [one.read_rate for one in rounds]
    watts = [one.watts[name] for one in rounds]
    known = [one for one in watts if one is not None]
    context = args.prompt_length + FEW + args.new_tokens // 2
    nbytes, flops = _cost(args, config, batch, context, distinct)
    median, sheet = statistics.median(seconds), ready[RATES]["sheet_rate"]
    return DecodeRow(
        engine=name,
        version=ready[name]["version"],
        captured=ready[name]["captured"],
        random_weights=ready[name]["random_weights"],
        batch=batch,
        context=context,
        step_seconds=seconds,
        tokens_per_second=batch / median,
        distinct_experts=distinct,
        bytes_per_step=nbytes,
        flops_per_step=flops,
        read_rate=rates,
        share_of_read_rate=statistics.median(nbytes / s / rate for s, rate in zip(seconds, rates, strict=True)),
        sheet_rate=sheet,
        share_of_sheet=nbytes / median / sheet if sheet else None,
        memory_bytes=max(one.memory_bytes[name] for one in rounds),
        watts=statistics.mean(known) if known else None,
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
    if rates[-1] > STEADY * rates[0]:
        print(
            f"NOT STEADY: the read rate moved by {rates[-1] / rates[0] - 1:.0%} between rounds, and the shares with it"
        )
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
        mark = "  random weights" if row.random_weights else ""
        print(f"{row.engine:<14}{row.batch:>6}{times}{shares}{memory}{watts}{ratio:>7.2f}{mark}")
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
