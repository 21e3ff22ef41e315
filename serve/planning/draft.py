"""A plan before it is judged: everything that has been decided, for the rules of `traps.py` to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.planning.cards import Cards
from serve.planning.drafter import Drafter
from serve.planning.gain import Gain
from serve.planning.memory import Division, Load
from serve.planning.model import PlannedModel

MC2_LEAST_CARDS, MC2_MOST_EXPERTS = 16, 24  # vllm_ascend/ascend_forward_context.py:249


@dataclass(frozen=True)
class Draft:
    """precision: of the weights. kv_dtype: "auto", "bf16" or "fp8". settings, environment: as in `Plan`.

    gain: of the drafts, which may have been left off for it; None where it is not known.
    """

    model: PlannedModel
    cards: Cards
    precision: str
    dtype: str
    kv_dtype: str
    division: Division
    load: Load
    utilisation: float | None
    drafter: Drafter
    gain: Gain | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def uses_mc2(self) -> bool:
        """Whether vLLM-Ascend sends tokens to experts with its MC2 operators, instead of gathering them everywhere."""
        blocks = self.division.tensor * self.division.data
        few = self.model.shape.num_experts // blocks <= MC2_MOST_EXPERTS
        return self.cards.device == "npu" and self.division.expert and few and blocks >= MC2_LEAST_CARDS
