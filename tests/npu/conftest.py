"""Everything here computes on emulated cards: `tests/run.sh npu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ascend import emulator

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not emulator.active() and item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason="needs the emulated cards: tests/run.sh npu"))


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
