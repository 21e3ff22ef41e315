"""`--config FILE` and `--profile NAME`: YAML whose keys are the launcher's flags, turned into a command line.

So a value in a file is checked by the very code that checks the flag, and the command line wins by standing last.

    device: npu
    tensor-parallel-size: 8
    engine-flags: {seed: 1, hf-overrides: {rope_parameters: {…}}}    # what would stand after '--'
    environment: {HCCL_BUFFSIZE: "200"}                              # of the engine

Paths in it are relative to the file. Unknown keys are refused, and so are those that stand there twice, also as `a-b`
and `a_b`, and YAML's aliases, which nobody needs here and which a small file can make endless.
"""

from __future__ import annotations

import json
import os
import re
from argparse import Action
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend.errors import UserError, suggest

PROFILES = Path(__file__).parent / "profiles"
LARGEST_BYTES = 1 << 20
ENGINE_FLAGS, ENVIRONMENT = "engine-flags", "environment"
PATHS = ("model", "key", "ready-file")
ONLY_ON_THE_COMMAND_LINE = ("help", "config", "profile", "print-config", "dry-run", "forget-isolated")


@dataclass(frozen=True)
class ConfigFile:
    """A file as arguments of the launcher, arguments of the engine, and the engine's environment."""

    name: str
    arguments: list[str]
    engine_flags: list[str]
    environment: dict[str, str]


def profiles() -> list[str]:
    """Return the names of the profiles that ship."""
    return sorted(file.stem for file in PROFILES.glob("*.yaml"))


def read_profile(name: str, flags: Mapping[str, Action]) -> ConfigFile:
    """Read a profile by its name; as `read_config`."""
    if name not in profiles():
        raise UserError(f"unknown profile '{name}'{suggest(name, profiles())}; there is {', '.join(profiles())}")
    return read_config(PROFILES / f"{name}.yaml", flags)


def read_config(path: Path, flags: Mapping[str, Action]) -> ConfigFile:
    """Read a file whose keys are ``flags`` without their dashes. Raises `UserError`, one line that names the file."""
    content = _content(path)
    names = {flag[2:] for flag in flags if flag.startswith("--") and not flag.startswith("--no-")}
    names -= set(ONLY_ON_THE_COMMAND_LINE)
    arguments: list[str] = []
    for name, key, value in _entries(path, content):
        if name in (ENGINE_FLAGS, ENVIRONMENT):
            continue
        if name in ONLY_ON_THE_COMMAND_LINE:
            raise UserError(f"{path}: '{key}' belongs on the command line, not in a file")
        if name not in names:
            raise UserError(f"{path}: unknown key '{key}'{suggest(name, [*names, ENGINE_FLAGS, ENVIRONMENT])}")
        if isinstance(value, (dict, list)):
            raise UserError(f"{path}: '{key}' is one value, not a {'mapping' if isinstance(value, dict) else 'list'}")
        if value is None:
            continue
        text = _text(path, key, value)
        if name in PATHS:
            value = os.path.join(os.path.abspath(path.parent), text)
        is_switch = flags[f"--{name}"].nargs == 0
        if is_switch != isinstance(value, bool):
            raise UserError(f"{path}: '{key}' is {value!r}, it must be {'true or false' if is_switch else 'a value'}")
        arguments += as_flags({name: value})
    engine_flags = {name: value for name, _, value in _entries(path, _mapping(path, content, ENGINE_FLAGS))}
    for name, value in engine_flags.items():
        for one in value if isinstance(value, list) else [value]:
            _text(path, name, one)
    return ConfigFile(str(path), arguments, as_flags(engine_flags), _environment(path, content))


def _entries(path: Path, content: Mapping[Any, Any]) -> list[tuple[str, Any, Any]]:
    """Names as the flags have them, keys as they stand there, and values. Raises `UserError` for two of one name."""
    keys: dict[str, Any] = {}
    for key in content:
        name = str(key).replace("_", "-")
        if name in keys:
            raise UserError(f"{path}: '{keys[name]}' and '{key}' are the same: keep one of them")
        keys[name] = key
    return [(name, key, content[key]) for name, key in keys.items()]


def _text(path: Path, name: str, value: Any) -> str:
    """The value as a program's argument. Raises `UserError` for what cannot be one."""
    try:
        text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        text.encode()
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: '{name}' is no text, number or JSON") from None
    if "\0" in text or isinstance(value, (bytes, set)):
        raise UserError(f"{path}: '{name}' is {type(value).__name__} that no program takes: write text")
    return text


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as a command line: true is ``--name``, false ``--no-name``, a mapping JSON, a list its items."""
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return words


def _content(path: Path) -> dict[Any, Any]:
    try:
        import yaml
    except ImportError:
        raise UserError(
            f"{path}: PyYAML is not installed in this environment; pip install pyyaml, or give the flags themselves"
        ) from None

    class Loader(yaml.SafeLoader):
        """Refuses aliases, and a key that stands there twice; YAML's own rule takes the last in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise UserError(f"{path}, line {node.start_mark.line + 1}: '{twice}' stands there twice")
            return super().construct_mapping(node, deep)

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                line = self.peek_event().start_mark.line + 1
                raise UserError(f"{path}, line {line}: aliases are not read: write it out")
            return super().compose_node(parent, index)

    try:
        with path.open("rb") as stream:
            text = stream.read(LARGEST_BYTES + 1)
        if len(text) > LARGEST_BYTES:
            raise UserError(f"{path}: larger than {LARGEST_BYTES} bytes, which no configuration is")
        content = yaml.load(text.decode(), Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError, LookupError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: it must be a mapping of flags to values, such as 'port: 8123'")
    if odd := next((key for key in content if not isinstance(key, str)), None):
        raise UserError(f"{path}: unknown key {odd!r}")
    return content


def _mapping(path: Path, content: Mapping[Any, Any], key: str) -> dict[str, Any]:
    given = next((value for name, _, value in _entries(path, content) if name == key), None) or {}
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise UserError(f"{path}: '{key}' must be a mapping of names to values")
    return given


def _environment(path: Path, content: Mapping[Any, Any]) -> dict[str, str]:
    environment = {}
    for name, value in _mapping(path, content, ENVIRONMENT).items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or isinstance(value, (dict, list, bool)) or value is None:
            raise UserError(f"{path}: environment: {name!r} must be a variable's name with a text or a number")
        environment[name] = _text(path, name, value)
    return environment
