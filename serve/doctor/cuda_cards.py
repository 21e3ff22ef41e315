"""Checks of NVIDIA cards, by `nvidia-smi`: are they there, whole, free, and initialised."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ascend.devices import CudaDevice
from ascend.devices.cuda import OLDEST_DRIVER
from serve.doctor import nvidia_smi
from serve.doctor.finding import Finding, error, note, ok, unknown, warning
from serve.doctor.machine import Answer, Machine

IDLE_MIB = 2048  # what a driver holds of an idle card is less; of H20 and H200 nvidia-smi shows 0 to 600
HOT_CELSIUS = 85
# Xid errors that are the card's and not a program's, from NVIDIA's Xid catalogue.
XID = {
    48: "uncorrectable memory error",
    63: "a memory row is to be remapped",
    64: "a memory row could not be remapped",
    74: "NVLink error",
    79: "the card has fallen off the bus",
    92: "many correctable memory errors",
    94: "contained memory error",
    95: "uncontained memory error",
    119: "the card's own processor does not answer",
    120: "the card's own processor failed",
}
VISIBLE = "CUDA_VISIBLE_DEVICES"
NVSWITCH = ("/dev/nvidia-nvswitchctl", "/proc/driver/nvidia-nvswitch/devices")


def check_device(m: Machine) -> Iterator[Finding]:
    """What the device layer would refuse: driver, cards, a CUDA build of torch; and the driver's age."""
    device = CudaDevice(host=m.host)
    parts = (device._cards, device._packages)  # each apart, so that all that is missing is told at once
    problems = [problem for problem in (part() for part in parts) if problem]
    for problem in problems:
        yield error(problem.reason, "the launcher refuses device cuda without it", problem.remedy)
    if not problems:
        yield ok("the driver, cards and a CUDA build of torch are there")
    if m.host.package("torch") is None:
        return
    software = device.software()
    driver, cuda = software.get("driver"), software.get("cuda", "")
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0])) if cuda[:1].isdigit() else None
    if driver and oldest:
        if int(driver.split(".")[0]) < oldest:
            why = f"torch is built for CUDA {cuda}, which needs driver {oldest} or newer (or a compatibility package)"
            yield warning(f"the driver is {driver}", why, "update the driver")
        else:
            yield ok(f"driver {driver} is new enough for CUDA {cuda}")
    elif not problems:
        yield unknown("whether the driver is new enough for torch's CUDA", "one of the two versions is not told")


def cards(m: Machine) -> tuple[Answer, list[dict[str, str]]]:
    """Return what nvidia-smi answers about the cards, and the rows that could be read."""
    return _query(m, "gpu", nvidia_smi.GPU)


def used(m: Machine) -> list[dict[str, str]]:
    """Return the rows of the cards this launch may use: those that CUDA_VISIBLE_DEVICES leaves."""
    rows, visible = cards(m)[1], m.host.environ.get(VISIBLE)
    if visible is None:
        return rows
    left = [one.strip() for one in visible.split(",") if one.strip()]
    return [row for row in rows if any(row["index"] == one or row["uuid"].startswith(one) for one in left)]


def _query(m: Machine, what: str, fields: Sequence[str]) -> tuple[Answer, list[dict[str, str]]]:
    answer = m.run("nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits")
    return answer, nvidia_smi.parse_csv(answer.text, fields)


def check_nvidia_smi(m: Machine) -> Iterator[Finding]:
    """Whether nvidia-smi answers, and shows as many cards as there are device nodes."""
    answer, rows = cards(m)
    if answer.is_missing:
        yield unknown("health and free memory of the cards", "nvidia-smi is not installed", "it comes with the driver")
        return
    if said := nvidia_smi.says(answer.text):
        yield error(f"nvidia-smi: {said[0]}", "CUDA would not start either", said[1])
    if answer.problem and not rows and not said:
        yield unknown("health and free memory of the cards", f"nvidia-smi {answer.problem}", "run it by hand")
    elif not rows and not said:
        yield unknown("health and free memory of the cards", "nvidia-smi's answer could not be read")
    nodes = m.host.nodes(r"nvidia\d+")
    if rows and len(rows) < len(nodes):
        why = f"nvidia-smi shows {len(rows)} and /dev has {len(nodes)}: a card that is not shown counts as broken"
        make = error if m.host.environ.get(VISIBLE) is None else warning
        yield make("not every card is shown", why, "look for Xid errors in dmesg; power off and on")
    elif rows:
        names = sorted({row["name"] for row in rows})
        yield ok(f"nvidia-smi shows {len(rows)} x {', '.join(names)}, driver {rows[0]['driver_version']}")


def check_cards(m: Machine) -> Iterator[Finding]:
    """Each card's answers: lost, memory errors, MIG, heat, persistence."""
    rows = used(m)
    for row in rows:
        yield from _card(row)
    if rows and all(nvidia_smi.number(row["ecc.errors.uncorrected.volatile.total"]) == 0 for row in rows):
        yield ok("no card counts uncorrectable memory errors since the driver was loaded")


def _card(row: dict[str, str]) -> Iterator[Finding]:
    where = f"card {row['index']}"
    broken = next((value for value in row.values() if value in nvidia_smi.BROKEN), None)
    if broken:
        yield error(f"{where} answers {broken}", "CUDA cannot use it", "`nvidia-smi -r`, else power off and on")
        return
    errors = row["ecc.errors.uncorrected.volatile.total"]
    if errors in nvidia_smi.ABSENT:
        yield unknown(f"{where}: memory errors", "ECC is off, or the card has none")
    elif nvidia_smi.number(errors):
        why = "these bits could not be corrected: what lay there was wrong"
        yield error(f"{where}: {errors} uncorrectable memory errors since the driver was loaded", why, "reset the card")
    if row["mig.mode.current"] == "Enabled":
        remedy = f"nvidia-smi -i {row['index']} -mig 0"
        yield error(f"{where} is in MIG mode", "an engine gets a part of it only", remedy)
    heat = nvidia_smi.number(row["temperature.gpu"])
    if heat is not None and heat >= HOT_CELSIUS:
        yield warning(f"{where} has {heat} °C", "it will be slowed down", "check fans, air flow and the room")
    if row["persistence_mode"] == "Disabled":
        why = "the driver is unloaded when no process uses the card: starts are slow and settings are lost"
        yield note(f"{where}: persistence mode is off", why, "nvidia-smi -pm 1, or start nvidia-persistenced")


def check_memory(m: Machine) -> Iterator[Finding]:
    """Card memory that something else holds, and the processes that hold it."""
    rows = used(m)
    if not rows:
        return
    index = {row["uuid"]: row["index"] for row in rows}
    answer, apps = _query(m, "compute-apps", nvidia_smi.APPS)
    if answer.problem and not answer.is_missing:
        yield unknown("other processes on the cards", f"nvidia-smi {answer.problem}")
    for app in apps:
        if app["gpu_uuid"] not in index:
            continue
        where = f"card {index[app['gpu_uuid']]}"
        yield warning(
            f"{where}: pid {app['pid']} ({app['process_name']}) holds {app['used_memory']} MiB",
            "the engine takes a share of all the memory and fails if it is not free",
            f"end it, or leave the card out by {VISIBLE}",
        )
    busy = {app["gpu_uuid"] for app in apps}
    free = 0
    for row in rows:
        total, left = (nvidia_smi.number(row[name]) for name in ("memory.total", "memory.free"))
        if total is None or left is None:
            yield unknown(f"card {row['index']}: its free memory", "nvidia-smi shows none")
        elif total - left > IDLE_MIB and row["uuid"] not in busy:
            why = "it is held in another container or by a process that hangs; the engine fails if it is not free"
            what = f"card {row['index']}: {total - left} of {total} MiB are in use, and no process is shown"
            yield warning(what, why, "look on the host itself: `nvidia-smi`, `fuser -v /dev/nvidia*`")
        else:
            free += row["uuid"] not in busy
    if free == len(rows):
        yield ok(f"the memory of all {free} cards is free")


def check_remapped(m: Machine) -> Iterator[Finding]:
    """Memory rows that were, or could not be, replaced by spare ones."""
    answer, rows = _query(m, "remapped-rows", nvidia_smi.REMAPPED)
    if answer.is_missing or not cards(m)[1]:
        return
    if answer.problem or not rows:
        yield unknown("remapped memory rows", f"nvidia-smi {answer.problem or 'shows none'}")
    for row in rows:
        if (nvidia_smi.number(row["remapped_rows.failure"]) or 0) > 0:
            why = "a broken memory row could not be replaced: the card's memory is at its end"
            yield error(f"{row['gpu_uuid']}: row remapping failed", why, "leave the card out and have it replaced")
        if (nvidia_smi.number(row["remapped_rows.pending"]) or 0) > 0:
            yield warning(f"{row['gpu_uuid']}: a row is to be remapped", "it is until the next reset", "reset the card")


def check_fabric(m: Machine) -> Iterator[Finding]:
    """NVSwitch machines (H20, H200 HGX): until the fabric manager is done, CUDA fails with 802."""
    answer, rows = _query(m, "gpu", nvidia_smi.FABRIC)
    has_switches = any(m.host.path(path).exists() for path in NVSWITCH)
    states = {row["fabric.state"] for row in rows if "N/A" not in row["fabric.state"]} - {"Not Supported"}
    waiting = sorted(states - {"Completed"})
    if waiting:
        yield error(
            f"the NVLink fabric is '{waiting[0]}'",
            "CUDA fails with error 802, system not yet initialized",
            "systemctl enable --now nvidia-fabricmanager, in the very version of the driver; then wait a minute",
        )
    elif states:
        yield ok("the NVLink fabric is set up")
    elif has_switches:
        missing = answer.problem or "does not tell (an older driver)"
        remedy = "systemctl status nvidia-fabricmanager; its version must be the driver's"
        yield unknown("whether the NVLink fabric is set up", f"nvidia-smi {missing}", remedy)


def check_xid(m: Machine) -> Iterator[Finding]:
    """What the kernel's log tells of the cards."""
    if not m.host.nodes("nvidiactl"):
        return
    answer = m.run("dmesg")
    if answer.problem:
        yield unknown("errors of the cards in the kernel's log", f"dmesg {answer.problem}", "run it as root")
        return
    seen = {(bus, int(code)) for bus, code in re.findall(r"NVRM: Xid \(PCI:([\da-fA-F:.]+)\): (\d+)", answer.text)}
    found = sorted((bus, code) for bus, code in seen if code in XID)
    for bus, code in found:
        why = "the kernel has logged it since the machine started"
        yield warning(f"card at {bus}: Xid {code}, {XID[code]}", why, "reset it; if it comes again, have it looked at")
    if not found:
        yield ok("the kernel's log has no Xid error of a card's own")
