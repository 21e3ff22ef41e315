"""Projections with quantised weights against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ops import quantise, reference_quantised
from ops.triton_kernels import linear
from tests.op_cases import make
from tests.triton.cases import DTYPES, SEEDS, examples
from tests.triton.checker import in_any_order
from tests.triton.test_experts import close

CASES = {
    "fp8": (quantise.fp8_weight, linear.linear_fp8, reference_quantised.linear_fp8),
    "int8": (quantise.int8_weight, linear.linear_w8a8, reference_quantised.linear_w8a8),
}


@pytest.mark.parametrize("form", sorted(CASES))
@examples
@given(
    seed=SEEDS,
    dtype=DTYPES,
    tokens=st.sampled_from([0, 1, 5, 16, 33, 130]),
    inputs=st.sampled_from([8, 64, 130, 256, 384, 512]),
    outputs=st.sampled_from([1, 40, 129, 260]),
    biased=st.booleans(),
)
def test_linear(
    device: str, form: str, seed: int, dtype: torch.dtype, tokens: int, inputs: int, outputs: int, biased: bool
) -> None:
    to_format, kernel, definition = CASES[form]
    new = make(seed, dtype)
    x, (weight, scale) = new(1, tokens, inputs), to_format(new(outputs, inputs))
    bias = new(outputs) if biased else None
    wide = (scale.float(), None if bias is None else bias.float())
    found = kernel(x.to(device), weight.to(device), scale.to(device), None if bias is None else bias.to(device))
    close(found, definition(x.float(), weight, *wide), dtype)


@pytest.mark.parametrize("form", sorted(CASES))
def test_a_row_of_zeros(device: str, form: str) -> None:
    to_format, kernel, _ = CASES[form]
    weight, scale = to_format(torch.zeros(8, 128))
    x = torch.zeros(2, 128)
    x[1] = 3
    assert kernel(x.to(device), weight.to(device), scale.to(device), None).eq(0).all()


@pytest.mark.parametrize("form", sorted(CASES))
def test_parts_of_the_inputs_in_any_order(device: str, form: str) -> None:
    to_format, kernel, definition = CASES[form]
    new = make(1, torch.bfloat16)
    x, (weight, scale), bias = new(3, 512), to_format(new(70, 512)), new(70)
    found = in_any_order(lambda: kernel(*(one.to(device) for one in (x, weight, scale, bias))))
    close(found, definition(x.float(), weight, scale.float(), bias.float()), torch.bfloat16)


def test_a_weight_that_is_part_of_another_is_refused(device: str) -> None:
    weight, scale = quantise.int8_weight(torch.ones(8, 128))
    with pytest.raises(ValueError, match="not contiguous"):
        linear.linear_w8a8(torch.ones(1, 64, device=device), weight[:, :64].to(device), scale.to(device), None)
