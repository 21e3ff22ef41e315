"""The Triton kernels, on Triton's interpreter or on a card.

    TRITON_INTERPRET=1 python -m pytest tests/triton    # anywhere
    python -m pytest tests/triton                       # on a machine with an NVIDIA GPU

A process of its own: Triton decides at the first ``@triton.jit`` whether a kernel is interpreted or compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton

from tests.triton import checker, interpreter

HERE = Path(__file__).parent
INTERPRETED = triton.knobs.runtime.interpret
RUNNABLE = INTERPRETED or torch.cuda.is_available()

if INTERPRETED:
    interpreter.repair()
    checker.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "needs TRITON_INTERPRET=1 in the environment, or an NVIDIA GPU"
    for item in items:
        if not RUNNABLE and item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> str:
    """Where the tensors of a launch live."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its kin give NaN (integers: their largest value), so an element left unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
