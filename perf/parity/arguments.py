"""The arguments of `perf parity live`, `record` and `check`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ascend.arguments import Parser
from ascend.errors import UserError
from perf.arguments import out_file
from perf.parity.compute import SIDES
from perf.parity.side import DTYPES

VERBS = {
    "live": "A B --model DIR: compute both sides here and compare them",
    "record": "DEVICE FILE --model DIR: compute one side and write it, for the site where the other card is",
    "check": "FILE SIDE: hold a device, another such file or an http(s)://HOST:PORT endpoint against it",
}
LEAST = {"rows": 1, "prompt_length": 16, "decode": 0, "seed": 0}


def parse(verb: str, argv: Sequence[str]) -> argparse.Namespace:
    """Read a verb's arguments. Raises `UserError` for what makes no sense by itself."""
    parser = Parser(f"perf parity {verb}", f"{VERBS[verb]}. Exit code 0: PASS, 1: FAIL, 2: nothing was compared.")
    {"live": _live, "record": _record, "check": _check}[verb](parser)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--verbose", action="store_true", help="let the workers print what they have to say")
    args = parser.read(argv)
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}, it must be at least {least}")
    out_file("--html", getattr(args, "html", None))
    return args


def _live(parser: Parser) -> None:
    parser.add_argument("a", help=f"the side to trust: {', '.join(SIDES)}")
    parser.add_argument("b", help="the side to judge, the same choices")
    parser.add_argument("--model", metavar="DIR", required=True, help="checkpoint directory")
    _computation(parser)
    _report(parser)


def _record(parser: Parser) -> None:
    parser.add_argument("device", help=f"what computes it: {', '.join(SIDES)}")
    parser.add_argument("file", type=Path, help="what to write; it holds logits and streams, no weights")
    parser.add_argument("--model", metavar="DIR", required=True, help="checkpoint, the same on both machines")
    parser.add_argument("--like", type=Path, metavar="FILE", help="the recorded side a that this one is for")
    _computation(parser)


def _check(parser: Parser) -> None:
    parser.add_argument("file", type=Path, help="the recorded side to trust")
    parser.add_argument("side", help=f"the side to judge: {', '.join(SIDES)}, a file recorded with --like, or a URL")
    parser.add_argument("--model", metavar="DIR", help="the same checkpoint, where a device computes the side")
    parser.add_argument("--served-model", metavar="NAME", help="where the server has several")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="else VLLM_API_KEY or OPENAI_API_KEY is used")
    _report(parser)


def _computation(parser: Parser) -> None:
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="as stored by default")
    parser.add_argument("--quantise", choices=("w8a8", "w4a16"))
    parser.add_argument("--rows", type=int, help="random prompts, besides a padded one; default 8")
    parser.add_argument("--prompt-length", type=int, help="default 48")
    parser.add_argument("--seed", type=int, help="of the prompts; default 0")
    parser.add_argument("--decode", type=int, help="decode steps, both sides fed side a's tokens; default 4")


def _report(parser: Parser) -> None:
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page of one file, to print and to sign")
    parser.add_argument("--layers", action="store_true", help="show every layer, not only those out of tolerance")
