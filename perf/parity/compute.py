"""Having a side computed: which devices there are, and the worker process (`perf.parity.side`) that each side gets."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ascend.devices import get_device
from ascend.errors import EXIT_USER_ERROR, UserError, suggest

SIDES = ("cpu", "cuda", "npu", "npu-emulated")
SETTLED = ("dtype", "quantise", "rows", "prompt_length", "seed", "decode")


@dataclass(frozen=True)
class Side:
    """A device, by the name that the user gave it and the one it has in its environment."""

    name: str
    device: str
    environ: dict[str, str]


def device_side(text: str, environ: dict[str, str], otherwise: str = "") -> Side:
    """Read a device's name; it must be there now, not only once a worker has loaded torch.

    ``otherwise`` says what else the argument might have been, for the error. Raises `UserError`.
    """
    kind, colon, index = text.partition(":")
    if kind == "npu-emulated":
        from ascend.emulator.__main__ import environment

        return Side(text, f"npu{colon}{index}", environment())
    if kind not in SIDES:
        choices = ", ".join(filter(None, [*SIDES, otherwise]))
        raise UserError(f"'{text}' is none of {choices}{suggest(kind, SIDES)}")
    get_device(text)
    return Side(text, text, environ)


def compute(side: Side, args: argparse.Namespace, out: Path, like: Path | None = None) -> None:
    """Have a worker compute a side into ``out``. Raises `UserError` with the worker's own line if it ends with one."""
    options = ["--model", args.model, "--device", side.device, "--out", str(out)]
    options += [] if like is None else ["--like", str(like)]
    for name in SETTLED:
        value = getattr(args, name)
        options += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    print(f"computing {side.name} …", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "perf.parity.side", *options],
        stderr=None if args.verbose else subprocess.PIPE,
        stdout=sys.stderr,
        env=side.environ,
        text=True,
        check=False,
    )
    if done.returncode:
        errors = [line for line in (done.stderr or "").splitlines() if line.startswith("error: ")]
        if done.returncode == EXIT_USER_ERROR and errors:
            raise UserError(errors[-1].removeprefix("error: "))
        raise UserError(f"side {side.name} ended with code {done.returncode}; run again with --verbose to see why")
