"""Projections with quantised weights, FP8 in blocks and INT8 per output: one launch, tokens quantised as they are read.

Unquantised ones are the library's (`torch.nn.functional.linear`). Shapes: T tokens, K inputs, O outputs, N weight rows
and M tokens of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.triton_kernels.launch import check_whole, counters
from ops.triton_kernels.product import product

# By tokens up to which: weight rows, tokens, inputs of a tile, warps, stages, and parts of the inputs. A step quantises
# tokens before it multiplies, which is a chain of some 0.5 µs by the compiler's output: with few tokens a projection of
# 4096 inputs is shared out, so that its 32 steps are not one after the other. Not tuned on a card: none was at hand.
TILES = (
    (8, (32, 8, 128, 4, 4, 4)),
    (16, (32, 16, 128, 4, 4, 4)),
    (32, (32, 32, 128, 4, 4, 2)),
    (64, (64, 64, 128, 4, 3, 2)),
    (128, (64, 128, 128, 8, 3, 2)),
    (None, (128, 128, 128, 8, 3, 1)),
)


@triton.jit
def _linear(
    x, weight, scale, bias, out, parts, counter, tokens, O: tl.constexpr, K: tl.constexpr, BIASED: tl.constexpr,
    FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # Tiles of tokens that share their weights run beside one another.
    PART: tl.constexpr = K // PARTS
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    row_N = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    token_M = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_M, in_N = token_M < tokens, row_N < O
    begin = tl.program_id(1) * PART
    scale_row_N, scale_begin = row_N, 0
    if FORMAT == "fp8":
        scale_row_N, scale_begin = row_N // 128, begin // 128
    sum_NM = product(
        x, token_M.to(tl.int64) * K + begin, in_M, weight + begin, row_N, in_N, scale, scale_begin, scale_row_N, begin,
        PART, K, K, (K + 127) // 128, 128, FORMAT, BLOCK_N, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    where_NM = token_M.to(tl.int64)[None, :] * O + row_N[:, None]
    inside = in_M[None, :] & in_N[:, None]
    if PARTS == 1:
        _write(out + where_NM, inside, sum_NM, bias + row_N if BIASED else bias, in_N, BIASED)
    else:
        size = tokens * O
        tl.store(parts + tl.program_id(1) * size + where_NM, sum_NM, mask=inside)
        # All threads' sums are written before one of them says so; whoever is last adds all parts, in their order.
        tl.debug_barrier()
        if tl.atomic_add(counter + tl.program_id(0), 1, sem="acq_rel", scope="gpu") == PARTS - 1:
            tl.debug_barrier()
            total_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for part in tl.static_range(PARTS):
                total_NM += tl.load(parts + part * size + where_NM, mask=inside, other=0.0, cache_modifier=".cg")
            _write(out + where_NM, inside, total_NM, bias + row_N if BIASED else bias, in_N, BIASED)
            tl.store(counter + tl.program_id(0), 0)


@triton.jit
def _write(out_NM, inside, sum_NM, bias_N, in_N, BIASED: tl.constexpr):
    """Store the sums, rounded before the bias is added as well as after."""
    value_NM = sum_NM.to(out_NM.dtype.element_ty)
    if BIASED:
        added_N = tl.load(bias_N, mask=in_N, other=0.0).to(tl.float32)
        value_NM = (value_NM.to(tl.float32) + added_N[:, None]).to(out_NM.dtype.element_ty)
    tl.store(out_NM, value_NM, mask=inside)


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
    check_whole(weight, scale)
    if tokens:
        rows, block, step, warps, stages, parts = next(
            tile for limit, tile in TILES if limit is None or tokens <= limit
        )
        if inputs % (parts * 128):  # a part begins with a block of scales
            parts = 1
        tiles = triton.cdiv(outputs, rows) * triton.cdiv(tokens, block)
        sums = x.new_empty((parts, tokens, outputs) if parts > 1 else (0,), dtype=torch.float32)
        _linear[(tiles, parts)](
            x.contiguous(), weight, scale, bias, out, sums, counters(x.device, "linear", tiles), tokens, outputs,
            inputs, bias is not None, form, rows, block, step, parts, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
