"""Key/value caches: the static one of the lean engine, and the adapter to whatever transformers passes.

The model asks a cache two things per layer: where to write the new keys and values (`buffers`), and what to attend to
once they are written (`commit`). Shapes: B rows, T new tokens, S slots, G key/value heads (of this rank), D head_dim.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ascend.devices import get_device
from ascend.errors import UserError
from ops import layout
from ops.quantise import FP8


class LayerCache(Protocol):
    """What the model needs of a cache.

    written_B: per row, how many of the ``slots`` of a buffer are full after. in_place: whether `commit` would return
    the buffers themselves, ``written_B`` slots of which are then attended to: one op may do all of it.
    """

    slots: int
    written_B: Tensor
    in_place: bool

    def buffers(self, layer: int, like_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[B, G, S, D]`` to write into."""
        ...

    def commit(self, layer: int, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values to attend to, the new ones included."""
        ...


class StaticCache:
    """Slots for ``slots`` tokens of each row, allocated once; ``written_B`` says how many of them are full.

    The lengths are a tensor on the device, so that a decode step that adds to them in place can be captured as a graph.
    ``dtype`` is the model's, or `ops.quantise.FP8` for half the memory: `UserError` where the device has none.
    """

    in_place = True

    def __init__(
        self, layers: int, batch: int, heads: int, slots: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if dtype is FP8 and "fp8" not in get_device(str(device)).quantised_formats():
            raise UserError(f"{device} has no FP8; leave the key/value cache in the model's dtype")
        shape = (batch, heads, slots, head_dim)
        self.keys = [layout.cache(shape, dtype, device) for _ in range(layers)]
        self.values = [layout.cache(shape, dtype, device) for _ in range(layers)]
        self.slots, self.written_B = slots, torch.zeros(batch, dtype=torch.int64, device=device)

    def buffers(self, layer: int, like_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """The cache itself: new tokens are written in place."""
        return self.keys[layer], self.values[layer]

    def commit(self, layer: int, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """The cache itself."""
        return k_BGSD, v_BGSD


class TransientCache:
    """Fresh slots for the new tokens of each layer, handed on to a transformers cache where there is one."""

    def __init__(self, heads: int, head_dim: int, batch: int, slot_T: Tensor, transformers_cache: Any = None) -> None:
        self.heads, self.head_dim, self.slots = heads, head_dim, len(slot_T)
        self.written_B = torch.full((batch,), len(slot_T), dtype=torch.int64, device=slot_T.device)
        self.transformers_cache, self.in_place = transformers_cache, transformers_cache is None
        # transformers 4 has its static cache told where the new tokens go; transformers 5 keeps count itself.
        self.arguments = {"cache_position": slot_T}

    def buffers(self, layer: int, like_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Slots for just the new tokens."""
        shape = (like_BTC.shape[0], self.heads, self.slots, self.head_dim)
        return tuple(layout.cache(shape, like_BTC.dtype, like_BTC.device) for _ in range(2))  # type: ignore[return-value]

    def commit(self, layer: int, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """All that the transformers cache holds for the layer, or the new tokens alone."""
        if self.in_place:
            return k_BGSD, v_BGSD
        return self.transformers_cache.update(k_BGSD, v_BGSD, layer, self.arguments)
