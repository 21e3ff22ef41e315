"""Which accesses of a launch's programs are ordered, and which pairs of them race: vector clocks.

The programs of a launch run in any order and at once, unless one waits for another. Here they ran one after the other,
so an order that a program relies on must be shown by its synchronisation. What orders two accesses:

- Both are of one program. (But a value that a program stored and loads again wants a `tl.debug_barrier` in between:
  another thread may do the loading. Two stores to one place, or a load before a store, are not looked at.)
- A `tl.debug_barrier` follows the first, then an atomic with a release; another program's atomic with an acquire takes
  that up, and a `tl.debug_barrier` follows before the second. Triton 3.9 puts a barrier before such an atomic by
  itself, 3.6 does not, and without one the other threads' stores may come after it. After an atomic on a single value
  every version has a barrier.

Two atomics never race. An atomic whose scope is the block ("cta") orders nothing between programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

READ, WRITE, ATOMIC = "load", "store", "atomic"
DENSE = 2**24  # elements of a storage; of a larger one only those that were touched are kept account of


@dataclass(frozen=True)
class Segment:
    """A stretch of one program without synchronisation: ``clock`` counts its barriers, ``seen`` whose are behind it."""

    program: int
    clock: int
    seen: np.ndarray  # [programs]: accesses of that program up to this clock have happened before

    def before(self, later: Segment) -> bool:
        return self.program == later.program or bool(later.seen[self.program] >= self.clock)


@dataclass(frozen=True)
class Access:
    """What one instruction of a program touched: elements of one storage."""

    kind: str
    segment: Segment
    elements: np.ndarray
    line: str


@dataclass(frozen=True)
class Race:
    """Two accesses to one element that nothing orders."""

    first: Access
    second: Access
    element: int


class Clocks:
    """The clocks of a launch's programs, which run one after the other; ``segment`` is where the present one is."""

    def __init__(self, programs: int) -> None:
        self._nothing = np.zeros(programs, np.int32)
        self._released: dict[int, np.ndarray] = {}  # by address of an atomic
        self.start(0)

    def start(self, program: int) -> None:
        self.segment = Segment(program, 2, self._nothing)  # 1: its atomics before any barrier; 0: nothing
        self._acquired = self._nothing

    def barrier(self) -> None:
        """All threads of the program are here."""
        segment = self.segment
        self.segment = Segment(segment.program, segment.clock + 1, np.maximum(segment.seen, self._acquired))

    def atomic(self, addresses: np.ndarray, acquire: bool, release: bool) -> Segment:
        """An atomic at ``addresses``, after which `barrier` makes known what was acquired; return where it stands.

        One that releases belongs to what it releases.
        """
        segment = self.segment
        behind = segment.seen.copy()
        behind[segment.program] = segment.clock - 1  # what lies before the last barrier
        for address in addresses.tolist():
            released = self._released.get(address, self._nothing)
            if acquire:
                self._acquired = np.maximum(self._acquired, released)
            if release:
                self._released[address] = np.maximum(released, behind)
        if len(addresses) == 1:
            self.segment = Segment(segment.program, segment.clock, np.maximum(segment.seen, self._acquired))
        return Segment(segment.program, segment.clock - release, np.maximum(segment.seen, self._acquired))


def races(accesses: list[Access], elements: int) -> Iterator[Race]:
    """Yield races of ``accesses`` (in the order they ran) to a storage of so many elements; at least one if any is."""
    if all(access.kind == READ for access in accesses):
        return
    places = None
    if elements > DENSE:
        places = np.unique(np.concatenate([access.elements for access in accesses]))
        accesses = [replace(access, elements=np.searchsorted(places, access.elements)) for access in accesses]
        elements = len(places)
    # Each access against the store before it, and against the store after it: if two stores are further apart, either
    # a neighbour of theirs races with one of them, or all between are ordered and so are they.
    for race in chain(_against_stores(accesses, elements), _loads_against_atomics(accesses, elements)):
        yield race if places is None else replace(race, element=int(places[race.element]))


def _against_stores(accesses: list[Access], elements: int) -> Iterator[Race]:
    count = len(accesses)
    for numbers in (range(count), reversed(range(count))):
        store = np.full(elements, -1, np.int32)
        forward = isinstance(numbers, range)
        for number in numbers:
            access = accesses[number]
            stored = store[access.elements]
            for neighbour in np.unique(stored[stored >= 0]).tolist():
                other = accesses[neighbour]
                first, second = (other, access) if forward else (access, other)
                if not first.segment.before(second.segment) or (forward and _read_back(first, second)):
                    yield Race(first, second, int(access.elements[stored == neighbour][0]))
            if access.kind == WRITE:
                store[access.elements] = number


def _read_back(first: Access, second: Access) -> bool:
    """A program loads what it stored, with no barrier in between."""
    a, b = first.segment, second.segment
    return second.kind == READ and a.program == b.program and a.clock == b.clock


def _loads_against_atomics(accesses: list[Access], elements: int) -> Iterator[Race]:
    counted = np.zeros(elements, bool)
    atomics: dict[int, list[int]] = {}
    for number, access in enumerate(accesses):
        if access.kind == ATOMIC:
            counted[access.elements] = True
            for element in access.elements.tolist():
                atomics.setdefault(element, []).append(number)
    for number, access in enumerate(accesses if atomics else []):
        if access.kind == READ:
            for element in np.unique(access.elements[counted[access.elements]]).tolist():
                for other in atomics[element]:
                    first, second = accesses[min(number, other)], accesses[max(number, other)]
                    if not first.segment.before(second.segment):
                        yield Race(first, second, element)
