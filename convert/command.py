"""`python -m convert {fp8,w8a8,w4a16,bf16} SRC DST`: the command line of a conversion."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ascend.arguments import Parser
from ascend.checkpoint import read_config
from ascend.model_shape import ModelShape, context_limit
from convert import cards
from convert.engine import Converted, Job, Steps, convert, prepare
from convert.plan import Request
from convert.quality import by_class, gigabytes, table
from convert.sharding import NOT_SHARDED, Sharding
from convert.sizes import parse_size
from convert.targets import LAYOUTS, TARGETS

SIGTERM_CODE = 143


def main(argv: Sequence[str]) -> int:
    """Run `python -m convert TARGET SRC DST`; ``argv`` begins with the target."""
    name, *rest = argv
    args = _arguments(name, rest)
    source, target = Path(os.path.abspath(args.source)), Path(os.path.abspath(args.target))
    config = read_config(source)
    texts = _texts(getattr(args, "calibrate", None), source)
    job = prepare(source, target, _request(name, args, config, texts))
    if args.dry_run:
        _print_plan(job, args.json)
        return 0
    stopped = []

    def stop(signum: int, _frame: FrameType | None) -> None:
        stopped.append(signum)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        done = convert(job, args.workers, args.restart, _say, _steps(args, job, texts))
    except KeyboardInterrupt:
        print("interrupted: finished files stay, the same command goes on with the next", file=sys.stderr)
        return SIGTERM_CODE if stopped else 130
    _print_result(job, done, args.json)
    return 0


def _say(line: str) -> None:
    with suppress(OSError):  # a terminal that is gone is no reason to stop
        print(line, file=sys.stderr, flush=True)


def _texts(file: str | None, source: Path) -> list[list[int]]:
    if file is None:
        return []
    from convert.texts import read_texts

    return read_texts(Path(file), source)


def _steps(args: argparse.Namespace, job: Job, texts: list[list[int]]) -> Steps:
    """Turn flags into what is done besides; whatever can be refused is refused here, before hours of work."""
    calibration = check = signing = None
    if texts:
        from convert.calibrate import calibrate, check_calibration

        check_calibration(job.checkpoint, job.plan)

        def calibration(file: Path) -> dict[str, Any]:
            return calibrate(job.checkpoint, texts, job.plan, file, _say).as_json()

    if args.check is not None:
        from convert.check import check_fits, compare_logits

        prompts = _texts(args.check, job.checkpoint.path)
        check_fits(job.checkpoint, prompts)

        def check(directory: Path) -> dict[str, Any]:
            return compare_logits(job.checkpoint.path, directory, prompts)

    if args.sign is not None:
        from convert.signature import private_key, sign

        key = Path(args.sign)
        private_key(key)

        def signing(directory: Path) -> None:
            sign(directory, key)

    return Steps(calibration, check, signing)


def _arguments(name: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(f"convert {name}", f"{TARGETS[name].what}. All or nothing; the same command goes on after a break.")
    add = parser.add_argument
    add("source", metavar="SRC", help="a checkpoint: BF16, FP16, FP32, FP8 in blocks, compressed-tensors or ModelSlim")
    add("target", metavar="DST", help="a directory that does not exist yet; it appears when it is whole")
    add("--workers", type=_positive, metavar="N", help="processes (default: by cores and size, at most 8)")
    add("--ignore", action="append", default=[], metavar="GLOB", help="modules to leave as they are; may be repeated")
    add("--shard", metavar="ep=N", help="experts of each of N ranks in files of their own")
    add("--max-shard-size", default="4GB", metavar="SIZE", help="largest file (default %(default)s)")
    if name == "w8a8":
        add("--format", choices=LAYOUTS, default=LAYOUTS[0], help="modelslim: vLLM-Ascend's own (default %(default)s)")
    if name == "w4a16":
        add("--calibrate", metavar="FILE", help="prompts, a line each or .jsonl with `text`: scale by what they excite")
    add("--check", metavar="FILE", help="compare logits with the source's on these prompts; both must fit in memory")
    add("--sign", metavar="KEY", help="sign the manifest with this Ed25519 private key (PEM)")
    add("--dry-run", action="store_true", help="print what would be done, and stop")
    add("--restart", action="store_true", help="begin anew where another conversion to DST was not finished")
    add("--json", action="store_true", help="end the output with one JSON document")
    return parser.read(argv)


def _request(name: str, args: argparse.Namespace, config: dict[str, Any], texts: list[list[int]]) -> Request:
    return Request(
        name,
        getattr(args, "format", LAYOUTS[0]),
        tuple(sorted(set(args.ignore))),
        parse_size(args.max_shard_size),
        Sharding.parse(args.shard, config) if args.shard else NOT_SHARDED,
        hashlib.sha256(json.dumps(texts).encode()).hexdigest() if texts else None,
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of processes")
    return int(text)


def _print_plan(job: Job, as_json: bool) -> None:
    plan = job.plan
    classes = {name: one.as_json() for name, one in by_class(plan, {}).items()}
    before, after = sum(one["bytes_before"] for one in classes.values()), plan.nbytes
    print(table(classes))
    print(f"{gigabytes(before)} in, {gigabytes(after)} out in {len(plan.shards)} files ({after:,} bytes)")
    _print_notes(job)
    print(f"\n{cards.table(_fits(job, classes))}")
    if as_json:
        files = {shard.file: shard.nbytes for shard in plan.shards}
        print(json.dumps({"request": plan.request.as_json(), "classes": classes, "bytes": after, "files": files}))


def _fits(job: Job, classes: dict[str, dict[str, Any]]) -> list[cards.Fit]:
    """Which cards the target will fit on."""
    config = job.checkpoint.config
    nbytes = {name: one["bytes_after"] for name, one in classes.items()}
    context = context_limit(config) or cards.SEQUENCE_LENGTH
    return cards.fits(ModelShape.from_config(config), nbytes, {item.to for item in job.plan.items()}, context)


def _print_notes(job: Job) -> None:
    for what, why in job.beside.left_out.items():
        print(f"left out: {what} ({why})")
    for note in job.notes:
        print(f"note: {note}")


def _print_result(job: Job, done: Converted, as_json: bool) -> None:
    document: dict[str, Any] = {"target": str(done.target), "bytes": done.nbytes, "seconds": round(done.seconds, 3)}
    if done.report is None:
        print(
            f"{done.target}: is there already, made by this very command; `python -m convert verify` checks its bytes"
        )
    else:
        print(table(done.report["classes"]))
        _print_notes(job)
        if done.report["worst"]:
            worst = done.report["worst"][0]
            print(f"worst tensor: {worst['tensor']}, mean error {worst['mean_relative_error']:.2%}")
        if "logits" in done.report:
            print("logits: " + ", ".join(f"{key} {value}" for key, value in done.report["logits"].items()))
        print(f"{done.target}: {gigabytes(done.nbytes)} in {done.seconds:.1f} s; `python -m convert verify` checks it")
        document["report"] = done.report
    if as_json:
        print(json.dumps(document))
