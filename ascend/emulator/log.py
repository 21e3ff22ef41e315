"""What ran on the emulated cards: the ops by name, in order, and every time the host waited for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Log:
    """``ops``: full names such as "npu::npu_rms_norm". ``syncs``: what made host and device wait for one another."""

    ops: list[str] = field(default_factory=list)
    syncs: list[str] = field(default_factory=list)

    def of(self, namespace: str) -> list[str]:
        """Return the ops of one namespace without its prefix."""
        prefix = f"{namespace}::"
        return [op.removeprefix(prefix) for op in self.ops if op.startswith(prefix)]


_open: list[Log] = []


@contextmanager
def recording() -> Iterator[Log]:
    """Record what runs in this context (of all threads); contexts may be nested."""
    log = Log()
    _open.append(log)
    try:
        yield log
    finally:
        _open.remove(log)


def op(name: str) -> None:
    """Note an op, captured ones and those of a replayed graph included."""
    for log in _open:
        log.ops.append(name)


def sync(name: str) -> None:
    """Note that host and device waited for one another."""
    for log in _open:
        log.syncs.append(name)
