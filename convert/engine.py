"""A conversion from beginning to end: plan, take the target, make its files, describe them, give it its name.

plan ─► target free? ─► room on the disk? ─► files of weights, each recorded ─► others, manifest ─► rename
                 └── killed anywhere here: the same command goes on with what is recorded ──┘
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend.checkpoint import Checkpoint, open_checkpoint
from ascend.errors import UserError
from ascend.progress import Progress
from convert.carried import Beside, beside, write_beside
from convert.demo_tokenizer import to_json
from convert.journal import Journal, work_directory
from convert.manifest import (
    MANIFEST,
    SIGNATURE,
    FileRecord,
    check_quick,
    read_manifest,
    summary,
    write_manifest,
    write_whole,
)
from convert.plan import Plan, Request, Shard, plain_dtype, plan
from convert.quality import PLOT, REPORT, by_class, plot, report
from convert.shard import ShardResult, Work
from convert.source import change_times, fingerprint
from convert.targets import TARGETS, notes
from convert.workers import run

MOST_WORKERS = 8  # unless told otherwise: more only wait for the disk
BYTES_WORTH_A_WORKER = 2 * 10**9  # one takes seconds to start
SCALES, CALIBRATION = "scales.safetensors", "calibration.json"  # in the work directory
BESIDE_BYTES = 64 << 20  # room for files that are no weights: tokenizer, index, report


@dataclass(frozen=True)
class Job:
    """A conversion that was checked and planned, and not begun."""

    checkpoint: Checkpoint
    target: Path
    plan: Plan
    beside: Beside
    fingerprint: str

    @property
    def notes(self) -> list[str]:
        """What to know of the target beforehand."""
        return notes(TARGETS[self.plan.request.target], self.checkpoint.config)

    @property
    def source(self) -> dict[str, Any]:
        """What the manifest says of the source."""
        return {"name": self.checkpoint.path.resolve().name, "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class Steps:
    """What a conversion does besides, where it is asked for.

    calibrate: writes the file of factors (`convert.scaling`) it is given, returns what the report says of it. check:
    looks at the directory with weights and config in it, returns the report's part on logits. sign: called last, when
    the manifest is there.
    """

    calibrate: Callable[[Path], dict[str, Any]] | None = None
    check: Callable[[Path], dict[str, Any]] | None = None
    sign: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Converted:
    """What came of it. ``seconds`` and ``reused`` files are this run's; ``report`` None: it was there already."""

    target: Path
    nbytes: int
    seconds: float
    reused: int
    report: dict[str, Any] | None


def prepare(source: Path, target: Path, request: Request) -> Job:
    """Check and plan. Raises `UserError` for a source that is no whole checkpoint, or an impossible target."""
    checkpoint = open_checkpoint(source, beside_pickles=True)
    try:
        _check_place(source, target)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}; give another place") from None
    return Job(checkpoint, target, plan(checkpoint, request), beside(checkpoint), fingerprint(checkpoint))


def _check_place(source: Path, target: Path) -> None:
    """Refuse at once where a rename could not put the target, or the work would meet the source."""
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is no directory: make it first, or give another place")
    if target.is_symlink():
        raise UserError(f"{target} is a link: give the place itself")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: give a directory that does not exist yet")
    if target.exists() and os.path.ismount(target):
        raise UserError(f"{target} is a mount point, which no rename can replace: give a directory in it")
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{target} lies in the source {source}: give another place")
    if source.resolve().is_relative_to(work_directory(target).resolve()):
        raise UserError(f"{source} lies where the work on {target} would be done: move it first")
    if len(os.fsencode(work_directory(target).name)) > os.pathconf(target.parent, "PC_NAME_MAX"):
        raise UserError(
            f"{target}: the name is too long for what stands beside it while it is made: give a shorter one"
        )


def convert(
    job: Job,
    workers: int | None = None,
    restart: bool = False,
    said: Callable[[str], None] = lambda line: None,
    steps: Steps = Steps(),
) -> Converted:
    """Do it, all or nothing: the target appears when every byte of it is on the disk.

    workers: processes, None chooses by cores and size. restart: begin anew where another conversion to this target was
    not finished. said: told a line per file.

    Raises `UserError`, one line, whatever goes wrong; finished files stay beside the target for the same command.
    """
    begun = time.monotonic()
    if _is_there(job, steps) and not work_directory(job.target).exists():
        return Converted(job.target, job.plan.nbytes, 0.0, len(job.plan.shards), None)
    what = {"plan": job.plan.sha256(job.fingerprint), "source": change_times(job.checkpoint)}
    with Journal(job.target, what, restart) as journal:
        if _is_there(job, steps):
            journal.discard()
            return Converted(job.target, job.plan.nbytes, 0.0, len(job.plan.shards), None)
        reused = len(journal.finished)
        try:
            _check_room(job, journal, steps)
            calibration = _calibrated(journal, steps)
            _make_files(job, journal, workers, said, calibration)
            if what["source"] != change_times(job.checkpoint):
                raise UserError(f"{job.checkpoint.path} changed while it was read: give the command with --restart")
            described = _describe(job, journal, calibration, steps)
            if steps.sign is not None:
                steps.sign(journal.files)
            journal.publish(job.target)
        except OSError as error:
            journal.discard_partial()
            raise UserError(f"cannot write {job.target}: {error.strerror or error}") from None
        except BaseException:
            journal.discard_partial()
            raise
    return Converted(job.target, job.plan.nbytes, time.monotonic() - begun, reused, described)


def _is_there(job: Job, steps: Steps) -> bool:
    """Whether the target is this very conversion, finished, its files all there and of the right sizes.

    Raises `UserError` if it is anything else, or lacks what is asked for now.
    """
    if not job.target.is_dir() or not any(job.target.iterdir()):
        return False
    if (job.target / MANIFEST).is_file():
        manifest = read_manifest(job.target)
        if (manifest.command, manifest.source) == (job.plan.request.as_json(), job.source):
            problems = check_quick(job.target, manifest)
            if problems:
                raise UserError(f"{summary(problems)}; remove {job.target} and give the command again")
            unsigned = steps.sign is not None and not (job.target / SIGNATURE).is_file()
            if unsigned or (steps.check is not None and "logits" not in _report(job.target)):
                raise UserError(
                    f"{job.target} is there already, made without this --sign or --check: "
                    "`python -m convert manifest DIR --force --sign KEY` signs it, another directory gets both"
                )
            return True
    raise UserError(f"{job.target} is not empty: it is never overwritten, give another directory")


def _report(directory: Path) -> dict[str, Any]:
    described: dict[str, Any] = json.loads((directory / REPORT).read_text(encoding="utf-8"))
    return described


def _check_room(job: Job, journal: Journal, steps: Steps) -> None:
    """Refuse at once what would fail after hours."""
    missing = sum(shard.nbytes for shard in _missing(job, journal)) + BESIDE_BYTES
    if steps.calibrate is not None:  # a factor per row and column of each weight, in fp32
        missing += sum(4 * sum(item.source.shape) for item in job.plan.items() if item.to == "w4a16")
    free = shutil.disk_usage(journal.path).free
    if missing > free:
        raise UserError(
            f"{job.target.parent} has {free / 1e9:.2f} GB free, {missing / 1e9:.2f} GB ({missing:,} bytes) are needed "
            f"for {job.target.name}: make room, or give another place"
        )


def _missing(job: Job, journal: Journal) -> list[Shard]:
    return [shard for shard in job.plan.shards if shard.file not in journal.finished]


def _calibrated(journal: Journal, steps: Steps) -> dict[str, Any] | None:
    """Make the factors, once, however often the work is broken off: their report is written when they are there."""
    if steps.calibrate is None:
        return None
    report_file = journal.path / CALIBRATION
    if not report_file.exists():
        write_whole(report_file, to_json(steps.calibrate(journal.path / SCALES)))
    found: dict[str, Any] = json.loads(report_file.read_text(encoding="utf-8"))
    return found


def _make_files(
    job: Job,
    journal: Journal,
    workers: int | None,
    said: Callable[[str], None],
    calibration: dict[str, Any] | None,
) -> None:
    missing = _missing(job, journal)
    if len(missing) < len(job.plan.shards):
        said(f"{len(job.plan.shards) - len(missing)} of {len(job.plan.shards)} files are there from an earlier run")
    scales = journal.path / SCALES if calibration is not None else None
    work = Work(journal.files, plain_dtype(job.checkpoint), _group(job.plan), scales)
    total = sum(shard.source_bytes for shard in missing)
    workers = workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)), 1 + total // BYTES_WORTH_A_WORKER)
    begun, read = time.monotonic(), 0
    # Closed whatever happens here: no process may write on when what is half written is removed.
    with (
        Progress(f"{job.plan.request.target} {job.target.name}", total) as progress,
        closing(run(work, missing, workers, progress.advance)) as results,
    ):
        for result in results:
            journal.finish(result)
            read += next(shard.source_bytes for shard in missing if shard.file == result.file)
            said(_line(result, len(journal.finished), len(job.plan.shards), read, total, time.monotonic() - begun))


def _group(plan: Plan) -> int:
    """Inputs per int4 scale: those of any weight, they are the same for all."""
    for item in plan.items():
        if item.to == "w4a16":
            return item.source.shape[1] // item.outputs[1].shape[1]
    return 0


def _line(result: ShardResult, done: int, files: int, read: int, total: int, seconds: float) -> str:
    rate = max(read, 1) / seconds
    left = (total - read) / rate
    return (
        f"{result.file}: {result.nbytes / 1e9:.2f} GB written, {done} of {files} files, "
        f"{rate / 1e9:.2f} GB/s read, {left:.0f} s left"
    )


def _describe(job: Job, journal: Journal, calibration: dict[str, Any] | None, steps: Steps) -> dict[str, Any]:
    """Write all that is no weights, and the manifest. Returns the report."""
    directory = journal.files
    errors = {name: one for shard in job.plan.shards for name, one in journal.finished[shard.file].errors.items()}
    described = report(job.plan, errors, job.beside.left_out, job.notes)
    write_beside(directory, job.checkpoint, job.plan, job.beside)
    if calibration is not None:
        described["calibration"] = calibration
    if steps.check is not None:
        described["logits"] = steps.check(directory)
    (directory / REPORT).write_text(to_json(described), encoding="utf-8")
    if errors:
        plot(directory / PLOT, by_class(job.plan, errors))
    known = {result.file: FileRecord(result.sha256, result.nbytes) for result in journal.finished.values()}
    write_manifest(directory, command=job.plan.request.as_json(), source=job.source, known=known)
    return described
