"""Checks of what lies below Python on Ascend: driver, device nodes, CANN, its kernels, NNAL."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ascend.devices import NpuDevice
from ascend.devices.npu import CONTAINER, DRIVER_VERSION, SET_ENV
from serve.doctor.finding import Finding, error, ok, unknown, warning
from serve.doctor.machine import Machine
from serve.doctor.versions import LATEST, is_same_release, pairing

FIRMWARE_VERSION = "/usr/local/Ascend/firmware/version.info"
DRIVER_LIBRARIES = "/usr/local/Ascend/driver/lib64"
NODES = ("davinci_manager", "devmm_svm", "hisi_hdc")
NNAL_SET_ENV = ("/usr/local/Ascend/nnal/atb/set_env.sh", "{home}/Ascend/nnal/atb/set_env.sh")
KERNELS = "built-in/op_impl/ai_core/tbe/kernel/config"  # below ASCEND_OPP_PATH, one folder per kind of chip
GROUP = "HwHiAiUser"  # the driver's


def check_device(m: Machine) -> Iterator[Finding]:
    """What the device layer would refuse: torch_npu and its torch, CANN's variables, driver and cards."""
    device = NpuDevice(host=m.host)
    why = "the launcher refuses device npu without it"
    parts = (device._packages, device._cann, device._cards)  # each apart, so that all that is missing is told at once
    problems = [problem for problem in (part() for part in parts) if problem]
    for problem in problems:
        yield error(problem.reason, why, problem.remedy)
    if not problems:
        yield ok("torch_npu, CANN's variables, the driver and cards are there")


def check_nodes(m: Machine) -> Iterator[Finding]:
    """The device nodes beside the cards', and whether this user may open them all."""
    cards = m.host.nodes(r"v?davinci\d+")
    there = m.host.nodes("|".join(NODES))
    if not cards and not there:
        return  # check_device has said so
    for name in NODES:
        if name not in there:
            remedy = f"into a container pass {CONTAINER}"
            yield error(f"/dev/{name} is missing", "the runtime cannot reach the cards without it", remedy)
    shut = [name for name in [*there, *cards] if not _may_open(m, name)]
    if shut:
        yield error(
            f"this user may not open /dev/{shut[0]}" + (f" and {len(shut) - 1} more" if shut[1:] else ""),
            "torch_npu would find no card",
            f"usermod -aG {GROUP} USER, then log in again; in a container run as a user of that group",
        )
    elif set(NODES) <= set(there):
        yield ok(f"this user may open {len(cards)} cards and the driver's nodes")


def _may_open(m: Machine, name: str) -> bool:
    folder = m.host.environ.get("ASCEND_DEV") or str(m.host.path("/dev"))
    return os.access(os.path.join(folder, name), os.R_OK | os.W_OK)


def check_driver(m: Machine) -> Iterator[Finding]:
    """The driver's version, its libraries, and whether the firmware is in the range that the driver names."""
    text = m.host.text(DRIVER_VERSION)
    driver = _field(text, "Version")
    if not m.host.path(DRIVER_LIBRARIES).is_dir():
        yield error(
            f"there is no {DRIVER_LIBRARIES}",
            "torch_npu loads the driver's libraries from it",
            f"install the driver; in a container mount {DRIVER_LIBRARIES} and {DRIVER_VERSION}",
        )
    if driver is None:
        yield unknown("the driver's version", f"{DRIVER_VERSION} does not tell", "in a container mount that file")
        return
    yield unknown(f"whether driver {driver} is new enough", f"only the release notes of CANN {LATEST.cann} say so")
    firmware = _field(m.host.text(FIRMWARE_VERSION), "Version")
    ranges = re.findall(r"\[([\d.]+),([\d.]+)\]", _field(text, "compatible_version_fw") or "")
    if firmware is None or not ranges:
        missing = "no firmware version file" if firmware is None else "the driver does not name its firmware"
        yield unknown("whether driver and firmware fit together", missing)
    elif any(_numbers(low) <= _numbers(firmware)[:3] <= _numbers(high) for low, high in ranges):
        yield ok(f"firmware {firmware} is in the range that the driver names")
    else:
        named = " or ".join(f"{low} to {high}" for low, high in ranges)
        why = f"driver {driver} names {named}; parts of the runtime fail with a pair that does not fit"
        remedy = "install driver and firmware of one release, then reboot"
        yield warning(f"firmware {firmware} does not fit", why, remedy)


def check_cann(m: Machine) -> Iterator[Finding]:
    """CANN's release, and whether the kernels of this chip are installed."""
    cann = NpuDevice(host=m.host).software().get("cann")
    ascend = m.host.package("vllm-ascend")
    row = (pairing(ascend.version) if ascend else None) or LATEST
    if cann is None:
        yield unknown("CANN's version", "ASCEND_HOME_PATH does not lead to a file that tells")
    elif is_same_release(cann, row.cann) or cann.casefold() == row.cann.casefold():
        yield ok(f"CANN {cann} fits vllm-ascend {row.vllm_ascend}")
    else:
        why = f"vllm-ascend {row.vllm_ascend} is built for CANN {row.cann}: its kernels may not load"
        yield warning(f"CANN is {cann}", why, f"install CANN {row.cann} with its 910b kernels and NNAL")
    opp = m.host.environ.get("ASCEND_OPP_PATH")
    if not opp:
        return
    kinds = [entry.name for entry in _entries(m, f"{opp}/{KERNELS}")]
    if not kinds:
        yield unknown("whether the kernels of the 910B are installed", f"there is no {opp}/{KERNELS}")
    elif "ascend910b" in kinds:
        yield ok("the kernels of the 910B are installed")
    else:
        yield error(
            f"the kernels of the 910B are not installed, only those of {', '.join(sorted(kinds))}",
            "operators fail with 'binary_info_config.json failed'",
            f"install Ascend-cann-kernels-910b (from CANN 8.5 on: the ops package) of CANN {row.cann}",
        )


def check_nnal(m: Machine) -> Iterator[Finding]:
    """NNAL's libatb.so, which vllm-ascend loads: found where LD_LIBRARY_PATH looks."""
    environ = m.host.environ
    folders = [folder for folder in environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    if any(m.host.path(f"{folder}/libatb.so").exists() for folder in folders):
        yield ok("libatb.so of NNAL is found")
        return
    scripts = [script.format(home=environ.get("HOME", "/root")) for script in NNAL_SET_ENV]
    script = next((script for script in scripts if m.host.path(script).exists()), None)
    toolkit = next((one for one in SET_ENV if m.host.path(one).exists()), SET_ENV[0])
    yield error(
        "libatb.so is not found",
        "vllm-ascend loads it from LD_LIBRARY_PATH and stops without it",
        f"source {script}" if script else f"source {toolkit}, install NNAL {LATEST.cann}, then source {scripts[0]}",
    )


def _entries(m: Machine, folder: str) -> list[os.DirEntry[str]]:
    try:
        return [entry for entry in os.scandir(m.host.path(folder)) if entry.name.startswith("ascend")]
    except OSError:
        return []


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^\s*{name}\s*=\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]
