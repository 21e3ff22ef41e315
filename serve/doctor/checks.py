"""All checks, in the order in which their findings are told: what is missing first, from the ground up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from serve.doctor import (
    cuda_cards,
    environment,
    links,
    model_files,
    npu_cards,
    npu_driver,
    packages,
    ports,
    system,
)
from serve.doctor.finding import Finding, unknown
from serve.doctor.machine import Machine

Check = Callable[[Machine], Iterator[Finding]]


@dataclass(frozen=True)
class Row:
    """A check and when it is made. devices: empty for all. is_slow: not when the launcher asks; nodes: of several."""

    check: Check
    devices: tuple[str, ...] = ()
    is_slow: bool = False
    for_several: bool = False


_NPU, _CUDA = ("npu",), ("cuda",)

CHECKS = (
    Row(packages.check_python),
    Row(npu_driver.check_device, _NPU),
    Row(npu_driver.check_nodes, _NPU),
    Row(npu_driver.check_driver, _NPU),
    Row(npu_driver.check_cann, _NPU),
    Row(npu_driver.check_nnal, _NPU),
    Row(cuda_cards.check_device, _CUDA),
    Row(packages.check_engine),
    Row(packages.check_pairing, _NPU),
    Row(packages.check_pins, ("cpu", "cuda")),
    Row(packages.check_triton, _NPU),
    Row(packages.check_plugin),
    Row(packages.check_holes),
    Row(npu_cards.check_npu_smi, _NPU),
    Row(npu_cards.check_chip, _NPU),
    Row(packages.check_wheel, _NPU),
    Row(npu_cards.check_health, _NPU),
    Row(npu_cards.check_memory, _NPU),
    Row(npu_cards.check_visible, _NPU),
    Row(npu_cards.check_ecc, _NPU, is_slow=True),
    Row(npu_cards.check_firmware, _NPU, is_slow=True),
    Row(cuda_cards.check_nvidia_smi, _CUDA),
    Row(cuda_cards.check_cards, _CUDA),
    Row(cuda_cards.check_memory, _CUDA),
    Row(cuda_cards.check_remapped, _CUDA, is_slow=True),
    Row(cuda_cards.check_fabric, _CUDA, is_slow=True),
    Row(cuda_cards.check_xid, _CUDA, is_slow=True),
    Row(links.check_interface, for_several=True),
    Row(links.check_hccl_port, _NPU, for_several=True),
    Row(links.check_hccn, _NPU, is_slow=True, for_several=True),
    Row(environment.check_variables),
    Row(system.check_shared_memory),
    Row(system.check_limits),
    Row(system.check_memory, is_slow=True),
    Row(system.check_disk),
    Row(system.check_clock, is_slow=True),
    Row(system.check_processor, is_slow=True),
    Row(system.check_user, is_slow=True),
    Row(ports.check_port),
    Row(model_files.check_files, is_slow=True),
    Row(model_files.check_code),
    Row(model_files.check_rights),
    Row(model_files.check_room, is_slow=True),
)


def examine(m: Machine) -> Iterator[Finding]:
    """Make the checks that apply and yield what they find. A check that fails itself is told as unknown, by name."""
    for row in CHECKS:
        if row.devices and m.asked.device not in row.devices:
            continue
        if (row.is_slow and m.quick) or (row.for_several and m.asked.nodes == 1):
            continue
        name = row.check.__name__.removeprefix("check_")
        try:
            for finding in row.check(m):
                yield replace(finding, check=name)
        except Exception as failure:  # a doctor that falls ill helps nobody: the other checks still count
            what = f"{type(failure).__name__}: {failure}"
            yield replace(unknown(f"what check {name} would say", f"it failed itself ({what})"), check=name)
