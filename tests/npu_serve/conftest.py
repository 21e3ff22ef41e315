"""Everything here runs the real vllm-ascend on emulated cards, in an environment that has it: the emulator's README."""

from __future__ import annotations

from pathlib import Path

import pytest

from ascend import emulator
from ascend.emulator import package

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE) and not (emulator.active() and package.plugin()):
            item.add_marker(pytest.mark.skip(reason="needs emulated cards and vllm-ascend: ascend/emulator/README.md"))
