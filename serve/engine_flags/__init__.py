"""What each engine version really accepts: flags, values, keys of `--additional-config`, and what goes together.

Light: no torch, no engine is imported; the answers come from lists that `serve.engine_flags.dump` made from the engines
themselves. Read `parser.py` first, then `rules.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve.engine_flags.additional_config import check_additional_config
from serve.engine_flags.parser import read_words
from serve.engine_flags.rules import check_combination
from serve.engine_flags.tables import environment_names, flag_file

__all__ = ["check_additional_config", "check_combination", "check_flags", "environment_names", "read_flags"]


def read_flags(engine: str, version: str | None, device: str, flags: Sequence[str]) -> dict[str, Any]:
    """Return what engine flags mean to the engine: values by full names without dashes, aliases and JSON resolved.

    Args:
        engine: "vllm" or "sglang". version: of the installed engine; None: the one the device is served with.
        device: "npu", "cuda" or "cpu". flags: the engine's arguments as a list of words.

    Raises:
        UserError: a flag that this version does not know, or a value that it would not take.
    """
    file, exact = flag_file(engine, version, device)
    return read_words(file, engine, flags, exact)


def check_flags(engine: str, version: str | None, device: str, flags: Sequence[str]) -> None:
    """Raise `UserError`, one line with a suggestion, for what `read_flags` would not read, and wrong keys on NPU."""
    found = read_flags(engine, version, device, flags)
    additional = found.get("additional-config")
    if device == "npu" and isinstance(additional, Mapping):
        check_additional_config(additional)
