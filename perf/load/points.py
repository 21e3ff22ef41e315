"""How hard: the points of a sweep, each with so many users at once (closed loop) or arrivals a second (open loop)."""

from __future__ import annotations

from dataclasses import dataclass

from ascend.errors import UserError

LEAST_REQUESTS = 16
WAVES = 4  # requests of each user, so that the first and the last wave are at most half of all
OPEN_LOOP_SECONDS = 30.0


@dataclass(frozen=True)
class Point:
    """One run of the load client: one of ``max_concurrency`` and ``request_rate`` (per second) is set."""

    max_concurrency: int | None
    request_rate: float | None
    requests: int
    repeat: int = 0

    def __str__(self) -> str:
        if self.max_concurrency is not None:
            return f"concurrency {self.max_concurrency}"
        return f"rate {self.request_rate:g}/s"

    @property
    def label(self) -> str:
        """What the prompts of this run are drawn by: no prompt is sent twice, so no prefix cache can know one."""
        return f"{self}, repeat {self.repeat}"


def closed_loop(concurrency: int, most: int | None) -> Point:
    """Return the point of ``concurrency`` users, who ask again once they are answered: whole waves of requests.

    Raises `UserError` if ``most`` requests are fewer than the users.
    """
    wanted = max(WAVES * concurrency, LEAST_REQUESTS)
    if most is not None and most < concurrency:
        raise UserError(f"--requests {most} is less than --concurrency {concurrency}: not every user would ask once")
    waves = -(-wanted // concurrency) if most is None or most >= wanted else most // concurrency
    return Point(concurrency, None, waves * concurrency)


def open_loop(rate: float, most: int | None) -> Point:
    """Return the point of ``rate`` arrivals a second, which wait for nobody: half a minute of them at least."""
    wanted = max(round(OPEN_LOOP_SECONDS * rate), LEAST_REQUESTS)
    return Point(None, rate, wanted if most is None else min(wanted, most))
