"""The experts of a decode step, routed and shared, in two launches: each expert that is hit is read once.

A program is one tile of weight rows of one column; a column is an expert that some token chose, or a part of the shared
experts, which all tokens pass. A program finds its expert's tokens itself, so nothing is sorted, counted or padded
before. `_down` leaves a row per token and expert and marks it as done; who brings a token's last row adds the token's
rows up, in their order, so that the sum is the same in every run.

Shapes: T tokens, H hidden_size, I width of an expert, E experts here, K experts per token, S parts of the shared
experts (each as wide as an expert), P pairs of a token and an expert (T · K), N weight rows and M tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ops.triton_kernels import grouped
from ops.triton_kernels.launch import check_whole, counters
from ops.triton_kernels.linear import linear_w8a8, project
from ops.triton_kernels.product import gate_up_rows, padded, product, scales_per_row, swiglu

DECODE_TOKENS = 128  # more are prefill: tokens are sorted by expert then, and tiles of them are large


@dataclass(frozen=True)
class Tile:
    """Sizes of a program's tile, its warps, and how many steps of its loop are in flight."""

    rows: int
    inputs: int
    warps: int
    stages: int


# By format: of gate and up (rows of each), and of down. Chosen so that two programs or more fit on a multiprocessor and
# have at least 32 KiB under way there, which a card of 25 to 36 GB/s per multiprocessor needs to hide 1 µs. Not tuned
# on a card: none was at hand.
TILES = {
    "plain": (Tile(32, 64, 4, 4), Tile(64, 64, 4, 4)),
    "fp8": (Tile(32, 128, 4, 4), Tile(64, 128, 4, 4)),
    "int8": (Tile(32, 128, 4, 4), Tile(64, 128, 4, 4)),
    "int4": (Tile(32, 32, 4, 5), Tile(64, 64, 4, 4)),
}
FP32_TILES = (Tile(16, 32, 4, 3), Tile(32, 32, 4, 3))


@triton.jit
def _chosen(expert, pairs, column, first, E: tl.constexpr, PAIRS: tl.constexpr, BY_EXPERT: tl.constexpr):
    """Which pairs belong to the column's expert, ``[P]``, and the expert; none where another column has it."""
    pair_P = tl.arange(0, PAIRS)
    chosen_P = tl.load(expert + pair_P, mask=pair_P < pairs, other=-1).to(tl.int32) - first
    mine = column if BY_EXPERT else tl.load(expert + column).to(tl.int32) - first
    match_P = (chosen_P == mine) & (pair_P < pairs) & (mine >= 0) & (mine < E)
    if not BY_EXPERT:
        before = tl.sum((match_P & (pair_P < column)).to(tl.int32))
        match_P = match_P & (before == 0)
    return match_P, mine


@triton.jit
def _members(match_P, begin, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The pairs of ``match_P`` from the one numbered ``begin`` on: ``[M]``."""
    rank_P = tl.cumsum(match_P.to(tl.int32), 0) - 1
    number_M = begin + tl.arange(0, BLOCK_M)
    hit_MP = match_P[None, :] & (rank_P[None, :] == number_M[:, None])
    return tl.sum(tl.where(hit_MP, tl.arange(0, PAIRS)[None, :], 0), 1)


@triton.jit
def _gate_up(
    x, expert, hidden, weight, scale, shared, shared_scale, tokens, pairs, first,
    K: tl.constexpr, S: tl.constexpr, E: tl.constexpr, H: tl.constexpr, I: tl.constexpr, PAIRS: tl.constexpr,
    BY_EXPERT: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TILES_N: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    BLOCKS_I: tl.constexpr = (I + 127) // 128  # rows of fp8 scales of a gate
    SCALE_ROWS: tl.constexpr = 2 * BLOCKS_I if FORMAT == "fp8" else 2 * I
    SCALES: tl.constexpr = scales_per_row(H, GROUP, FORMAT)
    column, n = tl.program_id(0) // TILES_N - S, tl.program_id(0) % TILES_N * BLOCK_N
    if column < 0:
        part = column + S
        row_N, of_N = gate_up_rows(n, S * I, BLOCK_N)
        row_N += part * I
        scale_row_N = row_N
        if SHARED_FORMAT == "fp8":
            blocks: tl.constexpr = (S * I + 127) // 128
            scale_row_N = (row_N >= S * I).to(tl.int32) * blocks + (part * I + of_N) // 128
        for begin in range(0, tokens, BLOCK_S):
            token_M = begin + tl.arange(0, BLOCK_S)
            in_M = token_M < tokens
            sum_NM = product(
                x, token_M.to(tl.int64) * H, in_M, shared, row_N, of_N < I, shared_scale, 0, scale_row_N, 0,
                H, H, H, (H + 127) // 128, GROUP, SHARED_FORMAT, 2 * BLOCK_N, BLOCK_S, BLOCK_K,
            )  # fmt: skip
            slot_M = token_M * (K + S) + K + part
            _store(hidden, slot_M, in_M, n, I, swiglu(sum_NM, BLOCK_N, BLOCK_S), BLOCK_N)
    elif E:
        match_P, mine = _chosen(expert, pairs, column, first, E, PAIRS, BY_EXPERT)
        count = tl.sum(match_P.to(tl.int32))
        mine = mine.to(tl.int64)
        row_N, of_N = gate_up_rows(n, I, BLOCK_N)
        scale_row_N = row_N
        if FORMAT == "fp8":
            scale_row_N = (row_N >= I).to(tl.int32) * BLOCKS_I + of_N // 128
        for begin in range(0, count, BLOCK_M):
            pair_M = _members(match_P, begin, PAIRS, BLOCK_M)
            in_M = begin + tl.arange(0, BLOCK_M) < count
            sum_NM = product(
                x, (pair_M // K).to(tl.int64) * H, in_M, weight + mine * 2 * I * STRIDE, row_N, of_N < I,
                scale, mine * SCALE_ROWS * SCALES, scale_row_N, 0,
                H, H, STRIDE, SCALES, GROUP, FORMAT, 2 * BLOCK_N, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            slot_M = pair_M // K * (K + S) + pair_M % K
            _store(hidden, slot_M, in_M, n, I, swiglu(sum_NM, BLOCK_N, BLOCK_M), BLOCK_N)


@triton.jit
def _store(rows, slot_M, in_M, n, WIDTH: tl.constexpr, value_NM, BLOCK_N: tl.constexpr):
    n_N = n + tl.arange(0, BLOCK_N)
    where = rows + slot_M.to(tl.int64)[None, :] * WIDTH + n_N[:, None]
    tl.store(where, value_NM.to(rows.dtype.element_ty), mask=in_M[None, :] & (n_N < WIDTH)[:, None])


@triton.jit
def _down(
    hidden, expert, mix, part_rows, counter, out, weight, scale, shared, shared_scale, tokens, pairs, first,
    K: tl.constexpr, S: tl.constexpr, E: tl.constexpr, H: tl.constexpr, I: tl.constexpr, PAIRS: tl.constexpr,
    BY_EXPERT: tl.constexpr, FORMAT: tl.constexpr, SHARED_FORMAT: tl.constexpr, GROUP: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TILES_N: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    SCALE_ROWS: tl.constexpr = (H + 127) // 128 if FORMAT == "fp8" else H
    SCALES: tl.constexpr = scales_per_row(I, GROUP, FORMAT)
    column, tile = tl.program_id(0) // TILES_N - S, tl.program_id(0) % TILES_N
    row_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if column < 0:
        part = column + S
        scale_row_N, scale_begin = row_N, 0
        if SHARED_FORMAT == "fp8":
            scale_row_N, scale_begin = row_N // 128, part * (I // 128)
        for begin in range(0, tokens, BLOCK_S):
            token_M = begin + tl.arange(0, BLOCK_S)
            in_M = token_M < tokens
            slot_M = token_M * (K + S) + K + part
            sum_NM = product(
                hidden, slot_M.to(tl.int64) * I, in_M, shared + part * I, row_N, row_N < H,
                shared_scale, scale_begin, scale_row_N, part * I,
                I, S * I, S * I, (S * I + 127) // 128, GROUP, SHARED_FORMAT, BLOCK_N, BLOCK_S, BLOCK_K,
            )  # fmt: skip
            _finish(
                sum_NM, slot_M, token_M, in_M, tile, TILES_N, expert, mix, part_rows, counter, out, first, K, S, E,
                H, BLOCK_N, BLOCK_S,
            )  # fmt: skip
    elif E:
        match_P, mine = _chosen(expert, pairs, column, first, E, PAIRS, BY_EXPERT)
        count = tl.sum(match_P.to(tl.int32))
        mine = mine.to(tl.int64)
        scale_row_N = row_N
        if FORMAT == "fp8":
            scale_row_N = row_N // 128
        for begin in range(0, count, BLOCK_M):
            pair_M = _members(match_P, begin, PAIRS, BLOCK_M)
            in_M = begin + tl.arange(0, BLOCK_M) < count
            slot_M = pair_M // K * (K + S) + pair_M % K
            sum_NM = product(
                hidden, slot_M.to(tl.int64) * I, in_M, weight + mine * H * STRIDE, row_N, row_N < H,
                scale, mine * SCALE_ROWS * SCALES, scale_row_N, 0,
                I, I, STRIDE, SCALES, GROUP, FORMAT, BLOCK_N, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            _finish(
                sum_NM, slot_M, pair_M // K, in_M, tile, TILES_N, expert, mix, part_rows, counter, out, first, K, S, E,
                H, BLOCK_N, BLOCK_M,
            )  # fmt: skip


@triton.jit
def _finish(
    sum_NM, slot_M, token_M, in_M, tile, TILES_N: tl.constexpr, expert, mix, part_rows, counter, out, first,
    K: tl.constexpr, S: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Keep the rows; of tokens whose last row is among them, write the sum of all rows to ``out``."""
    if K + S == 1:
        if K:
            sum_NM *= tl.load(mix + token_M, mask=in_M, other=0.0)[None, :]
        _store(out, token_M, in_M, tile * BLOCK_N, H, sum_NM, BLOCK_N)
    else:
        _store(part_rows, slot_M, in_M, tile * BLOCK_N, H, sum_NM, BLOCK_N)
        rows_M = tl.full((BLOCK_M,), S, tl.int32)
        for k in tl.static_range(K):
            of_k_M = tl.load(expert + token_M * K + k, mask=in_M, other=0).to(tl.int32) - first
            rows_M += ((of_k_M >= 0) & (of_k_M < E)).to(tl.int32)
        # All threads' rows are written before one of them says so, and all read only what was said to be there.
        tl.debug_barrier()
        done_M = tl.atomic_add(counter + token_M * TILES_N + tile, 1, mask=in_M, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        last_M = in_M & (done_M == rows_M - 1)
        if tl.max(last_M.to(tl.int32), 0) > 0:
            n_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            total_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            row_M = part_rows + (token_M * (K + S)).to(tl.int64) * H
            if K:
                # At once, so that nothing waits for another's address.
                k_K = tl.arange(0, padded(K))
                here_KM = last_M[None, :] & (k_K < K)[:, None]
                place_KM = token_M[None, :] * K + k_K[:, None]
                chosen_KM = tl.load(expert + place_KM, mask=here_KM, other=-1).to(tl.int32) - first
                mix_KM = tl.load(mix + place_KM, mask=here_KM, other=0.0)
                here_KM = here_KM & (chosen_KM >= 0) & (chosen_KM < E)
                where_KNM = row_M[None, None, :] + k_K[:, None, None] * H + n_N[None, :, None]
                in_KNM = here_KM[:, None, :] & (n_N < H)[None, :, None]
                row_KNM = tl.load(where_KNM, mask=in_KNM, other=0.0, cache_modifier=".cg")
                total_NM += tl.sum(row_KNM * mix_KM[:, None, :], 0)
            for part in range(K, K + S):
                inside = last_M[None, :] & (n_N < H)[:, None]
                where = row_M[None, :] + (part * H + n_N)[:, None]
                total_NM += tl.load(where, mask=inside, other=0.0, cache_modifier=".cg")
            _store(out, token_M, last_M, tile * BLOCK_N, H, total_NM, BLOCK_N)
            # All of the token's rows have been counted: nobody comes here again.
            tl.store(counter + token_M * TILES_N + tile, 0, mask=last_M)


@dataclass(frozen=True)
class Weights:
    """Experts or a part of them: ``[E, 2·I, H]`` and ``[E, H, I]`` with what scales them; shared ones without the E."""

    gate_up: Tensor
    gate_up_scale: Tensor | None
    down: Tensor
    down_scale: Tensor | None
    form: str


def _decode(
    x_TH: Tensor,
    weight_TK: Tensor | None,
    expert_TK: Tensor | None,
    routed: Weights | None,
    shared: Weights | None,
    first: int,
) -> Tensor:
    """Two launches, of at most `DECODE_TOKENS` tokens."""
    T, H = x_TH.shape
    K = 0 if expert_TK is None else expert_TK.shape[1]
    E = 0 if routed is None else routed.gate_up.shape[0]
    width = 0 if shared is None else shared.gate_up.shape[0] // 2
    I = routed.gate_up.shape[1] // 2 if routed is not None else part_width(width)
    S, pairs = width // I, T * K
    # Where nobody brings a token any row, nobody writes its sum.
    out_TH = torch.empty_like(x_TH) if S else torch.zeros_like(x_TH)
    if not T:
        return out_TH
    check_whole(
        *(
            part
            for one in (routed, shared)
            if one
            for part in (one.gate_up, one.gate_up_scale, one.down, one.down_scale)
        )
    )
    some = routed or shared
    assert some is not None, "an MLP has weights"
    form, shared_form = some.form, shared.form if shared is not None else some.form
    one, other = routed or some, shared or some
    hidden = x_TH.new_empty((T * (K + S), I), dtype=torch.float32 if form in ("fp8", "int8") else x_TH.dtype)
    rows = x_TH.new_empty((T * (K + S), H) if K + S > 1 else (0,), dtype=torch.float32)
    tiles = FP32_TILES if x_TH.dtype is torch.float32 else TILES[form]
    columns = min(pairs, E)
    tokens = 8 if T <= 32 else 16
    shared_tokens = max(8, min(32, triton.next_power_of_2(T)))
    common = (triton.next_power_of_2(max(pairs, 1)), pairs > E, form, shared_form)
    tile = tiles[0]
    _gate_up[((S + columns) * triton.cdiv(I, tile.rows),)](
        x_TH, expert_TK, hidden, one.gate_up, one.gate_up_scale, other.gate_up, other.gate_up_scale, T, pairs,
        first, K, S, E, H, I, *common, grouped.group_of(form, H, one.gate_up_scale), one.gate_up.shape[-1],
        tile.rows, tokens, shared_tokens, tile.inputs, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = tiles[1]
    counter = counters(x_TH.device, "experts", DECODE_TOKENS * triton.cdiv(H, tile.rows))
    _down[((S + columns) * triton.cdiv(H, tile.rows),)](
        hidden, expert_TK, weight_TK, rows, counter, out_TH, one.down, one.down_scale, other.down, other.down_scale, T,
        pairs, first, K, S, E, H, I, *common, grouped.group_of(form, I, one.down_scale), one.down.shape[-1],
        tile.rows, tokens, min(shared_tokens, 16), tile.inputs, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_TH


def part_width(width: int) -> int:
    """Into parts of which width a dense MLP is divided, so that many programs read its second matrix."""
    return next((part for part in (1024, 512, 256) if width % part == 0 and width > part), width)


def _moe(
    x_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor, routed: Weights, shared: Weights | None, first: int
) -> Tensor:
    x_TH, weight_TK, expert_TK = x_TH.contiguous(), weight_TK.contiguous(), expert_TK.contiguous()
    width, part = (0 if shared is None else shared.gate_up.shape[0] // 2), routed.gate_up.shape[1] // 2
    # FP8 scales of a part begin at its own block.
    divides = width % part == 0 and (shared is None or shared.form != "fp8" or part % 128 == 0 or width == part)
    if x_TH.shape[0] <= DECODE_TOKENS and divides:
        return _decode(x_TH, weight_TK, expert_TK, routed, shared, first)
    extra_TH = None if shared is None else _mlp(x_TH, shared)
    if x_TH.shape[0] <= DECODE_TOKENS:
        return _decode(x_TH, weight_TK, expert_TK, routed, None, first) + (0 if extra_TH is None else extra_TH)
    parts = (routed.gate_up, routed.gate_up_scale, routed.down, routed.down_scale)
    return grouped.moe_experts(x_TH, weight_TK, expert_TK, parts, routed.form, first, extra_TH)


def _mlp(x_TH: Tensor, weights: Weights) -> Tensor:
    """A dense MLP; above the decode sizes through projections, the library's where it has them."""
    x_TH = x_TH.contiguous()
    flat_TH = x_TH.flatten(0, -2)
    if flat_TH.shape[0] <= DECODE_TOKENS:
        return _decode(flat_TH, None, None, None, weights, 0).view(x_TH.shape)
    if weights.form == "plain":
        gate, up = F.linear(x_TH, weights.gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, weights.down)
    assert weights.gate_up_scale is not None, "an integer or FP8 weight has scales"
    assert weights.down_scale is not None, "an integer or FP8 weight has scales"
    if weights.form == "int8":
        gate, up = linear_w8a8(x_TH, weights.gate_up, weights.gate_up_scale, None).float().chunk(2, -1)
        return linear_w8a8((F.silu(gate) * up).to(x_TH.dtype), weights.down, weights.down_scale, None)
    # Two matrices: the blocks of the second begin anew. What is quantised again stays fp32 until then.
    halves = zip(weights.gate_up.chunk(2), weights.gate_up_scale.chunk(2), strict=True)
    gate, up = (project(x_TH, weight, scale, None, "fp8", torch.float32) for weight, scale in halves)
    return project(F.silu(gate) * up, weights.down, weights.down_scale, None, "fp8", x_TH.dtype)


def swiglu_mlp(x_TH: Tensor, gate_up_IH: Tensor, down_HI: Tensor) -> Tensor:
    """`reference.swiglu_mlp`."""
    return _mlp(x_TH, Weights(gate_up_IH, None, down_HI, None, "plain"))


def swiglu_mlp_fp8(
    x_TH: Tensor, gate_up_IH: Tensor, gate_up_scale: Tensor, down_HI: Tensor, down_scale: Tensor
) -> Tensor:
    """`reference.swiglu_mlp_fp8`."""
    return _mlp(x_TH, Weights(gate_up_IH, gate_up_scale, down_HI, down_scale, "fp8"))


def swiglu_mlp_w8a8(
    x_TH: Tensor, gate_up_IH: Tensor, gate_up_scale_I: Tensor, down_HI: Tensor, down_scale_H: Tensor
) -> Tensor:
    """`reference.swiglu_mlp_w8a8`."""
    return _mlp(x_TH, Weights(gate_up_IH, gate_up_scale_I, down_HI, down_scale_H, "int8"))


def moe_experts(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EIH: Tensor,
    down_EHI: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """`reference.moe_experts`."""
    return _moe(x_TH, weight_TK, expert_TK, Weights(gate_up_EIH, None, down_EHI, None, "plain"), None, first)


def moe(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EIH: Tensor,
    down_EHI: Tensor,
    shared_gate_up_IH: Tensor,
    shared_down_HI: Tensor,
    first: int = 0,
    total: int = 0,
) -> Tensor:
    """`fused.moe`."""
    routed, shared = (
        Weights(gate_up, None, down, None, "plain")
        for gate_up, down in ((gate_up_EIH, down_EHI), (shared_gate_up_IH, shared_down_HI))
    )
    return _moe(x_TH, weight_TK, expert_TK, routed, shared, first)


def _quantised(form: str, with_shared: bool) -> Callable[..., Tensor]:
    """Return the op of routed experts in the format, alone or with shared ones, whose arguments come after theirs."""

    def op(
        x_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor, *rest: Tensor | int, first: int = 0, total: int = 0
    ) -> Tensor:
        tensors = [one for one in rest if isinstance(one, Tensor)]
        numbers = [one for one in rest if isinstance(one, int)]
        shared = None
        if with_shared and form == "int4":  # the experts alone are quantised
            shared = Weights(tensors[4], None, tensors[5], None, "plain")
        elif with_shared:
            shared = Weights(tensors[4], tensors[5], tensors[6], tensors[7], form)
        routed = Weights(tensors[0], tensors[1], tensors[2], tensors[3], form)
        return _moe(x_TH, weight_TK, expert_TK, routed, shared, numbers[0] if numbers else first)

    return op


moe_experts_fp8, moe_fp8 = (_quantised("fp8", with_shared) for with_shared in (False, True))
moe_experts_w8a8, moe_w8a8 = (_quantised("int8", with_shared) for with_shared in (False, True))
moe_experts_w4a16, moe_w4a16 = (_quantised("int4", with_shared) for with_shared in (False, True))
