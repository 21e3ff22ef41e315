"""RMS norms. A row is what gamma covers: the last ``gamma.dim()`` dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend.emulator.limits import FLOATS, VECTOR_CORES, require, require_dim, require_dtype, require_nd


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    """``input · rstd · gamma`` and ``rstd = 1/√(mean(input²) + epsilon)`` (fp32, ones in the normed dimensions).

    Everything in fp32 with one rounding (the kernel of ops-nn; its older forms rounded before gamma). Dtypes, A2 table
    of the op's page: gamma like the input, or fp32 with an fp16 or bf16 input.
    """
    op = "npu_rms_norm"
    _check(op, input, gamma)
    if gamma.dtype != torch.float32:
        require(gamma.dtype == input.dtype, op, f"gamma is {gamma.dtype}, input {input.dtype}; fp32 or the same needed")
    normed, rstd = _normed(input.float(), gamma, epsilon)
    return (normed * gamma.float()).to(input.dtype), rstd


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor, Tensor]:
    """``(norm(x1 + x2), rstd, x1 + x2)``: note the order.

    ``x · rstd`` is rounded to the dtype before gamma. The rounding of x itself depends on the batch (CANN's
    add_rms_norm templates): up to one row per vector core the norm takes the sum as rounded to the dtype; with more
    rows bf16 norms the unrounded fp32 sum, fp16 the rounded one still. (On the card that is so from a width of about
    2000 on; here at any width, so that a small model meets it too.)
    """
    return add_rms_norm("npu_add_rms_norm", x1, x2, gamma, None, epsilon)


def add_rms_norm(
    op: str, x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `npu_add_rms_norm` does, plus ``beta`` (of gamma's shape and dtype) before the last rounding."""
    _check(op, x1, gamma)
    require(x2.dtype == x1.dtype == gamma.dtype, op, "x1, x2 and gamma have different dtypes; one is needed")
    require(x2.shape == x1.shape, op, f"x1 has shape {list(x1.shape)}, x2 {list(x2.shape)}; the same is needed")
    require(x1.numel() > 0, op, "an empty tensor; the device takes none")
    exact = x1.float() + x2.float()
    total = exact.to(x1.dtype)
    few = x1.numel() // gamma.numel() <= VECTOR_CORES
    normed, rstd = _normed(total.float() if few or x1.dtype == torch.float16 else exact, gamma, epsilon)
    scaled = normed.to(x1.dtype).float() * gamma.float()
    if beta is not None:
        require(beta.dtype == gamma.dtype and beta.shape == gamma.shape, op, "beta is not of gamma's shape and dtype")
        scaled = scaled + beta.float()
    return scaled.to(x1.dtype), rstd, total


def _check(op: str, x: Tensor, gamma: Tensor) -> None:
    require_dtype(op, "input", x, *FLOATS)
    require_dtype(op, "gamma", gamma, *FLOATS)
    require_nd(op, input=x, gamma=gamma)
    require_dim(op, "input", x, *range(1, 9))
    fits = 0 < gamma.dim() <= x.dim() and x.shape[x.dim() - gamma.dim() :] == gamma.shape
    require(fits, op, f"gamma has shape {list(gamma.shape)}; needed are the last dimensions of {list(x.shape)}")


def _normed(x_fp32: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    dims = tuple(range(-gamma.dim(), 0))
    rstd = 1.0 / torch.sqrt(x_fp32.square().mean(dims, keepdim=True) + epsilon)
    return x_fp32 * rstd, rstd
