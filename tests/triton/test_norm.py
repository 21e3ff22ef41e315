"""`rms_norm` and `add_rms_norm` against their definition, and that views need no copy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ops import reference
from ops.triton_kernels import norm
from tests.op_cases import BF16, FP32, make
from tests.triton.cases import DTYPES, SEEDS, examples, near

WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from([64, 100, 128, 1000, 4096, 5000, 8192]))


@examples
@given(seed=SEEDS, dtype=DTYPES, rows=st.integers(0, 4), width=WIDTHS, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_rms_norm(device: str, seed: int, dtype: torch.dtype, rows: int, width: int, scale: float) -> None:
    new = make(seed, dtype)
    x, weight = new(rows, width, scale=scale).to(device), new(width).to(device)
    near(norm.rms_norm(x, weight, 1e-6), reference.rms_norm(x.float(), weight.float(), 1e-6), roundings=2)


@examples
@given(seed=SEEDS, dtype=DTYPES, rows=st.integers(0, 4), width=WIDTHS)
def test_add_rms_norm(device: str, seed: int, dtype: torch.dtype, rows: int, width: int) -> None:
    new = make(seed, dtype)
    x, residual, weight = (new(*shape).to(device) for shape in ((rows, width), (rows, width), (width,)))
    normed, total = norm.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    near(normed, reference.rms_norm(total.float(), weight.float(), 1e-6), roundings=2)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_rounds_where_the_definition_rounds(device: str, dtype: torch.dtype) -> None:
    # A root that is a power of two is exact however it is computed, so every bit must agree.
    x = make(1, dtype)(3, 64).sign().to(device) * torch.tensor([[1.0], [2.0], [0.5]], dtype=dtype, device=device)
    x, weight = x * 3, make(2, dtype)(64).to(device)
    residual = x / 3
    assert torch.equal(norm.rms_norm(residual, weight, 0.0), reference.rms_norm(residual, weight, 0.0))
    found, wanted = norm.add_rms_norm(x, residual, weight, 0.0), reference.add_rms_norm(x, residual, weight, 0.0)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def heads(device: str) -> list[Tensor]:
    """Query heads of a fused projection; the same with rows apart; one head; three strides, which need a copy."""
    fused = make(3, FP32)(2, 3, 6 * 16).to(device)
    view = fused.view(2, 3, 6, 16)
    return [view[:, :, :4], view[:, ::2, 4:], view[:, :, 3], view[:, ::2, ::2, 1:], view[..., ::2], view[0, 0, 0]]


@pytest.mark.parametrize("case", range(6))
def test_rows_anywhere(device: str, case: int) -> None:
    x = heads(device)[case]
    weight = make(4, FP32)(x.shape[-1]).to(device)
    result = norm.rms_norm(x, weight, 1e-6)
    assert result.is_contiguous()
    near(result, reference.rms_norm(x, weight, 1e-6))
    normed, total = norm.add_rms_norm(x, x, weight, 1e-6)
    assert torch.equal(total, 2 * x)
    near(normed, reference.rms_norm(2 * x, weight, 1e-6))


def test_heads_of_a_projection_are_read_where_they_are(device: str) -> None:
    queries = heads(device)[0]
    assert not queries.is_contiguous()
    assert norm._rows(queries)[0].data_ptr() == queries.data_ptr()


def test_nan_stays_in_its_row(device: str) -> None:
    x = torch.ones(3, 40, device=device)
    x[1, 7] = float("nan")
    result = norm.rms_norm(x, torch.ones(40, device=device), 1e-6)
    assert result[1].isnan().all()
    assert result[::2].isfinite().all()
