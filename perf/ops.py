"""`python -m perf ops`: each op of a decode step alone, against the memory's and the matrix units' measured rates.

Every implementation walks through the same copies of weights, together larger than any cache, with the same choices of
experts; implementations take turns within a round. Before it is timed, each must give what the definition gives. On a
card a walk is captured as a graph, so that launches are not what is measured; the definition, which waits for the host,
is then checked against and not timed. Read `op_cases.py` and `moe_cases.py` for what is run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend.arguments import Parser
from ascend.devices import get_device
from ascend.devices.base import Device
from ascend.devices.cpu import CpuDevice
from ascend.errors import UserError
from perf.arguments import names, numbers, out_file
from perf.machine import describe, this_run
from perf.models import open_model
from perf.rates import EMULATED_SHARE, matmul_rate, read_rate, seconds
from perf.result import OpsRow, OpsSettings, Result, document, write

if TYPE_CHECKING:
    from torch import Tensor

    from ascend.model_shape import ModelShape
    from perf.op_cases import Case

EXIT_WRONG, EXIT_INTERRUPTED = 1, 130
EMULATED = "npu-emulated"
PEERS = ("torch", "vllm")  # a library that may lack an op here
FORMATS = ("w8a8", "w4a16", "fp8")
OPS = (
    "add_rms_norm", "linear", "attention", "cached_attention", "add_rms_norm_gate", "moe_experts", "moe", "moe_layer",
    "swiglu_mlp",
)  # fmt: skip
CALLS, MOST_COPIES = 16, 512  # calls of a walk, at least; copies at most, so a norm of few rows stays in a cache
CARD_WALK_BYTES = 1 << 30  # larger than a card's last-level caches together (H200: 60 MB of L2)
# How far an implementation may be from ours, of the largest value: both round to the dtype, sums to a few more of it.
TORCH_DTYPE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
TOLERANCE = {"bf16": 3e-2, "fp16": 5e-3, "fp32": 1e-4, "w8a8": 6e-2, "w4a16": 3e-2, "fp8": 6e-2}


def main(argv: Sequence[str]) -> int:
    """Time the ops and print a table; returns 1 if one does not compute what its definition says.

    That op and those after it are not reported, those before it are. So are they after an interrupt; it returns 130.
    """
    args = _parse(argv)
    if args.device == EMULATED:
        return _under_the_emulator(argv)
    device = get_device(args.device)
    import torch

    from ascend.model_shape import ModelShape

    device.activate()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="ops-") as scratch:
        _, config, model = open_model(args.model, None, args.quantise or args.dtype, Path(scratch))
    machine = describe(device)
    if machine.emulated:
        print("EMULATED CARD: every time below is this computer's, and says nothing of an Ascend card's speed")
    shape, rows = _shape(args, ModelShape.from_config(config)), list[OpsRow]()
    walked = args.walk_bytes or _walk_bytes(device, machine.emulated)
    print(f"{machine.device}; {model.name}'s shapes; {args.rounds} rounds, walks of at least {walked / 1e6:.0f} MB")
    _peers_left_out(args, device)
    _head()
    code = 0
    try:
        for case in _cases(args, device, shape):
            with torch.inference_mode():
                wrong = _measure(args, device, machine.emulated, case, walked, rows)
            if wrong:
                print(f"WRONG: {case.op} {wrong}: neither it nor what comes after it is reported", file=sys.stderr)
                if not rows:
                    return EXIT_WRONG
                code = EXIT_WRONG
                break
    except KeyboardInterrupt:
        if not rows:
            raise
        print("interrupted: what was measured until now is reported", file=sys.stderr)
        code = EXIT_INTERRUPTED
    threads = args.threads if device.type == "cpu" else None
    settings = OpsSettings(args.rounds, threads, _captures(args, device), walked, args.width)
    result = Result("ops", this_run(["ops", *argv], args.seed, machine, model), settings, rows)
    if args.out is not None:
        write(args.out, result)
    if args.json:
        print(json.dumps(document(result), allow_nan=False))
    return code


def _under_the_emulator(argv: Sequence[str]) -> int:
    """Run the same command in a process whose NPU is emulated."""
    from ascend.emulator.__main__ import environment

    arguments = [*argv, "--device", "npu:0"]  # the last one counts
    return subprocess.run([sys.executable, "-m", "perf", "ops", *arguments], env=environment(), check=False).returncode


def _cases(args: argparse.Namespace, device: Device, shape: ModelShape) -> Iterator[Case]:
    import torch

    from perf.op_cases import Place, cases

    dtype = getattr(torch, TORCH_DTYPE[args.dtype])
    for tokens in args.tokens:
        place = Place(device.torch_device, dtype, args.skew, torch.Generator().manual_seed(args.seed))
        for case in cases(shape, place, tokens, args.context, args.quantise, args.kv):
            if case.op.removesuffix(f"_{args.quantise}") in args.ops:
                yield case


def _shape(args: argparse.Namespace, shape: ModelShape) -> ModelShape:
    """Return the model's sizes, with ``--width`` those of a rank that has a part of each expert's width."""
    if args.width is None:
        return shape
    whole = shape.moe_intermediate_size
    if whole % args.width:
        raise UserError(f"--width {args.width} is no part of the experts' width {whole}: it must divide it")
    shared = (shape.moe_shared_expert_intermediate_size or whole) * args.width // whole
    return replace(shape, moe_intermediate_size=args.width, moe_shared_expert_intermediate_size=shared)


def _peers_left_out(args: argparse.Namespace, device: Device) -> None:
    from perf.moe_cases import why_no_vllm

    reason = why_no_vllm(device.torch_device, args.quantise)
    if reason is not None and {"moe_experts", "moe", "moe_layer"} & set(args.ops):
        print(f"no peer vllm: {reason}")


def _walk_bytes(device: Device, emulated: bool) -> int:
    """Return how much must be walked through so that little of it comes from a cache."""
    if isinstance(device, CpuDevice):
        return device.uncached_bytes()
    return CARD_WALK_BYTES // (EMULATED_SHARE if emulated else 1)


def _measure(
    args: argparse.Namespace, device: Device, emulated: bool, case: Case, walked: int, rows: list[OpsRow]
) -> str | None:
    """Time one case and append its rows; returns what is wrong with an implementation, None if all are right."""
    held = min(MOST_COPIES, -(-walked // int(case.copy_bytes)))
    memory = device.memory()
    free = (
        memory.free if device.type == "cpu" else memory.free + memory.reserved
    )  # what torch keeps for later is unused
    if (held + 1) * case.copy_bytes > free:  # making one takes about as much again
        print(
            f"{case.op:<20}{_sizes(case.sizes)} left out: {held * case.copy_bytes / 1e9:.1f} GB, {free / 1e9:.1f} free"
        )
        return None
    copies = [case.make() for _ in range(held)]
    walks: dict[str, Callable[[], Any]] = {}
    count = max(CALLS, len(copies), min(MOST_COPIES, int(walked / case.nbytes)))
    for name, call in case.calls.items():
        try:
            wrong = _difference(case, call(copies[0], 0), case.calls["ours"](copies[0], 0), name)
        except Exception as error:
            too_large = isinstance(error, RuntimeError) and "out of memory" in str(error)
            if name not in PEERS and not (name == "reference" and too_large):
                raise  # a library may lack it here; without the definition nothing would be checked
            said = "does not fit, not checked at this size" if too_large else f"not here ({_first_line(error)})"
            print(f"{case.op:<20}{_sizes(case.sizes)}{name}: {said}")
            continue
        if wrong:
            return wrong
        if name == "reference" and _captures(args, device):
            continue
        walk = _walk(call, copies, count)
        try:
            walks[name] = _captured(device, walk, f"{case.op} as {name}") if _captures(args, device) else walk
        except UserError as error:
            if name not in PEERS:
                raise
            print(f"{case.op:<20}{_sizes(case.sizes)}{name}: left out, {error}")
    times: dict[str, list[float]] = {name: [] for name in walks}
    rates, dtype = [], TORCH_DTYPE.get(case.precision, "bfloat16")
    for number in range(args.rounds):
        rates.append((read_rate(device, emulated), matmul_rate(device, dtype, emulated)))
        order = list(walks)[number % len(walks) :] + list(walks)[: number % len(walks)]
        for name in order:
            times[name].append(seconds(device, walks[name], passes=2) / count)
    reads, products = ([rate[i] for rate in rates] for i in (0, 1))
    for name, taken in times.items():
        row = OpsRow(
            op=case.op,
            implementation=name,
            precision=case.precision,
            sizes=case.sizes,
            copies=len(copies),
            call_seconds=taken,
            bytes=float(case.nbytes),
            flops=float(case.flops),
            read_rate=reads,
            matmul_rate=products,
            share_of_read_rate=_share(case.nbytes, taken, reads),
            share_of_matmul_rate=_share(case.flops, taken, products),
        )
        rows.append(row)
        _line(row, times["ours"])
    return None


def _walk(call: Callable[[Any, int], Tensor], copies: list[Any], count: int) -> Callable[[], None]:
    def walk() -> None:
        for i in range(count):
            call(copies[i % len(copies)], i)

    return walk


def _captured(device: Device, walk: Callable[[], None], what: str) -> Callable[[], Any]:
    try:
        return device.capture(walk)
    except RuntimeError as error:
        raise UserError(f"{what} cannot be captured on this device ({_first_line(error)}): give --eager") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:80]


def _captures(args: argparse.Namespace, device: Device) -> bool:
    return device.captures_graphs and not args.eager


def _share(amount: float, taken: list[float], rates: list[float]) -> float:
    return statistics.median(amount / one / rate for one, rate in zip(taken, rates, strict=True))


def _difference(case: Case, result: Any, ours: Any, name: str) -> str | None:
    limit = TOLERANCE.get(case.precision, 3e-2)
    of_it, of_ours = (case.values(one).float() for one in (result, ours))
    found = float((of_it - of_ours).abs().max() / of_ours.abs().max())
    return None if found <= limit else f"as {name} differs by {found:.1e} of its largest value, limit {limit:.0e}"


def _head() -> None:
    head = f"{'op':<20}{'sizes':<43}{'by':<11}{'µs':>9}{'min':>9}{'max':>9}{'MB':>9}{'of read':>9}{'of matmul':>10}"
    print(f"{head}{'ratio':>7}")


def _sizes(sizes: dict[str, int]) -> str:
    return f"{' '.join(f'{key}={value}' for key, value in sizes.items()):<42} "


def _line(row: OpsRow, ours: list[float]) -> None:
    ratio = statistics.median(one / other for one, other in zip(row.call_seconds, ours, strict=True))
    low, median, high = (1e6 * f(row.call_seconds) for f in (min, statistics.median, max))
    shares = f"{row.bytes / 1e6:>9.2f}{row.share_of_read_rate:>9.0%}{row.share_of_matmul_rate:>10.0%}{ratio:>7.2f}"
    times = f"{median:>9.1f}{low:>9.1f}{high:>9.1f}"
    print(f"{row.op:<20}{_sizes(row.sizes)}{row.implementation:<11}{times}{shares}", flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("perf ops", "Each op of a decode step alone, against measured rates; ratio: times as slow as ours.")
    parser.add_argument("--model", required=True, help="ling-flash, ling-mini, small, tiny, or a directory: its shapes")
    parser.add_argument("--device", default="cpu", help=f"cpu, cuda[:i], npu[:i] or {EMULATED}")
    parser.add_argument("--tokens", default="1,8,32", help="rows decoded together, one or several")
    parser.add_argument("--context", default="1024", help="tokens of each row in the cache, one or several")
    parser.add_argument("--ops", default=",".join(OPS), help="those to time, without their format's name; default all")
    parser.add_argument("--width", type=int, help="the experts' width on a rank, if they are divided")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--quantise", choices=FORMATS)
    parser.add_argument("--kv", choices=("fp8",), help="the cache's format, else the dtype")
    parser.add_argument("--skew", type=float, default=0.0, help="of the experts' log-normal popularity; 0 is uniform")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the CPU")
    parser.add_argument("--walk-bytes", type=int, help="weights to walk through; default: more than the caches hold")
    parser.add_argument("--eager", action="store_true", help="capture no graphs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result file")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.read(argv)
    args.tokens, args.context = numbers("--tokens", args.tokens), numbers("--context", args.context)
    args.ops = names("--ops", args.ops, OPS)
    out_file("--out", args.out)
    walked = 1 if args.walk_bytes is None else args.walk_bytes
    width = 1 if args.width is None else args.width
    if min(args.rounds, args.threads, walked, width) < 1 or args.skew < 0:
        raise UserError("--rounds, --threads, --walk-bytes and --width must be at least 1, --skew at least 0")
    return args
