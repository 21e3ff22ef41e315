"""`python -m perf parity`: prove that two platforms compute the same model, layer by layer and end to end.

Each side is computed in a process of its own (`perf.parity_side`), or was on another machine and is now a file. Side b
runs every layer on the residual streams of side a, so a difference is seen in the layer it comes from. Read
`parity_trace.py` for what is recorded, `parity_numbers.py` for what is compared, `judge.py` for the limits, and
`parity_report.py` for what is printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend.checkpoint import open_checkpoint
from ascend.devices import get_device
from ascend.errors import EXIT_USER_ERROR, UserError, suggest
from perf.judge import LIMITS, judge
from perf.parity_report import report
from perf.parity_side import DTYPES, SideInfo, config_sha256, read_info

SIDES = ("cpu", "cuda", "npu", "npu-emulated")
EXIT_FAIL = 1
# What says which computation it is: a file of side a has settled it, so that none of it may be given then.
DEFAULTS: dict[str, Any] = {
    "dtype": None,
    "quantise": None,
    "rows": 2,
    "prompt_length": 48,
    "seed": 0,
    "decode": 4,
}


@dataclass(frozen=True)
class Source:
    """Where a side comes from: a device, on which it is computed in that environment, or a file."""

    name: str
    device: str | None = None
    environ: dict[str, str] | None = None

    @property
    def file(self) -> Path | None:
        """The file, where it is one."""
        return Path(self.name) if self.device is None else None


def main(argv: Sequence[str]) -> int:
    """Compare two sides, or compute one and save it; returns 0 for PASS (or saved) and 1 for FAIL."""
    args = _parse(argv)
    environ = dict(os.environ)  # before the look for one device tells torch not to load the others
    a = _source("--a", args.a, environ)
    b = None if args.b is None else _source("--b", args.b, environ)
    _check(args, a, b)
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        file_a = a.file or _computed(a, args, args.save_a or Path(scratch, "a.safetensors"))
        if b is None:
            print(f"saved {args.save_a}; where the other card is: perf parity --a FILE --b DEVICE --model DIR")
            return 0
        file_b = b.file or _computed(b, args, args.save_b or Path(scratch, "b.safetensors"), like=file_a)
        return _compare(args, file_a, file_b)


def _compare(args: argparse.Namespace, file_a: Path, file_b: Path) -> int:
    info_a, info_b = read_info(file_a), read_info(file_b)
    _check_alike(info_a, info_b, str(args.b))
    from safetensors.torch import load_file

    from perf.parity_numbers import compare

    limits = LIMITS[info_a.quantise or info_a.dtype]
    numbers = compare(load_file(file_a), load_file(file_b), limits, info_a.n_group, info_a.topk_group)
    verdict = judge(numbers, limits)
    report(info_a, info_b, numbers, limits, verdict, args.layers, args.json)
    return 0 if verdict.passed else EXIT_FAIL


def _computed(source: Source, args: argparse.Namespace, out: Path, like: Path | None = None) -> Path:
    """Have a worker compute a side. Raises `UserError` with the worker's own line if it ends with one."""
    options = ["--model", args.model, "--device", source.device, "--out", str(out)]
    options += [] if like is None else ["--like", str(like)]
    for name in DEFAULTS:
        value = getattr(args, name)
        options += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    print(f"computing {source.name} …", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "perf.parity_side", *options],
        stderr=None if args.verbose else subprocess.PIPE,
        stdout=sys.stderr,
        env=source.environ,
        text=True,
        check=False,
    )
    if done.returncode:
        errors = [line for line in (done.stderr or "").splitlines() if line.startswith("error: ")]
        if done.returncode == EXIT_USER_ERROR and errors:
            raise UserError(errors[-1].removeprefix("error: "))
        raise UserError(f"side {source.name} ended with code {done.returncode}; run again with --verbose to see why")
    return out


def _source(flag: str, text: str, environ: dict[str, str]) -> Source:
    """Read ``--a`` or ``--b``; the device must be there now, not only once a worker has loaded torch."""
    kind, colon, index = text.partition(":")
    if kind == "npu-emulated":
        from ascend.emulator.__main__ import environment

        return Source(text, f"npu{colon}{index}", environment())
    if kind in SIDES:
        get_device(text)
        return Source(text, text, environ)
    if not Path(text).is_file():
        raise UserError(f"{flag} '{text}' is neither a file nor one of {', '.join(SIDES)}{suggest(kind, SIDES)}")
    return Source(text)


def _check(args: argparse.Namespace, a: Source, b: Source | None) -> None:
    """Refuse what makes no sense before anything is computed, and let a file of side a fill the arguments."""
    if b is None and (a.device is None or args.save_a is None):
        raise UserError("--b is missing; only --a DEVICE with --save-a FILE goes without")
    for flag, saved, source in (("--save-a", args.save_a, a), ("--save-b", args.save_b, b)):
        if saved is not None and (source is None or source.device is None):
            raise UserError(f"{flag}: that side is not computed here")
        if saved is not None and not saved.absolute().parent.is_dir():
            raise UserError(f"{flag} {saved}: there is no such folder")
    computed = a.device or (b and b.device)
    if computed:
        if args.model is None:
            raise UserError("--model is missing: the checkpoint directory that a side is computed from")
        open_checkpoint(args.model)
    if a.file is None:
        if b is not None and b.file is not None:
            raise UserError("--b can be a file only where --a is one: side b is computed on side a's streams")
        for name, default in DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
        return
    info = read_info(a.file)
    for name in DEFAULTS:
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: the file of side a has settled it; leave it out")
    args.dtype, args.quantise, args.decode, args.seed = info.dtype, info.quantise, info.decode, info.seed
    if computed and config_sha256(args.model) != info.config_sha256:
        raise UserError(f"{args.model}: its config.json is not the one that {a.file} was computed with")


def _check_alike(a: SideInfo, b: SideInfo, name: str) -> None:
    for key in ("config_sha256", "tokens_sha256", "dtype", "quantise", "decode"):
        if getattr(a, key) != getattr(b, key):
            what = key.replace("_sha256", "")
            raise UserError(f"the two sides are of different {what}: {getattr(a, key)} and {getattr(b, key)}")
    if b.like_sha256 != a.streams_sha256:
        raise UserError(f"{name}: was not computed on the streams of this side a; make it with --a FILE --save-b FILE")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m perf parity", description="Exit code 0: PASS, 1: FAIL, 2: not compared.", allow_abbrev=False
    )
    parser.add_argument("--a", required=True, help=f"the side to trust: {', '.join(SIDES)}, or a saved file")
    parser.add_argument("--b", help="the side to judge, the same choices")
    parser.add_argument("--model", metavar="DIR", help="checkpoint, the same on both machines")
    parser.add_argument("--save-a", type=Path, metavar="FILE", help="keep side a; without --b nothing is compared")
    parser.add_argument("--save-b", type=Path, metavar="FILE", help="keep side b, for whoever has side a")
    parser.add_argument("--dtype", choices=DTYPES, help="as stored by default")
    parser.add_argument("--quantise", choices=("w8a8", "w4a16"))
    parser.add_argument("--rows", type=int, help="random prompts, besides a padded one; default 2")
    parser.add_argument("--prompt-length", type=int, help="default 48")
    parser.add_argument("--seed", type=int, help="of the prompts; default 0")
    parser.add_argument("--decode", type=int, help="decode steps, both sides fed side a's tokens; default 4")
    parser.add_argument("--layers", action="store_true", help="show every layer, not only those out of tolerance")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--verbose", action="store_true", help="let the workers print what they have to say")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"unknown argument '{unknown[0]}'{suggest(unknown[0].split('=')[0], known)}; see --help")
    for name, least in (("rows", 1), ("prompt_length", 16), ("decode", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}, it must be at least {least}")
    return args
