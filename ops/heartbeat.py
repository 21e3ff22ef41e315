"""Who is still there: every rank of a job writes a sign of life into the job's store, and reads the others'.

A backend's error says that a connection broke or that time ran out, not whose fault it was. The signs of life do: a
process that ended or was stopped gives none, and one that lives says which collective it came to last. The store lives
in rank 0's process, so a store that no longer answers means rank 0. One thread does all the talking: it may hang on a
dead store, the threads that wait for what it learns do not.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

NAMING = 0.25  # the part of a collective's timeout that is kept for finding out who is lost


def name_ranks(ranks: Sequence[int], size: int) -> str:
    """``rank 3 of 4``, ``rank 1 and rank 3 of 4``."""
    return " and ".join(f"rank {rank}" for rank in ranks) + f" of {size}"


class RankLost(RuntimeError):  # noqa: N818 (what happened, not a fault of the code)
    """A rank died or did not come to a collective; the message says which."""


class Heartbeat:
    """This process's sign of life in ``store`` (a connection of its own), and what it knows of the other ranks.

    timeout: seconds a collective may take, all told. A rank is taken for gone after an eighth of it (10 s at most)
    without a sign. That is looked at only once a collective failed: a rank may stand still while nobody waits for it.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.silence = min(timeout / 8, 10.0)
        self.interval = min(self.silence / 5, 1.0)
        self.verdict = ""  # which ranks are lost and how that showed; the first finding counts for all ranks
        self._store = store
        self._keys = [f"alive/{r}" for r in range(size)]
        self._at: dict[str, tuple[int, str]] = {}  # by group: how many collectives, and the one waited in, or ""
        self._signs = [b""] * size
        self._seen = [time.monotonic()] * size
        self._asked = self._answered = time.monotonic()
        self._store_lost = False
        self._accusation = ""
        self._haste = True  # while ranks come and leave
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def absent(self, seconds: float) -> list[int]:
        """Wait until every rank has given a sign; return those that did not within ``seconds``."""
        deadline = time.monotonic() + seconds
        while missing := [r for r in range(self.size) if not self._signs[r]]:
            if time.monotonic() > deadline or 0 in self._silent():
                return [0] if 0 in self._silent() else missing
            time.sleep(0.01)
        self._haste = False
        return []

    @contextmanager
    def watch(self, group: str, members: Sequence[int], operation: str) -> Iterator[None]:
        """Stand around a collective of ``members`` (global ranks). Raises RankLost if it fails for want of a rank."""
        if self.verdict:
            raise RankLost(self.verdict)
        count = self._at.get(group, (0, ""))[0] + 1
        self._at[group] = (count, operation)
        started = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if lost := self._find_lost(group, members, operation, started):
                raise RankLost(lost) from error
            raise
        finally:
            self._at[group] = (count, "")

    def close(self) -> None:
        """Stop beating. Rank 0, which holds the store, first waits for the others to leave, or to fall silent."""
        deadline, self._haste = time.monotonic() + self.timeout, True
        while self.rank == 0 and not self.verdict and time.monotonic() < deadline:
            present = set(range(1, self.size)) - set(self._silent())
            if all(b'"left": true' in self._signs[r] for r in present):
                break
            time.sleep(0.01)
        self._leaving.set()
        self._thread.join(self.silence)

    def _beat(self) -> None:
        store, number, left = self._store, 0, False
        try:
            while not left:
                left = self._leaving.wait(min(self.interval, 0.02) if self._haste else self.interval)
                number += 1
                self._asked = time.monotonic()
                sign = {"beat": number, "at": dict(self._at), "left": left}
                store.set(self._keys[self.rank], json.dumps(sign))
                if self._accusation:
                    store.compare_set("lost", "", self._accusation)
                if store.check(["lost"]):
                    self.verdict = store.get("lost").decode()
                came = [r for r in range(self.size) if self._signs[r] or store.check([self._keys[r]])]
                signs = store.multi_get([self._keys[r] for r in came])
                self._answered = time.monotonic()
                for r, sign_of_r in zip(came, signs, strict=True):
                    if sign_of_r != self._signs[r]:
                        self._signs[r], self._seen[r] = sign_of_r, self._answered
        except RuntimeError:
            self._store_lost = True

    def _find_lost(self, group: str, members: Sequence[int], operation: str, started: float) -> str:
        """Return one line that names the ranks at fault for a failed collective that began at ``started``, or "".

        Takes no longer than what is left of the timeout.
        """
        failed = time.monotonic()
        late = failed - started > 0.9 * (1 - NAMING) * self.timeout
        # A lost connection is noticed at once, the silence after it only later.
        deadline = started + self.timeout - 5 * self.interval if late else failed + 2 * self.silence
        while not self.verdict:
            final = time.monotonic() > deadline
            if self._store_lost and self.rank != 0:
                self._accuse([0], "is gone: its process ended")
            elif gone := self._silent():
                time.sleep(self.interval)  # a second one may have gone with it
                gone = self._silent() or gone
                self._accuse(
                    gone, f"is gone: its process ended or is stopped, no sign of life for {self.silence:.3g} s"
                )
            elif late and (missing := self._behind(group, members, final)):
                self._accuse(missing, f"did not come to {operation} within {self.timeout:g} s")
            elif final:
                break
            else:
                time.sleep(self.interval / 2)
        if self.verdict and self.rank == 0:
            time.sleep(3 * self.interval)  # the store goes with this process: let the others read the verdict first
        return self.verdict

    def _silent(self) -> list[int]:
        waiting = time.monotonic() - self._asked if self._asked > self._answered else 0.0
        if self.rank != 0 and (self._store_lost or waiting > self.silence):
            return [0]
        return [r for r in range(self.size) if r != self.rank and self._answered - self._seen[r] > self.silence]

    def _behind(self, group: str, members: Sequence[int], final: bool) -> list[int]:
        """Members that have not come as far as this rank. One that waits in another group is at fault only at last."""
        behind, idle = [], []
        for r in members:
            at = json.loads(self._signs[r])["at"]
            if r != self.rank and at.get(group, (0, ""))[0] < self._at[group][0]:
                behind.append(r)
                if not any(operation for _, operation in at.values()):
                    idle.append(r)
        return idle or (behind if final else [])

    def _accuse(self, ranks: list[int], how: str) -> None:
        self._accusation = f"{name_ranks(ranks, self.size)} {how}"
        waited = 0
        while 0 not in ranks and not self.verdict and waited < 4:
            time.sleep(self.interval)
            waited += 1
        self.verdict = self.verdict or self._accusation
