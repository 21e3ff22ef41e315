"""The real torch_npu package, kept in a folder of its own: beside a plain torch it would break `import torch`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from ascend.devices.npu import TORCH_NPU
from ascend.errors import UserError
from ops import build

INSTALL_TIMEOUT_S = 600


def version() -> str:
    """Return the torch-npu release that belongs to the installed torch. Raises `UserError` if there is none."""
    torch = metadata.version("torch").partition("+")[0]
    if torch not in TORCH_NPU:
        raise UserError(f"the emulator has no torch-npu for torch {torch}; install torch {' or '.join(TORCH_NPU)}")
    return TORCH_NPU[torch]


def folder(release: str) -> Path:
    """Return the folder that holds torch-npu ``release``: beside torch, or installed by pip on first use, as a whole.

    pip's own settings (an index, a directory of wheels) hold. Raises `UserError` with what pip said.
    """
    beside = _beside(release)
    if beside is not None:
        return beside
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    home = build.cache_folder("torch_npu") / f"{release}-{python}"
    if not home.exists():
        with tempfile.TemporaryDirectory(dir=home.parent) as staged:
            _pip("install", "--no-compile", "--target", staged, f"torch-npu=={release}")
            _publish(Path(staged), home)
    return home


def _beside(release: str) -> Path | None:
    """The folder of a torch-npu that is installed already, as vllm-ascend's environment has it."""
    try:
        installed = metadata.distribution("torch-npu")
    except metadata.PackageNotFoundError:
        return None
    return Path(str(installed.locate_file(""))) if installed.version == release else None


def plugin() -> Path | None:
    """Return the folder of the installed vllm-ascend, None where there is none; nothing of it is imported."""
    spec = importlib.util.find_spec("vllm_ascend")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def wheel(release: str) -> Path:
    """Return the wheel of torch-npu ``release``, downloaded on first use: for reading, whatever torch is installed."""
    home = build.cache_folder("torch_npu") / f"{release}-wheel"
    if not home.exists():
        with tempfile.TemporaryDirectory(dir=home.parent) as staged:
            _pip("download", "--dest", staged, f"torch-npu=={release}")
            _publish(Path(staged), home)
    return next(home.glob("*.whl"))


def _pip(command: str, *arguments: str) -> None:
    print(f"emulator: {command} {arguments[-1]} (first use)", file=sys.stderr)
    quiet = ["--no-deps", "--quiet", "--disable-pip-version-check"]
    result = subprocess.run(
        [sys.executable, "-m", "pip", command, *quiet, *arguments],
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
        check=False,
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no reason given"]
        said = [line for line in lines if "ERROR" in line] or lines[-1:]
        raise UserError(
            f"pip could not {command} {arguments[-1]}: {said[0].removeprefix('ERROR: ')}; check the network or "
            "PIP_INDEX_URL, or set PIP_NO_INDEX=1 and PIP_FIND_LINKS to a directory that holds the wheel"
        )


def _publish(staged: Path, home: Path) -> None:
    """Give a finished folder its name; another process may have been first, with the same content."""
    try:
        os.rename(shutil.copytree(staged, home.with_name(f"{home.name}.{os.getpid()}")), home)
    except OSError:
        shutil.rmtree(home.with_name(f"{home.name}.{os.getpid()}"), ignore_errors=True)
        if not home.exists():
            raise
