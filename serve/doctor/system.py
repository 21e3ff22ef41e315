"""Checks of the machine itself: shared memory, limits, memory, disk, clock, NUMA, who runs this."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator

from ascend.devices.cpu import CpuDevice
from ascend.devices.facts import GiB, MiB
from serve.doctor.finding import Finding, error, note, ok, unknown, warning
from serve.doctor.machine import Machine

# The workers of several cards pass messages through shared memory (vLLM: 24 MiB x 10 for a group; NCCL too); one card
# has one worker. A container's default is 64 MiB.
LEAST_SHM, GOOD_SHM = 256 * MiB, 2 * GiB
LEAST_FILES, LEAST_PROCESSES = 8192, 4096
LEAST_DISK, GOOD_DISK, GOOD_TMP = 256 * MiB, 10 * GiB, 2 * GiB  # /tmp: kernels while they are compiled, no more
SIZES = {"": 1, "k": 1024, "m": MiB, "g": GiB}
LIMITS = "/proc/self/limits"
ARCHITECTURES = ("x86_64", "aarch64")


def check_shared_memory(m: Machine) -> Iterator[Finding]:
    """The size of /dev/shm as it is mounted."""
    mounts = re.findall(r"^\S+ /dev/shm tmpfs (\S+)", m.host.text("/proc/self/mounts"), re.MULTILINE)
    size = re.search(r"\bsize=(\d+)([kmg]?)", mounts[-1]) if mounts else None
    if not mounts:
        yield unknown("the size of /dev/shm", "it is not in /proc/self/mounts")
        return
    if size is None:
        yield ok("/dev/shm may take half of the memory")
        return
    nbytes = int(size[1]) * SIZES[size[2]]
    shown, remedy = f"/dev/shm has {nbytes / GiB:.2f} GiB", "start the container with --shm-size=16g or --ipc=host"
    if nbytes < LEAST_SHM and len(m.host.nodes(r"v?davinci\d+|nvidia\d+")) > 1:
        yield error(shown, "the workers pass messages through it and die with a bus error when it is full", remedy)
    elif nbytes < GOOD_SHM:
        yield warning(shown, "the engine's processes pass messages through it", remedy)
    else:
        yield ok(shown)


def check_limits(m: Machine) -> Iterator[Finding]:
    """Open files, processes, and locked memory where servers talk by RDMA."""
    limits = dict(re.findall(r"^(Max [a-z ]+?)\s{2,}(\S+)", m.host.text(LIMITS), re.MULTILINE))
    if not limits:
        yield unknown("this user's limits", f"{LIMITS} cannot be read")
        return
    wanted = [
        ("Max open files", LEAST_FILES, "every connection and every file of the model takes one", "nofile"),
        ("Max processes", LEAST_PROCESSES, "the engine's libraries start hundreds of threads a card", "nproc"),
    ]
    if m.asked.nodes > 1 and m.asked.device != "cpu":
        wanted.append(("Max locked memory", 2**62, "RDMA between servers registers locked memory", "memlock"))
    for name, least, why, key in wanted:
        soft = limits.get(name, "unknown")
        if soft == "unlimited" or (soft.isdecimal() and int(soft) >= least):
            yield ok(f"limit: {name[4:]} {soft}")
        else:
            value = "unlimited" if key == "memlock" else "65536"
            remedy = f"{key} {value} in /etc/security/limits.conf, docker --ulimit {key}=, systemd Limit{key.upper()}="
            yield warning(f"limit: {name[4:]} {soft}", why, remedy)


def check_memory(m: Machine) -> Iterator[Finding]:
    """Free memory, a container's limit, swap."""
    if "MemAvailable" not in (text := m.host.text("/proc/meminfo")):
        yield unknown("free memory", "/proc/meminfo cannot be read")
        return
    device = CpuDevice(host=m.host)
    memory = device.memory()
    total = int(re.search(r"^MemTotal:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024  # type: ignore[index]
    limited = f" (a container's limit, the machine has {total / GiB:.0f})" if memory.total < total else ""
    yield ok(f"memory: {memory.free / GiB:.1f} GiB free of {memory.total / GiB:.1f}{limited}")
    swap = re.search(r"^SwapTotal:\s+(\d+) kB", text, re.MULTILINE)
    if swap and int(swap[1]):
        why = "what a request says could be written to disk, and the engine would stall while it is fetched back"
        yield note(f"swap is on, {int(swap[1]) / 2**20:.1f} GiB", why, "swapoff -a, or an encrypted swap")


def check_disk(m: Machine) -> Iterator[Finding]:
    """Room where logs and compiled kernels go; that the state directory can be written."""
    environ = m.host.environ
    home = environ.get("HOME", "/root")
    state = f"{environ.get('XDG_STATE_HOME') or f'{home}/.local/state'}/antangelmed"
    cache = environ.get("VLLM_CACHE_ROOT") or environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    for what, folder, good in (
        ("logs and state", state, GOOD_DISK),
        ("compiled kernels", cache, GOOD_DISK),
        ("temporary files", "/tmp", GOOD_TMP),
    ):
        free = m.free_bytes(folder)
        if free is None:
            yield unknown(f"room for {what}", f"{folder} cannot be looked at")
        elif free < LEAST_DISK:
            yield error(f"{free / GiB:.2f} GiB free for {what} in {folder}", "a start fills it", "make room")
        elif free < good:
            yield warning(f"{free / GiB:.1f} GiB free for {what} in {folder}", "it fills up in time", "make room")
        else:
            yield ok(f"{free / GiB:.0f} GiB free for {what} in {folder}")
    existing = m.host.path(state)
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        remedy = "set XDG_STATE_HOME to a writable place"
        yield error(f"{state} cannot be written", "the engine's log goes there", remedy)


def check_clock(m: Machine) -> Iterator[Finding]:
    """Whether a time service keeps the clock: audit records and several servers need it."""
    make = warning if m.asked.nodes > 1 else note
    why = "audit records tell the wrong time" + (", and servers do not agree on it" if m.asked.nodes > 1 else "")
    remedy = "start chrony or systemd-timesyncd with a time server of the house"
    timedatectl = m.run("timedatectl", "show", "-p", "NTPSynchronized", "--value")
    chrony = m.run("chronyc", "tracking")
    if timedatectl.text.strip() == "yes" or re.search(r"^Leap status\s*:\s*Normal", chrony.text, re.MULTILINE):
        yield ok("the clock is synchronised")
    elif timedatectl.text.strip() == "no" or "Not synchronised" in chrony.text:
        yield make("the clock is not synchronised", why, remedy)
    else:
        yield unknown("whether the clock is synchronised", "neither timedatectl nor chronyc tells", remedy)


def check_processor(m: Machine) -> Iterator[Finding]:
    """Architecture, frequency governor, automatic NUMA balancing, transparent huge pages."""
    machine = platform.machine()
    if machine in ARCHITECTURES:
        yield ok(f"processor: {machine}, {CpuDevice(host=m.host).name()}")
    else:
        why = f"engines are built for {' and '.join(ARCHITECTURES)}"
        yield error(f"processor: {machine}", why, "use another server")
    governor = m.host.text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    if governor and governor != "performance":
        why = "the host prepares every step of the cards, at low clocks more slowly"
        yield note(f"the CPU governor is {governor}", why, "cpupower frequency-set -g performance")
    if m.host.text("/proc/sys/kernel/numa_balancing").strip() not in ("", "0"):
        why = "the kernel moves memory about while the engine binds its threads to cores"
        yield note("automatic NUMA balancing is on", why, "sysctl kernel.numa_balancing=0")
    pages = re.search(r"\[(\w+)\]", m.host.text("/sys/kernel/mm/transparent_hugepage/enabled"))
    if pages and pages[1] == "never":
        yield note("transparent huge pages are off", "large buffers on the host are slower", "madvise is enough")


def check_user(m: Machine) -> Iterator[Finding]:
    """Who runs this, and what new files let others do."""
    status = m.host.text("/proc/self/status")
    user, mask = (re.search(rf"^{name}:\s+(\w+)", status, re.MULTILINE) for name in ("Uid", "Umask"))
    if user is None:
        yield unknown("who runs this", "/proc/self/status cannot be read")
    elif user[1] == "0":
        why = "a hole in the engine would be one in the whole machine"
        yield warning("this runs as root", why, "make a user for it, in the driver's group where cards are used")
    else:
        yield ok(f"this runs as user {user[1]}, not as root")
    if mask and not int(mask[1], 8) & 0o002:
        why = "caches could be changed by others"
        yield warning(f"umask {mask[1]} lets everyone write new files", why, "umask 027")
