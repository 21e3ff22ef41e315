"""The command `serve doctor`: flags in, lines or one JSON document out."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ascend.arguments import Parser
from ascend.devices import Host
from ascend.errors import EXIT_USER_ERROR, UserError, suggest
from serve.doctor.checks import examine
from serve.doctor.finding import LEVELS, Finding
from serve.doctor.machine import Asked, Machine

DEVICES = ("auto", "npu", "cuda", "cpu")


def main(arguments: Sequence[str]) -> int:
    """Run ``python -m serve doctor``. Returns 0 if nothing found prevents a launch, 2 if something does."""
    options = _parse(arguments)
    host = Host()
    device, why = _device(options.device, host)
    model = Path(os.path.abspath(options.model)) if options.model else None
    asked = Asked(device, model, options.port, options.host, options.nodes, options.network_interface)
    if not options.json:
        print(f"device {device}{why}", flush=True)
    found = []
    for finding in examine(Machine(asked, host)):
        found.append(finding)
        if not options.json:
            print(f"{finding.level:<8}{finding}", flush=True)
    is_ready = all(finding.level != "error" for finding in found)
    print(_document(device, found, is_ready) if options.json else _summary(device, found, is_ready))
    return 0 if is_ready else EXIT_USER_ERROR


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "serve doctor",
        "Look for every reason why a launch would fail on this machine. One line per finding: how it is "
        f"({', '.join(LEVELS)}), why it matters, what to do.",
        epilog="Exit codes: 0 nothing found prevents a launch, 2 something does.",
    )
    add = parser.add_argument
    add("--device", default="auto", help="auto (by device nodes: NPU, else CUDA, else CPU), npu, cuda or cpu")
    add("--model", metavar="DIR", help="checkpoint directory to look at, too")
    add("--host", default="127.0.0.1", help="address the server will listen on; default: 127.0.0.1")
    add("--port", type=_port, default=8000, help="default: 8000")
    add("--nodes", type=_count, default=1, metavar="N", help="servers that work together; default: 1")
    add("--network-interface", metavar="NAME", help="between the servers")
    add("--json", action="store_true", help="the last line of standard output is one JSON document")
    known = parser.read(arguments)
    if known.device not in DEVICES:
        choose = f"choose one of {', '.join(DEVICES)}"
        raise UserError(f"unknown device '{known.device}'{suggest(known.device.lower(), DEVICES)}: {choose}")
    return known


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port, a number from 1 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 on")
    return int(text)


def _device(name: str, host: Host) -> tuple[str, str]:
    """Return the kind of device, and why that one where none was asked for."""
    if name != "auto":
        return name, ""
    if host.nodes(r"v?davinci\d+|davinci_manager"):
        return "npu", ": there are Ascend device nodes"
    if host.nodes(r"nvidia\d+|nvidiactl"):
        return "cuda", ": there are NVIDIA device nodes"
    return "cpu", ": there are no device nodes of an NPU or a GPU"


def _summary(device: str, found: list[Finding], is_ready: bool) -> str:
    counts = Counter(finding.level for finding in found)
    words = [f"{counts[level]} {level}" for level in ("error", "warning", "unknown") if counts[level]]
    told = f" ({', '.join(words)})" if words else ""
    if is_ready:
        return f"ready: nothing was found that prevents a launch on {device}{told}"
    return f"not ready: a launch on {device} would fail{told}"


def _document(device: str, found: list[Finding], is_ready: bool) -> str:
    return json.dumps({"device": device, "is_ready": is_ready, "findings": [asdict(finding) for finding in found]})
