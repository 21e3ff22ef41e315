"""CPU kernels that stand in for the ops of Ascend Transformer Boost in torch_npu, `torch.ops.atb`.

Their pages are thin: roundings and the treatment of negative slots are guessed to be those of the like `npu` ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ascend.emulator.kernels import cache
from ascend.emulator.limits import (
    require,
    require_contiguous,
    require_dim,
    require_dtype,
    require_nd,
    require_shape,
    require_value,
)


def _npu_reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor
) -> None:
    """Write ``key`` and ``value`` ``[T, heads, D]`` IN PLACE to int32 slots of ``[blocks, block_size, heads, D]``.

    They need not be contiguous: vllm-ascend gives a part of a fused projection, which op-plugin is taken to copy.
    """
    require_dtype("_npu_reshape_and_cache", "slot_indices", slot_indices, torch.int32)
    cache.npu_scatter_pa_kv_cache(
        key.contiguous(), value.contiguous(), key_cache, value_cache, slot_indices, cache_mode="Norm"
    )


def _npu_rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox_style: bool
) -> None:
    """Turn each head of ``query`` and ``key`` ``[T, heads · head_size]`` IN PLACE by its row of ``cos_sin_cache``.

    A row holds the cosines, then the sines, of all ``head_size`` dimensions (half style). fp32, one rounding: a guess.
    """
    op = "_npu_rotary_embedding"
    require_value(op, "is_neox_style", is_neox_style, (True,))
    require_dtype(op, "positions", positions, torch.int32, torch.int64)
    require_dim(op, "positions", positions, 1)
    require_dim(op, "cos_sin_cache", cos_sin_cache, 2)
    require_nd(op, query=query, key=key, cos_sin_cache=cos_sin_cache)
    require(cos_sin_cache.shape[1] == head_size, op, f"the cache is {cos_sin_cache.shape[1]} wide, a head {head_size}")
    cos, sin = cos_sin_cache[positions.long()].float()[:, None].chunk(2, -1)
    for name, tensor in (("query", query), ("key", key)):
        require_dtype(op, name, tensor, torch.float16, torch.bfloat16)
        require(cos_sin_cache.dtype == tensor.dtype, op, f"{name} is {tensor.dtype}, the cache {cos_sin_cache.dtype}")
        require_contiguous(op, **{name: tensor})
        require(len(tensor) == len(positions), op, f"{name} has {len(tensor)} rows for {len(positions)} positions")
        left, right = tensor.view(len(tensor), -1, head_size).float().chunk(2, -1)
        turned = torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
        tensor.copy_(turned.view(tensor.shape))


def _npu_matmul_add_fp32(x: Tensor, weight: Tensor, C: Tensor) -> None:
    """Add ``xᵀ @ weight`` of fp16 or bf16 ``[T, M]`` and ``[T, N]`` to fp32 ``C [M, N]`` IN PLACE."""
    op = "_npu_matmul_add_fp32"
    require_dtype(op, "x", x, torch.float16, torch.bfloat16)
    require_dtype(op, "weight", weight, x.dtype)
    require_dtype(op, "C", C, torch.float32)
    require_shape(op, "C", C, [x.shape[1], weight.shape[1]])
    C += x.float().t() @ weight.float()


KERNELS: dict[str, Callable[..., Any]] = {
    f"atb::{kernel.__name__}": kernel
    for kernel in (_npu_matmul_add_fp32, _npu_reshape_and_cache, _npu_rotary_embedding)
}
"""The kernels by the name of their op."""
