"""`--emulate`: the NPU's whole path, from the plan to an answer, on cards that `ascend.emulator` computes on the CPU.

The engine is the real vLLM-Ascend on the real torch_npu. What only an emulated card needs beside the plan is here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ascend.errors import UserError
from serve.settings import LaunchSettings

CARDS = "1x910B3-64G"  # where none are named; the emulator shows eight
MOST_CARDS = 8
NAME = "npu (emulated)"
WHY = (
    "device npu: EMULATED on this machine's CPU by the real vLLM-Ascend; its times mean nothing, what it proves is in "
    "ascend/emulator/README.md"
)
# By whom the engine is run.
PREFIX = (sys.executable, "-m", "ascend.emulator", "--")
SETTINGS: Mapping[str, Any] = {
    # The card says 64 GiB; the cache of that size would have to lie in this machine's memory.
    "num-gpu-blocks-override": 256,
    # Its kernel is written in Triton, for which there is no Ascend compiler here.
    "additional-config": {"ascend_compilation_config": {"fuse_qknorm_rope": False}},
}
ENVIRONMENT: Mapping[str, str] = {
    # torch would keep compiled graphs on disk and fail to write these: they hold tensors of the emulated device.
    "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
    # vllm-ascend's ops return their inputs. torch 2.10, which it is made for, lets them; 2.13 ends where CI is set.
    "TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING": "0",
}


def check(settings: LaunchSettings) -> None:
    """Raise `UserError` for what does not go with ``--emulate``."""
    if settings.device != "npu":
        raise UserError(f"--emulate stands in for Ascend cards: it goes with --device npu, not {settings.device}")
    if settings.nodes > 1:
        raise UserError("--emulate is for one server: leave --nodes out")


def with_settings(planned: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's flags with what an emulated card needs."""
    additional = {**planned.get("additional-config", {}), **SETTINGS["additional-config"]}
    return {**planned, **SETTINGS, "additional-config": additional}
