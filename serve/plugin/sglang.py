"""The plan's settings, which have vLLM's names, as a command of SGLang: CUDA only, with FlashAttention-3.

The model family's own README runs it so (`--attention-backend fa3`), but with `--trust-remote-code`, which is never
given here: SGLang has a class for the architecture (BailingMoeV2ForCausalLM in `srt/models/bailing_moe.py`), and
`register` below gives it the configuration class, as it does vLLM. Seen with SGLang 0.5.23: its own parser takes the
flags, and its `get_config`, which knows no `bailing_moe`, reads a checkpoint without remote code after `register`.
Not run: the server itself, which needs a GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ascend.errors import UserError

# vLLM's flag: SGLang's. Those with a value that is written otherwise are in `_converted`.
FLAGS = {
    "dtype": "dtype",
    "tensor-parallel-size": "tp-size",
    "data-parallel-size": "dp-size",
    "pipeline-parallel-size": "pp-size",
    "max-model-len": "context-length",
    "max-num-seqs": "max-running-requests",
    "max-num-batched-tokens": "chunked-prefill-size",
    "gpu-memory-utilization": "mem-fraction-static",
    "block-size": "page-size",
    "kv-cache-dtype": "kv-cache-dtype",
    "hf-overrides": "json-model-override-args",
    "seed": "random-seed",
}
# What SGLang does by default, or has no word for; a plan's value of it changes nothing that is computed.
IGNORED = ("compilation-config", "enable-prefix-caching", "enable-chunked-prefill")

ALWAYS = ("--attention-backend", "fa3", "--enable-metrics")
# Never past this launcher: code or pickles from elsewhere, prompts in a log, or a file that gets round these checks.
REFUSED = {
    "--trust-remote-code": "code that lies in a model directory is never run; this architecture needs none",
    "--trust-request-chat-template": "a request's own template is a program that would run in the server",
    "--log-requests": "prompts and answers are patients' data and never go to a log",
    "--crash-dump-folder": "prompts and answers are patients' data and never go to a file",
    "--config": "flags from a file would get past these checks: use --config before '--'",
    "--host": "it is the launcher's own flag: give it before '--'",
    "--port": "it is the launcher's own flag: give it before '--'",
    "--api-key": "every user of this machine can read it in the process list",
}
# They keep the libraries below it offline. Whether SGLang itself reports usage was not found out: give it no egress.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
# CVE-2026-3059, 3060 and 3989 (pickles over ZMQ and in a script): pull requests 20904 and 21435 of sgl-project/sglang,
# March 2026. 0.5.23 was read: the multimodal broker binds to 127.0.0.1, pickles are loaded by a list of exact names.
OLDEST, BELOW = "0.5.23", "0.6"
PLUGIN_GROUP = "sglang.srt.plugins"


def sglang_command(
    model: Path, name: str, host: str, port: int, settings: Mapping[str, Any], engine_flags: tuple[str, ...] = ()
) -> list[str]:
    """Return the command that serves ``model`` under ``name``; ``settings`` as `Plan.settings` has them.

    Raises:
        UserError: a setting that SGLang has no flag for, or an engine flag that is not passed on.
    """
    for word in engine_flags:
        flag = word.split("=")[0]
        for refused, reason in REFUSED.items():
            if len(flag) > 2 and refused.startswith(flag):
                raise UserError(f"engine flag '{word}' is refused: {reason}")
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--served-model-name", name]
    command += ["--host", host, "--port", str(port)]
    for key, value in settings.items():
        command += _converted(key, value, settings)
    return [*command, *ALWAYS, *engine_flags]


def _converted(key: str, value: Any, settings: Mapping[str, Any]) -> list[str]:
    if key in IGNORED or value in (None, False):
        return []
    if key == "enable-expert-parallel":
        # Its data parallel groups are replicas: experts are divided within one (srt/arg_groups/parallel_hook.py).
        return ["--ep-size", str(settings.get("tensor-parallel-size") or 1)]
    if key == "kv-cache-dtype" and value == "fp8":
        value = "fp8_e4m3"
    if key not in FLAGS:
        raise UserError(f"--engine sglang has no equivalent of '{key}': use --engine vllm, or leave it out")
    return [f"--{FLAGS[key]}", json.dumps(value) if isinstance(value, Mapping) else str(value)]


def register() -> None:
    """Register the architecture's configuration class; for the entry point group `sglang.srt.plugins`.

    SGLang loads the group in its main process before it reads a configuration, and in its scheduler, detokenizer and
    data parallel controller (`srt/plugins/__init__.py`, load_plugins).
    """
    import ascend

    ascend.register()
