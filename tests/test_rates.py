"""The rates of a device, and the power of several cards."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from ascend.devices import Host
from ascend.devices.cpu import CpuDevice
from ascend.devices.npu import NpuDevice
from perf.power import PowerMeter
from perf.rates import read_rate, seconds

# Rates and power.


@pytest.mark.slow
def test_rates_are_those_of_the_device() -> None:
    device = CpuDevice()
    took = seconds(device, lambda: time.sleep(0.01), passes=2)
    assert 0.01 <= took < 0.05
    assert 1e8 < read_rate(device) < 1e13


def npu_smi(folder: Path) -> Host:
    """A machine whose npu-smi tells the card's index as its watts."""
    tool = folder / "npu-smi"
    tool.write_text('#!/bin/sh\nprintf "\\tNPU ID                         : $5\\n"\n'
                    'printf "\\tNPU Real-time Power(W)         : %s0.5\\n" "$5"\n')  # fmt: skip
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return Host(folder, {"PATH": str(folder)}, ())


def test_power_is_the_sum_of_the_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = npu_smi(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with PowerMeter(NpuDevice(0, host), 3) as power:
        time.sleep(0.01)
    assert power.watts == pytest.approx(0.5 + 10.5 + 20.5)
    with PowerMeter(None) as power:
        pass
    assert power.watts is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with PowerMeter(NpuDevice(0, host), 1) as power:
        pass
    assert power.watts is None


def test_power_of_another_card_than_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`perf decode --device npu:2` must not report what npu:0 draws."""
    host = npu_smi(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with PowerMeter(NpuDevice(2, host)) as power:
        time.sleep(0.01)
    assert power.watts == pytest.approx(20.5)


def test_part_of_a_sum_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = npu_smi(tmp_path)
    tool = tmp_path / "npu-smi"
    tool.write_text(tool.read_text().replace("#!/bin/sh\n", '#!/bin/sh\n[ "$5" = 1 ] && exit 1\n'))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for cards, watts in ((1, 0.5), (3, None)):
        with PowerMeter(NpuDevice(0, host), cards) as power:
            time.sleep(0.01)
        assert power.watts == watts
