"""Progress of byte-moving work: a bar on a terminal, a plain line every few seconds anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A context manager: `advance` it by the bytes done; shows bytes/s and the time left on standard error."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self.what, self.total, self.done = what, total_bytes, 0
        self.bar = tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
        self.begun = self.said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self, nbytes: int) -> None:
        """Count ``nbytes`` more as done."""
        self.done += nbytes
        self.bar.update(nbytes)
        now = time.monotonic()
        if self.bar.disable and now - self.said > SECONDS_BETWEEN_LINES:
            self.said = now
            rate = self.done / (now - self.begun)
            amount = f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s"
            print(f"{self.what}: {amount}, {(self.total - self.done) / rate:.0f} s left", file=sys.stderr, flush=True)
