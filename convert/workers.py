"""Processes that make files of weights: each takes the next one when it is done, none outlives the one that asked."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import Synchronized

from ascend.errors import UserError
from convert.plan import Shard
from convert.scaling import Scales
from convert.shard import ShardResult, Work, convert_shard

SECONDS_BETWEEN_REPORTS = 0.2
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run(
    work: Work, shards: Sequence[Shard], workers: int, advance: Callable[[int], None]
) -> Generator[ShardResult, None, None]:
    """Make ``shards`` and yield each when it is durable; ``advance`` is told of source bytes that were read.

    Raises `UserError`, one line, for whatever keeps a file from being made; other files are then broken off.
    """
    if min(workers, len(shards)) <= 1:
        scales = Scales.load(work.scales)
        for shard in shards:
            with _disk_errors(shard):
                result = convert_shard(work, shard, scales, advance)
            yield result
        return
    with _Pool(work, shards, min(workers, len(shards)), advance) as pool:
        yield from pool.results()


class _Pool:
    def __init__(self, work: Work, shards: Sequence[Shard], workers: int, advance: Callable[[int], None]) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self.advance, self.told = advance, 0
        self.waiting = list(reversed(shards))
        self.read: Synchronized[int] = context.Value("q", 0)
        self.at_work: dict[Connection, tuple[SpawnProcess, Shard]] = {}
        self.processes: list[SpawnProcess] = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(work, theirs, self.read, os.getpid()), daemon=True)
            # Ctrl-C reaches it too while it still imports; a mask is inherited, and that of the parent ends us both.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            process.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
            self.processes.append(process)
            self._give(ours, process)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def _give(self, connection: Connection, process: SpawnProcess) -> None:
        if self.waiting:
            shard = self.waiting.pop()
            connection.send(shard)
            self.at_work[connection] = (process, shard)

    def results(self) -> Iterator[ShardResult]:
        while self.at_work:
            ready = wait(list(self.at_work), SECONDS_BETWEEN_REPORTS)
            read = self.read.value
            self.advance(read - self.told)
            self.told = read
            for connection in ready:
                assert isinstance(connection, Connection)
                process, shard = self.at_work.pop(connection)
                try:
                    answer = connection.recv()
                except EOFError:
                    process.join()
                    raise UserError(
                        f"the process that made {shard.file} ended with code {process.exitcode} (killed, for want of "
                        "memory?): the same command goes on where it stopped"
                    ) from None
                if isinstance(answer, UserError):
                    raise answer
                if isinstance(answer, str):
                    raise RuntimeError(answer)
                yield answer  # recorded by who asked: at most one finished file of a process is not, whenever we end
                self._give(connection, process)


def _worker(work: Work, connection: Connection, read: Synchronized[int], parent: int) -> None:
    """Make one file after the other until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends us
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        return
    scales = Scales.load(work.scales)

    def advance(nbytes: int) -> None:
        with read.get_lock():
            read.value += nbytes

    with suppress(EOFError, BrokenPipeError):
        while True:
            shard: Shard = connection.recv()
            answer: ShardResult | UserError | str
            try:
                with _disk_errors(shard):
                    answer = convert_shard(work, shard, scales, advance)
            except UserError as error:
                answer = error
            except Exception:
                answer = traceback.format_exc()
            connection.send(answer)


@contextmanager
def _disk_errors(shard: Shard) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; make room and give the same command again, finished files stay" if full else ""
        raise UserError(
            f"cannot write {shard.file}, {shard.nbytes / 1e9:.2f} GB: {error.strerror or error}{remedy}"
        ) from None
