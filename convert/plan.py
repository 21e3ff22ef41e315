"""What a conversion will do, told from headers alone: which tensor goes into which file, in which format, how large.

The same source and the same request make the same plan, on every machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from ascend.checkpoint import SINGLE, Checkpoint
from ascend.errors import UserError
from ascend.stored import PLAIN, PLAIN_DTYPES, StoredWeight, stored_weights
from convert.classes import model_order, tensor_class
from convert.sharding import NOT_SHARDED, Sharding
from convert.targets import LAYOUTS, TARGETS, Output, Target, int4_group, outputs, quantization_config


@dataclass(frozen=True)
class Request:
    """What was asked for; it decides every byte of the target.

    ignore: globs of module names that keep their precision. calibrated: the SHA-256 of the text that scales are made
    from, where there are any.
    """

    target: str
    layout: str = LAYOUTS[0]
    ignore: tuple[str, ...] = ()
    max_shard_bytes: int = 4 * 10**9
    sharding: Sharding = NOT_SHARDED
    calibrated: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values, for the manifest and the journal."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


@dataclass(frozen=True)
class Item:
    """A weight on its way: what it is in the source, its class, and the tensors it becomes in format ``to``."""

    source: StoredWeight
    kind: str
    to: str
    outputs: tuple[Output, ...]

    @property
    def is_copied(self) -> bool:
        """Whether values stay the bytes that they are; a scale may get another dtype."""
        ours = {output.part: output for output in self.outputs}
        values, scale = ours["values"], ours.get("scale")
        theirs = self.source.values
        sizes = [math.prod(one.shape) for one in (self.source.scale, scale) if one is not None]
        same_values = (theirs.dtype, theirs.shape) == (values.dtype, values.shape)
        return self.source.format == self.to and same_values and len(set(sizes)) <= 1

    @property
    def nbytes(self) -> int:
        """Bytes in the target."""
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class Shard:
    """A file of the target."""

    file: str
    items: tuple[Item, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(item.nbytes for item in self.items)

    @property
    def source_bytes(self) -> int:
        """Bytes that must be read for it."""
        return sum(item.source.nbytes for item in self.items)


@dataclass(frozen=True)
class Plan:
    """All of it: the files in order, and what `config.json` says of the formats."""

    request: Request
    shards: tuple[Shard, ...]
    quantization_config: dict[str, Any] | None

    def items(self) -> Iterator[Item]:
        """All weights, file by file."""
        for shard in self.shards:
            yield from shard.items

    @property
    def nbytes(self) -> int:
        """Bytes of the target's tensors."""
        return sum(shard.nbytes for shard in self.shards)

    def sha256(self, source: str) -> str:
        """Tell this conversion of a ``source`` (its fingerprint) from every other."""
        words = [source, json.dumps(self.request.as_json(), sort_keys=True), *(shard.file for shard in self.shards)]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()


def plan(checkpoint: Checkpoint, request: Request) -> Plan:
    """Plan a conversion. Raises `UserError` for what cannot be converted so."""
    target = TARGETS[request.target]
    if request.layout != LAYOUTS[0] and target.name != "w8a8":
        raise UserError(f"--format {request.layout} is a form of w8a8 alone, not of {target.name}")
    stored = sorted(stored_weights(checkpoint.tensors).values(), key=lambda one: model_order(one.name))
    ignored = _ignored(stored, request.ignore, target)
    quantised = [one for one in stored if _is_quantised(one, target) and one.name not in ignored]
    if request.ignore and not quantised:
        raise UserError(f"--ignore leaves nothing that {target.name} would quantise: give fewer modules, or use bf16")
    _check_fused(stored, {one.name for one in quantised}, target)
    group = int4_group([one.shape[1] for one in quantised]) if target.stored == "w4a16" and quantised else 0
    half = plain_dtype(checkpoint)
    names = {one.name for one in quantised}
    items = []
    for one in stored:
        to = target.stored if one.name in names else PLAIN
        dtype = half if to != PLAIN else _plain_dtype(one, target, half)
        parts = outputs(one.name, one.shape, to, dtype, request.layout, group)
        items.append(Item(one, tensor_class(one.name), to, parts))
    kept = [item.source.name.removesuffix(".weight") for item in items if item.to == PLAIN and _is_linear(item)]
    described = quantization_config(target, sorted(kept), group) if request.layout == LAYOUTS[0] and names else None
    return Plan(request, tuple(_shards(items, request)), described)


def _is_quantised(one: StoredWeight, target: Target) -> bool:
    return tensor_class(one.name) in target.classes and one.name.endswith(".weight") and len(one.shape) == 2


def _is_linear(item: Item) -> bool:
    """Whether engines see a linear layer there: all matrices but the embedding."""
    return len(item.source.shape) == 2 and item.kind != "embedding"


def plain_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of the model's plain tensors, the embedding's. Raises `UserError` where there is none."""
    entry = checkpoint.tensors.get("model.word_embeddings.weight")
    if entry is None or entry.dtype not in PLAIN_DTYPES:
        raise UserError(f"{checkpoint.path}: tensor model.word_embeddings.weight is missing or not in {PLAIN_DTYPES}")
    return entry.dtype


def _plain_dtype(one: StoredWeight, target: Target, half: str) -> str:
    """What a plain tensor becomes: itself, or BF16 where that is the target.

    fp32 among halves is meant so (the router's bias) and stays.
    """
    is_plain = one.format == PLAIN
    if target.name != "bf16":
        return one.values.dtype if is_plain else half
    if one.name.endswith(".expert_bias") or (is_plain and one.values.dtype == "F32" and half != "F32"):
        return one.values.dtype
    return "BF16"


def _ignored(stored: Sequence[StoredWeight], patterns: Sequence[str], target: Target) -> set[str]:
    names = [one.name for one in stored if _is_quantised(one, target)]
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name.removesuffix(".weight"), pattern)}
        if not matched:
            raise UserError(f"--ignore '{pattern}' names no module that {target.name} would quantise; it is a glob")
        found |= matched
    return found


def _check_fused(stored: Sequence[StoredWeight], quantised: set[str], target: Target) -> None:
    """Refuse to leave out a part of what every engine keeps as one: gate and up, the experts of a layer."""
    modules: dict[str, dict[bool, str]] = {}
    for one in stored:
        if _is_quantised(one, target):
            module = re.sub(r"\.experts\.\d+\..*", ".experts", one.name)
            module = re.sub(r"\.(gate|up)_proj\.weight$", ".gate_proj and up_proj", module)
            modules.setdefault(module, {})[one.name in quantised] = one.name
    for module, names in modules.items():
        if len(names) == 2:
            raise UserError(f"--ignore leaves out {names[False]} and not {names[True]}, but {module} is kept as one")


def _shards(items: Sequence[Item], request: Request) -> Iterator[Shard]:
    """Fill files in the order of the model, those of each rank by themselves."""
    groups: dict[str, list[list[Item]]] = {}
    filled: dict[str, int] = {}
    for item in items:
        group = request.sharding.group(item.source.name)
        files = groups.setdefault(group, [[]])
        filled[group] = filled.get(group, 0) + item.nbytes
        if files[-1] and filled[group] > request.max_shard_bytes:
            files.append([])
            filled[group] = item.nbytes
        files[-1].append(item)
    total = sum(map(len, groups.values()))
    if total == 1:
        yield Shard(SINGLE, tuple(items))
        return
    number = 0
    for group, files in sorted(groups.items()):
        for file in files:
            number += 1
            yield Shard(f"model{group}-{number:05d}-of-{total:05d}.safetensors", tuple(file))


def index(plan: Plan) -> dict[str, Any] | None:
    """Return the index of the files (`model.safetensors.index.json`), None where there is one file."""
    if len(plan.shards) == 1:
        return None
    weight_map = {output.name: shard.file for shard in plan.shards for item in shard.items for output in item.outputs}
    return {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
