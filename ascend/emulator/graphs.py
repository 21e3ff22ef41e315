"""Captured graphs (``torch.npu.NPUGraph``): what a capture records, a replay does again over the same memory.

The real runtime's calls arrive here through the C stand-in. As on the card, a captured op does not run: its results
have a shape, from the op's own meta kernel, and hold nothing until the first replay. Whatever makes the host wait is
refused while capturing. A task group (an op whose host arguments change) is recorded as a part of the tape that
`update` replaces.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from typing import Any

import torch
from torch import Tensor

from ascend.emulator import communicator, log, memory
from ascend.emulator.limits import Refused
from ascend.emulator.tape import (
    Collective,
    Step,
    Tape,
    Task,
    ValueWait,
    ValueWrite,
    replay,
    stand_behind,
    wait,
    waiting,
    write,
)

_tapes: dict[int, Tape] = {}
_numbers = itertools.count(1)
_capture: Tape | None = None
_group_start = 0
_update: tuple[Tape, int, int] | None = None  # the place of the next task, and the thread that replaces it
_hooks: list[Any] = []  # what C holds must not be collected

_GRAPH_HOOK = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p)
_COLLECTIVE_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, *[ctypes.c_void_p] * 3, ctypes.POINTER(ctypes.c_uint64)
)
_VALUE_HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32)


def capturing() -> bool:
    """Say whether ops are being recorded (or a group's are being replaced) and not run."""
    return _capture is not None or (_update is not None and _update[2] == threading.get_ident())


def refuse_while_capturing(what: str) -> None:
    """Raise `Refused` if a graph is being captured: the host would wait for what has not run."""
    if _capture is not None:
        raise Refused(f"{what}: the host cannot wait for the device while a graph is captured")


def behind_a_wait(what: str) -> None:
    """Let ``what`` stand behind a graph on this stream that stands half-way, see `tape.stand_behind`."""
    if waiting() and not capturing():
        stand_behind(what, torch.npu.current_stream().npu_stream)  # type: ignore[attr-defined]


def install() -> None:
    """Connect the C runtime to this file and to the collectives."""
    _hooks[:] = [_GRAPH_HOOK(_on_event), _COLLECTIVE_HOOK(_on_collective), _VALUE_HOOK(_on_value)]
    _runtime().emulator_set_hooks(*_hooks)


def _runtime() -> ctypes.CDLL:
    return ctypes.CDLL("libascendcl.so")


def record(kernel: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
    """Put an op on the tape; return results that have a shape and, until a replay, no values."""
    host_args, host_kwargs = kernel.on_host(args, kwargs)
    if _capture is not None and device != _capture.device:
        raise Refused(f"{kernel.name}: on {device} while a graph is captured on {_capture.device}")
    if isinstance(kwargs.get("out"), list):  # an npu op of this form writes there, whatever its schema says
        _put(Task(kernel, host_args, host_kwargs, None))
        return tuple(kwargs["out"])
    if not kernel.returned:
        _put(Task(kernel, host_args, host_kwargs, None))
        return None
    meta_args, meta_kwargs = memory.replaced(args, _shape_alone), memory.replaced(kwargs, _shape_alone)
    if meta_kwargs.get("device") is not None:
        meta_kwargs["device"] = torch.device("meta")
    shaped = kernel.overload(*meta_args, **meta_kwargs)
    results = memory.replaced(shaped, lambda one: memory.poison(memory.empty_like(one, device)))
    returned = kernel.results(results, args, kwargs, torch.device("cpu"))  # written arguments return themselves
    given = {id(one) for one in memory.tensors(args) + memory.tensors(kwargs)}
    fresh = [memory.alias(one) for one in memory.tensors(returned) if id(one) not in given]
    _put(Task(kernel, host_args, host_kwargs, fresh))
    return returned


def _put(task: Step) -> None:
    global _update
    if _update is not None:
        tape, position, thread = _update
        tape.tasks[position] = task
        _update = (tape, position + 1, thread)
    else:
        assert _capture is not None, "the caller asked `capturing`"
        _capture.tasks.append(task)


def _shape_alone(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor  # a scalar
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _on_event(what: bytes, number: int | None, stream: int | None) -> int:
    try:
        name = what.decode()
        return _execute(number or 0, stream or 0) if name == "execute" else _EVENTS[name](number or 0)
    except Exception as error:  # an exception cannot cross C: the call fails, and torch_npu asks why
        return _runtime().emulator_fail(f"{what.decode()}: {error}".encode())


def _on_collective(what: bytes, handle: int | None, send: int | None, receive: int | None, numbers: Any) -> int:
    task = Collective(what.decode(), handle or 0, send or 0, receive or 0, numbers[: communicator.NUMBERS])
    try:
        if not capturing() or task.what in communicator.SETTING_UP:
            task.run()
        elif task.what in communicator.NOT_CAPTURED:
            raise Refused("counts of the host cannot be part of a captured graph")
        else:
            _put(task)
    except Exception as error:
        return _runtime().emulator_fail(f"Hccl {task.what}: {error}".encode())
    return 0


def _on_value(what: bytes, address: int | None, value: int, mode: int) -> int:
    """``aclrtValueWait`` and ``aclrtValueWrite``: part of a graph while one is captured (an update's are not)."""
    try:
        step = ValueWait(address or 0, value, mode) if what == b"wait" else ValueWrite(address or 0, value)
        if _capture is not None:
            _capture.tasks.append(step)
        elif isinstance(step, ValueWait):
            wait(step)
        else:
            write(step)
    except Exception as error:
        return _runtime().emulator_fail(f"aclrtValue{what.decode().title()}: {error}".encode())
    return 0


def _begin(_: int) -> int:
    global _capture
    _capture = Tape(next(_numbers), torch.device("npu", torch.accelerator.current_device_index()))
    return 0


def _end(_: int) -> int:
    global _capture
    assert _capture is not None, "the runtime ends what it began"
    tape, _capture = _capture, None
    _tapes[tape.number] = tape
    return tape.number


def _under_way(_: int) -> int:
    return 0 if _capture is None else _capture.number


def _execute(number: int, stream: int) -> int:
    replay(_tapes[number], stream)
    return 0


def _destroy(number: int) -> int:
    _tapes.pop(number, None)
    return 0


def _group_begin(_: int) -> int:
    global _group_start
    assert _capture is not None, "a task group is part of a capture"
    _group_start = len(_capture.tasks)
    return 0


def _group_end(_: int) -> int:
    assert _capture is not None, "a task group is part of a capture"
    number = next(_numbers)
    _capture.groups[number] = slice(_group_start, len(_capture.tasks))
    return number


def _update_begin(number: int) -> int:
    global _update
    tape = next(tape for tape in _tapes.values() if number in tape.groups)
    _update = (tape, tape.groups[number].start, threading.get_ident())
    return 0


def _update_end(_: int) -> int:
    global _update
    _update = None
    return 0


def _synchronise(what: str) -> int:
    log.sync(what)
    refuse_while_capturing(what)
    stand_behind(what, None)
    return 0


_EVENTS = {
    "capture_begin": _begin,
    "capture_end": _end,
    "graph": _under_way,
    "destroy": _destroy,
    "group_begin": _group_begin,
    "group_end": _group_end,
    "update_begin": _update_begin,
    "update_end": _update_end,
    "aclrtSynchronizeStream": lambda _: _synchronise("aclrtSynchronizeStream"),
    "aclrtSynchronizeDevice": lambda _: _synchronise("aclrtSynchronizeDevice"),
    "aclrtSynchronizeEvent": lambda _: _synchronise("aclrtSynchronizeEvent"),
}
