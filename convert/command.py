"""`python -m convert {fp8,w8a8,w4a16,bf16} SRC DST`: the command line of a conversion."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from ascend.errors import UserError, suggest
from convert.engine import Converted, Job, convert, prepare
from convert.plan import Request
from convert.quality import by_class, gigabytes, table
from convert.sharding import NOT_SHARDED, Sharding
from convert.sizes import parse_size
from convert.targets import LAYOUTS, TARGETS

MOST_WORKERS = 8  # by default: more only wait for the disk
SIGTERM_CODE = 143


def main(argv: Sequence[str]) -> int:
    """Run `python -m convert TARGET SRC DST`; ``argv`` begins with the target."""
    name, *rest = argv
    args = _arguments(name, rest)
    request = _request(name, args)
    job = prepare(Path(os.path.abspath(args.source)), Path(os.path.abspath(args.target)), request)
    if args.dry_run:
        _print_plan(job, args.json)
        return 0
    stopped = []

    def stop(signum: int, _frame: FrameType | None) -> None:
        stopped.append(signum)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        done = convert(job, args.workers, args.restart, lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print("interrupted: finished files stay, the same command goes on with the next", file=sys.stderr)
        return SIGTERM_CODE if stopped else 130
    _print_result(job, done, args.json)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _arguments(name: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog=f"python -m convert {name}",
        description=f"{TARGETS[name].what}. All or nothing; the same command goes on after a break.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="a checkpoint: BF16, FP16, FP32, FP8 in blocks, compressed-tensors or ModelSlim")
    add("target", metavar="DST", help="a directory that does not exist yet; it appears when it is whole")
    add("--workers", type=_positive, default=_cores(), metavar="N", help="processes (default: %(default)s)")
    add("--ignore", action="append", default=[], metavar="GLOB", help="modules to leave as they are; may be repeated")
    add("--shard", metavar="ep=N", help="experts of each of N ranks in files of their own")
    add("--max-shard-size", default="4GB", metavar="SIZE", help="largest file (default %(default)s)")
    if name == "w8a8":
        add("--format", choices=LAYOUTS, default=LAYOUTS[0], help="modelslim: vLLM-Ascend's own (default %(default)s)")
    add("--dry-run", action="store_true", help="print what would be done, and stop")
    add("--restart", action="store_true", help="begin anew where another conversion to DST was not finished")
    add("--json", action="store_true", help="end the output with one JSON document")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"unknown argument '{unknown[0]}'{suggest(unknown[0].split('=')[0], known)}; see --help")
    return args


def _request(name: str, args: argparse.Namespace) -> Request:
    from ascend.checkpoint import read_config

    sharding = Sharding.parse(args.shard, read_config(Path(args.source))) if args.shard else NOT_SHARDED
    return Request(
        name,
        getattr(args, "format", LAYOUTS[0]),
        tuple(sorted(set(args.ignore))),
        parse_size(args.max_shard_size),
        sharding,
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of processes")
    return int(text)


def _cores() -> int:
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def _print_plan(job: Job, as_json: bool) -> None:
    plan = job.plan
    classes = {name: one.as_json() for name, one in by_class(plan, {}).items()}
    before, after = sum(one["bytes_before"] for one in classes.values()), plan.nbytes
    print(table(classes))
    print(f"{gigabytes(before)} in, {gigabytes(after)} out in {len(plan.shards)} files ({after:,} bytes)")
    for what, why in job.beside.left_out.items():
        print(f"left out: {what} ({why})")
    if as_json:
        files = {shard.file: shard.nbytes for shard in plan.shards}
        print(json.dumps({"request": plan.request.as_json(), "classes": classes, "bytes": after, "files": files}))


def _print_result(job: Job, done: Converted, as_json: bool) -> None:
    document: dict[str, Any] = {"target": str(done.target), "bytes": done.nbytes, "seconds": round(done.seconds, 3)}
    if done.report is None:
        print(f"{done.target}: is there already, made by this very command")
    else:
        print(table(done.report["classes"]))
        for what, why in job.beside.left_out.items():
            print(f"left out: {what} ({why})")
        if done.report["worst"]:
            worst = done.report["worst"][0]
            print(f"worst tensor: {worst['tensor']}, mean error {worst['mean_relative_error']:.2%}")
        print(f"{done.target}: {gigabytes(done.nbytes)} in {done.seconds:.1f} s; `python -m convert verify` checks it")
        document["report"] = done.report
    if as_json:
        print(json.dumps(document))
