"""Starting a program on emulated cards: the command, the package, the runtime that is built, and what goes wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ascend.devices.npu import TORCH_NPU
from ascend.emulator import __main__ as command
from ascend.emulator import package, runtime, schemas
from ascend.errors import UserError
from tests import tiny

ROOT = Path(command.__file__).parents[2]
COUNTED = ("ascend", "ops", "convert", "serve", "perf")


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ascend.emulator", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environ,
        timeout=120,
        check=False,
    )


def test_torch_npu_is_imported_in_two_files() -> None:
    """Beside the emulator: one for the device, one for the weights' layout."""
    importing = re.compile(r"^\s*(?:import|from) torch_npu\b", re.MULTILINE)
    found = {
        str(file.relative_to(ROOT))
        for name in COUNTED
        for file in (ROOT / name).rglob("*.py")
        if importing.search(file.read_text()) and not file.is_relative_to(ROOT / "ascend" / "emulator")
    }
    assert found == {"ascend/devices/npu.py", "ops/layout.py"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no command; usage: python -m ascend.emulator -- COMMAND"),
        (["--"], "no command"),
        (["--", "no-such-program"], "no program 'no-such-program' on the PATH"),
    ],
)
def test_a_wrong_command_is_told_in_one_line(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: python -m ascend.emulator -- COMMAND")


@pytest.mark.slow  # seconds; tests/npu runs the same way
@pytest.mark.beside
def test_a_program_sees_cards_and_ends_with_its_own_code(tmp_path: Path) -> None:
    # A sitecustomize of the user's own is run as ever: in the process that starts the program, and in the program.
    (tmp_path / "sitecustomize.py").write_text("print('mine')")
    program = "import sys, torch; print(torch.ones(2, device='npu:7').sum().item()); sys.exit(5)"
    result = run("--", "python", "-c", program, PYTHONPATH=str(tmp_path))
    assert result.stdout.split() == ["mine", "mine", "2.0"]
    assert result.returncode == 5


def test_a_torch_without_a_torch_npu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.metadata, "version", lambda name: "2.9.1+cpu")
    assert "no torch-npu for torch 2.9.1; install torch 2.10.0 or 2.13.0" in tiny.user_error(package.version)


@pytest.mark.slow
@pytest.mark.beside
def test_without_an_index_the_user_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for call in (package.folder, package.wheel):
        told = tiny.user_error(call, TORCH_NPU["2.13.0"])
        assert "pip could not" in told
        assert "torch-npu==2.13.0" in told
        assert "PIP_FIND_LINKS" in told
    assert list((tmp_path / "antangelmed" / "torch_npu").iterdir()) == []


@pytest.mark.slow
@pytest.mark.beside
def test_the_runtime_is_built_once_and_answers_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = package.folder(package.version())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    home = runtime.folder(installed)
    assert runtime.folder(installed) == home
    assert [one.name for one in home.parent.iterdir()] == [home.name]
    assert {file.name for file in (home / "lib").iterdir()} == {f"lib{name}.so" for name in runtime.LIBRARIES}
    assert len(list((home / "dev").iterdir())) == 9
    source = (home / "runtime.c").read_text()
    assert "long aclrtResetDevice(void) { return 0; }" in source
    assert 'long aclrtMemcpyBatch(void) { return emulator_unsupported("aclrtMemcpyBatch"); }' in source
    assert "aclnn" not in source
    # Everything that is told to do nothing is there to be called.
    inert = [line for line in (runtime.HERE / "inert.txt").read_text().split() if re.match(r"acl|Hccl|Msprof", line)]
    assert all(f"long {name}(void) {{ return 0; }}" in source for name in inert)


def test_a_runtime_that_does_not_compile_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = package.folder(package.version())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(runtime, "_source", lambda library: "not C")
    with pytest.raises(UserError, match="does not compile"):
        runtime.folder(installed)
    assert list((tmp_path / "antangelmed" / "cann").iterdir()) == []


def test_schemas_are_read_from_a_wheel() -> None:
    found = schemas.read(package.wheel(TORCH_NPU["2.10.0"]), ["npu_rms_norm", "npu_no_such_op"])
    assert set(found) == {"npu_rms_norm"}
    expected = "npu::npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)"
    assert str(found["npu_rms_norm"]) == str(torch._C.parse_schema(expected))
