"""How often a dead engine is started again, and how soon."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 600.0
FIRST_SECONDS, LONGEST_SECONDS = 1.0, 60.0


class Restarts:
    """Counts deaths. More than ``allowed`` of them within ten minutes are a crash loop."""

    def __init__(
        self,
        allowed: int,
        clock: Callable[[], float] = time.monotonic,
        spread: Callable[[], float] = random.random,
    ) -> None:
        self.allowed = allowed
        self._clock = clock
        self._spread = spread
        self._deaths: deque[float] = deque()

    def after_death(self) -> float | None:
        """Count a death. Returns the seconds to wait before the next start, or None if there shall be none.

        The time doubles with every death of the last ten minutes, from 1 to 60 s. Half of it is random, so that many
        launchers that died of one cause do not all come back at one moment.
        """
        now = self._clock()
        self._deaths.append(now)
        while self._deaths[0] < now - WINDOW_SECONDS:
            self._deaths.popleft()
        if len(self._deaths) > self.allowed:
            return None
        longest = min(LONGEST_SECONDS, FIRST_SECONDS * 2 ** (len(self._deaths) - 1))
        return longest * (1 + self._spread()) / 2

    @property
    def recent(self) -> int:
        """Deaths within the last ten minutes before the latest one, that one included."""
        return len(self._deaths)
