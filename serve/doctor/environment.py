"""Checks of environment variables that break a launch, or quietly change what it does: one row each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from serve.doctor.finding import Finding, error, note, ok, warning
from serve.doctor.machine import Machine

Environ = Mapping[str, str]
OFF = ("", "0", "false", "False", "off")
LOOPBACK = ("localhost", "127.0.0.1")
PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


@dataclass(frozen=True)
class Variable:
    """A row: ``bites`` returns what is wrong with the environment, or None. devices: empty for all."""

    bites: Callable[[Environ], str | None]
    make: Callable[[str, str, str], Finding]
    why: str
    remedy: str
    devices: tuple[str, ...] = ()


def _on(name: str) -> Callable[[Environ], str | None]:
    return lambda environ: f"{name}={environ[name]}" if environ.get(name, "") not in OFF else None


def _proxy(environ: Environ) -> str | None:
    proxy = next((name for name in PROXIES if environ.get(name)), None)
    spared = re.split(r"[,\s]+", environ.get("no_proxy") or environ.get("NO_PROXY") or "")
    is_spared = "*" in spared or set(LOOPBACK) <= set(spared)
    return f"{proxy} is set, and no_proxy does not spare this machine" if proxy and not is_spared else None


def _allocator(environ: Environ) -> str | None:
    value = environ.get("PYTORCH_NPU_ALLOC_CONF", "")
    clash = re.search(r"max_split_size_mb|garbage_collection_threshold", value)
    return f"PYTORCH_NPU_ALLOC_CONF={value}" if clash and "expandable_segments:True" in value else None


def _platform_plugin(environ: Environ) -> str | None:
    value = environ.get("VLLM_PLUGINS")
    return f"VLLM_PLUGINS={value} leaves out ascend" if value is not None and "ascend" not in value.split(",") else None


def _own_plugin(environ: Environ) -> str | None:
    from serve.engine import PLUGIN

    value = environ.get("VLLM_PLUGINS")
    return f"VLLM_PLUGINS={value} leaves out {PLUGIN}" if value is not None and PLUGIN not in value.split(",") else None


VARIABLES = (
    Variable(
        _on("ASCEND_LAUNCH_BLOCKING"),
        error,
        "vllm-ascend refuses it with graphs, its default (platform.py, v0.23.0)",
        "unset it: it is for debugging",
        ("npu",),
    ),
    Variable(
        _allocator,
        error,
        "torch_npu refuses expandable_segments together with either of the two",
        "unset it: vllm-ascend sets expandable_segments by itself",
        ("npu",),
    ),
    Variable(_platform_plugin, error, "vLLM would not know the NPU", "unset it, or add ascend", ("npu",)),
    Variable(_own_plugin, note, "the launcher adds it", "for a vLLM that you start yourself, add it"),
    Variable(_on("CUDA_LAUNCH_BLOCKING"), warning, "every kernel waits for the one before", "unset it", ("cuda",)),
    Variable(_on("VLLM_USE_MODELSCOPE"), note, "it looks for models on the internet; the launcher takes it out", ""),
    Variable(_on("VLLM_SERVER_DEV_MODE"), note, "it lets clients control the server; the launcher takes it out", ""),
    Variable(
        _on("PYTHONOPTIMIZE"),
        warning,
        "Python leaves out assertions, some of which were security checks (CVE-2026-41523)",
        "unset it",
    ),
    Variable(
        _proxy,
        warning,
        "clients and probes on this machine would ask the proxy for the server",
        f"export no_proxy={','.join(LOOPBACK)}",
    ),
)


def check_variables(m: Machine) -> Iterator[Finding]:
    """Each row of the table, and libraries that are to be loaded first but are not there."""
    found = False
    for row in VARIABLES:
        if row.devices and m.asked.device not in row.devices:
            continue
        if what := row.bites(m.host.environ):
            found = True
            yield row.make(what, row.why, row.remedy)
    for library in filter(None, re.split(r"[:\s]+", m.host.environ.get("LD_PRELOAD", ""))):
        found = True
        if "/" in library and not m.host.path(library).exists():
            why = "every process complains of it, and what it was to do is not done"
            yield warning(f"LD_PRELOAD names {library}, which is not there", why, "correct or unset it")
        else:
            yield note(f"LD_PRELOAD={library}", "it is loaded into the engine")
    if not found:
        yield ok("no environment variable is known to bite")
