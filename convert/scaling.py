"""Factors for the rows and columns of weights, by which a calibration prepares them for rounding (`calibrate.py`).

They leave the model what it is: what one weight is multiplied with, its neighbour is divided by. Kept in one
safetensors file: `NAME:rows` and `NAME:columns`, fp32 vectors, for each weight NAME that has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

ROWS, COLUMNS = ":rows", ":columns"


@dataclass(frozen=True)
class Scales:
    """The factors by name of weight; none at all where nothing was calibrated."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path | None) -> Scales:
        """Read them from a file; None gives none."""
        tensors = {} if file is None else load_file(file)
        return cls(
            {name.removesuffix(ROWS): one for name, one in tensors.items() if name.endswith(ROWS)},
            {name.removesuffix(COLUMNS): one for name, one in tensors.items() if name.endswith(COLUMNS)},
        )

    def __contains__(self, name: str) -> bool:
        return name in self.rows or name in self.columns

    def apply(self, name: str, weight: Tensor, begin: int, end: int) -> Tensor:
        """Multiply rows ``[begin, end)`` of a weight (of a vector: elements) by its factors, in fp32."""
        if name in self.rows:
            rows = self.rows[name][begin:end]
            weight = weight.float() * (rows if weight.ndim == 1 else rows.unsqueeze(-1))
        if name in self.columns:
            weight = weight.float() * self.columns[name]
        return weight
