"""What a device reaches here and now: bytes read and matrix products per second. Every share in `perf` is of these.

A vendor's sheet says what a card could do; clocks, cooling and what else runs decide what it does. So both rates are
measured in the same run as what is held against them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ascend.devices.base import Device
from ascend.devices.cpu import CpuDevice

READ_BYTES = 1 << 30
PASSES = 5
# Rows of the square product, by device: large enough for a card's full rate, small enough for two CPU cores.
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192, "npu": 8192}
EMULATED_SHARE = 64  # an emulated card's rates mean nothing: as much smaller is the work


def read_rate(device: Device, emulated: bool = False) -> float:
    """Return bytes per second that ``device`` reads from its memory, the fastest pass of several ways to read.

    On a CPU see `CpuDevice.measure_bandwidth`. On a card: sum and largest of a fp32 array of 1 GiB, and a copy of it,
    which counts twice since it writes as much as it reads.
    """
    if isinstance(device, CpuDevice):
        return device.measure_bandwidth()
    import torch

    count = READ_BYTES // 4 // (EMULATED_SHARE if emulated else 1)
    data, copy = (torch.ones(count, dtype=torch.float32, device=device.torch_device) for _ in range(2))
    reads: tuple[tuple[Callable[[], Any], int], ...] = ((data.sum, 1), (data.amax, 1), (lambda: copy.copy_(data), 2))
    return max(4 * count * times / seconds(device, read) for read, times in reads)


def matmul_rate(device: Device, dtype: str = "bfloat16", emulated: bool = False) -> float:
    """Return floating-point operations per second of a large square product in ``dtype``, the fastest of several."""
    import torch

    size = MATMUL_SIZE[device.type] // (16 if emulated else 1)
    a, b = (torch.randn(size, size, device=device.torch_device).to(getattr(torch, dtype)) for _ in range(2))
    return float(2 * size**3 / seconds(device, lambda: a @ b))


def seconds(device: Device, work: Callable[[], Any], passes: int = PASSES) -> float:
    """Return the seconds that ``work`` takes by the device's own events, the fastest of several after one warm-up."""
    times = []
    for _ in range(passes + 1):
        begin, end = device.event(), device.event()
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times[1:])
