"""Weight rows times token rows, in each format of weights: the loop that all matmul kernels of this folder share.

The weights are the left operand, so that a tile of them may be tall and a tile of tokens as small as 8: at decode sizes
the matrix units then do little for nothing, which a card with few of them (H20) feels first.

Shapes: N weight rows of a tile, M tokens of a tile, K inputs, G inputs that share a scale.

Formats: ``plain`` (the dtype of the tokens), ``fp8`` (blocks of 128 × 128, tokens quantised per 128 inputs as they are
read), ``int8`` (tokens quantised by the largest of their whole row, which is read twice), ``int4`` (words as
`ops.layout.interleaved_int4` leaves them). What is computed is defined in `ops.reference` and beside it.
"""

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
INT8_MAX = tl.constexpr(127.0)
TINY = tl.constexpr(1.1754943508222875e-38)  # smallest normal fp32: a row of zeros has the scale 0
ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and taking it away rounds to the nearest even integer


@triton.jit
def product(
    x,
    x_row_M,
    x_in_M,
    weight,
    row_N,
    in_N,
    scale,
    scale_begin,
    scale_row_N,
    whole,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return fp32 ``[N, M]``: ``sum over K of weight[row_N] · x[x_row_M]``, scales included.

    x_row_M: where each token's row begins. row_N, scale_row_N: rows of the weight and of its scales (which begin at
    ``scale_begin``), that lie so many strides from one another. x_in_M, in_N: which are there. whole: of int8 alone,
    how far before a row's begin the WHOLE values begin whose largest scales it (a part of a row may be multiplied).
    """
    if FORMAT == "fp8":
        sum_NM = _fp8(
            x, x_row_M, x_in_M, weight, row_N, in_N, scale, scale_begin, scale_row_N,
            K, WEIGHT_STRIDE, SCALE_STRIDE, BLOCK_N, BLOCK_M,
        )  # fmt: skip
    elif FORMAT == "int8":
        sum_NM = _int8(
            x, x_row_M, x_in_M, weight, row_N, in_N, scale, scale_begin, scale_row_N, whole,
            K, WHOLE, WEIGHT_STRIDE, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    elif FORMAT == "int4":
        sum_NM = _int4(
            x, x_row_M, x_in_M, weight, row_N, in_N, scale, scale_begin, scale_row_N,
            K, WEIGHT_STRIDE, SCALE_STRIDE, GROUP, BLOCK_N, BLOCK_M,
        )  # fmt: skip
    else:
        sum_NM = _plain(x, x_row_M, x_in_M, weight, row_N, in_N, K, WEIGHT_STRIDE, BLOCK_N, BLOCK_M, BLOCK_K)
    return sum_NM


@triton.jit
def _tokens(x, x_row_M, x_in_M, k_K, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """``[K, M]`` of the tokens."""
    inside = x_in_M[None, :]
    if K % BLOCK_K:
        inside = inside & (k_K < K)[:, None]
    return tl.load(x + x_row_M[None, :] + k_K[:, None], mask=inside, other=0.0)


@triton.jit
def _weights(weight, row_N, in_N, k_K, K: tl.constexpr, STRIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """``[N, K]`` of the weights, read once and not kept."""
    inside = in_N[:, None]
    if K % BLOCK_K:
        inside = inside & (k_K < K)[None, :]
    where = weight + row_N[:, None] * STRIDE + k_K[None, :]
    return tl.load(where, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _plain(
    x, x_row_M, x_in_M, weight, row_N, in_N, K: tl.constexpr, STRIDE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    sum_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k_K = k0 + tl.arange(0, BLOCK_K)
        x_KM = _tokens(x, x_row_M, x_in_M, k_K, K, BLOCK_K)
        weight_NK = _weights(weight, row_N, in_N, k_K, K, STRIDE, BLOCK_K)
        sum_NM = tl.dot(weight_NK, x_KM, sum_NM, input_precision="ieee")
    return sum_NM


@triton.jit
def _fp8(
    x, x_row_M, x_in_M, weight, row_N, in_N, scale, scale_begin, scale_row_N, K: tl.constexpr, STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # Hopper's FP8 matrix units keep about 14 bits of a sum: so each block's starts anew and is added in fp32.
    BLOCK: tl.constexpr = 128
    sum_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    scale_row = scale + scale_begin + scale_row_N * SCALE_STRIDE
    next_N = tl.load(scale_row, mask=in_N, other=0.0)
    for block in range(0, (K + BLOCK - 1) // BLOCK):
        # A step ahead: only what is multiplied as matrices is fetched early by the compiler.
        scale_N = next_N
        next_N = tl.load(scale_row + block + 1, mask=in_N & (block + 1 < (K + BLOCK - 1) // BLOCK), other=0.0)
        k_K = block * BLOCK + tl.arange(0, BLOCK)
        x_KM = _tokens(x, x_row_M, x_in_M, k_K, K, BLOCK).to(tl.float32)
        x_scale_M = tl.div_rn(tl.max(tl.abs(x_KM), 0), FP8_MAX)
        steps_KM = tl.div_rn(x_KM, tl.broadcast_to(tl.maximum(x_scale_M, TINY)[None, :], BLOCK, BLOCK_M))
        x_KM = steps_KM.to(tl.float8e4nv)
        weight_NK = _weights(weight, row_N, in_N, k_K, K, STRIDE, BLOCK)
        sum_NM += tl.dot(weight_NK, x_KM) * scale_N[:, None] * x_scale_M[None, :]
    return sum_NM


@triton.jit
def _int8(
    x, x_row_M, x_in_M, weight, row_N, in_N, scale, scale_begin, scale_row_N, whole,
    K: tl.constexpr, WHOLE: tl.constexpr, STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    # The maximum over threads comes after the loop, so that its loads need not wait for one another.
    largest_KM = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for k0 in tl.range(0, WHOLE, BLOCK_K, num_stages=4):
        k_K = k0 + tl.arange(0, BLOCK_K)
        x_KM = _tokens(x, x_row_M - whole, x_in_M, k_K, WHOLE, BLOCK_K).to(tl.float32)
        largest_KM = tl.maximum(largest_KM, tl.abs(x_KM))
    x_scale_M = tl.div_rn(tl.max(largest_KM, 0), INT8_MAX)
    divisor_KM = tl.broadcast_to(tl.maximum(x_scale_M, TINY)[None, :], BLOCK_K, BLOCK_M)
    sum_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k_K = k0 + tl.arange(0, BLOCK_K)
        x_KM = _tokens(x, x_row_M, x_in_M, k_K, K, BLOCK_K).to(tl.float32)
        x_KM = ((tl.div_rn(x_KM, divisor_KM) + ROUND) - ROUND).to(tl.int8)
        weight_NK = _weights(weight, row_N, in_N, k_K, K, STRIDE, BLOCK_K)
        sum_NM = tl.dot(weight_NK, x_KM, sum_NM, out_dtype=tl.int32)
    scale_N = tl.load(scale + scale_begin + scale_row_N, mask=in_N, other=0.0).to(tl.float32)
    return sum_NM.to(tl.float32) * scale_N[:, None] * x_scale_M[None, :]


@triton.jit
def _int4(
    x, x_row_M, x_in_M, weight, row_N, in_N, scale, scale_begin, scale_row_N, K: tl.constexpr, STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = GROUP // 8
    BLOCK_W: tl.constexpr = 16  # the words of a whole group, and the fewest inputs that a product takes
    sum_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    word_W = tl.arange(0, BLOCK_W)
    for group in range(0, K // GROUP):
        inside = in_N[:, None] & (word_W < WORDS)[None, :]
        where = weight + row_N[:, None] * STRIDE + (group * WORDS + word_W)[None, :]
        word_NW = tl.load(where, mask=inside, other=0, eviction_policy="evict_first")
        part_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for nibble in tl.static_range(8):
            inputs = x + x_row_M[None, :] + (group * GROUP + nibble * WORDS + word_W)[:, None]
            x_WM = tl.load(inputs, mask=x_in_M[None, :] & (word_W < WORDS)[:, None], other=0.0)
            value_NW = (((word_NW >> (4 * nibble)) & 15) - 8).to(x_WM.dtype)
            part_NM = tl.dot(value_NW, x_WM, part_NM, input_precision="ieee")
        scale_N = tl.load(scale + scale_begin + scale_row_N * SCALE_STRIDE + group, mask=in_N, other=0.0).to(tl.float32)
        sum_NM += part_NM * scale_N[:, None]
    return sum_NM


@triton.jit
def swiglu(sum_NM, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """``silu(gate) · up`` of sums ``[2·N, M]``, the gates first: ``[N, M]``."""
    gate_NM, up_NM = tl.split(tl.permute(tl.reshape(sum_NM, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
    return gate_NM * up_NM / (1.0 + tl.exp(-gate_NM))


@triton.jit
def gate_up_rows(n, up, BLOCK_N: tl.constexpr):
    """Which rows make a tile at ``n``, of the gate, then of what begins ``up`` rows further; and their numbers."""
    tile_N = tl.arange(0, 2 * BLOCK_N)
    of_N = n + tile_N % BLOCK_N
    return tl.where(tile_N < BLOCK_N, of_N, up + of_N), of_N


@triton.constexpr_function
def scales_per_row(inputs: int, group: int, form: str) -> int:
    """Scales of a row of so many inputs: int8 has one."""
    return {"fp8": -(-inputs // 128), "int4": inputs // group}.get(form, 1)


@triton.constexpr_function
def padded(count: int) -> int:
    """The power of two from ``count`` on: as many elements a tensor may have."""
    return 1 << max(count - 1, 0).bit_length()
