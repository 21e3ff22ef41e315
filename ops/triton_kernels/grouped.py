"""Experts over many tokens (prefill): rows sorted by expert on the device, large tiles, two launches and a sum.

In bf16 the products are the library's (`grouped_mm`); in other formats `_grouped`, which reads the rows where they are
and writes them where they belong, so that nothing is gathered or padded. How many tiles there are is only known on the
device: as many programs as there could be are started, and what is beyond ends at once.

Shapes: T tokens, H hidden_size, I width of an expert, E experts here, K experts per token, P pairs of a token and an
expert (T · K), N weight rows and M rows of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ops.triton_kernels.launch import check_whole
from ops.triton_kernels.product import gate_up_rows, product, scales_per_row, swiglu

# Weight rows (of gate and of up each, in the first product), tokens, inputs of a tile; warps, stages.
TILE = (64, 128, 64, 8, 3)
FP32_TILE = (32, 32, 32, 4, 2)


@dataclass(frozen=True)
class Sorted:
    """Rows by expert: pair_P says which pair is where, begin_E1 where each expert's begin (and the last ends)."""

    pair_P: Tensor
    begin_E1: Tensor


def sort(expert_TK: Tensor, first: int, E: int) -> Sorted:
    """Sort pairs by expert; those of experts elsewhere come last. The host waits for nothing."""
    local_P = expert_TK.flatten() - first
    local_P = torch.where((local_P >= 0) & (local_P < E), local_P, E)
    in_order_P, pair_P = local_P.sort(stable=True)
    return Sorted(pair_P, torch.searchsorted(in_order_P, torch.arange(E + 1, device=local_P.device)))


@triton.jit
def _grouped(
    x, pair, begin, tile_end, weight, scale, out,
    K: tl.constexpr, E: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, SWIGLU: tl.constexpr, FORMAT: tl.constexpr,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, SORTED: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TILES_N: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = (OUT + 127) // 128
    SCALES: tl.constexpr = scales_per_row(IN, GROUP, FORMAT)
    tile, n = tl.program_id(0) // TILES_N, tl.program_id(0) % TILES_N * BLOCK_N
    expert_E = tl.arange(0, EXPERTS)
    end_E = tl.load(tile_end + expert_E, mask=expert_E < E, other=2147483647)
    # int64 from the start: a type may not change inside a branch.
    mine = tl.sum((end_E <= tile).to(tl.int64))
    if mine < E:
        tile_begin = tl.max(tl.where(end_E <= tile, end_E, 0))
        first, last = tl.load(begin + mine), tl.load(begin + mine + 1)
        row_M = first + (tile - tile_begin) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_M = row_M < last
        from_M, to_M = row_M, row_M
        if SORTED:
            if SWIGLU:
                from_M = tl.load(pair + row_M, mask=in_M, other=0) // K
            else:
                to_M = tl.load(pair + row_M, mask=in_M, other=0)
        if SWIGLU:
            row_N, of_N = gate_up_rows(n, OUT, BLOCK_N)
            scale_row_N = row_N
            if FORMAT == "fp8":
                scale_row_N = (row_N >= OUT).to(tl.int32) * BLOCKS + of_N // 128
            sum_NM = product(
                x, from_M.to(tl.int64) * IN, in_M, weight + mine * 2 * OUT * STRIDE, row_N, of_N < OUT,
                scale, mine * 2 * (BLOCKS if FORMAT == "fp8" else OUT) * SCALES, scale_row_N, 0,
                IN, IN, STRIDE, SCALES, GROUP, FORMAT, 2 * BLOCK_N, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            value_NM = swiglu(sum_NM, BLOCK_N, BLOCK_M)
        else:
            row_N = n + tl.arange(0, BLOCK_N)
            scale_row_N = row_N
            if FORMAT == "fp8":
                scale_row_N = row_N // 128
            value_NM = product(
                x, from_M.to(tl.int64) * IN, in_M, weight + mine * OUT * STRIDE, row_N, row_N < OUT,
                scale, mine * (BLOCKS if FORMAT == "fp8" else OUT) * SCALES, scale_row_N, 0,
                IN, IN, STRIDE, SCALES, GROUP, FORMAT, BLOCK_N, BLOCK_M, BLOCK_K,
            )  # fmt: skip
        n_N = n + tl.arange(0, BLOCK_N)
        where = out + to_M.to(tl.int64)[None, :] * OUT + n_N[:, None]
        tl.store(where, value_NM.to(out.dtype.element_ty), mask=in_M[None, :] & (n_N < OUT)[:, None])


@triton.jit
def _sum(
    rows, mix, expert, extra, out, first, E: tl.constexpr, K: tl.constexpr, H: tl.constexpr, EXTRA: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A token's rows by their weights, in fp32, plus what else belongs to it."""
    token, h_H = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_H = h_H < H
    total_H = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(K):
        chosen = tl.load(expert + token * K + k).to(tl.int32) - first
        if (chosen >= 0) & (chosen < E):
            row_H = tl.load(rows + (token * K + k) * H + h_H, mask=in_H, other=0.0).to(tl.float32)
            total_H += row_H * tl.load(mix + token * K + k)
    if EXTRA:
        total_H += tl.load(extra + token * H + h_H, mask=in_H, other=0.0).to(tl.float32)
    tl.store(out + token * H + h_H, total_H.to(out.dtype.element_ty), mask=in_H)


def moe_experts(
    x_TH: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    routed: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    form: str,
    first: int,
    extra_TH: Tensor | None = None,
) -> Tensor:
    """Sum over each token's experts, and ``extra_TH``. ``routed``: gate_up, its scales, down, its scales."""
    (T, K), H = expert_TK.shape, x_TH.shape[1]
    gate_up, gate_up_scale, down, down_scale = routed
    E = gate_up.shape[0]
    rows_PH = x_TH.new_empty((T * K, H))
    by_expert = sort(expert_TK, first, E)
    if form == "plain" and x_TH.dtype is torch.bfloat16:
        ends_E = by_expert.begin_E1[1:].to(torch.int32)
        rows_PH[by_expert.pair_P] = expert_rows_bf16(x_TH[by_expert.pair_P // K], ends_E, gate_up, down)
    else:
        _two_products(x_TH, by_expert, K, gate_up, gate_up_scale, down, down_scale, form, rows_PH, True)
    out_TH, block = torch.empty_like(x_TH), min(1024, triton.next_power_of_2(H))
    _sum[(T, triton.cdiv(H, block))](
        rows_PH, weight_TK, expert_TK, extra_TH, out_TH, first, E, K, H, extra_TH is not None, block, num_warps=4
    )
    return out_TH


def expert_rows(x_MH: Tensor, count_E: Tensor, gate_up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """`reference.expert_rows`."""
    ends_E = count_E.cumsum(0)
    if x_MH.dtype is torch.bfloat16:
        return expert_rows_bf16(x_MH, ends_E.to(torch.int32), gate_up_EIH, down_EHI)
    out_MH = torch.empty_like(x_MH)
    by_expert = Sorted(ends_E, F.pad(ends_E, (1, 0)))
    _two_products(x_MH, by_expert, 1, gate_up_EIH, None, down_EHI, None, "plain", out_MH, False)
    return out_MH


def expert_rows_bf16(x_MH: Tensor, ends_E: Tensor, gate_up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """Rows sorted by expert through the library's grouped matmul; beyond the last expert's end undefined."""
    gate_MI, up_MI = F.grouped_mm(x_MH, gate_up_EIH.transpose(1, 2), offs=ends_E).chunk(2, -1)
    return F.grouped_mm(F.silu(gate_MI) * up_MI, down_EHI.transpose(1, 2), offs=ends_E)


def _two_products(
    x: Tensor,
    by_expert: Sorted,
    K: int,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    form: str,
    out: Tensor,
    is_sorted: bool,
) -> None:
    rows, E, H = out.shape[0], down.shape[0], x.shape[1]
    I = gate_up.shape[1] // 2
    if not rows:
        return
    check_whole(gate_up, gate_up_scale, down, down_scale)
    # What is quantised again stays fp32 until then, as its definition has it.
    hidden = x.new_empty((rows, I), dtype=torch.float32 if form in ("fp8", "int8") else x.dtype)
    block_n, block_m, block_k, warps, stages = FP32_TILE if x.dtype is torch.float32 else TILE
    tiles_E = -(-by_expert.begin_E1.diff() // block_m)
    tiles = rows // block_m + min(E, rows)
    experts = triton.next_power_of_2(E)
    for source, weight, scale, target, inputs, outputs, first in (
        (x, gate_up, gate_up_scale, hidden, H, I, True),
        (hidden, down, down_scale, out, I, H, False),
    ):
        group = group_of(form, inputs, scale)
        _grouped[(tiles * triton.cdiv(outputs, block_n),)](
            source, by_expert.pair_P, by_expert.begin_E1, tiles_E.cumsum(0), weight, scale, target,
            K, E, inputs, outputs, first, form, group, weight.shape[-1], is_sorted, experts, block_n, block_m, block_k,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def group_of(form: str, inputs: int, scale: Tensor | None) -> int:
    """Inputs that share a scale in int4; 128 where the format does not ask."""
    return inputs // scale.shape[-1] if form == "int4" and scale is not None else 128
