"""Writes of new keys and values into the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend.emulator.limits import (
    require,
    require_absent,
    require_contiguous,
    require_dim,
    require_dtype,
    require_nd,
    require_shape,
    require_value,
)


def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Write ``key`` and ``value`` ``[T, heads, D]`` IN PLACE to slots of caches ``[blocks, block_size, heads, D]``.

    fp16, bf16 and int8 (the page of aclnnScatterPaKvCache: no fp32 on A2). A negative slot is skipped (CANN 9.0 and
    9.1). Of the modes only 'Norm' is covered, which None stands for; the default 'PA_NZ' is another memory layout.
    """
    op = "npu_scatter_pa_kv_cache"
    require_absent(op, compress_lens=compress_lens, compress_seq_offsets=compress_seq_offsets, seq_lens=seq_lens)
    require_value(op, "cache_mode", cache_mode, ("Norm", None), "the default is 'PA_NZ', for caches in FRACTAL_NZ")
    require_dtype(op, "slot_mapping", slot_mapping, torch.int32, torch.int64)
    require_dim(op, "slot_mapping", slot_mapping, 1)
    require_contiguous(op, slot_mapping=slot_mapping)
    slot = slot_mapping.long()
    written = (slot >= 0).nonzero().flatten()
    slot = slot[written]
    require(slot.unique().numel() == slot.numel(), op, "a slot occurs twice; which write wins is undefined")
    for name, new, cache in (("key", key, key_cache), ("value", value, value_cache)):
        require_dtype(op, name, new, torch.float16, torch.bfloat16, torch.int8)
        require(new.dtype == cache.dtype == key.dtype, op, f"{name} and its cache differ in dtype")
        require_contiguous(op, **{name: new, f"{name}_cache": cache})
        require_nd(op, **{name: new, f"{name}_cache": cache})
        require_dim(op, name, new, 3)
        require_dim(op, f"{name}_cache", cache, 4)
        require_shape(op, name, new, [slot_mapping.numel(), *cache.shape[2:]])
        require(new.numel() > 0, op, f"{name} is empty; the device takes no empty tensor")
        slots = cache.shape[0] * cache.shape[1]
        require(not slot.numel() or int(slot.max()) < slots, op, f"a slot is past the {slots} of the cache")
        cache.view(slots, *cache.shape[2:])[slot] = new[written]
