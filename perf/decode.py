"""`python -m perf decode`: tokens per second of decoding and prefill, this engine and its peers in one run.

Per round and batch size every engine is made ready by two untimed tokens and then generates twice from the same
prompts, a few tokens and many; the difference is decode alone, without prefill and start-up. The engines take turns
within a round, so that what else happens on the machine meets all of them, and the ratios are made per round before
their median is taken; a round in which noise was more than that difference is left out for all. The share of the memory
bandwidth is the fewest bytes a step must read (`ascend.cost`, with the experts that this engine's routing hit) over its
time, against the read rate of the same round on the same device (`perf.rates`; mean of before and after the turns). No
round is left out for that rate: where it moved between rounds by more than 15 % the table says so, and the shares then
say less than the ratios.

Prefill is what is left of the shorter generation without its steps. With ``--drafts`` this engine's speculative steps
take turns with its plain ones, on the same weights.
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

from ascend.arguments import Parser
from ascend.cost import active_parameters, decode_work, parameters
from ascend.devices import get_device
from ascend.devices.base import Device
from ascend.devices.cpu import CpuDevice
from ascend.errors import UserError
from ascend.model_shape import ModelShape
from ascend.precision import FP32, KV_DTYPES, PRECISIONS, Precision, precision
from ascend.progress import Progress
from perf.arguments import names, numbers, out_file
from perf.engines import ENGINES, Setting
from perf.machine import this_run
from perf.models import check_memory, open_model
from perf.power import PowerMeter
from perf.result import DecodeRow, DecodeSettings, Machine, Result, document, write
from perf.worker import RATES, Worker

READY, FEW = 2, 8  # tokens: a prefill and one step
STEADY = 1.15  # largest over smallest read rate, up to which no more is said
EXIT_INTERRUPTED = 130
FORMATS = ("w8a8", "w4a16", "fp8")  # `ascend.quantisation` knows them, and takes torch to import
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
EMULATED = "npu-emulated"
SPECULATIVE = "speculative"  # the lean engine's steps with drafts, as an engine of its own in the rounds
MOST_DRAFTS, MOST_AUTO_DRAFTS = 15, 7  # `ascend.speculation` and `ascend.draft_length` know them, and import torch
LONG = 1024  # tokens of a prompt from which on prefill is shown: of shorter ones it is mostly launches


@dataclass(frozen=True)
class Turns:
    """One round at one batch size: by engine what it did, and the rates that the device had around it.

    drafts, tokens_per_step: of the speculative steps.
    """

    read_rate: float
    matmul_rate: float
    step_seconds: dict[str, float]
    prefill_seconds: dict[str, float]
    memory_bytes: dict[str, int]
    watts: dict[str, float | None]
    drafts: int = 0
    tokens_per_step: float = 1.0


Round = dict[int, Turns]  # by batch size


@dataclass
class Counted:
    """What is counted once, by batch size: experts of a layer that a step hit, plain or speculative; its kernels."""

    distinct: dict[int, float | None]
    speculative: dict[int, float | None]
    kernels: dict[int, float | None]


def main(argv: Sequence[str]) -> int:
    """Run the comparison and print a table; with ``--json`` the last line is one JSON document.

    Returns 130 if it was interrupted after at least one whole round; such rounds are reported.
    """
    args = _parse(argv)
    device, name, environ = _device(args.device)
    stored = args.quantise or SHORT[args.dtype]
    with tempfile.TemporaryDirectory(prefix="decode-") as scratch:
        folder, config, model = open_model(args.model, args.layers, stored, Path(scratch))
        _check_memory(args, device, config)
        setting = Setting(
            model=folder,
            device=name,
            dtype=args.dtype,
            quantise=args.quantise,
            threads=args.threads,
            max_batch=max(args.batch),
            max_length=args.prompt_length + _most_tokens(args),
            capture=not args.eager,
            seed=args.seed,
            kv=args.kv,
            fill=args.fill,
            drafts=args.drafts,
            acceptance=args.acceptance,
        )
        own = [one for one in args.engines if one != SPECULATIVE]
        workers = {one: Worker(one, setting, environ, args.verbose) for one in (RATES, *own)}
        try:
            ready = {one: worker.answer() for one, worker in workers.items()}
            if SPECULATIVE in args.engines:
                workers[SPECULATIVE], ready[SPECULATIVE] = workers["lean"], ready["lean"]
            rounds, counted = _rounds(args, workers, device)
        finally:
            for worker in workers.values():
                worker.stop()
    machine = Machine(**ready[RATES]["machine"])
    versions = {one: ready[one]["version"] for one in args.engines}
    kept = {batch: _kept(args, rounds, batch) for batch in args.batch}
    rows = [_row(args, config, one, batch, kept[batch], counted, ready) for batch in args.batch for one in args.engines]
    threads = args.threads if isinstance(device, CpuDevice) else None
    lengths = (args.prompt_length, args.new_tokens, args.rounds)
    drafts = str(args.drafts) if args.drafts else None
    settings = DecodeSettings(*lengths, threads, args.kv, args.fill, drafts, args.acceptance)
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


def _most_tokens(args: argparse.Namespace) -> int:
    """Tokens that a row gains at most; a speculative step's overshoot is the decoder's own affair."""
    most = MOST_AUTO_DRAFTS if args.drafts == "auto" else args.drafts
    return int((FEW + args.new_tokens) * (most + 1))


def _check_memory(args: argparse.Namespace, device: Device, config: dict[str, Any]) -> None:
    plain = "fp32" if args.dtype == "float32" else "bf16"
    by_engine = {one: _stored(args) if one == "lean" else PRECISIONS[plain] for one in args.engines}
    by_engine.pop(SPECULATIVE, None)  # the lean engine's own weights
    length, caches = args.prompt_length + _most_tokens(args), 2 if args.drafts else 1  # of plain and speculative steps
    sequences = caches * max(args.batch)
    check_memory(device, ModelShape.from_config(config), by_engine, sequences, length, _kv_bytes(args))


def _rounds(args: argparse.Namespace, workers: dict[str, Worker], device: Device) -> tuple[list[Round], Counted]:
    """Let every engine take its turns; the first round warms up and is not kept. Ctrl-C keeps the whole rounds."""
    rounds: list[Round] = []
    counted = Counted(dict.fromkeys(args.batch), dict.fromkeys(args.batch), dict.fromkeys(args.batch))
    try:
        with Progress("measuring", (args.rounds + 1) * len(args.batch) * len(args.engines), "turns") as progress:
            for number in range(args.rounds + 1):
                turns = {batch: _turns(args, workers, device, number, batch, progress) for batch in args.batch}
                if number:
                    rounds.append(turns)
                elif "lean" in args.engines:
                    for batch in args.batch:
                        request = _request(args, number, batch) | {"distinct_experts": True}
                        counted.distinct[batch] = workers["lean"].answer(**request)["distinct_experts"]
                        if SPECULATIVE in args.engines:
                            found = workers["lean"].answer(**request, drafts=True)
                            counted.speculative[batch] = found["distinct_experts"]
            if "lean" in args.engines:  # last: a profiler may leave something behind
                for batch in args.batch:
                    request = _request(args, 0, batch) | {"kernels": True}
                    counted.kernels[batch] = workers["lean"].answer(**request)["kernels_per_layer"]
    except KeyboardInterrupt:
        if not rounds:
            raise
    return rounds, counted


def _turns(
    args: argparse.Namespace,
    workers: dict[str, Worker],
    device: Device,
    number: int,
    batch: int,
    progress: Progress,
) -> Turns:
    request, turn = _request(args, number, batch), number % len(args.engines)
    steps, prefill, memory_bytes, watts = {}, {}, {}, {}
    gained: dict[str, Any] = {}
    before = workers[RATES].answer(read=True)
    for name in args.engines[turn:] + args.engines[:turn]:
        ask = request | ({"drafts": True} if name == SPECULATIVE else {})
        # What an engine sets up for another batch size (cache, graph) must not be in one of the two times alone.
        workers[name].answer(**ask, new_tokens=READY)
        few = workers[name].answer(**ask, new_tokens=FEW)["seconds"]
        with PowerMeter(device) as power:
            many = workers[name].answer(**ask, new_tokens=FEW + args.new_tokens)
        steps[name] = (many["seconds"] - few) / args.new_tokens
        prefill[name] = few - (FEW - 1) * steps[name]
        memory_bytes[name], watts[name] = many["memory_bytes"], power.watts
        gained |= {key: many[key] for key in ("drafts", "tokens_per_step") if key in many}
        progress.advance(1)
    after = workers[RATES].answer(read=True)
    rates = [(before[key] + after[key]) / 2 for key in ("read_rate", "matmul_rate")]
    return Turns(rates[0], rates[1], steps, prefill, memory_bytes, watts, **gained)


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
    counted: Counted,
    ready: dict[str, dict[str, Any]],
) -> DecodeRow:
    seconds, rates = [one.step_seconds[name] for one in rounds], [one.read_rate for one in rounds]
    known = [one for turns in rounds if (one := turns.watts[name]) is not None]
    speculative = name == SPECULATIVE
    drafts = rounds[0].drafts if speculative else 0
    gained = statistics.mean(one.tokens_per_step for one in rounds) if speculative else 1.0
    context = args.prompt_length + int(gained * (FEW + args.new_tokens // 2))
    distinct = (counted.speculative if speculative else counted.distinct)[batch]
    nbytes, flops = _cost(args, config, batch, context, distinct, drafts)
    nbytes += drafts * ready[name]["draft_bytes"]
    median, sheet = statistics.median(seconds), ready[RATES]["sheet_rate"]
    row = DecodeRow(
        engine=name,
        version=ready[name]["version"],
        captured=ready[name]["captured"],
        random_weights=ready[name]["random_weights"],
        batch=batch,
        context=context,
        step_seconds=seconds,
        tokens_per_second=batch * gained / median,
        distinct_experts=distinct,
        bytes_per_step=nbytes,
        flops_per_step=flops,
        read_rate=rates,
        share_of_read_rate=statistics.median(nbytes / s / rate for s, rate in zip(seconds, rates, strict=True)),
        sheet_rate=sheet,
        share_of_sheet=nbytes / median / sheet if sheet else None,
        memory_bytes=max(one.memory_bytes[name] for one in rounds),
        watts=statistics.mean(known) if known else None,
        drafts=drafts,
        tokens_per_step=gained,
        kernels_per_layer=counted.kernels[batch] if name == "lean" else None,
    )
    prefill, matmul = [one.prefill_seconds[name] for one in rounds], [one.matmul_rate for one in rounds]
    if args.fill or speculative or min(prefill) <= 0:  # what noise makes of a short prompt is no figure
        return row
    flops = _prefill_flops(config, batch, args.prompt_length)
    share = statistics.median(flops / one / rate for one, rate in zip(prefill, matmul, strict=True))
    return replace(row, prefill_seconds=prefill, prefill_flops=flops, matmul_rate=matmul, share_of_matmul_rate=share)


def _stored(args: argparse.Namespace) -> Precision:
    """Return the formats of this engine's weights; it and its peers keep the router in fp32."""
    plain = "fp32" if args.dtype == "float32" else "bf16"
    return replace(precision(args.quantise or plain), plain=PRECISIONS[plain].plain, router=FP32)


def _kv_bytes(args: argparse.Namespace) -> float:
    return KV_DTYPES[args.kv] if args.kv else _stored(args).plain.bytes_per_weight


def _cost(
    args: argparse.Namespace, config: dict[str, Any], batch: int, context: int, distinct: float | None, drafts: int = 0
) -> tuple[float, float]:
    """Return the fewest bytes and FLOPs of a decode step, or of a verification of so many drafts."""
    sizes, kv_bytes = (ModelShape.from_config(config), _stored(args), batch, context), _kv_bytes(args)
    work = decode_work(*sizes, kv_bytes=kv_bytes, drafts=drafts, distinct=distinct)
    return sum(part.nbytes for part in work.values()), sum(part.flops for part in work.values())


def _prefill_flops(config: dict[str, Any], batch: int, length: int) -> float:
    """Return the fewest FLOPs of a prompt: as `ascend.roofline.prefill`, and the head once for each row."""
    shape = ModelShape.from_config(config)
    scores = 4 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * length / 2
    counted = parameters(shape)
    return batch * (length * (2 * active_parameters(shape) + scores) + 2 * (counted.head or counted.embedding))


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
        cost = statistics.median(a / b for a, b in zip(row.step_seconds, first.step_seconds, strict=True))
        ratio = cost * first.tokens_per_step / row.tokens_per_step
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
    for row in rows:
        _print_more(row, rows, settings)


def _print_more(row: DecodeRow, rows: list[DecodeRow], settings: DecodeSettings) -> None:
    """What only some rows have: the cost of a step with drafts, launches, and prefill."""
    plain = next((one for one in rows if one.engine == "lean" and one.batch == row.batch), None)
    if row.engine == SPECULATIVE and plain is not None:
        cost = statistics.median(a / b for a, b in zip(row.step_seconds, plain.step_seconds, strict=True))
        forced = settings.drafts == "auto" or settings.acceptance is not None
        asked = " (forced)" if forced else ""
        gained = f"{row.tokens_per_step:.2f} tokens a step{asked}"
        speed = f"{row.tokens_per_second / plain.tokens_per_second:.2f} times the plain tokens/s"
        print(f"batch {row.batch}: {row.drafts} drafts, {gained}: a step costs {cost:.2f} plain ones, {speed}")
    if row.kernels_per_layer is not None:
        print(f"batch {row.batch}: {row.kernels_per_layer:.2f} kernels and copies a layer, embedding and head included")
    if row.share_of_matmul_rate is not None and settings.prompt_length >= LONG:
        rate = row.batch * settings.prompt_length / statistics.median(row.prefill_seconds)
        share = f"{row.share_of_matmul_rate:.0%} of the matmul rate ({statistics.median(row.matmul_rate) / 1e12:.3g} T)"
        print(f"batch {row.batch}, {row.engine}: prefill of {settings.prompt_length} at {rate:.0f} tokens/s, {share}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("perf decode", "Decode speed of this engine and its peers; perf/README.md says how to read it.")
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
    parser.add_argument("--kv", choices=("fp8",), help="format of the key/value cache, else the dtype; lean alone")
    parser.add_argument("--fill", action="store_true", help="random values in the cache in place of running prompts")
    parser.add_argument(
        "--drafts", default="0", help="also speculative steps of the lean engine with K drafts, or auto"
    )
    parser.add_argument("--acceptance", type=float, help="tokens that such a step is made to keep, on average")
    parser.add_argument("--eager", action="store_true", help="capture no graph of the decode step")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and prompts")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result file that `perf compare` reads")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--verbose", action="store_true", help="let the engines print what they have to say")
    args = parser.read(argv)
    args.engines = names("--engines", args.engines, ENGINES)
    args.batch = numbers("--batch", args.batch)
    _parse_drafts(args)
    out_file("--out", args.out)
    if min([args.prompt_length, args.new_tokens, args.rounds, args.threads]) < 1:
        raise UserError("--prompt-length, --new-tokens, --rounds and --threads must be at least 1")
    cores = len(os.sched_getaffinity(0))
    if args.threads > cores:
        raise UserError(f"--threads {args.threads} is more than the {cores} cores this process may use")
    return args


def _parse_drafts(args: argparse.Namespace) -> None:
    """Read ``--drafts``, and let the speculative steps take turns with the engines."""
    if args.drafts != "auto":
        if not args.drafts.isdecimal() or int(args.drafts) > MOST_DRAFTS:
            raise UserError(f"--drafts '{args.drafts}' is neither auto nor a number from 0 to {MOST_DRAFTS}")
        args.drafts = int(args.drafts)
    if not args.drafts and args.acceptance is not None:
        raise UserError("--acceptance is of steps with drafts: give --drafts too")
    if not args.drafts:
        return
    if "lean" not in args.engines:
        raise UserError("--drafts: the lean engine drafts; name it in --engines")
    most = MOST_AUTO_DRAFTS if args.drafts == "auto" else args.drafts
    if args.acceptance is not None and not 1 <= args.acceptance <= most + 1:
        raise UserError(f"--acceptance {args.acceptance:g}: a step with {most} drafts keeps 1 to {most + 1} tokens")
    args.engines.insert(args.engines.index("lean") + 1, SPECULATIVE)
