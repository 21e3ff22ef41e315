"""Where the files of `serve/deploy` are, what the launcher's own numbers are, and the tools that know such files."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.args import parse
from serve.watch import process, supervise

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "serve" / "deploy"
UNIT = DEPLOY / "systemd" / "antangelmed.service"
PROBE = DEPLOY / "probe.sh"
SLOWEST_LOAD_S = 206e9 / 0.15e9  # the BF16 weights from a hard disk

SETTINGS = parse([])
# The longest way out: nothing new is admitted, what runs is drained, the engine ends, three rounds for what is left.
STOP_S = supervise.ADMITTED_SECONDS + SETTINGS.drain + process.GRACE_SECONDS + 3 * process.ORPHAN_SECONDS


def tool(name: str) -> str:
    """The path of a command; without it the test is skipped."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not on the PATH")
    return found


def run(*command: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **more)


def seconds(text: str) -> float:
    """Return a time as systemd and compose write it ("35min", "3m", "1h30s") in seconds."""
    units = {"h": 3600, "min": 60, "m": 60, "s": 1, "": 1}
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(h|min|m|s|)", text)
    assert "".join(number + unit for number, unit in parts) == text.replace(" ", ""), text
    return sum(float(number) * units[unit] for number, unit in parts)


@cache
def compose() -> dict[str, Any]:
    """The compose file."""
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())  # type: ignore[no-any-return]
