"""A finished plan: what to start the engine with, why, and where the memory goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from serve.planning.limits import Limits
from serve.planning.memory import CardMemory


class Choice(NamedTuple):
    """One thing that was decided: ``source`` says who knows."""

    name: str
    value: Any
    why: str
    source: str


@dataclass(frozen=True)
class Plan:
    """What `make_plan` answers.

    device: "npu", "cuda" or "cpu". division: of the model over the cards, in words. settings: the engine's flags
    without dashes, in order; a mapping is one JSON value. environment: of the engine. memory: of one card (None: CPU).
    kv_sequences: by their length, how many sequences the cache of one data-parallel group holds.
    warnings: lines for the user.
    """

    device: str
    engine: str
    model: str
    cards: str
    nodes: int
    precision: str
    division: str
    settings: Mapping[str, Any] = field(hash=False)
    environment: Mapping[str, str] = field(hash=False)
    choices: tuple[Choice, ...] = ()
    memory: CardMemory | None = None
    kv_sequences: Mapping[int, int] = field(default_factory=dict, hash=False)
    limits: Limits = field(default_factory=Limits)
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return plain values: bytes, seconds, tokens; null is unknown."""
        document = asdict(self)
        document["choices"] = [one._asdict() for one in self.choices]
        for name in ("single", "full"):
            one = getattr(self.limits, name)
            document["limits"][name] = one._asdict() if one else None
        return document
