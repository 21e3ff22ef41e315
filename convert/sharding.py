"""Files by rank: `--shard ep=8` puts the experts of each expert-parallel rank into files of their own.

The directory stays an ordinary checkpoint: tensors keep names and shapes, and one index names all files. What changes
is what a rank must read. `ascend.load_model` maps only the files that hold its part; vLLM with expert parallelism
passes over the other ranks' experts (model_loader/ep_weight_filter.py, linear placement).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ascend.errors import UserError

_EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")


@dataclass(frozen=True)
class Sharding:
    """``experts``: the number of expert-parallel ranks, ``num_experts`` of the model; 1 rank is no sharding."""

    experts: int = 1
    num_experts: int = 0

    @classmethod
    def parse(cls, text: str, config: Mapping[str, Any]) -> Sharding:
        """Read ``ep=8``. Raises `UserError` for anything else, and for ranks that do not divide the experts."""
        match = re.fullmatch(r"ep=(\d+)", text)
        if not match:
            raise UserError(f"--shard '{text}' is not ep=RANKS, such as ep=8")
        ranks, num_experts = int(match[1]), config.get("num_experts")
        if not isinstance(num_experts, int) or ranks < 1 or num_experts % ranks:
            raise UserError(f"--shard {text}: the {num_experts} experts do not divide into {ranks} ranks")
        return cls(ranks, num_experts)

    def group(self, name: str) -> str:
        """Return what the file of this tensor is called after: "-ep3" for experts of rank 3, "" for what all need."""
        match = _EXPERT.search(name)
        if self.experts == 1 or not match:
            return ""
        return f"-ep{int(match[1]) * self.experts // self.num_experts:0{len(str(self.experts - 1))}d}"


NOT_SHARDED = Sharding()
