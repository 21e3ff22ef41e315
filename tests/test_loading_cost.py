"""What loading costs: memory beyond the model itself, and what it says while it runs. Linux counts the memory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import ascend
from ascend import progress
from ascend.progress import Progress
from convert.demo import write_demo
from tests.tiny import checkpoint

MIB = 1 << 20
LOAD = """
import json, sys
import torch
import ascend

def kernel(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key + ":"))

ascend.load_model  # imports torch and transformers
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
before = kernel("VmRSS")
model = ascend.load_model(sys.argv[1], dtype=sys.argv[2])
nbytes = sum(parameter.nbytes for parameter in model.parameters())
rss, peak = kernel("VmRSS"), kernel("VmHWM")
print(json.dumps({"model": nbytes, "peak": peak - before - nbytes, "left": rss - before - nbytes,
                  "file": kernel("RssFile")}))
"""


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_gigabyte_needs_next_to_nothing_beyond_itself(dtype: str, tmp_path: Path) -> None:
    demo = write_demo(tmp_path / "demo", "small", max_shard_size="400MB")
    assert demo.weight_bytes > 1e9
    try:
        assert len(list((tmp_path / "demo").glob("*.safetensors"))) == 3
        command = [sys.executable, "-c", LOAD, str(tmp_path / "demo"), dtype]
        said = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    finally:
        for file in (tmp_path / "demo").glob("*.safetensors"):
            file.unlink()
    print(f"{dtype}: " + ", ".join(f"{key} {value / MIB:.0f} MiB" for key, value in said.items()))
    assert said["model"] >= demo.weight_bytes
    # The promise is 1 GiB. Here the largest tensor has 64 MiB, the largest file 380: tensors must come one at a time.
    assert said["peak"] < 128 * MIB
    assert said["left"] < 60 * MIB


class Clock:
    """Stands for the time module: `now` moves only when a test says so."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_elsewhere_than_on_a_terminal_a_plain_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    said = []
    with Progress("loading demo", 8_000_000_000) as bar:
        for _ in range(8):
            clock.now += 6
            bar.advance(1_000_000_000)
            said.append(capsys.readouterr().err)
    assert said == [
        "",
        "loading demo: 2.0 of 8.0 GB, 0.17 GB/s, 36 s left\n",
        "",
        "loading demo: 4.0 of 8.0 GB, 0.17 GB/s, 24 s left\n",
        "",
        "loading demo: 6.0 of 8.0 GB, 0.17 GB/s, 12 s left\n",
        "",
        "loading demo: 8.0 of 8.0 GB, 0.17 GB/s, 0 s left\n",
    ]


def test_a_quick_load_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ascend.load_model(checkpoint(tmp_path / "demo"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_on_a_terminal_a_bar_with_bytes_rate_and_time_left(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "demo")
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-c", "import sys, ascend; ascend.load_model(sys.argv[1])", str(path)]
    with subprocess.Popen(command, stderr=its) as process:
        os.close(its)
        with open(ours, "rb", buffering=0) as terminal:
            shown = b""
            with contextlib.suppress(OSError):  # how a terminal says that its other end was closed
                while piece := terminal.read(1 << 16):
                    shown += piece
    assert process.returncode == 0
    bar = r"loading demo: 100%\|█+\| (\d+k)/\1 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+[kMG]B/s\]"
    assert re.search(bar, shown.decode())
