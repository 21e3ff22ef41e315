"""What `nvidia-smi --query-… --format=csv,noheader,nounits` prints, read, and what it says when it cannot.

A row counts only if it is whole: as many fields as were asked for, and a line end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

GPU = (
    "index",
    "uuid",
    "name",
    "memory.total",
    "memory.free",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
    "mig.mode.current",
    "persistence_mode",
    "driver_version",
)
REMAPPED = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")
APPS = ("gpu_uuid", "pid", "process_name", "used_memory")
FABRIC = ("index", "fabric.state", "fabric.status")

# In place of a value: the card has no such thing, or this driver cannot tell.
ABSENT = ("[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]", "")
# In place of a value: the card does not answer.
BROKEN = ("ERR!", "[GPU requires reset]", "[Unknown Error]", "[GPU is lost]")

SAYS = (
    (
        r"Driver/library version mismatch",
        "the driver was updated while an older one was loaded",
        "reboot, or unload the nvidia modules and load them again",
    ),
    (
        r"couldn't communicate with the NVIDIA driver",
        "no driver is loaded",
        "load the nvidia module; after a new kernel install the driver for it (dkms)",
    ),
    (
        r"Unable to determine the device handle for (GPU ?\S+):",
        "a card does not answer any more",
        "look for Xid 79 in dmesg, power the server off and on, then have the card looked at",
    ),
    (r"No devices were found", "the driver sees no card", "start a container with --gpus all; else look at lspci"),
    (
        r"Failed to initialize NVML",
        "the driver does not start",
        "check the driver's modules, and in a container that it was started with --gpus all",
    ),
)


def parse_csv(text: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """Read rows of ``fields``. Lines that are anything else (warnings, a cut-off end) are left out."""
    rows = []
    for line in text.splitlines(keepends=True):
        values = [value.strip() for value in line.split(",")]
        if line.endswith("\n") and len(values) == len(fields) and values[0]:
            rows.append(dict(zip(fields, values, strict=True)))
    return rows


def number(value: str) -> int | None:
    """Return a count, or None where there is none."""
    return int(value) if value.isdecimal() else None


def says(text: str) -> tuple[str, str] | None:
    """Return what the tool's own words mean and what to do, if it is one of the known complaints."""
    return next(((meaning, remedy) for pattern, meaning, remedy in SAYS if re.search(pattern, text)), None)
