"""What `python -m convert`, `python -m serve` and `python -m perf` share: choosing a command by its name."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module

from ascend.errors import UserError, run_command, suggest


def run_package(package: str, commands: Mapping[str, str], modules: Mapping[str, str] | None = None) -> int:
    """Run the command that the first argument names; returns the exit code.

    ``commands`` says what each does; its module ``package.command`` is imported only when it is called, and its
    ``main`` gets the rest of the arguments. ``modules`` names another module for some: theirs gets the command too.
    """
    return run_command(lambda: _dispatch(package, commands, modules or {}))


def _dispatch(package: str, commands: Mapping[str, str], modules: Mapping[str, str]) -> int:
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(f"usage: python -m {package} COMMAND …   (COMMAND --help for its options)\n\ncommands:")
        for name, what in commands.items():
            print(f"  {name:<8} {what}")
        return 0
    if command not in commands:
        lists = f"`python -m {package} --help` lists them"
        raise UserError(f"unknown command '{command}'{suggest(command, commands)}; {lists}")
    arguments = [command, *rest] if command in modules else rest
    result: int = import_module(f"{package}.{modules.get(command, command)}").main(arguments)
    return result
