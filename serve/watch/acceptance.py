"""How many drafts are accepted: the one figure that tells whether drafting pays with real questions."""

from __future__ import annotations

import http.client
from dataclasses import dataclass
from typing import ClassVar

from serve.watch.heartbeat import samples
from serve.watch.ready import Server, call

SECONDS = 1.0


@dataclass(frozen=True)
class Acceptance:
    """Counted since the engine started, over all its ranks. steps: verifications, of one sequence each."""

    NAMES: ClassVar[tuple[str, ...]] = (  # vllm/v1/spec_decode/metrics.py
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
    )
    steps: int
    drafted: int
    accepted: int

    def __str__(self) -> str:
        if not self.drafted:
            return "none verified yet"
        return (
            f"{self.accepted} of {self.drafted} accepted ({self.accepted / self.drafted:.0%}), "
            f"{1 + self.accepted / self.steps:.2f} tokens a step"
        )


def acceptance_of(page: str) -> Acceptance | None:
    """Read it from a page in Prometheus' text format; None where nothing drafts."""
    found = samples(page, Acceptance.NAMES, "engine").values()
    if not found:
        return None
    return Acceptance(*(int(sum(values.get(name, 0.0) for values in found)) for name in Acceptance.NAMES))


def read_acceptance(server: Server) -> Acceptance | None:
    """Ask the server; None too where it does not answer."""
    try:
        status, body = call(server, "GET", "/metrics", timeout=SECONDS)
    except (OSError, http.client.HTTPException):
        return None
    return acceptance_of(body.decode(errors="replace")) if status == 200 else None
