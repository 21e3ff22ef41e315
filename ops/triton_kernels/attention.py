"""`attention` and `cached_attention` in Triton: flash attention over a cache whose slots are shared out among programs.

A program has a tile of M query rows of one key/value head (a row is one token's query head; the heads that share a
key/value head stand beside each other, so that a decode step of one token fills a tile with them) and one part of the
slots that the tile sees. The parts are cut on the device, from the row's true length: how many programs there are
depends on shapes alone, so a captured decode step stays right as rows grow. The last program of a tile to be done
merges the parts, in their order, so that results do not depend on which was last, and leaves the tile's counter at 0.

Shapes as in `ops.reference`; J query heads per key/value head, M rows of a tile, BLOCK_S slots of a step, BLOCK_D the
power of two from D.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ops.triton_kernels.launch import counters, multiprocessors
from ops.triton_kernels.rope import plain, rope_to_cache, rotated_heads, store_to_cache


class Tile(NamedTuple):
    """Slots of a step of the loop, warps of a program, steps in flight, programs that share a multiprocessor."""

    slots: int
    warps: int
    stages: int
    programs: int


# By bytes of a cached value (D up to 128; above it half the slots) and rows of the tile. So that two programs have
# 64 KiB or more under way on a multiprocessor: 4.8 TB/s (H200) × 1 µs / 132 is 36 KB. Not tuned on a card: none was
# at hand.
TILES = {
    (1, 16): Tile(64, 4, 5, 2),
    (1, 32): Tile(64, 4, 5, 2),
    (1, 64): Tile(64, 8, 3, 1),
    (1, 128): Tile(64, 8, 3, 1),
    (2, 16): Tile(64, 4, 3, 2),
    (2, 32): Tile(64, 4, 3, 2),
    (2, 64): Tile(64, 8, 3, 1),
    (2, 128): Tile(64, 8, 3, 1),
    # fp32 is multiplied without the tensor cores, whose TF32 has 10 bits: small tiles, or the registers do not suffice.
    (4, 16): Tile(32, 8, 2, 2),
}
FEWEST_SLOTS = 128  # of a part: below, merging costs more than the reading it shares out
MOST_COUNTERS = 4096  # tiles whose slots are shared out; beyond, the tiles alone fill any card
MERGED = 4096  # values of the parts that a merging program holds at once: 32 registers of each of 128 threads
LIBRARY_TOKENS = 128  # from so many tokens of a prompt with nothing cached before, the library's attention


@triton.jit
def _write(out_ptr, out_M, acc_MD, sum_M, there_M, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Divide by the sums and store; a row that has seen nothing has the sum 0, and gives 0."""
    d = tl.arange(0, BLOCK_D)
    value = acc_MD / tl.where(sum_M == 0.0, 1.0, sum_M)[:, None]
    tl.store(
        out_ptr + out_M[:, None] + d[None, :], value.to(out_ptr.dtype.element_ty), there_M[:, None] & (d < D)[None]
    )


@triton.jit
def _merge(parts_ptr, best_ptr, parts, there_M, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, AT_ONCE: tl.constexpr):
    """Sum the parts of a tile: what `_attention_kernel` keeps of each, as ``(acc [M, D], sum [M])``."""
    row, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sum_M, best_M = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for first in range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        there_PM = (part < parts)[:, None] & there_M[None, :]
        at_PM = part[:, None] * BLOCK_M + row[None, :]
        best_PM = tl.load(best_ptr + 2 * at_PM, mask=there_PM, other=float("-inf"), cache_modifier=".cg")
        sum_PM = tl.load(best_ptr + 2 * at_PM + 1, mask=there_PM, other=0.0, cache_modifier=".cg")
        acc_PMD = tl.load(
            parts_ptr + at_PM[:, :, None] * BLOCK_D + d[None, None, :],
            mask=there_PM[:, :, None], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        new_M = tl.maximum(best_M, tl.max(best_PM, 0))
        zero_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        weight_PM = tl.exp2(best_PM - zero_M[None, :])
        kept_M = tl.exp2(best_M - zero_M)
        acc_MD = acc_MD * kept_M[:, None] + tl.sum(acc_PMD * weight_PM[:, :, None], 0)
        sum_M = sum_M * kept_M + tl.sum(sum_PM * weight_PM, 0)
        best_M = new_M
    return acc_MD, sum_M


@triton.jit
def _attention_kernel(
    q_ptr, q_b, q_t, q_n,
    k_ptr, k_b, k_g, k_s, k_d,
    v_ptr, v_b, v_g, v_s, v_d,
    start_ptr, length_ptr, out_ptr, parts_ptr, best_ptr, counter_ptr,
    q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, angle_b, angle_t, R, eps,
    T, S, scale,
    G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr, FEWEST: tl.constexpr, AT_ONCE: tl.constexpr, NEW: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Attend, of ``q`` as given; or, if NEW is not 0, of a fused projection whose T ≤ NEW tokens it writes itself.

    The grid is (rows · key/value heads · tiles, parts). Every program of a tile finds the same cuts. The new tokens'
    slots are beyond the cuts and belong to the last part, whose program writes them before it reads; no other program
    reads a slot of this row and head from ``length - T`` on, so nobody has to wait for them. That needs all T · J query
    rows in one tile, which the host sees to.
    """
    # Later tiles see more slots: they go first.
    tiles = tl.cdiv(T * J, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    b, g = tl.program_id(0) // tiles // G, tl.program_id(0) // tiles % G
    b64, part, d = b.to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_D)
    row_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there_M = row_M < T * J
    t_M, n_M = row_M // J, g * J + row_M % J

    # The slots that the tile sees, [start, seen), and the program's part of them, [begin, end).
    start, length = tl.load(start_ptr + b).to(tl.int32), tl.load(length_ptr + b).to(tl.int32)
    last_M = length - T + t_M
    seen = tl.minimum(length - T + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // J, T - 1) + 1, S)
    shared = tl.maximum((length - T if NEW else seen) - start, 0)
    span = tl.maximum(tl.cdiv(tl.cdiv(shared, tl.num_programs(1)), BLOCK_S) * BLOCK_S, FEWEST)
    parts = tl.maximum(tl.cdiv(shared, span), 1)
    if part >= parts:
        return
    begin = start + part * span
    end = tl.where(part == parts - 1, seen, begin + span)

    if NEW:
        if part == parts - 1:
            new = tl.arange(0, NEW)
            slot = length - T + new
            written = ((new < T) & (slot >= 0) & (slot < S))[:, None] & (d < D)[None, :]
            row = b64 * q_b + new * q_t + (G * J + g) * q_n
            angle = b64 * angle_b + new * angle_t
            k_new = rotated_heads(q_ptr, row, k_norm_ptr, cos_ptr, sin_ptr, angle, new < T, R, eps, D, BLOCK_D)
            v_new = tl.load(q_ptr + row[:, None] + G * q_n + d[None, :], mask=written, other=0.0)
            slot = slot.to(tl.int64)[:, None]
            store_to_cache(k_ptr + b64 * k_b + g * k_g + slot * k_s + (d * k_d)[None, :], k_new, written)
            store_to_cache(v_ptr + b64 * v_b + g * v_g + slot * v_s + (d * v_d)[None, :], v_new, written)
            tl.debug_barrier()
        angle_M = b64 * angle_b + t_M * angle_t
        q_M = b64 * q_b + t_M * q_t + n_M * q_n
        q = rotated_heads(q_ptr, q_M, q_norm_ptr, cos_ptr, sin_ptr, angle_M, there_M, R, eps, D, BLOCK_D)
    else:
        q_M = b64 * q_b + t_M.to(tl.int64) * q_t + n_M * q_n
        q = tl.load(q_ptr + q_M[:, None] + d[None, :], mask=there_M[:, None] & (d < D)[None, :], other=0.0)

    s = tl.arange(0, BLOCK_S)
    k_ptr += b64 * k_b + g.to(tl.int64) * k_g + begin.to(tl.int64) * k_s
    v_ptr += b64 * v_b + g.to(tl.int64) * v_g + begin.to(tl.int64) * v_s
    k_SD = (s * k_s)[:, None] + (d * k_d)[None, :]
    v_SD = (s * v_s)[:, None] + (d * v_d)[None, :]
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if PAIRS:
        # The tensor cores want pairs of slots, and shared memory is transposed in units of 16 bits: so FP8 values are
        # read two dimensions at a time and multiplied as even and odd ones. By single bytes it takes 128 loads a step.
        half = tl.arange(0, BLOCK_D // 2)
        pair_SD = (s * (v_s // 2))[:, None] + half[None, :]
        acc_MD = tl.zeros((BLOCK_M, BLOCK_D // 2), tl.float32)
        odd_MD = tl.zeros((BLOCK_M, BLOCK_D // 2), tl.float32)
    sum_M, best_M = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for first in range(0, end - begin, BLOCK_S):
        # Beyond the end there may be NaN: neither is it read, nor does it weigh.
        slot_S = begin + first + s
        there_SD = (slot_S < end)[:, None] & (d < D)[None, :] if BLOCK_D != D else (slot_S < end)[:, None]
        k = tl.load(k_ptr + k_SD, mask=there_SD, other=0.0).to(q.dtype)
        score_MS = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score_MS = tl.where((slot_S[None, :] <= last_M[:, None]) & (slot_S < end)[None, :], score_MS, float("-inf"))
        new_M = tl.maximum(best_M, tl.max(score_MS, 1))
        zero_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        weight_MS = tl.exp2(score_MS - zero_M[:, None])
        kept_M = tl.exp2(best_M - zero_M)
        if PAIRS:
            pair_ptr = v_ptr.to(tl.pointer_type(tl.uint16))
            pair = tl.load(pair_ptr + pair_SD, mask=(slot_S < end)[:, None] & (half < D // 2)[None, :], other=0)
            v = (pair & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(q.dtype)
            odd = (pair >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(q.dtype)
            odd_MD = tl.dot(weight_MS.to(q.dtype), odd, odd_MD * kept_M[:, None], input_precision="ieee")
        else:
            v = tl.load(v_ptr + v_SD, mask=there_SD, other=0.0).to(q.dtype)
        acc_MD = tl.dot(weight_MS.to(q.dtype), v, acc_MD * kept_M[:, None], input_precision="ieee")
        sum_M = sum_M * kept_M + tl.sum(weight_MS, 1)
        best_M = new_M
        k_ptr += BLOCK_S * k_s
        v_ptr += BLOCK_S * v_s
    if PAIRS:
        acc_MD = tl.reshape(tl.join(acc_MD, odd_MD), (BLOCK_M, BLOCK_D))

    out_M = ((b64 * T + t_M) * (G * J) + n_M) * D
    if counter_ptr is None or parts == 1:
        _write(out_ptr, out_M, acc_MD, sum_M, there_M, D, BLOCK_D)
    else:
        group = tl.program_id(0).to(tl.int64) * tl.num_programs(1)
        at_M = (group + part) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(parts_ptr + at_M[:, None] * BLOCK_D + d[None, :], acc_MD, mask=there_M[:, None])
        tl.store(best_ptr + 2 * at_M, best_M, mask=there_M)
        tl.store(best_ptr + 2 * at_M + 1, sum_M, mask=there_M)
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu") == parts - 1:
            tl.store(counter_ptr + tl.program_id(0), 0)
            parts_ptr += group * (BLOCK_M * BLOCK_D)
            best_ptr += group * (BLOCK_M * 2)
            acc_MD, sum_M = _merge(parts_ptr, best_ptr, parts, there_M, BLOCK_M, BLOCK_D, AT_ONCE)
            _write(out_ptr, out_M, acc_MD, sum_M, there_M, D, BLOCK_D)


def attention(
    q_BTND: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    start_B: Tensor,
    length_B: Tensor,
    scale: float,
    mask: Tensor | None = None,
    lengths: list[int] | None = None,
) -> Tensor:
    """`reference.attention`; a prompt with nothing cached before it goes to the library's."""
    T, kept = q_BTND.shape[1], (torch.bfloat16, torch.float16)
    whole = lengths is not None and T >= LIBRARY_TOKENS and all(length == T for length in lengths)
    if whole and q_BTND.dtype == k_BGSD.dtype == v_BGSD.dtype and q_BTND.dtype in kept:
        k, v = k_BGSD[:, :, :T], v_BGSD[:, :, :T]
        out = F.scaled_dot_product_attention(q_BTND.transpose(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous()
    q_BTND = q_BTND if q_BTND.stride(-1) == 1 else q_BTND.contiguous()
    return _launch(q_BTND, q_BTND.shape[2], k_BGSD, v_BGSD, start_B, length_B, scale, 0, (None,) * 4, (0, 0, 0, 0.0))


def cached_attention(
    qkv_BTC: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    start_B: Tensor,
    length_B: Tensor,
    eps: float,
    scale: float,
    slots: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: list[int] | None = None,
) -> Tensor:
    """`fused.cached_attention`: `rope_to_cache`, then `attention`; of few tokens in one launch."""
    (_, T, C), (_, G, _, D) = qkv_BTC.shape, k_BGSD.shape
    N = C // D - 2 * G
    queries = T * (N // G)
    if queries > _most_rows(_size(qkv_BTC, k_BGSD), D):
        q_BTND = rope_to_cache(qkv_BTC, q_norm_D, k_norm_D, cos_BTR, sin_BTR, k_BGSD, v_BGSD, length_B, eps, slots)
        return attention(q_BTND, k_BGSD, v_BGSD, start_B, length_B, scale, mask, lengths)
    qkv_BTC, q_norm_D, k_norm_D, cos_BTR, sin_BTR = plain(qkv_BTC, q_norm_D, k_norm_D, cos_BTR, sin_BTR)
    turn, numbers = (q_norm_D, k_norm_D, cos_BTR, sin_BTR), (*cos_BTR.stride()[:2], cos_BTR.shape[-1], eps)
    heads = qkv_BTC.unflatten(-1, (-1, D))
    return _launch(heads, N, k_BGSD, v_BGSD, start_B, length_B, scale, triton.next_power_of_2(T), turn, numbers)


def _launch(
    heads_BTHD: Tensor,
    N: int,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    start_B: Tensor,
    length_B: Tensor,
    scale: float,
    new: int,
    turn: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
) -> Tensor:
    """Launch for the first N of the heads; ``new``, ``turn`` and ``numbers`` are the kernel's own for a projection."""
    (B, T, _, D), (_, G, S, _) = heads_BTHD.shape, k_BGSD.shape
    if N % G:
        raise ValueError(f"attention: {N} query heads cannot share {G} key/value heads evenly")
    out_BTND = heads_BTHD.new_empty((B, T, N, D))
    if not out_BTND.numel():
        return out_BTND
    device, J, block_d = heads_BTHD.device, N // G, max(triton.next_power_of_2(D), 32)
    size = _size(heads_BTHD, k_BGSD)
    rows = min(max(triton.next_power_of_2(T * J), 16), _most_rows(size, D))
    tile = TILES[size, rows]
    tiles = B * G * triton.cdiv(T * J, rows)
    parts = _parts(tiles, S, tile.programs * multiprocessors(device), FEWEST_SLOTS)
    scratch: tuple[Tensor | None, ...] = (None, None, None)
    if parts > 1:
        acc = torch.empty((tiles, parts, rows, block_d), dtype=torch.float32, device=device)
        scratch = acc, acc.new_empty((tiles, parts, rows, 2)), counters(device, "attention", MOST_COUNTERS)
    _attention_kernel[(tiles, parts)](
        heads_BTHD, *heads_BTHD.stride()[:3],
        k_BGSD, *k_BGSD.stride(),
        v_BGSD, *v_BGSD.stride(),
        start_B.contiguous(), length_B.contiguous(), out_BTND, *scratch,
        *turn, *numbers,
        T, S, scale * math.log2(math.e),
        G=G, J=J, D=D, BLOCK_D=block_d, BLOCK_M=rows, BLOCK_S=max(tile.slots * 128 // max(block_d, 128), 16),
        FEWEST=FEWEST_SLOTS, AT_ONCE=max(MERGED // (rows * block_d), 1), NEW=new, PAIRS=_in_pairs(v_BGSD),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_BTND


def _size(q: Tensor, k: Tensor) -> int:
    """Bytes of a cached value, as the tiles are chosen by; 4 if anything is fp32."""
    return 4 if torch.float32 in (q.dtype, k.dtype) else k.itemsize


def _in_pairs(v_BGSD: Tensor) -> bool:
    """Whether values in FP8 can be read as 16-bit pairs of dimensions."""
    even = all(number % 2 == 0 for number in (v_BGSD.shape[3], *v_BGSD.stride()[:3], v_BGSD.data_ptr()))
    return v_BGSD.dtype == torch.float8_e4m3fn and v_BGSD.stride(3) == 1 and even


def _most_rows(size: int, D: int) -> int:
    """Rows of the largest tile; wide heads take fewer, or the sums do not fit into the registers."""
    most = max(rows for bytes_each, rows in TILES if bytes_each == size)
    return max(most * 128 // max(triton.next_power_of_2(D), 128), 16)


@lru_cache(maxsize=1024)
def _parts(tiles: int, slots: int, places: int, fewest: int) -> int:
    """How many programs share out the slots of a tile, of ``places`` that a card runs at once.

    The fewest with which the last wave of programs is nearly as full as with any number up to four waves.
    """
    if tiles > MOST_COUNTERS:
        return 1
    most = max(1, min(triton.cdiv(slots, fewest), 4 * places // tiles))
    full = [tiles * parts / (triton.cdiv(tiles * parts, places) * places) for parts in range(1, most + 1)]
    return 1 + next(i for i, share in enumerate(full) if share >= 0.95 * max(full))
