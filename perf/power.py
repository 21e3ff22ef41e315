"""What cards draw while something runs: the vendor's figure, sampled by a thread, averaged over the run."""

from __future__ import annotations

import statistics
import threading
from types import TracebackType

from ascend.devices.base import Device

INTERVAL_SECONDS = 0.5


class PowerMeter:
    """Samples the sum of ``cards`` cards, the device's own the first, while its context lasts; ``watts`` is the mean.

    None where nothing tells, and also where one card of them does not tell: part of a sum is no figure.
    """

    def __init__(self, device: Device | None, cards: int = 1) -> None:
        self.device, self.cards = device, cards
        self.watts: float | None = None
        self._samples: list[float] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PowerMeter:
        if self._sum() is not None:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self.watts = statistics.fmean(self._samples) if self._samples else None

    def _sample(self) -> None:
        while not self._over.is_set():
            now = self._sum()
            if now is None:
                self._samples.clear()
                return
            self._samples.append(now)
            self._over.wait(INTERVAL_SECONDS)

    def _sum(self) -> float | None:
        if self.device is None:
            return None
        each = [self.device.watts(card) for card in range(self.device.index, self.device.index + self.cards)]
        known = [watts for watts in each if watts is not None]
        return sum(known) if len(known) == self.cards else None
