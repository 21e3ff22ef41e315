"""Processes that are the ranks of a group, on gloo or on emulated NPUs: started once, then fed calls over pipes.

They are forked from a server process that has torch imported, so a rank costs no import. A call is a function of a
test module that takes its rank's `Group` first; what it returns, or raises, comes back.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from ops.process_group import Group, start

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["ascend.generation", "ascend.loader", "ops.process_group", "tests.ranks"])
PATIENCE = 60.0  # seconds for an answer that should take far less


class RankError(Exception):
    """A call failed on a rank."""


@dataclass(frozen=True)
class Failure:
    """What a call raised: the exception's class, its message, and the traceback."""

    kind: str
    message: str
    trace: str


class Ranks:
    """``size`` ranks on this machine; use it as a context."""

    def __init__(self, size: int, timeout: float = 30.0, backend: str = "gloo") -> None:
        self.size = size
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        self.hurt: set[int | None] = set()  # the processes that were sent a signal
        for rank in range(size):
            here, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(there, rank, size, port, timeout, backend), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(0 if process.pid in self.hurt else 5)
            process.kill()
            process.join()

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Kill or stop a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        self.hurt.add(pid)
        os.kill(pid, number)
        if number == signal.SIGKILL:
            self.processes[rank].join()

    def send(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], ranks: Sequence[int]) -> None:
        """Start ``function(group, *arguments[rank])`` on these ranks."""
        for rank in ranks:
            self.pipes[rank].send((function, arguments[rank]))

    def receive(self, rank: int) -> Any:
        """What the call on this rank returned, or the `Failure` that it raised."""
        assert self.pipes[rank].poll(PATIENCE), f"rank {rank} hangs"
        return self.pipes[rank].recv()

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(group, *arguments)`` on every rank: what each returned."""
        return self.call_each(function, [arguments] * self.size)

    def call_each(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """``function(group, *arguments[rank])`` on every rank: what each returned."""
        self.send(function, arguments, range(self.size))
        answers = [self.receive(rank) for rank in range(self.size)]
        for rank, answer in enumerate(answers):
            if isinstance(answer, Failure):
                raise RankError(f"rank {rank}: {answer.trace}")
        return answers


def free_port() -> int:
    """A port of the loopback interface that nobody listened on just now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _serve(pipe: Connection, rank: int, size: int, port: int, timeout: float, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "hccl":
        torch.npu.set_device(rank)
    group: Group = start(rank, size, "127.0.0.1", port, backend, timeout)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            with torch.inference_mode():
                answer = function(group, *arguments)
        except Exception as error:
            pipe.send(Failure(type(error).__name__, str(error), traceback.format_exc()))
        else:
            pipe.send(answer)
    group.close()
