"""Rotary position embedding: partial (the first dimensions of each head), half style, with YaRN where configured.

YaRN follows Peng et al., arXiv 2309.00071, in the form that transformers computes it, which the model authors' code
uses; `tests/test_rope.py` holds this file against transformers' own function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ascend.config import BailingMoeV2Config


@dataclass(frozen=True)
class Rope:
    """Rotary settings, resolved from a configuration: ``factor`` is None without YaRN."""

    rotary_dim: int
    theta: float
    factor: float | None = None
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    @classmethod
    def from_config(cls, config: BailingMoeV2Config) -> Rope:
        """Read the settings; see `BailingMoeV2Config` for the spellings that are understood."""
        # In transformers 5 vLLM and users may write theta into this dictionary after construction: it wins.
        rope = config.rope_scaling or {}
        theta = rope.get("rope_theta") or config.rope_theta
        rotary_dim = int(config.head_dim * config.partial_rotary_factor)
        if rope.get("rope_type", rope.get("type", "default")) != "yarn":
            return cls(rotary_dim, theta)
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        factor = rope.get("factor") or config.max_position_embeddings / original
        mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        attention_factor = rope.get("attention_factor")
        if attention_factor is None and mscale and mscale_all_dim:
            attention_factor = _magnitude(factor, mscale) / _magnitude(factor, mscale_all_dim)
        elif attention_factor is None:
            attention_factor = _magnitude(factor, 1.0)
        return cls(
            rotary_dim,
            theta,
            factor,
            original,
            rope.get("beta_fast") or 32.0,
            rope.get("beta_slow") or 1.0,
            attention_factor,
            rope.get("truncate", True),
        )

    def inverse_frequencies(self) -> Tensor:
        """Radians per position of each rotated pair: fp32 ``[rotary_dim / 2]``."""
        exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32) / self.rotary_dim
        wavelength = self.theta**exponent
        if self.factor is None:
            return 1.0 / wavelength
        low, high = self._pair_turning(self.beta_fast), self._pair_turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        if low == high:
            high += 0.001  # a ramp of no width would divide by zero
        pair = torch.arange(self.rotary_dim // 2, dtype=torch.float32)
        # 1 where the pair turns often enough within the original length to stay as it is, 0 where it is interpolated
        keep = 1 - ((pair - low) / (high - low)).clamp(0, 1)
        return (1.0 / (self.factor * wavelength)) * (1 - keep) + (1.0 / wavelength) * keep

    def _pair_turning(self, turns: float) -> float:
        """The (fractional) pair that makes ``turns`` full turns over the original length."""
        radians = self.original_max_position / (turns * 2 * math.pi)
        return self.rotary_dim * math.log(radians) / (2 * math.log(self.theta))


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def cos_sin(inverse_frequencies: Tensor, attention_factor: float, position_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, times the attention factor: two fp32 ``[B, T, rotary_dim / 2]``."""
    angle = position_BT.to(torch.float32).unsqueeze(-1) * inverse_frequencies
    return angle.cos() * attention_factor, angle.sin() * attention_factor
