"""Projections with quantised weights, FP8 in blocks and INT8 per output: one launch, tokens quantised as they are read.

Unquantised ones are the library's (`torch.nn.functional.linear`). Shapes: T tokens, K inputs, O outputs, N weight rows
and M tokens of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.triton_kernels.product import product

# By tokens up to which: weight rows, tokens, inputs of a tile, warps, stages. Few tokens: small tiles, so that a
# projection of 4096 rows fills a card. Not tuned on a card: none was at hand.
TILES = (
    (8, (32, 8, 128, 4, 4)),
    (16, (32, 16, 128, 4, 4)),
    (32, (32, 32, 128, 4, 4)),
    (64, (64, 64, 128, 4, 3)),
    (None, (128, 128, 128, 8, 3)),
)


@triton.jit
def _linear(
    x, weight, scale, bias, out, tokens, O: tl.constexpr, K: tl.constexpr, BIASED: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Tiles of tokens that share their weights run beside one another.
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    row_N = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    token_M = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_M, in_N = token_M < tokens, row_N < O
    scale_row_N = row_N
    if FORMAT == "fp8":
        scale_row_N = row_N // 128
    sum_NM = product(
        x, token_M.to(tl.int64) * K, in_M, weight, row_N, in_N, scale, 0, scale_row_N, 0,
        K, K, K, (K + 127) // 128, 128, FORMAT, BLOCK_N, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    value_NM = sum_NM.to(out.dtype.element_ty)
    if BIASED:
        bias_N = tl.load(bias + row_N, mask=in_N, other=0.0).to(tl.float32)
        value_NM = (value_NM.to(tl.float32) + bias_N[:, None]).to(out.dtype.element_ty)
    tl.store(out + token_M.to(tl.int64)[None, :] * O + row_N[:, None], value_NM, mask=in_M[None, :] & in_N[:, None])


def linear_fp8(x: Tensor, weight_OI: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.linear_fp8`."""
    return project(x, weight_OI, scale, bias, "fp8", x.dtype)


def linear_w8a8(x: Tensor, weight_OI: Tensor, scale_O: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.linear_w8a8`."""
    return project(x, weight_OI, scale_O, bias, "int8", x.dtype)


def project(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, form: str, dtype: torch.dtype) -> Tensor:
    """Return ``x [..., K] @ weight[O, K].T + bias`` in ``dtype``, the weight in the format of that name."""
    (outputs, inputs), tokens = weight.shape, x.numel() // x.shape[-1]
    out = x.new_empty((*x.shape[:-1], outputs), dtype=dtype)
    if tokens:
        rows, block, step, warps, stages = next(tile for limit, tile in TILES if limit is None or tokens <= limit)
        grid = (triton.cdiv(outputs, rows) * triton.cdiv(tokens, block),)
        _linear[grid](
            x.contiguous(), weight, scale, bias, out, tokens, outputs, inputs, bias is not None, form, rows, block,
            step, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
