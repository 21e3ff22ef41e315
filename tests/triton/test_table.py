"""Every op of `ops.cuda` against its definition in fp32, on the arguments that all devices' ops are tested with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from ops import cuda, fused, layout, reference, reference_quantised
from tests.op_cases import BF16, FP32, op_cases, run

# Of ‖Δ‖ / ‖definition‖: bf16 rounds to 2⁻⁹ at a few places, fp32 differs in the order of its sums.
LIMIT = {BF16: 1e-2, FP32: 1e-5}


def test_the_table_has_every_op_but_what_the_library_does() -> None:
    assert set(ops.SCHEMAS) - set(cuda.KERNELS) == {"linear"}
    assert set(cuda.KERNELS) <= set(ops.SCHEMAS)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("name", sorted(cuda.KERNELS))
def test_op(device: str, name: str, dtype: torch.dtype) -> None:
    args = op_cases(dtype)[name]
    definition = next(getattr(file, name) for file in (reference, reference_quantised, fused) if hasattr(file, name))
    exact = run(name, definition, tuple(map(_wide, args)))
    there = tuple(one.to(device) if isinstance(one, Tensor) else one for one in laid_out(name, args))
    for result, wanted in zip(run(name, cuda.KERNELS[name], there), exact, strict=True):
        found = result.cpu().float()
        assert torch.equal(found.isfinite(), wanted.float().isfinite())
        found, wanted = (one[wanted.float().isfinite()].float() for one in (found, wanted))
        assert (found - wanted).norm() <= LIMIT[dtype] * wanted.norm()


def laid_out(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments in CUDA's layout: int4 words hold other inputs there."""
    if not name.endswith("w4a16"):
        return args
    made = list(args)
    for words in (3, 5):
        made[words] = layout.interleaved_int4(args[words], args[words + 1].shape[-1])
    return tuple(made)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (BF16, torch.float16) else value
