"""How the CPU kernels are compiled, kept and loaded, and what happens where they cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ops import build, cpu
from tests.op_cases import BF16, FP32, cache_case, check_attention, kernels_used, make, op_cases, same

pytestmark = pytest.mark.beside


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No kernels loaded yet, and an empty cache."""
    monkeypatch.setattr(cpu, "_table", cpu._KernelTable())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def all_ops_agree() -> None:
    for dtype in (BF16, FP32):
        for name, args in op_cases(dtype).items():
            if name in cpu.KERNELS:
                same(name, args, dtype)
        new = make(10, dtype)
        x, gate_up, down = new(11, 72), new(5, 2 * 37, 72, scale=0.1), new(5, 72, 37)
        same("moe_experts", (x, torch.rand(11, 2), torch.randint(0, 5, (11, 2)), gate_up, down), dtype)
        check_attention(*cache_case(11, dtype, 3, 2, 4, 128, [(0, 300), (7, 33)]))


def processor_has(*features: str) -> bool:
    return set(features) <= set(build._processor().decode().split())


@pytest.mark.slow  # compiles
@pytest.mark.parametrize(
    ("tuning", "features"),
    [("-march=x86-64", ()), ("-march=haswell", ("avx2", "fma")), ("-march=skylake-avx512", ("avx512f", "avx512bw"))],
)
def test_older_processors(fresh: Path, monkeypatch: pytest.MonkeyPatch, tuning: str, features: tuple[str, ...]) -> None:
    if build.platform.machine() != "x86_64" or not processor_has(*features):
        pytest.skip(f"this processor does not run code for {tuning}")
    monkeypatch.setattr(build, "TUNING", {"x86_64": tuning})
    all_ops_agree()
    assert kernels_used(BF16)
    (library,) = (fresh / "antangelmed" / "kernels").iterdir()
    assert library.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow  # a process of its own
def test_the_second_load_compiles_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load()
    monkeypatch.setattr(build, "_compile", None)
    assert build.load().linear_bf16


@pytest.mark.slow  # a process of its own
def test_what_a_library_depends_on_is_in_its_name(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))
    build.load()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    build.load()
    sources = shutil.copytree(build.SOURCES, fresh / "csrc")
    monkeypatch.setattr(build, "SOURCES", sources)
    build.load()
    assert len(list((fresh / "antangelmed" / "kernels").iterdir())) == 2
    (sources / "vec.h").write_text((sources / "vec.h").read_text() + "/* changed */\n")
    build.load()
    assert len(list((fresh / "antangelmed" / "kernels").iterdir())) == 3


def falls_back(caplog: pytest.LogCaptureFixture, *words: str) -> None:
    """Right results from the reference, and exactly one line that holds ``words``."""
    all_ops_agree()
    assert not kernels_used(BF16)
    (record,) = caplog.records
    message = record.getMessage()
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_without_a_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    falls_back(caplog, "no C compiler", "install gcc")


def test_with_a_compiler_that_fails(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (fresh / "cc").write_text("#!/bin/sh\necho 'fatal error: no such header' >&2\nexit 1\n")
    (fresh / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(fresh), prepend=os.pathsep)
    falls_back(caplog, "no such header")
    assert list((fresh / "antangelmed" / "kernels").iterdir()) == []


def test_with_a_cache_that_others_can_write(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    (fresh / "antangelmed" / "kernels").mkdir(parents=True)
    (fresh / "antangelmed" / "kernels").chmod(0o777)
    falls_back(caplog, "chmod 700")


def test_with_a_cache_that_cannot_be(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (fresh / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    falls_back(caplog, "XDG_CACHE_HOME")


def test_without_a_home(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(build.os.path, "expanduser", lambda path: path)
    falls_back(caplog, "no home directory", "XDG_CACHE_HOME")


@pytest.mark.slow  # a process of its own
def test_switched_off(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("ASCEND_CPU_KERNELS", "0")
    all_ops_agree()
    assert not kernels_used(BF16)
    assert caplog.records == []
    assert list(fresh.iterdir()) == []


PROCESS = """
import torch, ops
from ops import cpu, reference
x, w = torch.randn(3, 64).bfloat16(), torch.randn(5, 64).bfloat16()
for _ in range(2):
    torch.testing.assert_close(ops.linear(x, w, None), reference.linear(x, w, None), rtol=0.02, atol=0.02)
print(cpu._table[torch.bfloat16] is not None)
"""


@pytest.mark.slow
def test_processes_that_start_at_once(tmp_path: Path) -> None:
    """One has no compiler on its PATH and says so in one line; two others compile into one cache at the same time."""
    paths = [os.environ["PATH"], os.environ["PATH"], str(tmp_path)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PATH": path},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for path in paths
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], ended
    assert [out.strip() for out, _ in ended] == ["True", "True", "False"]
    assert len(list((tmp_path / "antangelmed" / "kernels").iterdir())) == 1
    warnings = ended[2][1].strip().splitlines()
    assert len(warnings) == 1
    assert "no C compiler" in warnings[0]
