"""Where a launcher keeps what must outlast it, and how it prints what others wrote."""

from __future__ import annotations

import os
from pathlib import Path

from ascend.errors import UserError


def state_directory() -> Path:
    """Return the directory for logs, events, canaries and isolated cards, made if need be, closed to other users."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "antangelmed"
    try:
        state.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{state}: cannot be made ({error.strerror}); set XDG_STATE_HOME to a writable place") from None
    return state


def printable(text: str) -> str:
    """Return the text with everything that could steer a terminal taken out."""
    return "".join(character if character.isprintable() else " " for character in text)
