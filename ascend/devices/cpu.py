"""The CPU: what everything falls back to, and what all of it is developed and tested on."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from ascend.devices.base import Device, Event, Memory, Problem, Result
from ascend.devices.facts import TABLE, DeviceFacts, MiB

# ARM processors put two numbers where x86 has a name (implementer and part, as util-linux's lscpu reads them).
ARM_NAMES = {
    ("0x48", "0xd01"): "HiSilicon Kunpeng 920 (TaiShan v110)",
    ("0x48", "0xd02"): "HiSilicon TaiShan v120",
    ("0x41", "0xd0c"): "ARM Neoverse N1",
    ("0x41", "0xd40"): "ARM Neoverse V1",
    ("0x41", "0xd49"): "ARM Neoverse N2",
    ("0x41", "0xd4f"): "ARM Neoverse V2",
}
# Where each version of cgroups keeps limit, use and the file cache within the use that can be given back at any time.
CGROUP_2 = ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
CGROUP_1 = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


class CpuEvent:
    """A moment on the host's clock: CPU work is done when the call that does it returns."""

    def __init__(self) -> None:
        self._ns: int | None = None

    def record(self, stream: Any = None) -> None:
        """Take the time."""
        self._ns = time.perf_counter_ns()

    def wait(self, stream: Any = None) -> None:
        """Do nothing: what came before is done."""

    def synchronize(self) -> None:
        """Do nothing: what came before is done."""

    def elapsed_time(self, end_event: CpuEvent) -> float:
        """Return the milliseconds from this event to a later one; both must have been recorded."""
        if self._ns is None or end_event._ns is None:
            raise RuntimeError("an event has no time before it is recorded")
        return (end_event._ns - self._ns) / 1e6


class CpuDevice(Device):
    """The processor cores and the memory this process may use. It has no graphs: a capture is the function itself."""

    type = "cpu"
    label = "CPU"
    collective_backend = "gloo"
    captures_graphs = False

    def __str__(self) -> str:
        return "cpu"

    def why_unavailable(self) -> Problem | None:
        """Return a problem only where torch is not installed."""
        if self.host.package("torch") is None:
            return Problem("torch is not installed", "start through serve/launch.sh, which installs it")
        return None

    def count(self) -> int:
        """Return 1: all cores are one device."""
        return 1

    def cores(self) -> int:
        """Return the number of cores this process may run on."""
        return len(os.sched_getaffinity(0))

    def name(self, index: int | None = None) -> str:
        """Return the processor's model name, or what an ARM kernel says in its place."""
        fields = dict(re.findall(r"^([^\t:]+?)\s*:[ \t]*(.*)$", self.host.text("/proc/cpuinfo"), re.MULTILINE))
        if fields.get("model name"):
            return str(fields["model name"])
        implementer, part = fields.get("CPU implementer", "unknown"), fields.get("CPU part", "unknown")
        unnamed = f"{platform.machine()} (implementer {implementer}, part {part})"
        return ARM_NAMES.get((implementer, part), unnamed)

    def facts(self, index: int | None = None) -> DeviceFacts:
        """Return the CPU's row under this processor's name: nothing in it is known until measured."""
        return replace(TABLE["CPU"], name=self.name())

    def memory(self, index: int | None = None) -> Memory:
        """Return the memory this process may use; reserved is what it holds resident.

        The machine's MemTotal and MemAvailable, or the tightest cgroup (version 1 or 2) above this process if that is
        less. A cgroup's inactive file cache counts as free, since the kernel gives it back on demand.
        """
        machine = dict(re.findall(r"^(\w+):\s+(\d+) kB", self.host.text("/proc/meminfo"), re.MULTILINE))
        resident = re.search(r"^VmRSS:\s+(\d+) kB", self.host.text("/proc/self/status"), re.MULTILINE)
        total, free = int(machine["MemTotal"]) * 1024, int(machine["MemAvailable"]) * 1024
        for limit, used in self._cgroup_limits():
            total, free = min(total, limit), min(free, max(limit - used, 0))
        return Memory(total, free, int(resident.group(1)) * 1024 if resident else 0)

    def _cgroup_limits(self) -> Iterator[tuple[int, int]]:
        """Yield (limit, used) in bytes of each cgroup that holds this process and has a limit."""
        for line in self.host.text("/proc/self/cgroup").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            mount, limit_file, usage_file, cache_key = CGROUP_1 if controllers else CGROUP_2
            # Every level may set a limit. A container sees its own group as the mount's root, under any path.
            for level in (PurePosixPath(group), *PurePosixPath(group).parents):
                folder = f"{mount}{level}"
                limit = self.host.text(f"{folder}/{limit_file}").strip()
                usage = self.host.text(f"{folder}/{usage_file}").strip()
                if limit.isdecimal() and usage.isdecimal():
                    stat = re.search(rf"^{cache_key} (\d+)$", self.host.text(f"{folder}/memory.stat"), re.MULTILINE)
                    yield int(limit), int(usage) - int(stat.group(1) if stat else 0)

    def quantised_formats(self, index: int | None = None) -> tuple[str, ...]:
        """Return every format: the reference ops widen the weights and compute. It says nothing about speed."""
        return ("fp8", "w8a8", "w4a16")

    def watts(self, index: int | None = None) -> float | None:
        """Return the draw of all processor packages over 50 ms, from their energy counters (RAPL).

        None where one cannot be read, or wrapped around just then: part of a sum is no figure.
        """
        before = self._energy()
        start = time.perf_counter()
        time.sleep(0.05)
        after, seconds = self._energy(), time.perf_counter() - start
        spent = [after.get(name, 0.0) - joules for name, joules in before.items()]
        return sum(spent) / seconds if spent and min(spent) >= 0 and sum(spent) else None

    def _energy(self) -> dict[str, float]:
        """Return the joules that each package's counter stands at."""
        packages = self.host.path("/sys/class/powercap").glob("*-rapl:[0-9]*")
        texts = {zone.name: self.host.text(f"/sys/class/powercap/{zone.name}/energy_uj") for zone in packages}
        return {name: int(text) / 1e6 for name, text in texts.items() if name.count(":") == 1 and text.strip()}

    def activate(self) -> None:
        """Do nothing: there is one CPU."""

    def synchronize(self) -> None:
        """Do nothing: a call that returned is done."""

    def stream(self) -> Any:
        """Return torch's stand-in for a stream, in which nothing runs beside anything else."""
        import torch

        return torch.cpu.Stream()

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context in which ``stream`` is the current one."""
        import torch

        context: AbstractContextManager[Any] = torch.cpu.stream(stream)
        return context

    def event(self) -> Event:
        """Return a new event on the host's clock."""
        return CpuEvent()

    def graph_pool(self) -> None:
        """Return None: nothing is captured."""

    def capture(self, fn: Callable[[], Result], pool: Any = None) -> Callable[[], Result]:
        """Return ``fn`` itself, to be run eagerly (`captures_graphs` is False)."""
        return fn

    def measure_bandwidth(self, seconds: float = 0.4) -> float:
        """Return the bytes per second that torch's threads read from memory, as measured now.

        Three reductions that do next to nothing per byte (sum and largest of float32, sum of int64) take turns over an
        array of at least 512 MiB and eight times the last-level caches, so that at most an eighth of it can come from
        there, for about ``seconds``; the fastest single pass counts, since other work on the machine only slows one
        down. Written first by all threads, so that on several sockets each has its share. The threads are torch's
        (``torch.get_num_threads``). Against a C loop of AVX-512 loads on two cores of an EPYC the result was the same
        within what that machine varied.
        """
        import torch

        size = self.uncached_bytes()
        data = torch.empty(size, dtype=torch.uint8).fill_(1)
        floats, integers = data.view(torch.float32), data.view(torch.int64)
        passes: tuple[Callable[[], Any], ...] = (floats.sum, floats.amax, integers.sum)
        fastest, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end or fastest == float("inf"):
            for read in passes:
                start = time.perf_counter()
                read()
                fastest = min(fastest, time.perf_counter() - start)
        return size / fastest

    def uncached_bytes(self) -> int:
        """Return how much to read so that at most an eighth comes from caches; never above half the free memory."""
        return min(max(512 * MiB, 8 * self._last_level_cache()), self.memory().free // 2) // MiB * MiB

    def _last_level_cache(self) -> int:
        """Return the bytes of all caches of the highest level together, 0 where the kernel does not tell."""
        sizes: dict[tuple[int, str], int] = {}
        for cache in self.host.path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
            try:
                level, shared, size = ((cache / file).read_text() for file in ("level", "shared_cpu_list", "size"))
            except OSError:
                continue
            sizes[int(level), shared] = int(size.strip().rstrip("K")) * 1024
        top = max((level for level, _ in sizes), default=0)
        return sum(size for (level, _), size in sizes.items() if level == top)
