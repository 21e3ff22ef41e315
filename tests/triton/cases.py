"""What the tests of the Triton kernels share: spaces of cases, and how near is near enough."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.op_cases import BF16, FP32

FP16, FP8 = torch.float16, torch.float8_e4m3fn
# Half a unit in the last place; in fp32 what the order of a sum may change.
UNIT = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 1e-5}

DTYPES = st.sampled_from([BF16, FP16, FP32])
SEEDS = st.integers(0, 2**31)
# Fixtures that last for all examples of a test hold nothing of one of them.
examples = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def near(actual: Tensor, exact: Tensor, magnitude: Tensor | None = None, roundings: int = 1) -> None:
    """|actual − exact| ≤ unit · roundings · magnitude, element by element, as in `tests.op_cases`."""
    assert actual.shape == exact.shape
    assert not actual.isnan().any()
    scale = (exact if magnitude is None else magnitude).abs().float()
    least = 2.0**-24 if actual.dtype is FP16 else 1e-30  # where fp16 has no more digits
    excess = (actual.float() - exact.float()).abs() - (UNIT[actual.dtype] * roundings * 1.01 + 1e-6) * scale - least
    assert excess.numel() == 0 or excess.max() <= 0, f"off by {excess.max()} beyond the bound"
