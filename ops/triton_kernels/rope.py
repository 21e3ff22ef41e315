"""`rope_to_cache` in Triton: one launch that normalises, rotates, and writes keys and values to the cache.

A program has one head of a few tokens. Shapes as in `ops.reference`; M rows of a tile, BLOCK_D the power of two from D.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ops.triton_kernels.norm import inverse_rms, scaled

TOKENS = 16  # of a program: 4 KiB at D=128 in bf16, one 16-byte load or two per thread
FP8_MAX = tl.constexpr(448.0)  # of e4m3


@triton.jit
def rotated_heads(
    x_ptr, row_M, weight_ptr, cos_ptr, sin_ptr, angle_M, there_M, R, eps, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The heads at the offsets ``row_M``, normalised where there is a weight, rotated by the angles at ``angle_M``.

    Returns ``[M, BLOCK_D]`` in the dtype of ``x``, zeros where ``there_M`` is false and beyond D.
    """
    d = tl.arange(0, BLOCK_D)
    # The half style turns dimension d together with d + R.
    partner = tl.where(d < R, d + R, tl.where(d < 2 * R, d - R, d))
    there = there_M[:, None] & (d < D)[None, :]
    own = tl.load(x_ptr + row_M[:, None] + d[None, :], mask=there, other=0.0)
    other = tl.load(x_ptr + row_M[:, None] + partner[None, :], mask=there, other=0.0)
    if weight_ptr is not None:
        inverse = inverse_rms(own, D, eps)
        own = scaled(own, inverse, tl.load(weight_ptr + d, mask=d < D, other=0.0)[None, :])
        other = scaled(other, inverse, tl.load(weight_ptr + partner, mask=d < D, other=0.0)[None, :])
    turns = there_M[:, None] & (d < 2 * R)[None, :]
    angle = angle_M[:, None] + tl.where(d < R, d, d - R)[None, :]
    cos = tl.load(cos_ptr + angle, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=turns, other=0.0).to(tl.float32)
    sin = tl.where((d < R)[None, :], -sin, sin)
    turned = own.to(tl.float32) * cos + other.to(tl.float32) * sin
    return tl.where(turns, turned.to(own.dtype), own)


@triton.jit
def store_to_cache(pointers, x, mask):
    """Store in the dtype of the cache; in FP8 what is too large becomes the largest value, NaN stays NaN."""
    if pointers.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _rope_to_cache_kernel(
    qkv_ptr, qkv_b, qkv_t,
    q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, angle_b, angle_t,
    k_ptr, k_b, k_g, k_s, k_d,
    v_ptr, v_b, v_g, v_s, v_d,
    length_ptr, q_ptr, tokens, T, S, R, eps,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    there = token < tokens
    b, t = token // T, token % T
    row = b * qkv_b + t * qkv_t + head * D
    angle = b * angle_b + t * angle_t
    slot = tl.load(length_ptr + b, mask=there, other=0).to(tl.int64) - T + t
    written = (there & (slot >= 0) & (slot < S))[:, None] & (d < D)[None, :]
    if head < N:
        q = rotated_heads(qkv_ptr, row, q_norm_ptr, cos_ptr, sin_ptr, angle, there, R, eps, D, BLOCK_D)
        out = (token * N + head) * D
        tl.store(q_ptr + out[:, None] + d[None, :], q, mask=there[:, None] & (d < D)[None, :])
    elif head < N + G:
        k = rotated_heads(qkv_ptr, row, k_norm_ptr, cos_ptr, sin_ptr, angle, there, R, eps, D, BLOCK_D)
        at = b * k_b + (head - N) * k_g + slot * k_s
        store_to_cache(k_ptr + at[:, None] + (d * k_d)[None, :], k, written)
    else:
        v = tl.load(qkv_ptr + row[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        at = b * v_b + (head - N - G) * v_g + slot * v_s
        store_to_cache(v_ptr + at[:, None] + (d * v_d)[None, :], v, written)


def rope_to_cache(
    qkv_BTC: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    length_B: Tensor,
    eps: float,
    slots: Tensor | None = None,
) -> Tensor:
    """`reference.rope_to_cache`; what would go to a slot outside the cache is not written."""
    (B, T, C), (_, G, S, D) = qkv_BTC.shape, k_BGSD.shape
    N = C // D - 2 * G
    q_BTND = qkv_BTC.new_empty((B, T, N, D))
    if not B * T:
        return q_BTND
    qkv_BTC, q_norm_D, k_norm_D, cos_BTR, sin_BTR = plain(qkv_BTC, q_norm_D, k_norm_D, cos_BTR, sin_BTR)
    _rope_to_cache_kernel[(triton.cdiv(B * T, TOKENS), N + 2 * G)](
        qkv_BTC, *qkv_BTC.stride()[:2],
        q_norm_D, k_norm_D, cos_BTR, sin_BTR, *cos_BTR.stride()[:2],
        k_BGSD, *k_BGSD.stride(),
        v_BGSD, *v_BGSD.stride(),
        length_B.contiguous(), q_BTND, B * T, T, S, cos_BTR.shape[-1], eps,
        N=N, G=G, D=D, BLOCK_D=triton.next_power_of_2(D), TOKENS=TOKENS,
    )  # fmt: skip
    return q_BTND


def plain(
    qkv_BTC: Tensor, q_norm_D: Tensor | None, k_norm_D: Tensor | None, cos_BTR: Tensor, sin_BTR: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The same as the kernels read them: rows without gaps, one stride for both angles, two norms or none."""
    qkv_BTC = qkv_BTC if qkv_BTC.stride(-1) == 1 else qkv_BTC.contiguous()
    if cos_BTR.stride(-1) != 1 or cos_BTR.stride() != sin_BTR.stride():
        cos_BTR, sin_BTR = cos_BTR.contiguous(), sin_BTR.contiguous()
    if q_norm_D is None or k_norm_D is None:
        return qkv_BTC, None, None, cos_BTR, sin_BTR
    return qkv_BTC, q_norm_D.contiguous(), k_norm_D.contiguous(), cos_BTR, sin_BTR
