"""The kinds of values of engine flags, as the engines' parsers read them (vLLM's utils/argparse_utils.py, 0.32)."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ascend.errors import suggest

_POWERS = {letter: exponent for exponent, letter in enumerate("kmgt", start=1)}


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None


def int_with_suffix(text: str) -> int:
    """Read 4096, 4k (4000), 4.5k, 4K (4096); m, g, t likewise. A fraction goes with the decimal suffixes alone."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT])", text.strip())
    if not match:
        return _int(text.strip())
    number, letter = match.groups()
    power = _POWERS[letter.lower()]
    return int(float(number) * 1000**power) if letter.islower() else _int(number) * 1024**power


def _int_or_auto(text: str) -> int:
    return -1 if text.strip().lower() in ("-1", "auto") else int_with_suffix(text)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not JSON: {error}") from None


def _json_or_text(text: str) -> Any:
    return _json(text) if re.fullmatch(r"(?s)\s*{.*}\s*", text) else text


KINDS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": _int,
    "float": _float,
    "int-suffix": int_with_suffix,
    "int-auto": _int_or_auto,
    "json": _json,
    "json-or-str": _json_or_text,
    "backend": lambda text: text.lower().replace("-", "_"),
}


def reader(described: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return what reads one value of a flag of the list. It raises `argparse.ArgumentTypeError`."""
    kind = described["kind"]
    read = _config(described["fields"]) if kind == "config" else KINDS[kind]
    if not described.get("optional"):
        return read
    return lambda text: None if text in ("", "None") else read(text)


def _config(fields: list[str]) -> Callable[[str], dict[str, Any]]:
    """A configuration class: a JSON object of its fields, in which a number may have a suffix."""

    def read(text: str) -> dict[str, Any]:
        parts = re.split(r'("(?:[^"\\]|\\.)*")', text)  # every second one is a string, and stays
        parts[::2] = [
            re.sub(r"\b\d+(?:\.\d+)?[kmgtKMGT]\b", lambda match: str(int_with_suffix(match[0])), part)
            for part in parts[::2]
        ]
        value = _json("".join(parts))
        if not isinstance(value, dict):
            raise argparse.ArgumentTypeError(f"'{text}' is not a JSON object")
        for key in value:
            if key not in fields:
                raise argparse.ArgumentTypeError(f"unknown key '{key}'{suggest(key, fields)}")
        return value

    return read
