"""Errors a user can act on, and how every command of this project reports them."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """A mistake of the user's or of the machine's: one line that says what is wrong, where, and what to do.

    Names and values in it are as somebody wrote them; what would break the line or steer a terminal is escaped.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known word nearest to ``word``, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's ``main``: a `UserError` becomes one line on standard error and exit code 2, Ctrl-C 130."""
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`| head`): close quietly, and keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
