"""`python -m perf COMMAND …`: imports a command only when it is called, so that help and mistakes answer at once."""

from __future__ import annotations

import importlib
import sys

from ascend.errors import UserError, run_command, suggest

COMMANDS = {"decode": "decode tokens per second of this engine and its peers, interleaved, on one checkpoint"}


def main() -> int | None:
    """Dispatch to the command's module."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m perf COMMAND …\n")
        for name, what in COMMANDS.items():
            print(f"  {name:8} {what}")
        return 0
    name = sys.argv[1]
    if name not in COMMANDS:
        raise UserError(f"unknown command '{name}'{suggest(name, COMMANDS)}; there is {', '.join(COMMANDS)}")
    return importlib.import_module(f"perf.{name}").main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(run_command(main))
