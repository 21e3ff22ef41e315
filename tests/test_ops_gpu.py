"""Every op on an NVIDIA GPU against its definition in fp32 on the CPU; `perf/gpu.sh` runs it where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ops
from ascend.devices import cuda
from ops import reference, reference_quantised
from tests.op_cases import BF16, FP32, op_cases, run

# Of ‖Δ‖ / ‖reference‖: bf16 rounds to 2⁻⁹ at a few places, fp32 differs in the order of its sums.
LIMIT = {BF16: 1e-2, FP32: 1e-5}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("name", sorted(op_cases(BF16)))
def test_op_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    problem = cuda.CudaDevice().why_unavailable()
    if problem is not None:
        pytest.skip(f"no CUDA device here: {problem.reason}")
    args = op_cases(dtype)[name]
    definition = getattr(reference, name, None) or getattr(reference_quantised, name)
    exact = run(name, definition, tuple(_wide(one) for one in args))
    there = tuple(one.to("cuda") if isinstance(one, Tensor) else one for one in args)
    for result, wanted in zip(run(name, getattr(ops, name), there), exact, strict=True):
        assert result.device.type == "cuda"
        found = result.cpu().float()
        assert torch.equal(found.isfinite(), wanted.float().isfinite())
        found, wanted = (one[wanted.float().isfinite()].float() for one in (found, wanted))
        assert (found - wanted).norm() <= LIMIT[dtype] * wanted.norm()


def _wide(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
