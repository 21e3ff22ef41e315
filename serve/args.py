"""The launcher's command line: the only file that knows argparse, and the engine flags it will not pass on."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ascend.errors import UserError, suggest
from serve.config_file import ConfigFile, read_config, read_profile
from serve.planning.wanted import METHODS
from serve.settings import LaunchSettings

DTYPES = ("auto", "bfloat16", "float16", "float32")
ENGINES = ("vllm", "sglang")
VERIFY = ("auto", "quick", "full", "off")
CANARY = ("auto", "off")
KV_DTYPES = ("auto", "bf16", "fp8")

# Engine flags that are refused after `--`, and why. vLLM accepts `_` for `-` and any unambiguous beginning of a flag.
_OWN = "it is the launcher's own flag: give it before '--'"
_PHI = "prompts and answers are patients' data and never go to a log"
_PROBE = "the launcher would not see the server answer"
_NODES = "--nodes, --node-rank and --node-address decide it"
REFUSED = {
    "--model": _OWN,
    "--host": _OWN,
    "--port": _OWN,
    "--dtype": _OWN,
    "--max-model-len": _OWN,
    "--max-num-seqs": _OWN,
    "--max-num-batched-tokens": _OWN,
    "--served-model-name": _OWN,
    "--tensor-parallel-size": _OWN,
    "-tp": _OWN,
    "--data-parallel-size": _OWN,
    "-dp": _OWN,
    "--pipeline-parallel-size": _OWN,
    "-pp": _OWN,
    "--enable-expert-parallel": _OWN.replace("give it", "give --expert-parallel"),
    "-ep": _OWN.replace("give it", "give --expert-parallel"),
    "--gpu-memory-utilization": _OWN,
    "--block-size": _OWN,
    "--kv-cache-dtype": _OWN,
    "--shutdown-timeout": "--drain decides it",
    "--data-parallel-address": _NODES,
    "--data-parallel-start-rank": _NODES,
    "--data-parallel-size-local": _NODES,
    "--data-parallel-rpc-port": _NODES,
    "--headless": _NODES,
    "--trust-remote-code": "code that lies in a model directory is never run; this architecture needs none",
    "--trust-request-chat-template": "a request's own template is a program that would run in the server",
    "--trust-request-mm-kwargs": "what a client says would decide how the server reads files",
    "--enable-prompt-embeds": "a request could then carry a pickled tensor (CVE-2025-62164)",
    "--enable-log-requests": _PHI,
    "--enable-log-outputs": _PHI,
    "--log-error-stack": _PHI,
    "--log-config-file": _PHI,
    "--disable-log-stats": "without its counters an engine that is busy could be taken for one that hangs",
    "--config": "flags from a file would get past these checks: use --config before '--'",
    "--api-key": "every user of this machine can read it in the process list: set VLLM_API_KEY instead",
    "--grpc": _PROBE,
    "--uds": _PROBE,
    "--ssl-keyfile": _PROBE + " over TLS: end TLS in a gateway in front of it",
    "--ssl-certfile": _PROBE + " over TLS: end TLS in a gateway in front of it",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `serve/launch.sh --help` lists the flags")


def parse(arguments: Sequence[str]) -> LaunchSettings:
    """Turn the command line, and the profile and the file it names, into settings; what is nearer to the user wins.

    Raises `UserError` for anything it does not know.
    """
    if odd := next((word for word in arguments if "\0" in word), None):
        name = odd.split("=")[0] if odd.startswith("-") else "a value"
        raise UserError(f"{name} has a NUL character, which no program takes: leave it out")
    own, engine_flags = _split(arguments)
    parser = _parser()
    flags = {option: action for action in parser._actions for option in action.option_strings}
    named, _ = _known(parser, own, flags)
    files = [read_profile(named.profile, flags)] if named.profile else []
    files += [read_config(Path(named.config), flags)] if named.config else []
    for file in files:
        _check_file(parser, file, flags)
    known, _ = _known(parser, [*(word for file in files for word in file.arguments), *own], flags)
    engine_flags = [*(word for file in files for word in file.engine_flags), *engine_flags]
    environment = {name: value for file in files for name, value in file.environment.items()}
    for flag in engine_flags:
        _refuse(flag)
    _check_together(known)
    return LaunchSettings(
        **{
            **vars(known),
            "model": _path(known.model),
            # A signature is over hashes: without computing them it would vouch for names and sizes alone.
            "verify": "full" if known.key and known.verify == "auto" else known.verify,
            "key": _path(known.key),
            "ready_file": _path(known.ready_file),
            "engine_flags": tuple(engine_flags),
            "environment": environment,
        }
    )


def _known(
    parser: argparse.ArgumentParser, arguments: Sequence[str], flags: dict[str, argparse.Action]
) -> tuple[argparse.Namespace, list[str]]:
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(
            f"unknown flag '{unknown[0]}'{suggest(unknown[0].split('=')[0], flags)}; "
            "flags of the engine itself go after '--'"
        )
    return known, unknown


def _check_file(parser: argparse.ArgumentParser, file: ConfigFile, flags: dict[str, argparse.Action]) -> None:
    """Let a wrong value in a file be told by the file's name."""
    try:
        _known(parser, file.arguments, flags)
        for flag in file.engine_flags:
            _refuse(flag)
    except UserError as error:
        raise UserError(f"{file.name}: {str(error).partition('; `serve')[0]}") from None


def _check_together(known: argparse.Namespace) -> None:
    if known.key and known.verify == "off":
        raise UserError("--key asks for a signed manifest, --verify off for none to be read: give one of them")
    if not known.model and (known.key or known.verify in ("quick", "full")):
        raise UserError(
            f"{'--key' if known.key else '--verify ' + known.verify} needs --model: the demo has no manifest"
        )
    if known.node_rank >= known.nodes:
        raise UserError(f"--node-rank {known.node_rank} of --nodes {known.nodes}: ranks go from 0 to {known.nodes - 1}")
    if known.nodes > 1 and not known.node_address:
        raise UserError("--nodes needs --node-address: the address of node 0 that all nodes reach")
    if known.nodes == 1 and (known.node_address or known.network_interface):
        raise UserError("--node-address and --network-interface are for several servers: give --nodes too")
    if known.engine == "sglang" and known.device in ("cpu", "npu"):
        raise UserError(f"--engine sglang is for CUDA here, not for {known.device}: use --engine vllm")


def _path(text: str | None) -> Path | None:
    return Path(os.path.abspath(text)) if text else None


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    arguments = list(arguments)
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _refuse(argument: str) -> None:
    name = argument.split("=")[0].replace("_", "-")
    if name in REFUSED:
        raise UserError(f"engine flag '{argument}' is refused: {REFUSED[name]}")
    if not name.startswith("--"):
        return
    for flag, reason in REFUSED.items():
        if flag.startswith(name):
            raise UserError(f"engine flag '{argument}' is refused: {reason}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="serve/launch.sh",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Start the engine on a BailingMoeV2 model, wait until it truly answers, watch it until Ctrl-C or "
        "SIGTERM.",
        epilog="Everything after '--' goes to the engine. What is not given is decided by the plan, for the cards\n"
        "found: `--dry-run` shows it, `python -m serve plan` says why. Exit codes: 0 stopped after it was ready,\n"
        "1 the engine failed, 2 a mistake in what was asked, 130 or 143 stopped before it was ready.",
    )
    add = parser.add_argument_group("what and where").add_argument
    add("--device", default="auto", help="auto (NPU, else CUDA, else CPU), cpu, cuda or npu; default: auto")
    add("--emulate", action="store_true", help="with --device npu: on emulated cards, to try it; slow")
    add("--engine", choices=ENGINES, default="vllm", help="sglang: on CUDA only; default: vllm")
    add("--model", metavar="DIR", help="checkpoint directory; default: a tiny demo with random weights")
    add("--verify", choices=VERIFY, default="auto", help=_HELP_VERIFY)
    add("--key", metavar="PUB", help="Ed25519 public key that must have signed the manifest")
    add("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine only")
    add("--port", type=_port, default=8000, help="default: 8000")
    add("--served-model-name", metavar="NAME", help="what clients call it; default: the directory's name")

    add = parser.add_argument_group("where the settings come from").add_argument
    add("--profile", metavar="NAME", help="a file of serve/profiles, such as 910b-8x64g-w8a8")
    add("--config", metavar="FILE", help="YAML, its keys are these flags; wins over --profile, loses to this line")
    add("--print-config", action="store_true", help="print all settings, as such a file, and stop")
    add("--dry-run", action="store_true", help="check everything, print the engine's command and environment, stop")

    add = parser.add_argument_group("what the plan decides unless given").add_argument
    add(
        "--cards",
        metavar="CARDS",
        help="such as 8x910B3-64G; default: those found. With --dry-run they need not be here",
    )
    add("--dtype", choices=DTYPES, default="auto", help="default: auto, as the checkpoint says")
    add("--max-model-len", type=_positive, metavar="TOKENS", help="longest prompt plus answer; default: the model's")
    add("--max-num-seqs", type=_positive, metavar="N", help="requests in work at once")
    add("--max-num-batched-tokens", type=_positive, metavar="N", help="tokens of one step")
    add("--tpot-ms", type=_seconds, metavar="MS", help="refuse a plan whose best time per token is longer")
    add("--tensor-parallel-size", type=_positive, metavar="N")
    add("--data-parallel-size", type=_positive, metavar="N", help="over all nodes")
    add("--pipeline-parallel-size", type=_positive, metavar="N")
    add(
        "--expert-parallel", action=argparse.BooleanOptionalAction, help="whole experts on each card, or a part of each"
    )
    add("--gpu-memory-utilization", type=_share, metavar="SHARE", help="of each card's memory")
    add("--kv-cache-dtype", choices=KV_DTYPES)
    add("--block-size", type=_positive, metavar="TOKENS")
    add(
        "--speculative",
        metavar="|".join(METHODS),
        help="what drafts tokens to verify: MTP layers, a draft head, the text so far; default: off",
    )
    add("--speculative-tokens", type=_positive, metavar="K", help="drafts a step; default: what pays most, or none")

    add = parser.add_argument_group("watching it").add_argument
    add(
        "--timeout",
        type=_second_or_more,
        default=1800.0,
        metavar="SECONDS",
        help="give up if not ready by then; default: 1800",
    )
    add("--canary", choices=CANARY, default="auto", help="compare recorded logprobs before it counts as ready")
    add(
        "--hang",
        type=_second_or_more,
        default=120.0,
        metavar="SECONDS",
        help="without progress it counts as hung; default: 120",
    )
    add("--restarts", type=_count, default=5, metavar="N", help="of a dead engine within 10 minutes; default: 5")
    add(
        "--drain", type=_seconds, default=120.0, metavar="SECONDS", help="to finish requests when stopped; default: 120"
    )
    add("--ready-file", metavar="FILE", help="a JSON document is there while it answers")
    add("--forget-isolated", action="store_true", help="use cards again that had a memory fault: they were replaced")

    add = parser.add_argument_group("several servers: one command on each").add_argument
    add("--nodes", type=_positive, default=1, metavar="N", help="default: 1")
    add("--node-rank", type=_count, default=0, metavar="R", help="of this server; 0 answers requests")
    add("--node-address", metavar="ADDRESS[:PORT]", help="of node 0, as all nodes reach it")
    add("--network-interface", metavar="NAME", help="between the nodes; default: the one with a route to that address")
    return parser


_HELP_VERIFY = (
    "the model's manifest.json: quick (names, sizes, headers), full (SHA-256 of every file), off; "
    "default: auto, quick where there is one, full with --key"
)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port, a number from 1 to 65535")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 on")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time, a number from 0 on")
    return value


def _second_or_more(text: str) -> float:
    value = _seconds(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is too short: give a second or more")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share, a number above 0 and up to 1")
    return value
