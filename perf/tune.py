"""`python -m perf tune`: tile sizes of the experts' Triton kernels, tried on the card there is: a table, best first.

One product's tile changes at a time, the other's stays as `TILES` in `ops/triton_kernels/experts.py` has it. Each
candidate is compared with the definition, then timed as a graph over the weights of several layers with other experts
in each call. What does not compile or fit is said. The table's author puts the line printed last into `TILES`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from ascend.arguments import Parser
from ascend.devices import get_device
from ascend.devices.base import Device
from ascend.errors import UserError
from convert.demo_config import SIZES, demo_config
from perf.arguments import numbers
from perf.ops import FORMATS, TOLERANCE
from perf.rates import read_rate, seconds

if TYPE_CHECKING:
    from perf.op_cases import Case

FORM = {None: "plain", "fp8": "fp8", "w8a8": "int8", "w4a16": "int4"}
PRODUCTS = ("gate_up", "down")
ROWS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), (3, 4, 6)
INPUTS = {"plain": (64, 128), "fp8": (128,), "int8": (128, 256), "int4": (128,)}  # two formats have steps of their own


def main(argv: Sequence[str]) -> int:
    """Try the candidates for each number of tokens; returns 1 if none was right."""
    args = _parse(argv)
    device = get_device(args.device)
    device.activate()
    import torch

    with torch.inference_mode():
        return 0 if all([_tune(args, device, tokens) for tokens in args.tokens]) else 1


def _tune(args: argparse.Namespace, device: Device, tokens: int) -> bool:
    import torch

    from ascend.model_shape import ModelShape
    from ops.triton_kernels import experts
    from perf.moe_cases import moe_cases
    from perf.op_cases import Place

    shape = ModelShape.from_config(demo_config(args.model, 0, "bf16", None, {})[0])
    place = Place(device.torch_device, torch.float16 if device.type == "cpu" else torch.bfloat16)
    name = f"moe_{args.quantise}" if args.quantise else "moe"
    case = next(one for one in moe_cases(shape, place, tokens, args.quantise) if one.op == name)
    copies, form = [case.make() for _ in range(args.layers)], FORM[args.quantise]
    exact, rate = case.calls["reference"](copies[0], 0).float(), read_rate(device)
    print(f"{device.name()}, {name}, {tokens} tokens, {len(copies)} layers, read rate {rate / 1e9:.0f} GB/s")
    before, kept = experts.TILES[form], {}
    for at, which in enumerate(PRODUCTS):
        tried: list[tuple[float, Any]] = []
        deadline = time.monotonic() + args.seconds / len(args.tokens) / len(PRODUCTS)
        for tile in _candidates(args, form, before[at]):
            if tried and time.monotonic() > deadline:
                print(f"{which}: out of time, the rest is not tried")
                break
            experts.TILES[form] = (tile, before[1]) if at == 0 else (before[0], tile)
            try:
                took = _timed(device, case, copies, exact)
            except Exception as error:  # whatever the compiler or the card says
                print(f"{which} {tile}: {(str(error) or type(error).__name__).splitlines()[0][:80]}")
                continue
            tried.append((took, tile))
        experts.TILES[form] = before
        for took, tile in sorted(tried, key=lambda one: one[0])[: args.show]:
            mark = "  (as it is)" if tile == before[at] else ""
            print(f"{which:<8} {tile}  {1e6 * took:9.1f} µs  {case.nbytes / took / rate:5.0%} of read{mark}")
        if not tried:
            return False
        kept[which] = min(tried, key=lambda one: one[0])[1]
    best = ", ".join(f"Tile({one.rows}, {one.inputs}, {one.warps}, {one.stages})" for one in kept.values())
    print(f'{tokens} tokens, for TILES:    "{form}": ({best}),\n', flush=True)
    return True


def _candidates(args: argparse.Namespace, form: str, now: Any) -> Iterator[Any]:
    """The tile as it is, then all others unless one candidate is enough."""
    yield now
    if not args.one:
        for sizes in product(ROWS, INPUTS[form], WARPS, STAGES):
            if (tile := type(now)(*sizes)) != now:
                yield tile


def _timed(device: Device, case: Case, copies: list[Any], exact: Any) -> float:
    """Seconds of a call. Raises `ArithmeticError` where the result is wrong."""
    run = case.calls["ours"] if device.type == "cuda" else _interpreted(case)
    limit = TOLERANCE.get(case.precision, 3e-2)
    off = float((run(copies[0], 0).float() - exact).abs().max() / exact.abs().max())
    if not off <= limit:
        raise ArithmeticError(f"WRONG by {off:.1e} of the largest value, limit {limit:.0e}")
    calls = 32 if device.captures_graphs else 1

    def walk() -> None:
        for i in range(calls):
            run(copies[i % len(copies)], i)

    return seconds(device, device.capture(walk)) / calls


def _interpreted(case: Case) -> Callable[[Any, int], Any]:
    """The case's op as CUDA's table has it, on CPU tensors: there `ops` runs the CPU's own."""
    from unittest.mock import patch

    import ops
    from ops import cuda

    def run(copy: Any, i: int) -> Any:
        with patch.object(ops, "moe", cuda.KERNELS["moe"]):
            return case.calls["ours"](copy, i)

    return run


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "perf tune", "Tile sizes of the experts' kernels, tried on this card: best first, and a line for TILES."
    )
    parser.add_argument("--model", default="ling-flash", choices=tuple(SIZES))
    parser.add_argument("--device", default="cuda", help="cuda[:i]; cpu with TRITON_INTERPRET=1, to see that it runs")
    parser.add_argument("--quantise", choices=FORMATS)
    parser.add_argument("--tokens", default="1,8,32,128", help="rows decoded together, one or several")
    parser.add_argument("--layers", type=int, default=2, help="layers whose weights take turns")
    parser.add_argument("--seconds", type=int, default=420, help="for all of it; what is not tried then is said")
    parser.add_argument("--show", type=int, default=8, help="lines of each table")
    parser.add_argument("--one", action="store_true", help="only the tiles as they are")
    args = parser.read(argv)
    args.tokens = numbers("--tokens", args.tokens)
    if min(args.layers, args.seconds, args.show) < 1:
        raise UserError("--layers, --seconds and --show must be at least 1")
    if args.device == "cpu" and args.quantise:
        raise UserError("--device cpu shows that it runs, in fp16 alone: drop --quantise")
    if args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("--device cpu runs on Triton's interpreter: set TRITON_INTERPRET=1 in the environment")
    return args
