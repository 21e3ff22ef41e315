"""Reading command lines: what argparse would answer with its usage gets one line and a suggestion instead."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ascend.errors import UserError, suggest


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose complaints are `UserError`, without abbreviations of flags."""

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        """Of ``python -m COMMAND``, such as "perf roofline"."""
        super().__init__(prog=f"python -m {command}", description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse complains of."""
        raise UserError(f"{message}; see `{self.prog} --help`")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments. Raises `UserError` that suggests a known flag for an unknown one."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            name = unknown[0].split("=")[0]  # a value may be a secret
            raise UserError(f"unknown argument '{name}'{suggest(name, known)}; see `{self.prog} --help`")
        return args
