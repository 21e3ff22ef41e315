"""The launcher's supervision with `tests/stub_engine.py` in vLLM's place: `python -m tests.stub_launch JSON FLAG…`.

The JSON is the stub's, one object per life; the flags are the launcher's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ascend.errors import run_command
from serve.args import parse
from serve.engine import EngineCommand
from serve.plugin.middleware import FLAG
from serve.preflight import check_port, reserve_port
from serve.state import state_directory
from serve.watch.ready import Server
from serve.watch.supervise import supervise
from tests.launcher import ROOT, Launched

NAME = "stub"


def launch(directory: Path, *lives: dict[str, Any], flags: str = "", port: int | None = None) -> Launched:
    """Start it as a program of its own; each life of the engine as told, the last one for ever."""
    program = (sys.executable, "-m", "tests.stub_launch", json.dumps(lives or [{}]))
    arguments = (*f"--device cpu --canary off {flags}".split(), "--model", str(ROOT))
    return Launched(directory, *arguments, port=port, program=program)


def main() -> int:
    """Do what `serve.launch.main` does, without a model and without vLLM."""
    started_at = time.time()
    settings = parse(sys.argv[2:])
    check_port(settings.host, settings.port)
    with reserve_port(settings.port):
        state = state_directory()
        command = [sys.executable, "-m", "tests.stub_engine", "--port", str(settings.port), "--served-model-name", NAME]
        command += ["--shutdown-timeout", str(int(settings.drain)), *FLAG]
        command += ["--stub", sys.argv[1], "--lives", str(state / f"lives-{settings.port}")]
        log = state / f"engine-{settings.port}.log"
        server = Server(settings.host, settings.port, NAME, Path(os.devnull), "cpu", log, demo=False, chat=False)
        return supervise(server, EngineCommand(command, {"PYTHONPATH": str(ROOT)}), settings, started_at)


if __name__ == "__main__":
    sys.exit(run_command(main))
