"""Checks of the model's directory: whole, vouched for, without code, and out of others' reach."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ascend.checkpoint import Checkpoint, read_config
from ascend.devices.cpu import CpuDevice
from ascend.devices.facts import GiB, MiB
from ascend.errors import UserError
from convert.manifest import MANIFEST, check_quick, read_manifest, summary
from serve.doctor import nvidia_smi
from serve.doctor.cuda_cards import cards as cuda_cards
from serve.doctor.finding import Finding, error, note, ok, unknown, warning
from serve.doctor.machine import Machine
from serve.doctor.npu_cards import table

# Fields by which a config.json names code to be fetched (CVE-2026-4372).
CODE_FIELDS = ("_attn_implementation_internal", "_experts_implementation_internal")


def check_files(m: Machine) -> Iterator[Finding]:
    """What the launcher would refuse: config, shards, headers, pickles, tokenizer; and the manifest if there is one."""
    model = m.asked.model
    if model is None or m.quick:  # the launcher looks at this itself
        return
    checkpoint = _checkpoint(m)
    if isinstance(checkpoint, UserError):
        yield error(str(checkpoint), "the launcher refuses such a directory", "copy or convert the model again")
    else:
        yield ok(f"{model}: {len(checkpoint.tensors)} tensors, {_size(checkpoint.nbytes)}, headers whole")
    if not (model / MANIFEST).exists():
        if model.is_dir():
            remedy = "`python -m convert manifest DIR` writes one while they are known to be good"
            yield note(f"{model} has no {MANIFEST}", "nothing vouches for its files", remedy)
        return
    try:
        problems = check_quick(model, read_manifest(model))
    except UserError as problem:
        problems = [str(problem)]
    if problems:
        yield error(summary(problems), f"the directory is not what its {MANIFEST} says", "copy or convert it again")
    else:
        yield ok(f"{model}: names and sizes are those of its {MANIFEST} (`serve/launch.sh --verify full` reads it all)")


def check_code(m: Machine) -> Iterator[Finding]:
    """Code in the directory, or named by its config.json. None of it is ever run here."""
    model = m.asked.model
    if model is None or not model.is_dir():
        return
    scripts = sorted(path.name for path in model.glob("*.py"))
    if scripts:
        why = "this project never runs it, another program may"
        yield warning(f"{model} holds code: {', '.join(scripts[:3])}", why, "remove it: this architecture needs none")
    try:
        config = read_config(model)
    except UserError:
        return  # check_files says so
    if "auto_map" in config:
        yield note(f"{model}: config.json has an auto_map", "it names code; the plugin keeps it from being looked at")
    named = sorted(_code_fields(config))
    if named:
        why = "transformers before 5.3 fetches and runs what it names (CVE-2026-4372)"
        yield error(f"{model}: config.json has {named[0]}", why, "remove the field; find out who put it there")
    if not scripts and not named:
        yield ok(f"{model} holds no code")


def _code_fields(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key in CODE_FIELDS and isinstance(item, str) and "/" in item:
                yield key
            yield from _code_fields(item)
    elif isinstance(value, list):
        for item in value:
            yield from _code_fields(item)


def check_rights(m: Machine) -> Iterator[Finding]:
    """Whether others can change the weights."""
    model = m.asked.model
    if model is None or not model.is_dir():
        return
    worst = next((path for path in [model, *sorted(model.iterdir())] if _others_may_write(path)), None)
    if worst:
        why = "any user of this machine could put other weights in their place"
        yield error(f"{worst} can be written by everyone", why, f"chmod -R o-w {model}")
    foreign = next((path for path in [model, *sorted(model.iterdir())] if _owner(path) not in (0, os.geteuid())), None)
    if foreign:
        why = "its owner can change it at any time"
        yield warning(f"{foreign} belongs to user {_owner(foreign)}", why, "chown it to root or to who serves it")
    if not worst and not foreign:
        yield ok(f"{model}: only root or this user can change it")


def _others_may_write(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return bool(mode & stat.S_IWOTH) and not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX)


def _owner(path: Path) -> int:
    try:
        return path.stat().st_uid
    except OSError:
        return 0


def check_room(m: Machine) -> Iterator[Finding]:
    """Whether this server's part of the weights fits into what is free: the host's memory, or all cards' together."""
    if m.asked.model is None or m.quick:
        return
    checkpoint = _checkpoint(m)
    if isinstance(checkpoint, UserError):
        return
    free = _free_bytes(m)
    where = "memory" if m.asked.device == "cpu" else "memory of the cards here"
    size = f"the weights take {_size(checkpoint.nbytes)}"
    if free is None:
        yield unknown("whether the weights fit", f"free {where} is not known")
    elif checkpoint.nbytes / m.asked.nodes > free:
        what = f"{size}, and {_size(free)} of {where} are free"
        yield error(what, "they do not fit", "use more cards or servers, or convert the model to w8a8 or w4a16")
    else:
        yield ok(f"{size}, {_size(free)} of {where} are free (`serve plan` tells what that is enough for)")


def _size(nbytes: float) -> str:
    return f"{nbytes / GiB:.1f} GiB" if nbytes >= GiB else f"{nbytes / MiB:.1f} MiB"


def _free_bytes(m: Machine) -> int | None:
    if m.asked.device == "cpu":
        known = re.search(r"^MemAvailable:", m.host.text("/proc/meminfo"), re.MULTILINE)
        return CpuDevice(host=m.host).memory().free if known else None
    if m.asked.device == "npu":
        npu = [(card.hbm_total or 0) - (card.hbm_used or 0) for card in table(m).cards]
        return sum(npu) * MiB if npu else None
    cuda = [nvidia_smi.number(row["memory.free"]) for row in cuda_cards(m)[1]]
    return sum(free or 0 for free in cuda) * MiB if cuda else None


def _checkpoint(m: Machine) -> Checkpoint | UserError:
    from serve.preflight import check_model

    if m.asked.model is None:
        return UserError("no model")
    try:
        return check_model(m.asked.model, None)
    except UserError as problem:
        return problem
