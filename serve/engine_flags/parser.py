"""Read engine flags as the engine's own parser will, before it is started: its import alone takes ten seconds.

vLLM rewrites its arguments before argparse sees them (vllm/utils/argparse_utils.py, FlexibleArgumentParser.parse_args,
the same in 0.23 and 0.32): `_` is `-` in a flag, `-O3` is `--optimization-level 3`, and `--flag.key.sub VALUE` builds
JSON. The rest, such as unambiguous beginnings, is argparse's own doing, so argparse does it here too.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from ascend.errors import UserError, suggest
from serve.engine_flags.kinds import int_with_suffix, reader
from serve.engine_flags.tables import table


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"engine flag: {message.removeprefix('argument ')}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            rest = suggest(str(value), known) or f": it is one of {', '.join(known)}"
            raise argparse.ArgumentError(action, f"'{value}' is not among its values{rest}")


@functools.cache
def _parser(file: str) -> _Parser:
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="store_true")
    for name, described in table(file)["flags"].items():
        names = [name, *described.get("names", ())]
        dest = name.lstrip("-")
        if described["kind"] == "flag":
            negative = [other for other in names if other.startswith("--no-") and other != name]
            parser.add_argument(*(other for other in names if other not in negative), action="store_true", dest=dest)
            if negative:
                parser.add_argument(*negative, action="store_false", dest=dest)
            continue
        kept = {key: described[key] for key in ("nargs", "choices") if key in described}
        if kept.get("nargs") == "?":
            kept["const"] = True
        parser.add_argument(*names, dest=dest, type=reader(described), **kept)
    return parser


def read_words(file: str, engine: str, words: Sequence[str], exact: bool) -> dict[str, Any]:
    """Return the values of the flags by their full names without dashes. Raises `UserError`.

    exact: the list is that of the very version; otherwise flags that it lacks pass.
    """
    parser = _parser(file)
    words = _rewrite(list(words)) if engine == "vllm" else list(words)
    known, unknown = parser.parse_known_args(words)
    found = vars(known)
    if found.pop("help", False):
        raise UserError("engine flag --help: the engine would print its flags and stop; run it by hand for that")
    if unknown and exact:
        flags = [name for name in parser._option_string_actions if name.startswith("--")]
        if not unknown[0].startswith("-"):
            raise UserError(f"engine flag: '{unknown[0]}' belongs to no flag")
        name = unknown[0].split("=")[0]
        raise UserError(f"engine flag '{name}' is not known to {_name(file)}{suggest(name, flags)}")
    return found


def _name(file: str) -> str:
    return f"{table(file)['engine']} {table(file)['version']}"


def _rewrite(words: list[str]) -> list[str]:
    words = list(_dashes(words))
    kept: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        name, equals, text = word.partition("=")
        if not word.startswith("-") or "." not in name:
            kept.append(word)
            continue
        if not equals:
            if at == len(words):
                raise UserError(f"engine flag '{name}' needs a value")
            text = words[at]
            at += 1
        if name.endswith("+"):
            name, text = name[:-1], json.dumps(text.split(","))
        flag, *keys = name.split(".")
        nested: Any = _value(text)
        for key in reversed(keys):
            nested = {key: nested}
        _merge(objects.setdefault(flag, {}), nested)
    return [*kept, *(word for flag, value in objects.items() for word in (flag, json.dumps(value)))]


def _dashes(words: list[str]) -> Iterable[str]:
    """`--a_b.c_d=e_f` is `--a-b.c_d=e_f`; `-O3`, `-O=3` and `-O 3` are `--optimization-level 3`."""
    for at, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            flag, dot, keys = name.partition(".")
            yield flag.replace("_", "-") + dot + keys + equals + value
        elif word.startswith("-O") and word != "-O":
            yield from ("--optimization-level", word[3:] if word[2] == "=" else word[2:])
        elif word == "-O" and words[at + 1 : at + 2] and re.fullmatch("[0-3]", words[at + 1]):
            yield "--optimization-level"
        else:
            yield word


def _value(text: str) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(text)
    try:
        return int_with_suffix(text)
    except argparse.ArgumentTypeError:
        return text


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, list) and isinstance(into.get(key), list):
            into[key] += value
        else:
            into[key] = value
