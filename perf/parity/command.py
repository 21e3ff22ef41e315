"""`python -m perf parity VERB …`: the command line, what may be asked for together, and who does it.

`live` computes both sides here, `record` one of them into a file, `check` holds a recorded side against a device,
another recorded side, or an OpenAI endpoint. Everything that makes no sense is refused before anything is computed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ascend.checkpoint import open_checkpoint
from ascend.errors import UserError, suggest
from perf.arguments import out_file
from perf.parity.arguments import VERBS, parse
from perf.parity.compute import compute, device_side
from perf.parity.endpoint import Server, api_key
from perf.parity.judge import Check, Comparison, all_checks, judge
from perf.parity.judge_served import ServedNumbers
from perf.parity.limits import LIMITS
from perf.parity.report import Report, ServerInfo, publish
from perf.parity.side import SideInfo, config_sha256, read_info

EXIT_FAIL = 1
TOP_LOGPROBS = 20  # what a vLLM server gives at most unless it was told otherwise; `perf.parity.twin` counts as many
# What says which computation it is: a file of side a has settled it, so that none of it may be given then.
DEFAULTS: dict[str, Any] = {
    "dtype": None,
    "quantise": None,
    "rows": 8,
    "prompt_length": 48,
    "seed": 0,
    "decode": 4,
}


def main(argv: Sequence[str]) -> int:
    """Run one verb; returns 0 for PASS (or recorded) and 1 for FAIL, and raises `UserError` if nothing was compared."""
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help"):
        print("usage: python -m perf parity VERB …   (VERB --help for its options)\n\nverbs:")
        print("\n".join(f"  {name:<8} {what}" for name, what in VERBS.items()))
        print("\nexit code 0: PASS, 1: FAIL, 2: nothing was compared")
        return 0
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {"live": _live, "record": _record, "check": _check}
    if verb not in verbs:
        raise UserError(f"unknown verb '{verb}'{suggest(verb, VERBS)}; `python -m perf parity --help` lists them")
    args = parse(verb, rest)
    args.command = shlex.join(["python", "-m", "perf", "parity", *argv])
    return verbs[verb](args)


def _live(args: argparse.Namespace) -> int:
    environ = dict(os.environ)  # before the look for one device tells torch not to load the others
    sides = [device_side(name, environ) for name in (args.a, args.b)]
    open_checkpoint(args.model)
    _settle(args)
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        files = [Path(scratch, f"{letter}.safetensors") for letter in "ab"]
        compute(sides[0], args, files[0])
        compute(sides[1], args, files[1], like=files[0])
        return _compare(args, *files)


def _record(args: argparse.Namespace) -> int:
    side = device_side(args.device, dict(os.environ))
    out_file("FILE", args.file)
    like = None if args.like is None else read_info(args.like)
    if args.like is not None and args.like.resolve() == args.file.resolve():
        raise UserError(f"{args.file}: would be overwritten, and is what --like is to be compared with")
    open_checkpoint(args.model)
    _settle(args, like, args.like)
    compute(side, args, args.file, args.like)
    print(f"recorded {args.file}; where the other side is: python -m perf parity check FILE SIDE --model DIR")
    if args.json:
        print(json.dumps({"file": str(args.file), "side": asdict(read_info(args.file))}))
    return 0


def _check(args: argparse.Namespace) -> int:
    info = read_info(args.file)
    if args.side.startswith(("http://", "https://")):
        return _check_endpoint(args, info)
    for flag in ("served_model", "api_key_file"):
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')} is for an http(s):// endpoint, {args.side} is none")
    if Path(args.side).is_file():
        return _compare(args, args.file, Path(args.side))
    side = device_side(args.side, dict(os.environ), "a recorded side, an http(s):// endpoint")
    if args.model is None:
        raise UserError("--model is missing: the checkpoint directory that the side is computed from")
    _settle(args, info, args.file)
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        file_b = Path(scratch, "b.safetensors")
        compute(side, args, file_b, like=args.file)
        return _compare(args, args.file, file_b)


def _check_endpoint(args: argparse.Namespace, info: SideInfo) -> int:
    if args.model is not None:
        _check_config(args.model, info, args.file)
    from safetensors.torch import load_file

    from perf.parity.judge_served import served_checks
    from perf.parity.served import ask, check_record, compare_served

    a, limits = load_file(args.file), LIMITS[info.quantise or info.dtype]
    check_record(a)
    server = Server(args.side, api_key(args.api_key_file), args.served_model, TOP_LOGPROBS)
    print(f"asking {server.url} about {server.model} …", file=sys.stderr)
    numbers = compare_served(a, ask(server, a, info.decode), limits, info.n_group, info.topk_group)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    b = ServerInfo(server.url, server.model, server.version, server.top, date)
    return _publish(args, info, b, numbers, served_checks(numbers, limits))


def _compare(args: argparse.Namespace, file_a: Path, file_b: Path) -> int:
    info_a, info_b = read_info(file_a), read_info(file_b)
    _check_alike(info_a, info_b, file_b)
    from safetensors.torch import load_file

    from perf.parity.numbers import compare

    limits = LIMITS[info_a.quantise or info_a.dtype]
    numbers = compare(load_file(file_a), load_file(file_b), limits, info_a.n_group, info_a.topk_group)
    return _publish(args, info_a, info_b, numbers, all_checks(numbers, limits))


def _publish(
    args: argparse.Namespace,
    a: SideInfo,
    b: SideInfo | ServerInfo,
    numbers: Comparison | ServedNumbers,
    checks: list[Check],
) -> int:
    verdict = judge(checks)
    publish(Report(args.command, a, b, numbers, LIMITS[a.quantise or a.dtype], checks, verdict), args)
    return 0 if verdict.passed else EXIT_FAIL


def _settle(args: argparse.Namespace, info: SideInfo | None = None, file: Path | None = None) -> None:
    """Fill in what was not given: from the file of side a, which allows none of it, or with the defaults."""
    for name, default in DEFAULTS.items():
        if info is None:
            setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
        elif getattr(args, name, None) is not None:
            raise UserError(f"--{name.replace('_', '-')}: {file} has settled it; leave it out")
        else:
            setattr(args, name, getattr(info, name, None))
    if info is not None:
        _check_config(args.model, info, file)


def _check_config(model: str, info: SideInfo, file: Path | None) -> None:
    open_checkpoint(model)
    if config_sha256(model) != info.config_sha256:
        raise UserError(f"{model}: its config.json is not the one that {file} was computed with")


def _check_alike(a: SideInfo, b: SideInfo, file_b: Path) -> None:
    if a == b:
        raise UserError(f"{file_b}: is side a itself; record the other side with --like and the file of side a")
    for key in ("config_sha256", "tokens_sha256", "dtype", "quantise", "decode"):
        if getattr(a, key) != getattr(b, key):
            what = key.replace("_sha256", "")
            raise UserError(f"the two sides are of different {what}: {getattr(a, key)} and {getattr(b, key)}")
    if b.like_sha256 != a.streams_sha256:
        raise UserError(
            f"{file_b}: was not computed on the streams of this side a; record it with --like and the file of side a"
        )
