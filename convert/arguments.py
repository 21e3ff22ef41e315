"""Reading the command lines of this package: what argparse would answer with its usage gets one line instead."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ascend.errors import UserError, suggest


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose complaints are `UserError`, without abbreviations of flags."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"python -m convert {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse complains of."""
        raise UserError(f"{message}; see `{self.prog} --help`")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments. Raises `UserError` that suggests a known flag for an unknown one."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            name = unknown[0].split("=")[0]
            raise UserError(f"unknown argument '{name}'{suggest(name, known)}; see `{self.prog} --help`")
        return args
