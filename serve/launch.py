"""The launcher: check, decide, start the engine, wait until it truly answers, say so, and keep it so.

what was asked ─► the model's files ─► device, cards, plan, rules ─► this machine ─► the engine's life
   args.py          preflight.py          resolve.py                  doctor/          supervise.py
        └──────────────── UserError: one line, exit code 2 ───────────────┘
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ascend.checkpoint import Checkpoint
from ascend.errors import UserError
from convert.demo_config import MARKER
from serve import emulated
from serve.args import parse
from serve.demo import build_demo, demo_directory, demo_size
from serve.doctor import findings
from serve.engine import KINDS, check_engine
from serve.nodes.link import NodeLink
from serve.nodes.meeting import fingerprint, meet
from serve.preflight import check, has_chat_template, reserve_port
from serve.printed import config_text
from serve.resolve import Resolved, resolve
from serve.settings import LaunchSettings
from serve.state import state_directory
from serve.watch.isolation import forget
from serve.watch.ready import Server, remove_ready_file
from serve.watch.supervise import supervise

STARTED_AT = "ANTANGELMED_STARTED_AT"  # set by launch.sh, seconds since the epoch: making the environment counts too


def main(arguments: Sequence[str]) -> int:
    """Run ``python -m serve launch``. Returns the exit code; the epilog in `serve.args` lists them."""
    started_at = float(os.environ.pop(STARTED_AT, time.time()))
    settings = parse(arguments)
    if settings.forget_isolated:
        for line in forget():
            print(line, file=sys.stderr)
    checkpoint = check(settings)
    if settings.print_config or settings.dry_run:
        resolved = resolved_with_notes(settings, checkpoint)
        print(config_text(settings, resolved).rstrip() if settings.print_config else resolved.command)
        return 0
    with reserve_port(settings.port):
        return launch(settings, checkpoint, started_at)


def launch(settings: LaunchSettings, checkpoint: Checkpoint | None, started_at: float) -> int:
    """Start what is asked for, on a port that is ours, and stay. Returns the exit code."""
    resolved = resolved_with_notes(settings, checkpoint)
    device = emulated.NAME if settings.emulate else resolved.device
    check_machine(settings, device)
    check_engine(settings.engine, device)
    if settings.ready_file:
        remove_ready_file(settings.ready_file)
    model = settings.model or demo_directory(demo_size(settings.emulate))
    log = state_directory() / f"engine-{settings.port}.log"
    chat = settings.model is None or has_chat_template(model) or "--chat-template" in settings.engine_flags
    demo = checkpoint is None or MARKER in checkpoint.config
    server = Server(settings.host, settings.port, resolved.name, model, device, log, demo, chat)
    print(resolved.why, file=sys.stderr)
    return supervise(server, resolved.command, settings, started_at, lambda: _meet(settings, resolved, model))


def resolved_with_notes(settings: LaunchSettings, checkpoint: Checkpoint | None) -> Resolved:
    """Decide, and print what the user should know of it."""
    resolved = resolve(settings, checkpoint)
    for note in resolved.notes:
        print(f"note: {note}", file=sys.stderr)
    return resolved


def check_machine(settings: LaunchSettings, device: str) -> None:
    """Refuse what the doctor knows that would fail, and print what it warns of. Raises `UserError`."""
    for finding in findings(
        device, settings.model, nodes=settings.nodes, network_interface=settings.network_interface, quick=True
    ):
        # Where every byte is checked against a signature, or nobody wants it checked, rights decide nothing.
        if finding.check == "rights" and (settings.key or settings.verify == "off"):
            continue
        if finding.level == "error":
            raise UserError(f"{finding} (`python -m serve doctor` looks at everything)")
        if finding.level == "warning" or (
            finding.level == "unknown" and finding.check in ("npu_smi", "nvidia_smi", "health")
        ):
            print(f"{finding.level}: {finding}", file=sys.stderr)


def _meet(settings: LaunchSettings, resolved: Resolved, model: Path) -> NodeLink:
    """Wait for the launchers of the other nodes, where there are any."""
    if settings.nodes == 1:
        return NodeLink()
    if settings.model is None:
        build_demo(model)
    packages = [name for name, _, _ in KINDS[settings.engine, resolved.device].packages]
    flags = {"dtype": settings.dtype, **resolved.plan.settings}
    return meet(settings, fingerprint(model, [*packages, "torch"], flags), settings.timeout)
