"""What a calibration found, layer by layer, for `conversion.json`: figures alone, no text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from convert.calibration_search import Found
from convert.quality import digits, ratio


@dataclass(frozen=True)
class LayerReport:
    """What was found in a layer: of gate_proj and up_proj together, and of each down_proj.

    tokens: that each expert saw. gate_up is None if no expert saw enough of them; ``down`` has those that did.
    """

    layer: int
    tokens: tuple[int, ...]
    gate_up: Found | None
    down: dict[int, Found]

    @property
    def fallen_back(self) -> dict[int, int]:
        """The experts whose down_proj is rounded as it is since they saw too few tokens, and how many that were."""
        return {expert: tokens for expert, tokens in enumerate(self.tokens) if expert not in self.down}

    def as_json(self) -> dict[str, Any]:
        """Plain values. Errors are those of rounding, relative: ``√(Σ moment · error² / Σ moment · weight²)``."""
        down = list(self.down.values())
        alphas = [one.candidate.alpha for one in down]
        return {
            "layer": self.layer,
            "tokens_per_expert": _spread(self.tokens),
            "gate_up": self.gate_up and {"alpha": self.gate_up.candidate.alpha, **errors([self.gate_up])},
            "down": {"alpha": _spread(alphas), **errors(down)} if down else None,
            "fallen_back": {str(expert): tokens for expert, tokens in self.fallen_back.items()},
        }


@dataclass(frozen=True)
class CalibrationReport:
    """All layers with experts in INT4; ``not_scaled`` are MTP layers, which are rounded as they are."""

    texts: int
    tokens: int
    min_tokens: int  # with which an expert counts as seen
    layers: tuple[LayerReport, ...]
    not_scaled: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values, of four digits."""
        return {
            "texts": self.texts,
            "tokens": self.tokens,
            "least_tokens_per_expert": self.min_tokens,
            "layers": [layer.as_json() for layer in self.layers],
            "mtp_layers_not_scaled": list(self.not_scaled),
        }


def errors(found: Iterable[Found]) -> dict[str, float]:
    """Return the weighted errors of some weights together, without factors and with."""
    found = list(found)
    signal = sum(one.signal for one in found)
    before, after = sum(one.before for one in found), sum(one.after for one in found)
    return {"error_before": digits(ratio(before, signal) ** 0.5), "error_after": digits(ratio(after, signal) ** 0.5)}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": digits(median(values)), "max": max(values)}
