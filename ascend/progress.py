"""Progress of long work: a bar on a terminal, a plain line every few seconds anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A context manager: `advance` it by what is done; shows rate and the time left on standard error.

    ``total`` is in bytes, or in what ``unit`` says.
    """

    def __init__(self, what: str, total: int, unit: str = "B") -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.bar = tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", disable=not sys.stderr.isatty())
        self.begun = self.said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self, amount: int) -> None:
        """Count ``amount`` more as done."""
        self.done += amount
        self.bar.update(amount)
        now = time.monotonic()
        if self.bar.disable and now - self.said > SECONDS_BETWEEN_LINES:
            self.said = now
            rate = self.done / (now - self.begun)
            said = f"{self.done} of {self.total} {self.unit}"
            if self.unit == "B":
                said = f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s"
            print(f"{self.what}: {said}, {(self.total - self.done) / rate:.0f} s left", file=sys.stderr, flush=True)
