"""The ops on a CPU: C kernels (``ops/csrc``) for bf16 and fp32, compiled at first use, and the reference for the rest.

In: the tensors of an op, as `ops.reference` defines it. Out: the same result, made at the memory's speed: weights and
cached keys are read once and in order, nothing is copied, sums are kept in fp32. A token's result does not depend on
what else is in the batch, on padding or on the number of threads, bit for bit.

What the kernels do not take (other dtypes, an FP8 cache, weights that are not contiguous) runs the reference. So does
everything if there is no C compiler, with one warning, or if ``ASCEND_CPU_KERNELS=0`` is set. Threads:
``torch.set_num_threads``.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from ctypes import c_float, c_int, c_long, c_void_p
from typing import Any

import torch
from torch import Tensor

from ops import build, reference
from ops.quantise import FP8

_log = logging.getLogger(__name__)

# Arguments by C function: p pointer, n long, f float. Each returns 0, or 1 for the reason that its comment gives.
_SIGNATURES = {
    "linear": "ppppnnnn",
    "rms_norm": "pppppnnfn",
    "moe_gate": "pppppnnnnnnnfn",
    "experts": "ppppppnnnnnn",
    "rope_to_cache": "pppppppppnnnnnnnnnnfn",
    "attention": "ppppppnnnnnnnnnfn",
}
_C_TYPES = {"p": c_void_p, "n": c_long, "f": c_float}
_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}


class _Kernels:
    """The C functions for one dtype, as attributes named after `_SIGNATURES`."""

    linear: Callable[..., int]
    rms_norm: Callable[..., int]
    moe_gate: Callable[..., int]
    experts: Callable[..., int]
    rope_to_cache: Callable[..., int]
    attention: Callable[..., int]

    def __init__(self, library: ctypes.CDLL, suffix: str) -> None:
        for name, signature in _SIGNATURES.items():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes = [_C_TYPES[letter] for letter in signature]
            function.restype = c_int
            setattr(self, name, function)


class _KernelTable(dict[torch.dtype, "_Kernels | None"]):
    """Kernels by dtype, loaded when first asked for; None where the reference must do."""

    _lock = threading.Lock()

    def __missing__(self, dtype: torch.dtype) -> _Kernels | None:
        with self._lock:
            if dtype not in self:
                loaded = _load()
                self.update((known, loaded.get(known)) for known in (*_SUFFIXES, dtype))
        return self[dtype]


def _load() -> dict[torch.dtype, _Kernels]:
    if os.environ.get("ASCEND_CPU_KERNELS", "1") == "0":
        return {}
    try:
        library = build.load()
    except build.BuildError as error:
        _log.warning("CPU kernels are off, the slow reference runs instead: %s", error)
        return {}
    return {dtype: _Kernels(library, suffix) for dtype, suffix in _SUFFIXES.items()}


_table = _KernelTable()
_threads = torch.get_num_threads


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the work space of a CPU kernel")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    kernels, width = _table[x.dtype], weight.numel()
    if kernels is None or not _rows_fit(x, weight, width):
        return reference.rms_norm(x, weight, eps)
    out = torch.empty_like(x)
    kernels.rms_norm(
        x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), None, x.numel() // width, width, eps, _threads()
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`."""
    kernels, width = _table[x.dtype], weight.numel()
    if (
        kernels is None
        or not _rows_fit(x, weight, width)
        or residual.dtype is not x.dtype
        or residual.shape != x.shape
        or not residual.is_contiguous()
    ):
        return reference.add_rms_norm(x, residual, weight, eps)
    out, total = torch.empty_like(x), torch.empty_like(x)
    kernels.rms_norm(
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        total.data_ptr(),
        x.numel() // width,
        width,
        eps,
        _threads(),
    )
    return out, total


def _rows_fit(x: Tensor, weight: Tensor, width: int) -> bool:
    return (
        weight.dtype is x.dtype
        and weight.dim() == 1
        and x.dim() > 0
        and x.shape[-1] == width
        and x.numel() > 0
        and x.is_contiguous()
        and weight.is_contiguous()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.linear`."""
    kernels, (rows, width), shape = _table[x.dtype], weight.shape, x.shape
    if (
        kernels is None
        or weight.dtype is not x.dtype
        or not weight.is_contiguous()
        or shape[-1] != width
        or weight.numel() == 0
        or (bias is not None and (bias.dtype is not x.dtype or bias.shape != (rows,) or not bias.is_contiguous()))
    ):
        return reference.linear(x, weight, bias)
    x, out = x.contiguous(), x.new_empty((*shape[:-1], rows))
    if tokens := x.numel() // width:
        kernels.linear(
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            tokens,
            width,
            rows,
            _threads(),
        )
    return out


def swiglu_mlp(x_TH: Tensor, gate_up_IH: Tensor, down_HI: Tensor) -> Tensor:
    """`reference.swiglu_mlp`: the one expert of every token."""
    kernels, dtype, (H, inner) = _table[x_TH.dtype], x_TH.dtype, down_HI.shape
    if (
        kernels is None
        or gate_up_IH.dtype is not dtype
        or down_HI.dtype is not dtype
        or gate_up_IH.shape != (2 * inner, H)
        or x_TH.shape[-1] != H
        or x_TH.numel() == 0
        or inner == 0
        or not gate_up_IH.is_contiguous()
        or not down_HI.is_contiguous()
    ):
        return reference.swiglu_mlp(x_TH, gate_up_IH, down_HI)
    x_TH = x_TH.contiguous()
    out_TH = torch.empty_like(x_TH)
    failed = kernels.experts(
        x_TH.data_ptr(),
        None,
        None,
        gate_up_IH.data_ptr(),
        down_HI.data_ptr(),
        out_TH.data_ptr(),
        x_TH.numel() // H,
        1,
        1,
        H,
        inner,
        _threads(),
    )
    _check(failed)
    return out_TH


def moe_gate(
    x_TH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """`reference.moe_gate`; ties go to the lowest expert."""
    if weight_EH.dtype is torch.float32 and x_TH.dtype is torch.bfloat16:
        x_TH = x_TH.float()
    kernels, (T, H), E = _table[x_TH.dtype], x_TH.shape, weight_EH.shape[0]
    n_group = max(n_group, 1)
    if (
        kernels is None
        or weight_EH.dtype is not x_TH.dtype
        or weight_EH.shape[1] != H
        or not weight_EH.is_contiguous()
        or T * H == 0
        or E % n_group
        or not 0 < topk_group <= n_group
        or not 0 < top_k <= E // n_group * topk_group
        or (bias_E is not None and bias_E.shape != (E,))
    ):
        return reference.moe_gate(x_TH, weight_EH, bias_E, top_k, n_group, topk_group, normalise, scaling)
    if bias_E is not None:
        bias_E = bias_E.float().contiguous()
    x_TH = x_TH.contiguous()
    weight_TK = torch.empty((T, top_k), dtype=torch.float32)
    expert_TK = torch.empty((T, top_k), dtype=torch.int64)
    failed = kernels.moe_gate(
        x_TH.data_ptr(),
        weight_EH.data_ptr(),
        None if bias_E is None else bias_E.data_ptr(),
        weight_TK.data_ptr(),
        expert_TK.data_ptr(),
        T,
        H,
        E,
        top_k,
        n_group,
        topk_group,
        normalise,
        scaling,
        _threads(),
    )
    _check(failed)
    return weight_TK, expert_TK


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
    if first:
        expert_TK = expert_TK - first
    kernels, dtype, (E, H, inner), (T, K) = _table[x_TH.dtype], x_TH.dtype, down_EHI.shape, expert_TK.shape
    if (
        kernels is None
        or gate_up_EIH.dtype is not dtype
        or down_EHI.dtype is not dtype
        or gate_up_EIH.shape != (E, 2 * inner, H)
        or x_TH.shape != (T, H)
        or weight_TK.shape != (T, K)
        or T * K * E * H * inner == 0
        or not gate_up_EIH.is_contiguous()
        or not down_EHI.is_contiguous()
    ):
        return reference.moe_experts(x_TH, weight_TK, expert_TK, gate_up_EIH, down_EHI)
    x_TH, weight_TK, expert_TK = x_TH.contiguous(), _as(torch.float32, weight_TK), _as(torch.int64, expert_TK)
    out_TH = torch.empty_like(x_TH)
    failed = kernels.experts(
        x_TH.data_ptr(),
        weight_TK.data_ptr(),
        expert_TK.data_ptr(),
        gate_up_EIH.data_ptr(),
        down_EHI.data_ptr(),
        out_TH.data_ptr(),
        T,
        K,
        E,
        H,
        inner,
        _threads(),
    )
    _check(failed)
    return out_TH


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """A contiguous tensor of ``dtype``: nearly always ``tensor`` itself."""
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


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
    """`reference.rope_to_cache`."""
    kernels, dtype, (B, T, C), (rows, G, S, D) = _table[qkv_BTC.dtype], qkv_BTC.dtype, qkv_BTC.shape, k_BGSD.shape
    N, R = C // D - 2 * G, cos_BTR.shape[-1]
    normed = q_norm_D is not None and k_norm_D is not None
    if (
        kernels is None
        or not _caches_fit(dtype, k_BGSD, v_BGSD)
        or rows != B
        or length_B.shape != (B,)
        or C % D
        or N < 1
        or 2 * R > D
        or sin_BTR.shape != cos_BTR.shape
        or B * T == 0
        or (normed and not (_head_norm_fits(q_norm_D, dtype, D) and _head_norm_fits(k_norm_D, dtype, D)))
    ):
        return reference.rope_to_cache(qkv_BTC, q_norm_D, k_norm_D, cos_BTR, sin_BTR, k_BGSD, v_BGSD, length_B, eps)
    if cos_BTR.shape != (B, T, R):
        cos_BTR, sin_BTR = cos_BTR.expand(B, T, R), sin_BTR.expand(B, T, R)
    cos_BTR, sin_BTR = _as(torch.float32, cos_BTR), _as(torch.float32, sin_BTR)
    length_B = _as(torch.int64, length_B)
    qkv_BTC, q_BTND = qkv_BTC.contiguous(), qkv_BTC.new_empty((B, T, N, D))
    out_of_range = kernels.rope_to_cache(
        qkv_BTC.data_ptr(),
        q_norm_D.data_ptr() if q_norm_D is not None and normed else None,
        k_norm_D.data_ptr() if k_norm_D is not None and normed else None,
        cos_BTR.data_ptr(),
        sin_BTR.data_ptr(),
        k_BGSD.data_ptr(),
        v_BGSD.data_ptr(),
        length_B.data_ptr(),
        q_BTND.data_ptr(),
        B,
        T,
        N,
        G,
        D,
        R,
        S,
        *k_BGSD.stride()[:3],
        eps,
        _threads(),
    )
    if out_of_range:
        raise IndexError(f"rope_to_cache: a row of length {length_B.tolist()} takes {T} tokens, the cache {S} slots")
    return q_BTND


def _caches_fit(dtype: torch.dtype, k_BGSD: Tensor, v_BGSD: Tensor) -> bool:
    stride = k_BGSD.stride()
    return (
        k_BGSD.dtype is dtype
        and v_BGSD.dtype is dtype
        and k_BGSD.shape == v_BGSD.shape
        and stride == v_BGSD.stride()
        and stride[3] == 1
    )


def _head_norm_fits(weight_D: Tensor | None, dtype: torch.dtype, D: int) -> bool:
    return weight_D is not None and weight_D.dtype is dtype and weight_D.shape == (D,) and weight_D.is_contiguous()


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
    """`reference.attention`."""
    kernels, dtype, (B, T, N, D), (rows, G, S, width) = _table[q_BTND.dtype], q_BTND.dtype, q_BTND.shape, k_BGSD.shape
    if kernels is not None and k_BGSD.dtype is FP8:  # exact: every e4m3 is a bf16; the definition holds T x S scores
        k_BGSD, v_BGSD = k_BGSD.to(dtype), v_BGSD.to(dtype)
    if (
        kernels is None
        or not _caches_fit(dtype, k_BGSD, v_BGSD)
        or rows != B
        or width != D
        or start_B.shape != (B,)
        or length_B.shape != (B,)
        or B * T * G * D == 0
        or N % G
    ):
        return reference.attention(q_BTND, k_BGSD, v_BGSD, start_B, length_B, scale)
    start_B, length_B, q_BTND = _as(torch.int64, start_B), _as(torch.int64, length_B), q_BTND.contiguous()
    out_BTND = torch.empty_like(q_BTND)
    failed = kernels.attention(
        q_BTND.data_ptr(),
        k_BGSD.data_ptr(),
        v_BGSD.data_ptr(),
        out_BTND.data_ptr(),
        start_B.data_ptr(),
        length_B.data_ptr(),
        B,
        T,
        G,
        N // G,
        D,
        S,
        *k_BGSD.stride()[:3],
        scale,
        _threads(),
    )
    _check(failed)
    return out_BTND


# Fused ops, as `ops.fused` defines them; called directly, since each further trip through torch's dispatcher takes some
# 7 µs, together 2 % of a decode step.


def add_rms_norm_gate(
    x_TH: Tensor, residual_TH: Tensor, norm_H: Tensor, eps: float, *routing: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fused.add_rms_norm_gate`."""
    normed_TH, residual_TH = add_rms_norm(x_TH, residual_TH, norm_H, eps)
    weight_TK, expert_TK = moe_gate(normed_TH, *routing)
    return weight_TK, expert_TK, normed_TH, residual_TH


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
    """`fused.cached_attention`."""
    q = rope_to_cache(qkv_BTC, q_norm_D, k_norm_D, cos_BTR, sin_BTR, k_BGSD, v_BGSD, length_B, eps, slots)
    return attention(q, k_BGSD, v_BGSD, start_B, length_B, scale, mask, lengths)


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
    shared_TH = swiglu_mlp(x_TH, shared_gate_up_IH, shared_down_HI)
    return moe_experts(x_TH, weight_TK, expert_TK, gate_up_EIH, down_EHI, first, total) + shared_TH


KERNELS: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "linear": linear,
    "swiglu_mlp": swiglu_mlp,
    "moe_gate": moe_gate,
    "moe_experts": moe_experts,
    "rope_to_cache": rope_to_cache,
    "attention": attention,
    "add_rms_norm_gate": add_rms_norm_gate,
    "cached_attention": cached_attention,
    "moe": moe,
}
