"""The launcher: check, start the engine, wait until it truly answers, say so, stay, and clean up.

check what was asked ─► build the demo ─► start vLLM ─► a real answer ─► announce ─► wait ─► end every process
  (UserError, code 2)    (if no model)         └── it dies, hangs or is stopped: end every process ──┘
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from ascend.devices import choose
from ascend.errors import UserError
from convert.demo_config import MARKER, NOTE
from serve.args import LaunchSettings, parse
from serve.demo import DEMO_NAME, build_demo, demo_directory
from serve.engine import EngineCommand, check_engine, engine_command
from serve.preflight import check, has_chat_template, reserve_port
from serve.process import GRACE_SECONDS, EngineProcess
from serve.progress import Progress, error_line
from serve.ready import EngineError, Server, announce, wait_until_it_answers, write_ready_file

STARTED_AT = "ANTANGELMED_STARTED_AT"  # set by launch.sh, seconds since the epoch: making the environment counts too
POLL_SECONDS = 0.2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def main(arguments: Sequence[str]) -> int:
    """Run ``python -m serve launch``. Returns the exit code; the epilog in `serve.args` lists them."""
    started_at = float(os.environ.pop(STARTED_AT, time.time()))
    settings = parse(arguments)
    checkpoint = check(settings)
    device, why = choose(settings.device)
    model = settings.model or demo_directory()
    name = settings.served_model_name or (model.name if settings.model else DEMO_NAME)
    command = engine_command(device.type, settings, model, name, checkpoint)
    if command.note:
        print(command.note, file=sys.stderr)
    if settings.dry_run:
        print(command)
        return 0
    check_engine(device.type)
    with reserve_port(settings.port):
        log = state_directory() / f"engine-{settings.port}.log"
        chat = settings.model is None or has_chat_template(model) or "--chat-template" in settings.engine_flags
        demo = checkpoint is None or MARKER in checkpoint.config
        server = Server(settings.host, settings.port, name, model, device.type, log, demo, chat)
        for signum in STOP_SIGNALS:
            signal.signal(signum, _stop)
        print(why, file=sys.stderr)
        return run(server, command, settings, started_at)


def run(server: Server, command: EngineCommand, settings: LaunchSettings, started_at: float) -> int:
    """Start the engine, announce it once it answers, and wait for its end or ours. Returns the exit code."""
    ready = False
    try:
        if server.demo:
            print(f"serving a demo. {NOTE}", file=sys.stderr)
        if settings.model is None:
            build_demo(server.model)
        if server.log.exists():
            server.log.rename(f"{server.log}.1")
        with EngineProcess(command, server.log) as engine:
            progress = Progress(server.log, started_at)
            answer = wait_until_it_answers(server, engine, progress, settings.timeout)
            ready, stages = True, progress.close()
            engine.grace = GRACE_SECONDS
            announce(server, answer, stages)
            if settings.ready_file:
                write_ready_file(settings.ready_file, server, stages)
            while engine.poll() is None:
                time.sleep(POLL_SECONDS)
            raise EngineError(f"the engine ended: {error_line(server.log)}")
    except EngineError as failure:
        print(f"error: {failure}; its log: {server.log}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print("stopped, with all its processes", file=sys.stderr)
        return 0 if ready else 128 + stopped.signum
    finally:
        if ready and settings.ready_file:
            settings.ready_file.unlink(missing_ok=True)


def state_directory() -> Path:
    """Return the directory for the engine's logs, made if it is not there, closed to other users."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "antangelmed"
    try:
        state.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{state}: cannot be made ({error.strerror}); set XDG_STATE_HOME to a writable place") from None
    return state


def _stop(signum: int, _frame: FrameType | None) -> None:
    # Once is enough: another signal must not break off the cleaning up, which is bounded in time.
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(signum)
