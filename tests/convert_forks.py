"""Conversions that are broken off: run in forks of one process that has imported everything, a tenth of a second each.

Run as `python -m tests.convert_forks SCENARIO SOURCE BASE [ARGUMENT]`; prints what was seen, as JSON. The parent never
computes with torch: its threads would not survive the forks.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from ascend.errors import UserError, run_command
from convert import engine, journal, quality
from convert.plan import Request

KILLED = 77
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def convert(source: Path, target: Path, said: Callable[[str], None] = lambda line: None, restart: bool = False) -> None:
    engine.convert(engine.prepare(source, target, Request("w8a8", max_shard_bytes=60_000)), 1, restart, said)


def interrupted(line: str) -> None:
    """Ctrl-C after a file."""
    if " GB written, " in line:
        raise KeyboardInterrupt


def forked(work: Callable[[], Any], stderr: Path | None = None) -> int:
    """Start ``work`` in a child that exits as a command would; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        if stderr is not None:
            os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        code = run_command(lambda: work() and None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(work: Callable[[], Any], stderr: Path | None = None) -> int:
    return ended(forked(work, stderr))


def content(directory: Path) -> dict[str, str]:
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def identity(directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of each file of weights that is there under its name."""
    found = {file.name: file.stat() for file in directory.glob("*.safetensors")} if directory.is_dir() else {}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


class Crash:
    """Counts what changes the disk below ``base``, and ends the process without a word at call number ``at``.

    half: of what is written there, the first half is.
    """

    def __init__(self, base: Path, at: int = -1, half: bool = False, log: Path | None = None) -> None:
        self.base, self.at, self.half, self.log = str(base), at, half, log
        self.calls: list[str] = []

    def reached(self, what: str) -> bool:
        self.calls.append(what)
        if len(self.calls) - 1 != self.at:
            return False
        if not self.half:
            os._exit(KILLED)
        return True

    def arm(self) -> None:
        sys.addaudithook(self._audit)
        self._wrap(os, "pwrite", lambda call, fd, data, at: call(fd, data[: len(data) // 2], at))
        self._wrap(os, "fsync", lambda call, fd: call(fd))
        self._wrap(Path, "write_text", lambda call, path, text, **how: call(path, text[: len(text) // 2], **how))

        def half_line(call: Callable[..., None], log: journal.Journal, entry: dict[str, Any]) -> None:
            text = journal._line(entry)
            log.stream.write(text[: len(text) // 2])
            log.stream.flush()

        self._wrap(journal.Journal, "_append", half_line)

    def _wrap(self, owner: Any, name: str, half: Callable[..., Any]) -> None:
        call = getattr(owner, name)

        def counted(*args: Any, **how: Any) -> Any:
            if self.reached(f"{name} {args[0]}" if owner is Path else name):
                half(call, *args, **how)
                os._exit(KILLED)
            return call(*args, **how)

        setattr(owner, name, counted)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod")
        if event == "open" and isinstance(args[2], int) and args[2] & WRITING:
            changes = True
        # Below a directory descriptor (`shutil.rmtree`) names are relative: they are ours.
        if changes and isinstance(args[0], (str, os.PathLike)):
            path = os.fspath(args[0])
            if (path.startswith(self.base) or not path.startswith("/")) and self.reached(f"{event} {path}"):
                os._exit(KILLED)


def counted_calls(source: Path, base: Path) -> list[str]:
    """What an unbroken run does to the disk, call by call."""
    base.mkdir()
    log = base.with_name("calls.json")

    def work() -> None:
        crash = Crash(base)
        crash.arm()
        convert(source, base / "target")
        calls = list(crash.calls)
        io.FileIO(log, "w").write(json.dumps(calls).encode())

    assert run(work) == 0
    return list(json.loads(log.read_text()))


def chosen(calls: list[str], count: int) -> list[tuple[int, bool]]:
    """Crash points: all around journal, rename and what follows it; a spread over the rest; writes also half done."""
    publishing = next(k for k, call in enumerate(calls) if call.startswith("os.rename") and call.endswith("/files"))
    special = {k for k in range(publishing - 3, len(calls))} | {0, 1, 2}
    appends = [k for k, call in enumerate(calls) if call == "_append"]
    special |= {near for k in appends[:2] + appends[-1:] for near in range(k - 3, k + 3)}
    special &= set(range(len(calls)))
    points = [(k, False) for k in sorted(special)]
    writes = [k for k, call in enumerate(calls) if call.startswith(("pwrite", "write_text", "_append"))]
    spread = max(1, len(writes) * 2 // max(count, 1))
    points += [(k, True) for k in sorted({*writes[::spread], *appends})]
    rest = [k for k in range(len(calls)) if k not in special]
    return points + [(k, False) for k in rest[:: max(1, len(rest) * 2 // max(count, 1))]]


def crashes(source: Path, base: Path, count: str) -> dict[str, Any]:
    """Break off at many calls, look, do it again; returns what was wrong, by crash point."""
    calls = counted_calls(source, base / "unbroken")
    whole = content(base / "unbroken" / "target")
    points = chosen(calls, int(count))
    if int(count) < 20:  # quick: where something is recorded, where it gets its name
        recorded = [k for k, call in enumerate(calls) if call == "_append"]
        points = [(recorded[2], True), (recorded[-1], False), (len(calls) - 10, False), (len(calls) - 1, False)]
    wrong, most_repeated, halfway = [], 0, 0
    for number, (k, half) in enumerate(points):
        place = base / f"at{number}"
        place.mkdir()
        name = f"call {k} ({calls[k]}{', half' if half else ''})"

        def broken(place: Path = place, k: int = k, half: bool = half) -> None:
            Crash(place, k, half).arm()
            convert(source, place / "target")

        code = run(broken, base / "stderr")
        if code != KILLED:
            wrong.append(f"{name}: ended with {code}: {(base / 'stderr').read_text()[-300:]}")
        target = place / "target"
        if target.exists() and content(target) != whole:
            wrong.append(f"{name}: a half target")
        if half and calls[k] == "_append":  # a line that was torn: the journal must be whole after what is added to it
            run(lambda target=target: convert(source, target, interrupted), base / "stderr")  # type: ignore[misc]
        before = identity(place / ".target.converting" / "files") or identity(target)
        halfway += bool(before)
        if run(lambda target=target: convert(source, target), base / "stderr"):  # type: ignore[misc]
            wrong.append(f"{name}: cannot go on: {(base / 'stderr').read_text()[-300:]}")
            continue
        if content(target) != whole:
            wrong.append(f"{name}: other bytes")
        if os.listdir(place) != ["target"]:
            wrong.append(f"{name}: left {sorted(os.listdir(place))}")
        after = identity(target)
        repeated = sum(after[file] != one for file, one in before.items())
        most_repeated = max(most_repeated, repeated)
        if repeated > 1:
            wrong.append(f"{name}: {repeated} of {len(before)} finished files made again")
    return {"calls": len(calls), "points": len(points), "halfway": halfway, "repeated": most_repeated, "wrong": wrong,
            "files": len(list((base / "unbroken" / "target").glob("*.safetensors")))}  # fmt: skip


def at_once(source: Path, base: Path, rounds: str) -> list[dict[str, Any]]:
    """Eight begin at the same instant, some rounds of it."""
    seen = []
    for number in range(int(rounds)):
        place = base / f"round{number}"
        place.mkdir()
        start = time.monotonic() + 0.05

        def work(place: Path = place, start: float = start) -> None:
            time.sleep(max(0.0, start - time.monotonic()))
            job = engine.prepare(source, place / "target", Request("w8a8", max_shard_bytes=60_000))
            if engine.convert(job, 1).report is None:
                print("found", file=sys.stderr)
            else:
                print("made", file=sys.stderr)

        children = [(forked(work, base / f"said{n}"), base / f"said{n}") for n in range(8)]
        codes = [ended(pid) for pid, _ in children]
        seen.append({"codes": codes, "said": [said.read_text() for _, said in children],
                     "left": os.listdir(place), "content": content(place / "target")})  # fmt: skip
    return seen


def full_disk(source: Path, disk: Path, _: str) -> list[dict[str, Any]]:
    """Somebody fills the disk after each file, and before report and manifest; then makes room again."""
    elsewhere = disk.parent / "unbroken"
    assert run(lambda: convert(source, elsewhere)) == 0
    whole, seen = content(elsewhere), []
    stderr, filler = disk.parent / "stderr", disk / "filler"
    made = len(list(elsewhere.glob("*.safetensors")))

    def fill() -> None:
        with suppress_full(), filler.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(1 << 20))
        with suppress_full(), filler.open("ab", buffering=0) as stream:
            while True:
                stream.write(bytes(1 << 12))

    for after in range(made + 2):
        target = disk / "target"

        def work(after: int = after, target: Path = target) -> None:
            recorded = 0

            def said(line: str) -> None:
                nonlocal recorded
                recorded += 1
                if recorded == after:
                    fill()

            if after == 0:
                taken = journal.Journal._read

                def read(self: Any, what: Any) -> Any:
                    fill()
                    return taken(self, what)

                journal.Journal._read = read  # type: ignore[method-assign]
            if after == made + 1:
                write = engine.write_manifest

                def late(*args: Any, **how: Any) -> None:
                    fill()
                    write(*args, **how)

                engine.write_manifest = late
            convert(source, target, said)

        code = run(work, stderr)
        one = {"after": after, "code": code, "said": stderr.read_text(), "target": target.exists()}
        before = identity(disk / ".target.converting" / "files")
        refused = run(lambda target=target: convert(source, target), stderr)  # type: ignore[misc]
        one |= {"again": refused, "again_said": stderr.read_text(), "again_target": target.exists()}
        filler.unlink(missing_ok=True)
        one["finish"] = run(lambda target=target: convert(source, target), stderr)  # type: ignore[misc]
        one["finish_said"] = stderr.read_text()
        one["identical"] = target.exists() and content(target) == whole
        one["finished"] = len(before)
        one["repeated"] = sum(identity(target).get(file) != was for file, was in before.items())
        one["left"] = os.listdir(disk)
        seen.append(one)
        run(lambda target=target: __import__("shutil").rmtree(target))  # type: ignore[misc]
    return seen


class suppress_full:  # noqa: N801
    """Until the disk is full."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        return isinstance(error, OSError)


def faults(source: Path, base: Path, _: str) -> dict[str, Any]:
    """Each in a fork: a cut source, a changed source, a limit of file size, a place that is none."""
    import resource
    import shutil
    import signal

    seen: dict[str, Any] = {}

    def one(name: str, work: Callable[[Path, Path], Any]) -> None:
        place = base / name
        shutil.copytree(source, place / "source")
        stderr = base / "stderr"
        code = run(lambda: work(place / "source", place / "target"), stderr)
        seen[name] = {"code": code, "said": stderr.read_text(), "target": (place / "target").exists()}
        left = place / ".target.converting" / "files"
        seen[name]["partial"] = [str(file) for file in left.glob("*.partial")] if left.exists() else []

    def cut(src: Path, to: Path) -> None:
        largest = max(src.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        convert(src, to, lambda line: os.truncate(largest, largest.stat().st_size // 2))

    def touched(src: Path, to: Path) -> None:
        convert(src, to, lambda line: os.utime(next(src.glob("*.safetensors")), (1, 1)))

    def limited(src: Path, to: Path) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        convert(src, to)

    one("cut", cut)
    one("touched", touched)
    one("limited", limited)
    one("no parent", lambda src, to: convert(src, to.parent / "missing" / "target"))

    def file_as_parent(src: Path, to: Path) -> None:
        (to.parent / "file").write_text("x")
        convert(src, to.parent / "file" / "target")

    one("file as parent", file_as_parent)

    def other_options(src: Path, to: Path) -> None:
        def stop(line: str) -> None:
            raise KeyboardInterrupt

        try:
            convert(src, to, stop)
        except KeyboardInterrupt:
            engine.convert(engine.prepare(src, to, Request("fp8")), 1)

    one("other options", other_options)

    def restarted(src: Path, to: Path) -> None:
        try:
            other_options(src, to)
        except UserError:
            convert(src, to, restart=True)

    one("restart", restarted)
    return seen


def read_only(source: Path, disk: Path, _: str) -> dict[str, Any]:
    """The disk becomes read-only before the first file and, of another conversion, after it."""
    target, stderr = disk / "target", disk.parent / "stderr"
    seen: dict[str, Any] = {"codes": [], "said": [], "target": []}
    for begun in (False, True):
        if begun:
            run(lambda: convert(source, target, interrupted), stderr)
        subprocess.check_call(["mount", "-o", "remount,ro", str(disk)])
        seen["codes"].append(run(lambda: convert(source, target), stderr))
        seen["said"].append(stderr.read_text())
        seen["target"].append(target.exists())
        subprocess.check_call(["mount", "-o", "remount,rw", str(disk)])
    before = identity(disk / ".target.converting" / "files")
    seen["codes"].append(run(lambda: convert(source, target), stderr))
    seen["kept"] = [identity(target)[file] == one for file, one in before.items()]
    return seen | {"left": os.listdir(disk)}


SCENARIOS: dict[str, Callable[[Path, Path, str], Any]] = {
    "crashes": crashes,
    "at_once": at_once,
    "full_disk": full_disk,
    "faults": faults,
    "read_only": read_only,
}

if __name__ == "__main__":
    _, scenarios, source_, base_, *argument = sys.argv
    quality.plot(Path(os.devnull), {})  # its library takes longer than a conversion: once for all forks
    print(json.dumps(SCENARIOS[scenarios](Path(source_), Path(base_), *(argument or [""]))))
