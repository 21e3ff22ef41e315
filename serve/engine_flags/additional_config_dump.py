"""The keys that vllm-ascend reads from `--additional-config`, found in its source without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

# What the source's default does not tell: it is None, or read from an environment variable of envs.py, or anything.
_TYPES = {
    "dump_config": "dict",
    "dump_config_path": "str",
    "ascend_log_path": "str",
    "enable_dsa_cp": "bool",
    "layer_sharding": "list",
    "enable_flashcomm2_parallel_size": "int",
    "enable_fused_mc2": "int",
    "weight_nz_mode": "int",
    "eplb_config.expert_map_path": "str",
    "eplb_config.expert_map_record_path": "str",
    "profiling_chunk_config.need_timing": "bool",
    "weight_prefetch_config.prefetch_ratio": "dict",
}


def additional_config_keys(package: Path) -> dict[str, str]:
    """Return the type of each key, a nested one as ``outer.inner``, for the package's directory."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))]
    found: dict[str, str] = {}
    for tree in trees:
        for key, type_ in _reads(tree, "additional_config"):
            if found.get(key, "any") == "any":
                found[key] = type_
    config = ast.parse((package / "ascend_config.py").read_text(encoding="utf-8"))
    for outer, class_ in _sections(config):
        found[outer] = "dict"
        found |= {f"{outer}.{key}": type_ for key, type_ in _members(class_)}
    for key in ("enabled", "sparse_json_location"):  # read by a subscript of the default
        found.setdefault(f"hamming_sparse.{key}", "bool" if key == "enabled" else "str")
    return {key: _TYPES.get(key, found[key]) for key in sorted(found)}


def _reads(tree: ast.AST, mapping: str) -> Iterator[tuple[str, str]]:
    """Yield (key, type) of each ``mapping.get(key, default)``, ``mapping[key]``, ``key in mapping`` and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute) and function.attr == "get" and _is(function.value, mapping):
                yield from _key(node.args[0], node.args[1] if len(node.args) > 1 else None)
            elif isinstance(function, ast.Attribute) and function.attr == "_get_config_value":
                yield from _key(node.args[1], ast.Constant(False))
        elif isinstance(node, ast.Subscript) and _is(node.value, mapping):
            yield from _key(node.slice, None)
        elif isinstance(node, ast.Compare) and _is(node.comparators[0], mapping):
            yield from _key(node.left, None)


def _is(node: ast.AST, name: str) -> bool:
    return (isinstance(node, ast.Name) and node.id == name) or (isinstance(node, ast.Attribute) and node.attr == name)


def _key(key: ast.AST, default: ast.AST | None) -> Iterator[tuple[str, str]]:
    if isinstance(key, ast.Constant) and isinstance(key.value, str):
        yield key.value, _type(default)


def _type(default: ast.AST | None) -> str:
    if isinstance(default, ast.UnaryOp):
        default = default.operand
    if isinstance(default, ast.Constant) and default.value is not None:
        return type(default.value).__name__
    return {ast.List: "list", ast.Dict: "dict"}.get(type(default), "any")


def _sections(config: ast.Module) -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield the keys whose value a class of its own takes: ``self.KEY = Class(...)`` in AscendConfig."""
    classes = {node.name: node for node in config.body if isinstance(node, ast.ClassDef)}
    for node in ast.walk(classes["AscendConfig"]):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
            target = node.targets[0]
            if node.value.func.id in classes and isinstance(target, ast.Attribute):
                yield target.attr, classes[node.value.func.id]


def _members(class_: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for node in class_.body:
        if isinstance(node, ast.Assign) and _is(node.targets[0], "_defaults") and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                yield from _key(key, value)  # type: ignore[arg-type]
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            names = [argument.arg for argument in node.args.args]
            plain = names[len(names) - len(node.args.defaults) :]
            for name, default in zip(plain, node.args.defaults, strict=True):
                if isinstance(default, ast.Constant) and default.value is not None:
                    yield name, _type(default)
            for mapping in (*names[1:], "kwargs"):
                yield from _reads(node, mapping)
