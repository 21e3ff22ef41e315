"""What `perf roofline` is asked: the command line, checked and resolved into shapes, cards and figures."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ascend.arguments import Parser
from ascend.checkpoint import read_config
from ascend.cost import Sharding
from ascend.devices.facts import TABLE, Figure, lookup
from ascend.errors import UserError, suggest
from ascend.model_shape import ModelShape
from ascend.precision import KV_DTYPES, PRECISIONS, Precision
from ascend.roofline import Chip
from ascend.routing import MeasuredRouting, Routing, SkewedRouting
from convert.demo_config import SIZES, demo_config
from perf.arguments import names, numbers

PEAKS = ("fp32", "bf16", "fp8", "int8")


@dataclass(frozen=True)
class Question:
    """One call of the command. figures: of one card, "memory", "bandwidth" and "peak DTYPE" for all that is needed.

    all_reduce: seconds of one. measured: tokens per second, none, one, or one for each batch.
    """

    model: str
    shape: ModelShape
    card: str
    figures: Mapping[str, Figure]
    sharding: Sharding
    routing: Routing
    precisions: Sequence[Precision]
    contexts: Sequence[int]
    batches: Sequence[int]
    kv_dtype: str | None
    all_reduce: float
    drafts: int
    acceptance: float | None
    measured: Sequence[float]

    def chip(self, dtypes: Iterable[str]) -> Chip | None:
        """The card with its peaks in ``dtypes``; None where its bandwidth or one of them is unknown."""
        bandwidth, peaks = self.figures["bandwidth"].value, {}
        for dtype in dtypes:
            peaks[dtype] = self.figures[f"peak {dtype}"].value
        known = {dtype: value for dtype, value in peaks.items() if value is not None}
        if bandwidth is None or len(known) < len(peaks):
            return None
        return Chip(self.card, bandwidth, known, self.figures["memory"].value)


def read(argv: Sequence[str]) -> tuple[Question, bool]:
    """Return the question and whether JSON is wanted. Raises `UserError` for what makes no sense."""
    args = _parse(argv)
    shape = _shape(args.model, args.layers)
    count, card = _cards(args.cards)
    tensor = args.tp or count
    if count % tensor:
        raise UserError(f"--tp {tensor} does not divide the {count} cards")
    sharding = Sharding(tensor, args.ep, count // tensor)
    sharding.check(shape)
    question = Question(
        model=args.model,
        shape=shape,
        card=card,
        figures=_figures(card, args),
        sharding=sharding,
        routing=_routing(args, shape),
        precisions=[PRECISIONS[name] for name in args.precision],
        contexts=args.context,
        batches=args.batch,
        kv_dtype=args.kv_dtype,
        all_reduce=args.allreduce_us * 1e-6,
        drafts=args.draft,
        acceptance=args.acceptance,
        measured=args.measured,
    )
    return question, args.json


def _shape(text: str, layers: int | None) -> ModelShape:
    """The shape of a known model, of a checkpoint directory or of a ``config.json``, cut to ``layers`` layers."""
    path = Path(text)
    if text.casefold() in SIZES:
        config = demo_config(text.casefold(), 0, "bf16", None, {})[0]
    elif path.name == "config.json" and path.is_file():
        config = read_config(path.parent)
    elif path.is_dir():
        config = read_config(path)
    else:
        raise UserError(
            f"--model {text}: no such directory or config.json, and none of {', '.join(SIZES)}{suggest(text, SIZES)}"
        )
    shape = ModelShape.from_config(config)
    if layers is None:
        return shape
    if not 1 <= layers <= shape.num_hidden_layers:
        raise UserError(f"--layers {layers}: the model has 1 to {shape.num_hidden_layers} layers to count")
    return replace(shape, num_hidden_layers=layers)


def _cards(text: str) -> tuple[int, str]:
    """Read "4xH20-96G" or "H20-96G"."""
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?(\S.*)", text.strip(), re.IGNORECASE)
    if not match or int(match[1] or 1) < 1:
        raise UserError(f"--cards '{text}': write a number and a card, such as 4xH20-96G")
    return int(match[1] or 1), lookup(match[2]).name


def _figures(card: str, args: argparse.Namespace) -> dict[str, Figure]:
    """Memory, bandwidth and the peaks that are needed, by name; what the command line gives replaces the table's."""
    facts, given = lookup(card), _peaks(args.peak)
    if card not in TABLE and not (args.bandwidth and given):
        raise UserError(
            f"--cards: '{card}' is not in the table{suggest(card, TABLE)}; there is {', '.join(TABLE)}; "
            "for another card give --bandwidth and --peak"
        )
    figures = {"memory": facts.memory, "bandwidth": facts.bandwidth}
    if args.bandwidth:
        figures["bandwidth"] = Figure(args.bandwidth, "B/s", "as given")
    wanted = [dtype for name in args.precision for dtype in PRECISIONS[name].dtypes] + ["bf16"] * bool(args.draft)
    for dtype in dict.fromkeys(wanted):
        if any(key in given for key in (dtype, "")):
            figure = Figure(given.get(dtype, given.get("")), "OP/s" if dtype == "int8" else "FLOP/s", "as given")
        elif dtype in facts.peak:
            figure = facts.peak[dtype]
        elif facts.peak and dtype != "fp32":
            raise UserError(
                f"{card} does not compute in {dtype}, only in {', '.join(facts.peak)}: choose another --precision"
            )
        else:
            figure = Figure(None, "FLOP/s", "not in the table")
        figures[f"peak {dtype}"] = figure
    return figures


def _peaks(text: str | None) -> dict[str, float]:
    """Read "148e12" (for every dtype, under the name "") or "bf16=148e12,fp8=296e12"."""
    found = {}
    for part in text.split(",") if text else ():
        dtype, _, value = part.rpartition("=")
        if dtype and dtype not in PEAKS:
            raise UserError(f"--peak: unknown dtype '{dtype}'; there is {', '.join(PEAKS)}")
        found[dtype] = _rate("--peak", value, "FLOP/s")
    return found


def _routing(args: argparse.Namespace, model: ModelShape) -> Routing:
    if args.skew is not None and args.loads is not None:
        raise UserError("--skew and --loads are two answers to the same question: give one")
    if args.skew is not None:
        if not 0 <= args.skew <= 5:
            raise UserError(f"--skew {args.skew:g} is not between 0 (uniform) and 5")
        return SkewedRouting(seed=args.seed, sigma=args.skew)
    if args.loads is None:
        return Routing(seed=args.seed)
    from ops.placement import read_loads  # brings torch

    try:
        loads = read_loads(args.loads, model.num_experts)
    except ValueError as error:
        raise UserError(f"--loads: {error}") from None
    return replace(MeasuredRouting.of(loads, model.num_experts_per_tok), seed=args.seed)


def _rate(flag: str, text: str, unit: str) -> float:
    """Read a rate of a card. Raises `UserError` for one that was meant in another unit."""
    value = _positive(flag, text)
    if value < 1e9:
        raise UserError(f"{flag} {text} is in {unit}: write 4e12 for four tera{unit}")
    return value


def _positive(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise UserError(f"{flag} '{text}' is not a number above zero, such as 4.8e12")
    return value


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("perf roofline", "The most that cards can do with a model: limits, not predictions.")
    add = parser.add_argument
    add("--model", required=True, metavar="NAME|DIR", help=f"{', '.join(SIZES)}, a checkpoint directory or config.json")
    add("--cards", required=True, metavar="4xH20-96G", help=f"number and name: {', '.join(TABLE)}, or a driver's name")
    add("--precision", default="bf16", help=f"one or several of {', '.join(PRECISIONS)}")
    add("--batch", default="1,8,32", help="sequences decoded together, one or several")
    add("--context", default="2048", help="tokens of each sequence in the cache, one or several")
    add("--tp", type=int, help="tensor parallelism; default: all cards. Fewer than the cards: data parallel groups")
    add("--ep", type=int, default=1, help="blocks of whole experts; default 1, every expert divided over all cards")
    add("--kv-dtype", choices=KV_DTYPES, help="of the KV cache; default bf16")
    add("--layers", type=int, help="count the first N layers alone")
    add("--draft", type=int, default=0, metavar="K", help="verify K draft tokens of an EAGLE3 head per step")
    add("--acceptance", type=float, metavar="A", help="tokens gained per speculative step, 1 to K+1")
    add(
        "--skew",
        type=float,
        metavar="SIGMA",
        help="assume skewed routing, log popularity of experts with deviation SIGMA",
    )
    add("--loads", type=Path, metavar="FILE", help="expert loads recorded on a running model (ascend.expert_loads)")
    add("--seed", type=int, default=0, help="of what is sampled (--skew, --ep)")
    add("--allreduce-us", type=float, default=0.0, metavar="US", help="microseconds of one all-reduce, two a layer")
    add("--bandwidth", metavar="B/S", help="bytes per second of one card, instead of the table's")
    add("--peak", metavar="FLOP/S", help="peak of one card, for all dtypes, or bf16=148e12,fp8=296e12")
    add("--measured", metavar="TOK/S", help="tokens per second seen: one number, or one per batch; prints the share")
    add("--json", action="store_true", help="end with one line of JSON")
    args = parser.read(argv)
    args.precision = names("--precision", args.precision, PRECISIONS)
    args.batch, args.context = numbers("--batch", args.batch), numbers("--context", args.context)
    args.bandwidth = _rate("--bandwidth", args.bandwidth, "B/s") if args.bandwidth else None
    args.measured = [_positive("--measured", part) for part in args.measured.split(",")] if args.measured else []
    if len(args.measured) not in (0, 1, len(args.batch)):
        raise UserError(f"--measured has {len(args.measured)} numbers for {len(args.batch)} batches: one, or one each")
    for flag, value, least in (("--tp", args.tp, 1), ("--ep", args.ep, 1), ("--draft", args.draft, 0)):
        if value is not None and value < least:
            raise UserError(f"{flag} {value} is less than {least}")
    if not 0 <= args.allreduce_us < math.inf:
        raise UserError(f"--allreduce-us {args.allreduce_us:g} is not a number from 0")
    if args.acceptance is not None and not 1 <= args.acceptance <= args.draft + 1:
        raise UserError(
            f"--acceptance {args.acceptance:g} is not between 1 and {args.draft + 1}, the tokens of a step of --draft "
            f"{args.draft}"
        )
    return args
