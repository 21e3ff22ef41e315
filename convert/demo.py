"""`python -m convert demo DIR`: a checkpoint in the model family's exact format, with random weights.

`write_demo` is the same for Python: the launcher and the tests use it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ascend.arguments import Parser
from ascend.errors import UserError, suggest
from convert.demo_config import CONFIG_ONLY, DTYPES, MARKER, NOTE, SIZES, demo_config, generation_config
from convert.demo_tokenizer import to_json, tokenizer_files
from convert.demo_weights import KINDS, write_weights
from convert.shapes import count, tensor_shapes
from convert.sizes import parse_size
from convert.staging import staged_directory


@dataclass(frozen=True)
class Demo:
    """A demo checkpoint that was written: `parameters` and `weight_bytes` are zero where only the config was."""

    path: str
    size: str
    seed: int
    dtype: str
    parameters: int
    weight_bytes: int
    seconds: float
    note: str = NOTE


def write_demo(
    path: str | os.PathLike[str],
    size: str = "tiny",
    seed: int = 0,
    dtype: str = "bf16",
    *,
    weights: str = "gaussian",
    yarn: float | None = None,
    max_shard_size: str = "512MB",
    force: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    **config_overrides: Any,
) -> Demo:
    """Write a demo checkpoint to ``path`` and return what was written. The same arguments give the same bytes.

    Args:
        path: a directory that does not exist, is empty, or (with ``force``) holds an older demo. It appears whole or
            not at all.
        size: ``tiny`` (2.6 M parameters), ``tiny-npu`` (8.2 M, heads of 128), ``small`` (0.5 B), ``ling-mini``,
            ``ling-flash`` (no weights).
        seed: chooses the weights.
        dtype: ``bf16`` or ``fp32``.
        weights: ``gaussian``, or ``heavy``: with the tails, rows and outlier channels of trained ones (`demo_heavy`).
        yarn: extend the context by this factor with YaRN.
        max_shard_size: as in transformers, ``"512MB"``; a larger checkpoint is split into shards with an index.
        force: replace a demo that is there; anything else is never overwritten.
        progress: called with a line per file of weights.
        config_overrides: keys of `config.json`, ``num_nextn_predict_layers=2``; the tensors follow them.

    Raises:
        UserError: the arguments do not fit together, or the directory cannot be written.
    """
    start = time.monotonic()
    if weights not in KINDS:
        raise UserError(f"unknown weights '{weights}'{suggest(weights, KINDS)}; there is {', '.join(KINDS)}")
    config, tokens = demo_config(size, seed, dtype, yarn, config_overrides)
    if weights != KINDS[0]:
        config[MARKER]["weights"] = weights
    shapes = {} if size in CONFIG_ONLY else tensor_shapes(config)
    parameters, weight_bytes = count(shapes)
    max_shard_bytes = parse_size(max_shard_size)
    target = Path(path).resolve()
    _check_target(target, force, weight_bytes)

    texts = {
        "config.json": to_json(config),
        "generation_config.json": to_json(generation_config(tokens)),
        "README.md": _readme(config[MARKER], dtype, parameters),
        **tokenizer_files(tokens, config),
    }
    with staged_directory(target, replace=force) as staging:
        for name, text in texts.items():
            (staging / name).write_text(text, encoding="utf-8")
        if shapes:
            write_weights(
                staging, shapes, seed, tokens, max_shard_bytes, progress, weights, config["num_hidden_layers"]
            )
    return Demo(str(target), size, seed, dtype, parameters, weight_bytes, round(time.monotonic() - start, 3))


def is_demo(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` holds a checkpoint of `write_demo`, whose text means nothing."""
    try:
        config = json.loads((Path(path) / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and MARKER in config


def main(argv: Sequence[str]) -> int:
    """Run `python -m convert demo` with ``argv``."""
    parser = Parser("convert demo", f"Write a demo checkpoint. {NOTE}")
    parser.add_argument("dir", metavar="DIR", help="directory to make")
    parser.add_argument("--size", default="tiny", metavar="|".join(SIZES), help="ling-*: config and tokenizer only")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the weights (default 0)")
    parser.add_argument(
        "--weights", default=KINDS[0], metavar="|".join(KINDS), help="heavy: with the outliers of trained weights"
    )
    parser.add_argument("--dtype", default="bf16", metavar="|".join(DTYPES), help="default bf16")
    parser.add_argument("--mtp", type=int, metavar="N", help="number of MTP layers (default 1; ling-*: 0)")
    parser.add_argument("--yarn", type=float, metavar="FACTOR", help="extend the context with YaRN by this factor")
    parser.add_argument("--max-shard-size", default="512MB", metavar="SIZE", help="largest weight file (default 512MB)")
    parser.add_argument("--force", action="store_true", help="replace a demo that is already there")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    args = parser.read(argv)

    # A plain SIGTERM would leave the staging directory behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    demo = write_demo(
        args.dir,
        args.size,
        args.seed,
        args.dtype,
        weights=args.weights,
        yarn=args.yarn,
        max_shard_size=args.max_shard_size,
        force=args.force,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
        **({} if args.mtp is None else {"num_nextn_predict_layers": args.mtp}),
    )
    if args.json:
        print(json.dumps(asdict(demo)))
    else:
        what = f"{demo.parameters:,} parameters, {demo.weight_bytes / 1e6:.1f} MB" if demo.parameters else "no weights"
        print(f"{demo.path}: {demo.size} demo, {demo.dtype}, {what}, {demo.seconds:.1f} s\n{NOTE}")
    return 0


def _check_target(target: Path, force: bool, weight_bytes: int) -> None:
    """Refuse early what would fail after the work, or would destroy something."""
    try:
        if not target.parent.is_dir():
            raise UserError(f"{target.parent} is no directory: make it first, or give another place")
        if target.exists() and not target.is_dir():
            raise UserError(f"{target} is a file: give a directory")
        occupied = target.is_dir() and any(target.iterdir())
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise UserError(f"cannot read {target}: {error.strerror}") from None
    if occupied and not is_demo(target):
        raise UserError(f"{target} is not empty and holds no demo: it is not overwritten, give another directory")
    if occupied and not force:
        raise UserError(f"{target} already holds a demo: give --force to replace it, or another directory")
    if weight_bytes > free:
        raise UserError(f"{target.parent} has {free / 1e9:.2f} GB free, the weights need {weight_bytes / 1e9:.2f} GB")


def _readme(marker: dict[str, Any], dtype: str, parameters: int) -> str:
    what = f"{parameters:,} parameters, {dtype}" if parameters else "config and tokenizer only"
    if "weights" in marker:
        what += f", weights drawn with {marker['weights']} tails"
    return (
        f"# Demo checkpoint ({marker['size']}, seed {marker['seed']})\n\n**{NOTE}**\n\n"
        f"BailingMoeV2 architecture, {what}. Made by `python -m convert demo`; the same command makes the same bytes.\n"
        f"Programs know it by the key `{MARKER}` of `config.json`.\n"
    )
