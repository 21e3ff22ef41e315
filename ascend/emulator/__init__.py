"""A software stand-in for Ascend cards: the real torch_npu package runs on a machine that has none.

In: any Python program, started by ``python -m ascend.emulator -- COMMAND``. Out: the same program on eight emulated
910B3, devices ``npu:0`` to ``npu:7``. README.md beside this file says what that proves and what it does not. Read
`runtime.py` (the C runtime under torch_npu), `dispatch.py` and `overrides.py` (every op computed on the CPU over the
same memory), `kernels/` (what the `npu` ops do, from the documentation of the device), `graphs.py`, `communicator.py`
and `vllm_ascend.py` (what the real vllm-ascend needs besides).
"""

from __future__ import annotations

import os


def active() -> bool:
    """Whether this process runs under the emulator: its `npu` devices are no cards."""
    return os.environ.get("ASCEND_EMULATOR") == "1"
