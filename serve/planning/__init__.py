"""Planning: from a model, cards and wishes to the engine's settings, each with its reason.

`make_plan(open_model(DIR), parse_cards("8x910B3-64G"), Wanted())` returns a `Plan` or raises a one-line `UserError`.
Read `planner.py` first; `traps.py` is what must not go wrong, `memory.py` where the memory goes. Light: no torch.
"""

from __future__ import annotations

from serve.planning.cards import Cards, found_cards, parse_cards
from serve.planning.model import PlannedModel, open_model
from serve.planning.planner import make_plan
from serve.planning.result import Choice, Plan
from serve.planning.wanted import Wanted

__all__ = [
    "Cards",
    "Choice",
    "Plan",
    "PlannedModel",
    "Wanted",
    "found_cards",
    "make_plan",
    "open_model",
    "parse_cards",
]
