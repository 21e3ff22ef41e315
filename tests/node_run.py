"""One node of several: what the launcher does with `serve/nodes/node.py` and its neighbours, on the CPU.

`python -m tests.node_run FLAG…`, the flags of `serve/launch.sh`. Prints "started" once all nodes are there, "ready"
once node 0 answers, and in the end a line that says why.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from ascend.errors import UserError, run_command
from serve.args import parse
from serve.config_file import as_flags
from serve.nodes.link import NodeLink
from serve.nodes.meeting import fingerprint, meet
from serve.nodes.node import check_nodes, node_settings
from serve.settings import LaunchSettings

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def main() -> int:
    """Run until told to stop, or until something ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    settings = parse(sys.argv[1:])
    model = settings.model or Path()
    print(check_nodes(settings, "cpu"), flush=True)
    node = node_settings(settings, "cpu", 1)
    program = "serve.nodes.headless" if node.headless else "vllm.entrypoints.openai.api_server"
    flags = {"model": str(model), "host": settings.host, "port": settings.port, "dtype": settings.dtype}
    flags |= {"served-model-name": "tiny", "enforce-eager": True, **node.flags}
    flags |= {"enable-expert-parallel": True} if settings.expert_parallel else {}
    command = [sys.executable, "-m", program, *as_flags(flags), *settings.engine_flags]
    cores = sorted(os.sched_getaffinity(0))
    environment = {**os.environ, **ENVIRONMENT, **node.environment}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = str(cores[settings.node_rank % len(cores)])
    own = fingerprint(settings.model, ["vllm-cpu", "torch"], {"dtype": settings.dtype})
    with meet(settings, own, settings.timeout) as link:
        engine = subprocess.Popen(command, env=environment, cwd="/")
        print("started", flush=True)
        try:
            raise UserError(_watch(settings, link, engine))
        finally:
            engine.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                engine.wait(3)


def _watch(settings: LaunchSettings, link: NodeLink, engine: subprocess.Popen[bytes]) -> str:
    """Wait for the end, return its reason."""
    is_ready = False
    while True:
        if reason := link.lost():
            return reason
        if engine.poll() is not None:
            return f"the engine ended with code {engine.returncode}"
        if not is_ready and (link.is_ready() or (settings.node_rank == 0 and _answers(settings.port))):
            is_ready = True
            link.tell_ready()
            print("ready", flush=True)
        time.sleep(0.1)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200
    return False


if __name__ == "__main__":
    sys.exit(run_command(main))
