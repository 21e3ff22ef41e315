"""An engine in a process of its own, and both ends of the pipe to it: ``python -m perf.worker NAME SETTING``.

A worker loads the model and prints one JSON line; after that it answers each request line with one. Requests: a
generation (``batch``, ``prompt_length``, ``new_tokens``, ``seed``), with ``"drafts": true`` as many steps with drafts;
``{"distinct_experts": true}`` or ``{"kernels": true}`` with the same fields; or to the worker called "rates"
``{"read": true}``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ascend.errors import EXIT_USER_ERROR, UserError, run_command
from perf.engines import ENGINES, Engine, Lean, Setting

RATES = "rates"  # measures the device in place of an engine


class Worker:
    """The parent's end."""

    def __init__(self, name: str, setting: Setting, environ: Mapping[str, str], verbose: bool) -> None:
        self.name = name
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `stop`); a pipe that nobody reads fills up
        document = json.dumps(asdict(setting) | {"model": str(setting.model)})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "perf.worker", name, document],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if verbose else self.said,
            env={**environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(setting.threads)},
            text=True,
        )

    def answer(self, **request: Any) -> dict[str, Any]:
        """Send a request (none: wait until the worker is ready) and return its answer.

        Raises `UserError` with the worker's own line, or with its exit code where it has none.
        """
        if request:
            assert self.process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended: no line comes back
                print(json.dumps(request), file=self.process.stdin, flush=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return dict(json.loads(line))
        code = self.process.wait()
        self.said.seek(0)
        errors = [one.removeprefix("error: ").strip() for one in self.said if one.startswith("error: ")]
        if code == EXIT_USER_ERROR and errors:
            raise UserError(errors[-1])
        raise UserError(f"engine {self.name} ended with code {code}; run again with --verbose to see why")

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.said.close()


def main() -> None:
    """The worker's end: serve requests from standard input until it closes."""
    name, document = sys.argv[1:]
    loaded = json.loads(document)
    setting = replace(Setting(**loaded), model=Path(loaded["model"]))
    # Engines print to standard output as they like; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    if name != "vllm":
        torch.set_num_threads(setting.threads)
    serve = _rates(setting) if name == RATES else _engine(ENGINES[name](setting), setting, name)
    print(json.dumps(serve({})), file=answers)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=answers)


def _engine(engine: Engine, setting: Setting, name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    import torch

    from ascend.devices import get_device

    vocabulary = json.loads((setting.model / "config.json").read_text())["vocab_size"]
    device = get_device(setting.device)

    def serve(request: dict[str, Any]) -> dict[str, Any]:
        if not request:
            told = {"captured": engine.captured, "random_weights": engine.random_weights}
            draft_bytes = engine.draft_bytes if isinstance(engine, Lean) else 0
            return told | {"version": engine.version, "torch": torch.__version__, "draft_bytes": draft_bytes}
        generator = torch.Generator().manual_seed(request["seed"])
        shape = (request["batch"], request["prompt_length"])
        prompts = torch.randint(vocabulary, shape, generator=generator).tolist()
        if request.get("kernels"):
            return {"kernels_per_layer": engine.kernels_per_layer(prompts)}
        if request.get("distinct_experts"):
            return {"distinct_experts": engine.distinct_experts(prompts, bool(request.get("drafts")))}
        start = time.perf_counter()
        if request.get("drafts") and isinstance(engine, Lean):
            drafts, gained = engine.speculate(prompts, request["new_tokens"] - 1)
            taken = {"seconds": time.perf_counter() - start, "memory_bytes": device.memory().reserved}
            return taken | {"drafts": drafts, "tokens_per_step": gained}
        made = engine.generate(prompts, request["new_tokens"])
        seconds = time.perf_counter() - start
        if made != request["batch"] * request["new_tokens"]:
            raise RuntimeError(f"{name} made {made} tokens for {request}")
        return {"seconds": seconds, "memory_bytes": device.memory().reserved}

    return serve


def _rates(setting: Setting) -> Callable[[dict[str, Any]], dict[str, Any]]:
    from ascend.devices import get_device
    from ascend.emulator import active
    from perf.machine import describe
    from perf.rates import matmul_rate, read_rate

    device = get_device(setting.device)
    device.activate()
    emulated = device.type == "npu" and active()

    def serve(request: dict[str, Any]) -> dict[str, Any]:
        if not request:
            return {"machine": asdict(describe(device)), "sheet_rate": device.facts().bandwidth.value}
        return {"read_rate": read_rate(device, emulated), "matmul_rate": matmul_rate(device, setting.dtype, emulated)}

    return serve


if __name__ == "__main__":
    sys.exit(run_command(main))
