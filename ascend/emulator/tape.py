"""What a captured graph is made of, and a replay that may have to wait half-way.

On the card a graph runs beside the host: it stops at a ``ValueWait`` until another stream writes that value, and goes
on from there. Here a replay runs as far as it can in the call that starts it, and the rest in the call that writes.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ascend.emulator import communicator, log, memory
from ascend.emulator.limits import Refused


@dataclass
class Task:
    """One op of a graph: what to compute, on which memory, and where its results go (None: it writes them itself)."""

    kernel: Any
    args: Any
    kwargs: Any
    results: list[Tensor] | None

    def run(self) -> None:
        """Compute again over the memory that was captured."""
        log.op(self.kernel.name)
        computed = memory.tensors(self.kernel.compute(*self.args, **self.kwargs))
        if self.results is None:
            return
        # A result that is a written argument was written where it is.
        returned = self.kernel.returned if len(self.kernel.returned) == len(computed) else [None] * len(computed)
        fresh = [one for one, position in zip(computed, returned, strict=True) if position is None]
        for place, value in zip(self.results, fresh, strict=True):
            if place.numel():
                place.copy_(value)


@dataclass
class Collective:
    """One collective of a graph, on the memory that was captured."""

    what: str
    handle: int
    send: int
    receive: int
    numbers: list[int]

    def run(self) -> None:
        """Do it again; all ranks of the communicator have to."""
        log.op(f"hccl::{self.what}")
        communicator.perform(self.what, self.handle, self.send, self.receive, self.numbers)


@dataclass(frozen=True)
class ValueWrite:
    """``aclrtValueWrite``: a number into eight bytes of device memory; an external event is recorded or reset so."""

    address: int
    value: int

    def run(self) -> None:
        """Write it."""
        ctypes.c_uint64.from_address(self.address).value = self.value


@dataclass(frozen=True)
class ValueWait:
    """``aclrtValueWait``: the stream stops until the eight bytes there hold the number (modes of `_HOLDS`)."""

    address: int
    value: int
    mode: int

    def met(self) -> bool:
        """Say whether the stream may go on."""
        there = ctypes.c_uint64.from_address(self.address).value
        if self.mode not in _HOLDS:
            raise Refused(f"aclrtValueWait: mode {self.mode}; the emulator knows {sorted(_HOLDS)}")
        return _HOLDS[self.mode](there, self.value)

    def run(self) -> None:
        """Go on: `advance` asked `met`."""


# The reserved modes and the names of CANN 9.1: greater or equal, equal, and.
_HOLDS = {
    0: lambda there, value: there >= value,
    1: lambda there, value: there == value,
    2: lambda there, value: bool(there & value),
}
Step = Task | Collective | ValueWrite | ValueWait


@dataclass
class Tape:
    """A graph under its number: its tasks in order; ``groups`` holds those whose host arguments may be replaced."""

    number: int
    device: torch.device
    tasks: list[Step] = field(default_factory=list)
    groups: dict[int, slice] = field(default_factory=dict)


@dataclass(eq=False)
class Replay:
    """A replay on a stream, and the position it has come to."""

    tape: Tape
    stream: int
    position: int = 0
    thread: int = field(default_factory=threading.get_ident)

    def advance(self) -> bool:
        """Run to the end, or to a wait that is not met; say whether it is the end."""
        while self.position < len(self.tape.tasks):
            task = self.tape.tasks[self.position]
            if isinstance(task, ValueWait) and not task.met():
                return False
            self.position += 1
            task.run()
        return True


WAIT_S = 60
"""How long another thread waits for a replay that stands half-way, before it is taken to hang."""

_under_way: list[Replay] = []  # in the order of their start
_progress = threading.Condition()


def replay(tape: Tape, stream: int) -> None:
    """Start a replay on a stream: behind those that wait there already."""
    log.op("graph::replay")
    _under_way.append(Replay(tape, stream))
    _go_on()


def write(step: ValueWrite) -> None:
    """Write a value, and go on with the replays that waited for it."""
    step.run()
    _go_on()


def wait(step: ValueWait) -> None:
    """A wait outside of a graph: what it waits for must have been written."""
    if not step.met():
        raise Refused(f"a stream waits for the value {step.value} that no one has written; the emulator keeps no queue")


def stand_behind(what: str, stream: int | None) -> None:
    """Wait with a graph on this stream (None: on any) that waits for a value, if another thread is to write that.

    Raises `Refused` in the thread that started the graph: work given to the stream would have to be queued, and waiting
    for it would hang. So does a wait of more than `WAIT_S`.
    """
    before = [one for one in _under_way if stream is None or one.stream == stream]
    if not before:
        return
    problem = "a captured graph still waits for an external event here"
    if any(one.thread == threading.get_ident() for one in before):
        raise Refused(f"{what}: {problem}; the emulator keeps no queue behind it")
    with _progress:
        if not _progress.wait_for(lambda: not any(one in _under_way for one in before), WAIT_S):
            raise Refused(f"{what}: {problem}, after {WAIT_S} s")


def waiting() -> bool:
    """Say whether a replay has stopped half-way."""
    return bool(_under_way)


def _go_on() -> None:
    for stream in dict.fromkeys(one.stream for one in _under_way):
        for one in _of(stream):
            if not one.advance():
                break
            with _progress:
                _under_way.remove(one)
                _progress.notify_all()


def _of(stream: int) -> Iterator[Replay]:
    return iter([one for one in _under_way if one.stream == stream])
