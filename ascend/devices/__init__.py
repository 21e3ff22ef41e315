"""Which device to compute on: ask for one by name, get it or one line that says why not.

Read `base.py` first, it is the contract; `facts.py` is what the cards can do on paper. Importing this package is cheap:
torch comes in when a device is truly there.
"""

from __future__ import annotations

from ascend.devices.base import Device, Event, Host, Memory, Problem
from ascend.devices.cpu import CpuDevice
from ascend.devices.cuda import CudaDevice
from ascend.devices.facts import DeviceFacts, Figure, lookup
from ascend.devices.npu import NpuDevice
from ascend.errors import UserError, suggest

__all__ = ["Device", "DeviceFacts", "Event", "Figure", "Host", "Memory", "Problem", "choose", "get_device", "lookup"]

DEVICES: dict[str, type[Device]] = {kind.type: kind for kind in (NpuDevice, CudaDevice, CpuDevice)}  # auto's order
NAMES = ("auto", *sorted(DEVICES))
MEANT = {"gpu": "cuda", "nvidia": "cuda", "ascend": "npu"}


def get_device(name: str = "auto", host: Host | None = None) -> Device:
    """Return the device called ``name``: "auto", "cpu", "cuda", "npu", or one card, as in "cuda:1".

    Raises `UserError` with the reason and the remedy if it is not there.
    """
    return choose(name, host)[0]


def choose(name: str = "auto", host: Host | None = None) -> tuple[Device, str]:
    """Return the device called ``name`` and a sentence that says which it is and why.

    "auto" takes an NPU, else a CUDA device, else the CPU. Raises `UserError` as `get_device` does.
    """
    host = host or Host()
    kind, index = _parse(name)
    passed_over: list[str] = []
    for candidate in DEVICES if kind == "auto" else [kind]:
        if candidate != "npu":
            # torch loads an installed torch_npu by itself and fails with it if CANN is not sourced.
            host.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        device = DEVICES[candidate](index, host)
        problem = device.why_unavailable()
        if problem is None:
            count = device.count()
            _check_index(candidate, index, count)
            reason = "as asked for" if kind == candidate else ", ".join(passed_over) or f"{count} visible"
            return device, f"device {candidate}: {reason}"
        if kind == candidate:
            way_out = ", or use device cpu" if kind != "cpu" else ""
            raise UserError(f"device {kind} is not available: {problem.reason}; {problem.remedy}{way_out}")
        passed_over.append(f"no {device.label} ({problem.reason})")
        remedy = problem.remedy
    raise UserError(f"no device is available: {', '.join(passed_over)}; {remedy}")


def _parse(name: str) -> tuple[str, int]:
    kind, colon, index = name.partition(":")
    if kind not in NAMES:
        meant = f" (did you mean '{MEANT[kind.lower()]}'?)" if kind.lower() in MEANT else suggest(kind.lower(), NAMES)
        raise UserError(f"unknown device '{name}'{meant}: choose one of {', '.join(NAMES)}")
    if colon and (kind == "auto" or not index.isdecimal()):
        raise UserError(f"unknown device '{name}': a card is named by its number, as in npu:0 or cuda:1")
    return kind, int(index or 0)


def _check_index(kind: str, index: int, count: int) -> None:
    if index >= count:
        last = f" to {kind}:{count - 1}" if count > 1 else " alone"
        raise UserError(f"device {kind}:{index} does not exist: this process sees {kind}:0{last}")
