"""`python -m serve COMMAND …`: one module per command, imported only when it is called."""

from __future__ import annotations

import sys
from importlib import import_module

from ascend.errors import UserError, run_command, suggest

COMMANDS = {
    "launch": "start vLLM on a model, wait until it answers, and stay until it is told to stop",
}
USAGE = "usage: python -m serve COMMAND …   (COMMAND --help for its options)\n\ncommands:\n" + "\n".join(
    f"  {name:<8} {what}" for name, what in COMMANDS.items()
)


def main() -> int:
    """Run the command named by the first argument; its module's `main` gets the rest."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in COMMANDS:
        raise UserError(f"unknown command '{command}'{suggest(command, COMMANDS)}; `python -m serve --help` lists them")
    result: int = import_module(f"serve.{command}").main(rest)
    return result


if __name__ == "__main__":
    sys.exit(run_command(main))
