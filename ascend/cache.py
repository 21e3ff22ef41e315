"""Key/value caches: the static one of the lean engine, and the adapter to whatever transformers passes.

The model asks a cache two things per layer: where to write the new keys and values (`buffers`), and what to attend to
once they are written (`commit`). Shapes: B rows, T new tokens, S slots, G key/value heads, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ascend.config import BailingMoeV2Config


class LayerCache(Protocol):
    """What the model needs of a cache."""

    def buffers(self, layer: int, like_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values ``[B, G, S, D]`` to write into, and per row how many slots are full afterwards."""
        ...

    def commit(self, layer: int, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values to attend to, the new ones included."""
        ...


class StaticCache:
    """Slots for ``slots`` tokens of each row, allocated once; ``length_B`` says how many of them are full.

    The lengths are a tensor on the device, so that a decode step that adds to them in place can be captured as a graph.
    """

    def __init__(
        self, config: BailingMoeV2Config, batch: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch, config.num_key_value_heads, slots, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.length_B = torch.zeros(batch, dtype=torch.int64, device=device)

    def buffers(self, layer: int, like_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The cache itself: new tokens are written in place."""
        return self.keys[layer], self.values[layer], self.length_B

    def commit(self, layer: int, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """The cache itself."""
        return k_BGSD, v_BGSD


class TransientCache:
    """Fresh slots for the new tokens of each layer, handed on to a transformers cache where there is one."""

    def __init__(
        self, config: BailingMoeV2Config, transformers_cache: Any = None, slot_T: Tensor | None = None
    ) -> None:
        self.heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.transformers_cache = transformers_cache
        # transformers 4 has its static cache told where the new tokens go; transformers 5 keeps count itself.
        self.arguments = {"cache_position": slot_T}

    def buffers(self, layer: int, like_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots for just the new tokens."""
        B, T = like_BTC.shape[:2]
        shape = (B, self.heads, T, self.head_dim)
        return like_BTC.new_empty(shape), like_BTC.new_empty(shape), like_BTC.new_full((B,), T, dtype=torch.int64)

    def commit(self, layer: int, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """All that the transformers cache holds for the layer, or the new tokens alone."""
        if self.transformers_cache is None:
            return k_BGSD, v_BGSD
        return self.transformers_cache.update(k_BGSD, v_BGSD, layer, self.arguments)
