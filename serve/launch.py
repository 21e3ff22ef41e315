"""The launcher: check, start the engine, wait until it truly answers, say so, stay, and clean up.

check what was asked ─► build the demo ─► start vLLM ─► a real answer ─► announce ─► wait ─► end every process
  (UserError, code 2)    (if no model)         └── it dies, hangs or is stopped: end every process ──┘
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ascend.errors import UserError
from convert.demo_config import MARKER
from serve.args import parse
from serve.demo import demo_directory
from serve.engine import check_engine
from serve.preflight import check, has_chat_template, reserve_port
from serve.ready import Server
from serve.resolve import resolve
from serve.supervise import supervise

STARTED_AT = "ANTANGELMED_STARTED_AT"  # set by launch.sh, seconds since the epoch: making the environment counts too


def main(arguments: Sequence[str]) -> int:
    """Run ``python -m serve launch``. Returns the exit code; the epilog in `serve.args` lists them."""
    started_at = float(os.environ.pop(STARTED_AT, time.time()))
    settings = parse(arguments)
    checkpoint = check(settings)
    resolved = resolve(settings, checkpoint)
    for note in resolved.notes:
        print(f"note: {note}", file=sys.stderr)
    if settings.dry_run:
        print(resolved.command)
        return 0
    check_engine(settings.engine, resolved.device)
    model = settings.model or demo_directory()
    with reserve_port(settings.port):
        log = state_directory() / f"engine-{settings.port}.log"
        chat = settings.model is None or has_chat_template(model) or "--chat-template" in settings.engine_flags
        demo = checkpoint is None or MARKER in checkpoint.config
        server = Server(settings.host, settings.port, resolved.name, model, resolved.device, log, demo, chat)
        print(resolved.why, file=sys.stderr)
        return supervise(server, resolved.command, settings, started_at)


def state_directory() -> Path:
    """Return the directory for the engine's logs, made if it is not there, closed to other users."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "antangelmed"
    try:
        state.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{state}: cannot be made ({error.strerror}); set XDG_STATE_HOME to a writable place") from None
    return state
