"""The committed lists of what each engine version accepts, and which of them counts for a version."""

from __future__ import annotations

import functools
import json
import re
from importlib import resources
from typing import Any

from ascend.errors import UserError

# (engine, major and minor version) of each list; made by `python -m serve.engine_flags.dump`.
LISTED = {
    ("vllm", (0, 23)): "vllm-0.23.json",
    ("vllm", (0, 32)): "vllm-0.32.json",
    ("sglang", (0, 5)): "sglang-0.5.json",
}
ASCEND = "vllm-ascend-0.23.json"


@functools.cache
def table(file: str) -> dict[str, Any]:
    """Return a file of ``data/``."""
    content: dict[str, Any] = json.loads(resources.files(__package__).joinpath("data", file).read_text("utf-8"))
    return content


def flag_file(engine: str, version: str | None, device: str) -> tuple[str, bool]:
    """Return the name of the list for a version, and whether it is of that very version (major and minor).

    For a version without a list it is the newest older one: what that knows holds mostly, what it lacks may be new.
    ``version`` None is what the device is served with: vLLM-Ascend is a plug-in of vLLM 0.23.
    """
    listed = sorted(number for name, number in LISTED if name == engine)
    if not listed:
        raise UserError(f"unknown engine '{engine}': it is vllm or sglang")
    match = re.match(r"(\d+)\.(\d+)", version or "")
    wanted = (int(match[1]), int(match[2])) if match else (listed[0] if device == "npu" else listed[-1])
    nearest = max((number for number in listed if number <= wanted), default=listed[0])
    return LISTED[engine, nearest], nearest == wanted


def environment_names(engine: str, version: str | None, device: str) -> frozenset[str]:
    """Return the environment variables that the engine itself reads (CANN, HCCL and NCCL have their own)."""
    names = set(table(flag_file(engine, version, device)[0])["environment"])
    if device == "npu":
        names |= set(table(ASCEND)["environment"])
    return frozenset(names)
