"""What the doctor says: one line per finding."""

from __future__ import annotations

from dataclasses import dataclass

from serve.state import printable

LEVELS = ("ok", "note", "unknown", "warning", "error")  # error: a launch would fail; unknown: it could not be told


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: how it is, why that matters, and what to do. ``check`` is who looked."""

    level: str
    what: str
    why: str = ""
    remedy: str = ""
    check: str = ""

    def __str__(self) -> str:
        """One line without the level; what tools and file names put into it cannot steer a terminal."""
        why = f" ({self.why})" if self.why else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return printable(f"{self.what}{why}{remedy}")


def ok(what: str) -> Finding:
    """As it should be."""
    return Finding("ok", what)


def note(what: str, why: str = "", remedy: str = "") -> Finding:
    """Good to know; nothing needs to be done."""
    return Finding("note", what, why, remedy)


def unknown(what: str, why: str = "", remedy: str = "") -> Finding:
    """It could not be told, so it does not count as good."""
    return Finding("unknown", what, why, remedy)


def warning(what: str, why: str, remedy: str) -> Finding:
    """A launch may pass, and something will be worse for it."""
    return Finding("warning", what, why, remedy)


def error(what: str, why: str, remedy: str) -> Finding:
    """A launch would fail, or must not be."""
    return Finding("error", what, why, remedy)
