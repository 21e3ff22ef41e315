"""Versions below torch, and power, as a device reads them from files and vendors' tools."""

import os
import time

import pytest

from ascend.devices import Host, cuda, npu
from ascend.devices.cpu import CpuDevice
from tests.machines import DRIVER_FILE, NEW_DRIVER, OLD_DRIVER, SOURCED, machine

# Versions below torch, and power.

VERSIONS = {
    "/usr/local/Ascend/driver/version.info": "Version=25.2.0\nascendhal_version=7.35.23\n",
    "/cann/version.cfg": "# version: 1.0\nrunning_version=[9.1.0]\n",
    "/cann/ascend_toolkit_install.info": "package_name=Ascend-cann-toolkit\nversion=9.1.0\ninnerversion=V100R001\n",
}


def without(*names):
    return {name: text for name, text in VERSIONS.items() if name.split("/")[-1] not in names}


@pytest.mark.parametrize(
    ("files", "environ", "expected"),
    [
        (VERSIONS, SOURCED, {"driver": "25.2.0", "cann": "9.1.0"}),
        ({**without("ascend_toolkit_install.info"), "/cann/version.cfg": "version=[8.5.0]\n"}, SOURCED, None),
        ({**without("version.cfg", "ascend_toolkit_install.info"), "/cann/compiler/version.info": "Version=8.5.0\n"},
         SOURCED, None),
        (without("version.info"), SOURCED, {"cann": "9.1.0"}),
        (VERSIONS, {}, {"driver": "25.2.0"}),
        ({}, SOURCED, {}),
        ({"/usr/local/Ascend/driver/version.info": "nothing\n"}, {}, {}),
    ],
)  # fmt: skip
def test_npu_software(tmp_path, files, environ, expected):
    found = npu.NpuDevice(0, machine(tmp_path, files=files, environ=environ)).software()
    assert found == ({"driver": "25.2.0", "cann": "8.5.0"} if expected is None else expected)


@pytest.mark.parametrize(
    ("driver", "torch_version", "built_with", "expected"),
    [
        (NEW_DRIVER, "2.13.0+cu130", "13.0", {"driver": "580.65.06", "cuda": "13.0"}),
        (OLD_DRIVER, "2.10.0+cu128", "12.8", {"driver": "535.129.03", "cuda": "12.8"}),
        ("", "2.10.0+cu128", "12.8", {"cuda": "12.8"}),
        (NEW_DRIVER, "2.13.0+cpu", None, {"driver": "580.65.06"}),
    ],
)
def test_cuda_software(tmp_path, driver, torch_version, built_with, expected):
    there = {"files": {DRIVER_FILE: driver}, "packages": {"torch": torch_version}, "built_with": built_with}
    assert cuda.CudaDevice(0, machine(tmp_path, **there)).software() == expected


def test_a_cpu_has_no_software_below_torch():
    assert CpuDevice().software() == {}


def tool(folder, name, script):
    """Put a vendor's tool on the PATH of this process; it notes its arguments beside itself."""
    (folder / name).write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n{script}\n')
    (folder / name).chmod(0o755)


def asked(folder):
    return (folder / "asked").read_text().splitlines()


NPU_SMI = r"""
printf '\tNPU ID                         : %s\n\tChip Count                     : 1\n\n' "$5"
printf '\tNPU Real-time Power(W)         : 88.3\n\tChip ID                        : 0\n'
"""


@pytest.mark.parametrize(
    ("visible", "index", "card"),
    [(None, 0, "0"), (None, 3, "3"), ("4,5,6", 0, "4"), ("4,5,6", 2, "6"), (" 2, 7", 1, "7"), ("1", 5, "5")],
)
def test_npu_watts(tmp_path, monkeypatch, visible, index, card):
    tool(tmp_path, "npu-smi", NPU_SMI)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    environ = {} if visible is None else {"ASCEND_RT_VISIBLE_DEVICES": visible}
    assert npu.NpuDevice(0, Host(tmp_path, environ)).watts(index) == 88.3
    assert npu.NpuDevice(index, Host(tmp_path, environ)).watts() == 88.3
    assert asked(tmp_path) == [f"info -t power -i {card}"] * 2


@pytest.mark.parametrize(
    "script", ["exit 1", NPU_SMI + "exit 3", "echo 'NPU Real-time Power(W) : NA'", "echo 'Power Limit : 88'", ""]
)
def test_npu_watts_that_nobody_tells(tmp_path, monkeypatch, script):
    tool(tmp_path, "npu-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert npu.NpuDevice(0, Host(tmp_path, {})).watts() is None


def test_a_tool_that_hangs_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("ascend.devices.base.TOOL_SECONDS", 0.2)
    tool(tmp_path, "npu-smi", f"exec sleep 30\n{NPU_SMI}")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    start = time.perf_counter()
    assert npu.NpuDevice(0, Host(tmp_path, {})).watts() is None
    assert time.perf_counter() - start < 5
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert npu.NpuDevice(0, Host(tmp_path, {})).watts() is None


class NvidiaCards(cuda.CudaDevice):
    """Two cards as torch names them, without CUDA in this machine."""

    class _Api:
        @staticmethod
        def get_device_properties(index):
            class Properties:
                uuid = f"0000000{index}-aaaa-bbbb-cccc-dddddddddddd"

            return Properties

    def _api(self):
        return self._Api


@pytest.mark.parametrize(
    ("said", "watts"), [("113.27", 113.27), ("9", 9.0), ("[N/A]", None), ("[Not Supported]", None), ("", None)]
)
def test_cuda_watts(tmp_path, monkeypatch, said, watts):
    tool(tmp_path, "nvidia-smi", f"echo '{said}'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert NvidiaCards(1).watts() == watts
    assert NvidiaCards(1).watts(0) == watts
    rest = "--query-gpu=power.draw --format=csv,noheader,nounits"
    assert asked(tmp_path) == [f"--id=GPU-0000000{card}-aaaa-bbbb-cccc-dddddddddddd {rest}" for card in (1, 0)]


class Packages(Host):
    """A machine whose energy counters go on by so many microjoules whenever they are read."""

    def text(self, absolute):
        found = super().text(absolute)
        if absolute.endswith("energy_uj") and found:
            name = absolute.split("/")[-2]
            step, wraps = {
                "intel-rapl:0": (5_000_000, 0),
                "intel-rapl:0:0": (4_000_000, 0),
                "intel-rapl:1": (2_500_000, self.environ["wraps"]),
            }[name]
            value = int(found) + step
            self.path(absolute).write_text(str(0 if wraps and value > wraps else value))
        return found


def rapl(folder, wraps=0):
    for zone in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl"):
        (folder / "sys/class/powercap" / zone).mkdir(parents=True)
        if zone.count(":"):  # a package's part has a counter of its own, of what the package counts too
            (folder / "sys/class/powercap" / zone / "energy_uj").write_text("1000000")
    return CpuDevice(0, Packages(folder, {"wraps": wraps}))


def test_cpu_watts_are_those_of_all_packages(tmp_path):
    assert 30 < rapl(tmp_path).watts() <= 7.5 / 0.05


def test_cpu_watts_where_a_counter_wraps_are_no_part_of_a_sum(tmp_path):
    """As with cards: without one of its packages the sum is no figure."""
    assert rapl(tmp_path, wraps=2_000_000).watts() is None


def test_cpu_watts_where_nothing_tells(tmp_path):
    assert CpuDevice(0, Host(tmp_path)).watts() is None
