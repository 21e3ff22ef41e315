"""The launcher's command line: the only file that knows argparse, and the engine flags it will not pass on."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ascend.errors import UserError, suggest

DTYPES = ("auto", "bfloat16", "float16", "float32")
VERIFY = ("auto", "quick", "full", "off")

# Engine flags that are refused after `--`, and why. vLLM accepts `_` for `-` and any unambiguous beginning of a flag.
_OWN = "it is the launcher's own flag: give it before '--'"
_PHI = "prompts and answers are patients' data and never go to a log"
_PROBE = "the launcher would not see the server answer"
REFUSED = {
    "--model": _OWN,
    "--host": _OWN,
    "--port": _OWN,
    "--dtype": _OWN,
    "--max-model-len": _OWN,
    "--served-model-name": _OWN,
    "--trust-remote-code": "code that lies in a model directory is never run; this architecture needs none",
    "--trust-request-chat-template": "a request's own template is a program that would run in the server",
    "--enable-prompt-embeds": "a request could then carry a pickled tensor (CVE-2025-62164)",
    "--enable-log-requests": _PHI,
    "--enable-log-outputs": _PHI,
    "--log-error-stack": _PHI,
    "--config": "flags from a file would get past these checks: write them on the command line",
    "--api-key": "every user of this machine can read it in the process list: set VLLM_API_KEY instead",
    "--headless": _PROBE,
    "--grpc": _PROBE,
    "--uds": _PROBE,
    "--ssl-keyfile": _PROBE + " over TLS: end TLS in a gateway in front of it",
    "--ssl-certfile": _PROBE + " over TLS: end TLS in a gateway in front of it",
}


@dataclass(frozen=True)
class LaunchSettings:
    """What the user asked for. ``model`` None means the demo checkpoint, ``timeout`` is in seconds.

    verify: one of `VERIFY`; key: of whoever must have signed the model's manifest.
    """

    device: str
    model: Path | None
    verify: str
    key: Path | None
    host: str
    port: int
    dtype: str
    max_model_len: int | None
    served_model_name: str | None
    timeout: float
    ready_file: Path | None
    dry_run: bool
    engine_flags: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `serve/launch.sh --help` lists the flags")


def parse(arguments: Sequence[str]) -> LaunchSettings:
    """Turn the command line into settings. Raises `UserError` for anything it does not know."""
    own, engine_flags = _split(arguments)
    parser = _parser()
    known, unknown = parser.parse_known_args(own)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        raise UserError(
            f"unknown flag '{unknown[0]}'{suggest(unknown[0].split('=')[0], flags)}; "
            "flags of the engine itself go after '--'"
        )
    for flag in engine_flags:
        _refuse(flag)
    if known.key and known.verify == "off":
        raise UserError("--key asks for a signed manifest, --verify off for none to be read: give one of them")
    if not known.model and (known.key or known.verify in ("quick", "full")):
        raise UserError(
            f"{'--key' if known.key else '--verify ' + known.verify} needs --model: the demo has no manifest"
        )
    return LaunchSettings(
        device=known.device,
        model=Path(os.path.abspath(known.model)) if known.model else None,
        # A signature is over hashes: without computing them it would vouch for names and sizes alone.
        verify="full" if known.key and known.verify == "auto" else known.verify,
        key=Path(os.path.abspath(known.key)) if known.key else None,
        host=known.host,
        port=known.port,
        dtype=known.dtype,
        max_model_len=known.max_model_len,
        served_model_name=known.served_model_name,
        timeout=known.timeout,
        ready_file=Path(os.path.abspath(known.ready_file)) if known.ready_file else None,
        dry_run=known.dry_run,
        engine_flags=tuple(engine_flags),
    )


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    arguments = list(arguments)
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _refuse(argument: str) -> None:
    name = argument.split("=")[0].replace("_", "-")
    if not name.startswith("--"):
        return
    for flag, reason in REFUSED.items():
        if flag.startswith(name):
            raise UserError(f"engine flag '{argument}' is refused: {reason}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="serve/launch.sh",
        allow_abbrev=False,
        description="Start vLLM on a BailingMoeV2 model, wait until it answers, and stay until Ctrl-C or SIGTERM.",
        epilog="Everything after '--' goes to the engine as it stands. Exit codes: 0 stopped after it was ready, "
        "1 the engine failed, 2 a mistake in what was asked, 130 or 143 stopped before it was ready.",
    )
    add = parser.add_argument
    add("--device", default="auto", help="auto (NPU, else CUDA, else CPU), cpu, cuda or npu; default: auto")
    add("--model", metavar="DIR", help="checkpoint directory; default: a tiny demo with random weights")
    add(
        "--verify",
        choices=VERIFY,
        default="auto",
        help="the model's manifest.json: quick (names, sizes, headers), full (SHA-256 of every file), off; "
        "default: auto, quick where there is one, full with --key",
    )
    add("--key", metavar="PUB", help="Ed25519 public key that must have signed the manifest")
    add("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine only")
    add("--port", type=_port, default=8000, help="default: 8000")
    add("--dtype", choices=DTYPES, default="auto", help="default: auto, as the checkpoint says")
    add("--max-model-len", type=_positive, metavar="TOKENS", help="longest prompt plus answer; default: the model's")
    add("--served-model-name", metavar="NAME", help="what clients call it; default: the directory's name")
    add("--timeout", type=float, default=1800.0, metavar="SECONDS", help="give up if not ready by then; default: 1800")
    add("--ready-file", metavar="FILE", help="write a JSON document there once it answers; removed when it stops")
    add("--dry-run", action="store_true", help="check everything, print the engine's command and environment, stop")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port, a number from 1 to 65535")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of tokens")
    return int(text)
