"""What `compute-sanitizer` does on a card, for the interpreter: memory, races, and how often each value is read.

`install` puts it under every launch of the process. A launch fails with `KernelFault` when

- a load, store or atomic goes where no tensor of the launch is, or is not aligned to its type;
- two lanes of one store write different values to one place;
- two programs touch one place and nothing orders them (`tests.triton.races`).

Not seen: races between the threads of one program within registers and shared memory (the compiler's work), a program
that waits for another in a loop (programs run one after the other: it would wait for ever), whether a value is read
from memory or from a cache, and anything that only an input not tried would show.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, _ir

from tests.triton.races import ATOMIC, READ, WRITE, Access, Clocks, Race, races

_SEM, _SCOPE = _ir.MEM_SEMANTIC, _ir.MEM_SYNC_SCOPE
NOT_OF_A_KERNEL = (str(Path(triton.__file__).parent), __file__, str(Path(__file__).with_name("interpreter.py")))


class KernelFault(Exception):  # noqa: N818 - the word for it on a card
    """A kernel did what a card may punish."""


@dataclass(frozen=True)
class View:
    """A tensor given to a launch: the addresses from its first to its last element."""

    name: str
    tensor: Tensor
    begin: int
    end: int


@dataclass
class Storage:
    """Memory behind the tensors of a launch, in elements of the smallest of their types, and what was done to it."""

    begin: int
    size: int
    element_size: int
    accesses: list[Access] = field(default_factory=list)

    def elements(self, addresses: np.ndarray, size: int) -> np.ndarray:
        return _covered(addresses - self.begin, size, self.element_size)


def _covered(offsets: np.ndarray, size: int, element_size: int) -> np.ndarray:
    """Which elements the accesses of ``size`` bytes at byte ``offsets`` touch."""
    first = offsets // element_size
    if size <= element_size:
        return first
    return (first[:, None] + np.arange(size // element_size)).ravel()


def _views(name: str, value: Any) -> Iterator[View]:
    if isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _views(f"{name}[{number}]", item)
    elif hasattr(value, "base"):  # a TensorDescriptor or a TensorWrapper
        yield from _views(name, value.base)
    elif isinstance(value, Tensor) and value.numel():
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        begin = value.data_ptr()
        yield View(name, value, begin, begin + (last + 1) * value.element_size())


class Launch:
    """One launch, while it runs."""

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernel = kernel
        self.views = [view for name, value in arguments.items() for view in _views(name, value)]
        self.storages: dict[int, Storage] = {}
        for view in self.views:
            memory, element_size = view.tensor.untyped_storage(), view.tensor.element_size()
            storage = self.storages.setdefault(
                memory.data_ptr(), Storage(memory.data_ptr(), memory.nbytes(), element_size)
            )
            storage.element_size = min(storage.element_size, element_size)

    def set_grid(self, grid: tuple[int, ...]) -> None:
        self.grid = grid
        self.order = _order(int(np.prod(grid)))
        self.clocks = Clocks(max(len(self.order), 1))

    def set_program(self, at: tuple[int, ...]) -> tuple[int, ...]:
        """Start the program that is next in the order tried, and return its place in the grid."""
        program = self.order[np.ravel_multi_index(at, self.grid)]
        self.clocks.start(program)
        return tuple(int(i) for i in np.unravel_index(program, self.grid))

    def place(self, program: int) -> str:
        return "program (" + ", ".join(str(i) for i in np.unravel_index(program, self.grid)) + ")"

    def touch(
        self, kind: str, pointers: TensorHandle, mask: np.ndarray | None, synchronise: tuple[bool, bool] | None = None
    ) -> None:
        """Check what an instruction touches, and keep it; ``synchronise``: whether an atomic acquires and releases."""
        addresses = pointers.data if mask is None else pointers.data[np.broadcast_to(mask, pointers.data.shape)]
        if not addresses.size:
            return
        addresses = addresses.ravel().astype(np.int64)
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        line = _line()
        storage = self._storage(kind, addresses, size, line)
        segment = self.clocks.atomic(addresses, *synchronise) if synchronise else self.clocks.segment
        storage.accesses.append(Access(kind, segment, storage.elements(addresses, size), line))
        if kind == READ:
            for counted in _counted:
                counted.add(self, addresses, size)

    def _storage(self, kind: str, addresses: np.ndarray, size: int, line: str) -> Storage:
        here = f"kernel {self.kernel}, {self.place(self.clocks.segment.program)}, {line}: {kind}"
        if (addresses % size).any():
            raise KernelFault(f"{here} of {size} bytes at an address that is no multiple of {size}")
        low, high = int(addresses.min()), int(addresses.max()) + size
        for view in self.views:
            if view.begin <= low and high <= view.end:
                return self.storages[view.tensor.untyped_storage().data_ptr()]
        outside = np.ones(len(addresses), bool)
        for view in self.views:
            outside &= (addresses < view.begin) | (addresses + size > view.end)
        if not outside.any():
            raise KernelFault(f"{here} goes to several tensors at once: not foreseen here")
        address = int(addresses[outside][0])
        raise KernelFault(
            f"{here} goes {self._nearest(address)}; {int(outside.sum())} of {len(addresses)} lanes outside"
        )

    def _nearest(self, address: int) -> str:
        if not self.views:
            return "to memory, and the launch has no tensor"
        view = min(self.views, key=lambda view: max(view.begin - address, address - view.end))
        where = f"{view.begin - address} bytes before" if address < view.begin else f"{address - view.end} bytes after"
        what = f"{str(view.tensor.dtype).removeprefix('torch.')}{list(view.tensor.shape)}"
        return f"{where} the {'begin' if address < view.begin else 'end'} of {view.name} ({what})"

    def finish(self) -> None:
        """Look for races, once all programs have run."""
        for storage in self.storages.values():
            for race in races(storage.accesses, -(-storage.size // storage.element_size)):
                raise KernelFault(self._describe(race, storage))

    def _describe(self, race: Race, storage: Storage) -> str:
        address = storage.begin + race.element * storage.element_size
        view = next(view for view in self.views if view.begin <= address < view.end)
        element = (address - view.begin) // view.tensor.element_size()
        first, second = (
            f"{access.kind} of {self.place(access.segment.program)} at {access.line}"
            for access in (race.first, race.second)
        )
        if race.first.segment.program == race.second.segment.program:
            return f"kernel {self.kernel}: {second} of what it stored at {race.first.line} wants a tl.debug_barrier"
        where = f"element {element} of {view.name}"
        return f"kernel {self.kernel}: nothing orders the {first} and the {second}, both of {where}"


_launch: Launch | None = None
_counted: list[Reads] = []
_order: Callable[[int], list[int]]


def _in_sequence(programs: int) -> list[int]:
    return list(range(programs))


_order = _in_sequence


def _line() -> str:
    """Where in the kernel's source the present instruction is."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(NOT_OF_A_KERNEL):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"


def _same_values(launch: Launch, pointers: TensorHandle, value: TensorHandle, mask: np.ndarray) -> None:
    addresses, values = (np.broadcast_to(x, pointers.data.shape)[mask] for x in (pointers.data, value.data))
    order = np.argsort(addresses, kind="stable")
    addresses, values = addresses[order], np.ascontiguousarray(values[order]).view(f"u{values.itemsize}")
    differ = (addresses[1:] == addresses[:-1]) & (values[1:] != values[:-1])
    if differ.any():
        where = f"kernel {launch.kernel}, {launch.place(launch.clocks.segment.program)}, {_line()}"
        raise KernelFault(f"{where}: lanes of one store write different values to one place")


class Reads:
    """How often each element of a tensor was loaded: ``count`` has its shape; ``by`` sums per kernel and program."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, memory = tensor, tensor.untyped_storage()
        self._begin, self._size = memory.data_ptr(), tensor.element_size()
        self._count = torch.zeros(memory.nbytes() // self._size, dtype=torch.int64)
        self.by: Counter[tuple[str, int]] = Counter()

    def add(self, launch: Launch, addresses: np.ndarray, size: int) -> None:
        if not self._begin <= addresses[0] < self._begin + len(self._count) * self._size:
            return
        elements = torch.from_numpy(_covered(addresses - self._begin, size, self._size))
        self._count += elements.bincount(minlength=len(self._count))
        self.by[launch.kernel, launch.clocks.segment.program] += len(elements)

    @property
    def count(self) -> Tensor:
        tensor = self._tensor
        return self._count.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    @property
    def bytes(self) -> int:
        return int(self.count.sum()) * self._size


@contextmanager
def reads(tensor: Tensor) -> Iterator[Reads]:
    """Count the loads of ``tensor`` by launches inside the block."""
    counted = Reads(tensor)
    _counted.append(counted)
    try:
        yield counted
    finally:
        _counted.remove(counted)


@contextmanager
def order(ordered: Callable[[int], list[int]]) -> Iterator[None]:
    """Inside the block a launch of so many programs runs them as ``ordered(programs)`` lists them."""
    global _order
    before, _order = _order, ordered
    try:
        yield
    finally:
        _order = before


def in_any_order(function: Callable[[], Any], exact: bool = True, tries: int = 2) -> Any:
    """Call ``function`` with programs first to last, last to first and ``tries`` times shuffled; return its result.

    It gives a tensor or a tuple of them, each time the same: bit by bit, or to rounding if not ``exact``.
    """
    generator = np.random.default_rng(5)
    expected = function()
    ways: list[Callable[[int], list[int]]] = [lambda programs: list(range(programs))[::-1]]
    ways += [lambda programs: generator.permutation(programs).tolist()] * tries
    for way in ways:
        with order(way):
            actual = function()
        for a, b in zip(_flat(actual), _flat(expected), strict=True):
            limits = (0.0, 0.0) if exact else (None, None)
            torch.testing.assert_close(a, b, rtol=limits[0], atol=limits[1], equal_nan=True)
    return expected


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def install() -> None:
    """Put the checks under every launch, for the whole process."""
    builder = InterpreterBuilder
    load, store, rmw, cas = (
        getattr(builder, f"create_{name}") for name in ("masked_load", "masked_store", "atomic_rmw", "atomic_cas")
    )
    barrier, grid_dim, grid_idx, call = (
        builder.create_barrier,
        builder.set_grid_dim,
        builder.set_grid_idx,
        GridExecutor.__call__,
    )

    def masked_load(self: Any, ptrs: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        _launch.touch(READ, ptrs, mask.data)
        return load(self, ptrs, mask, *rest)

    def masked_store(self: Any, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        _launch.touch(WRITE, ptrs, mask.data)
        _same_values(_launch, ptrs, value, np.broadcast_to(mask.data, ptrs.data.shape))
        return store(self, ptrs, value, mask, *rest)

    def synchronise(sem: Any, scope: Any) -> tuple[bool, bool]:
        both, visible = sem == _SEM.ACQUIRE_RELEASE, scope != _SCOPE.CTA
        return visible and (both or sem == _SEM.ACQUIRE), visible and (both or sem == _SEM.RELEASE)

    def atomic_rmw(self: Any, op: Any, ptr: TensorHandle, val: Any, mask: TensorHandle, sem: Any, scope: Any) -> Any:
        _launch.touch(ATOMIC, ptr, mask.data, synchronise(sem, scope))
        return rmw(self, op, ptr, val, mask, sem, scope)

    def atomic_cas(self: Any, ptr: TensorHandle, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        _launch.touch(ATOMIC, ptr, None, synchronise(sem, scope))
        return cas(self, ptr, cmp, val, sem, scope)

    def create_barrier(self: Any) -> None:
        barrier(self)
        _launch.clocks.barrier()

    def set_grid_dim(self: Any, *grid: int) -> None:
        grid_dim(self, *grid)
        _launch.set_grid(grid)

    def set_grid_idx(self: Any, *at: int) -> None:
        grid_idx(self, *_launch.set_program(at))

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        global _launch
        _launch = Launch(self.fn.__name__, dict(zip(self.arg_names, args, strict=False)) | kwargs)
        try:
            call(self, *args, **kwargs)
            _launch.finish()
        except InterpreterError as error:
            cause = error.__cause__
            while isinstance(cause, InterpreterError):  # one for each function of the kernel
                cause = cause.__cause__
            raise cause or error from None
        finally:
            _launch = None

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw, builder.create_atomic_cas = atomic_rmw, atomic_cas
    builder.create_barrier, builder.set_grid_dim, builder.set_grid_idx = create_barrier, set_grid_dim, set_grid_idx
    GridExecutor.__call__ = run
