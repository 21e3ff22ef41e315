"""Cards that must not be used again: they had a memory fault, and what they compute may be wrong.

`isolated-cards.json` in the state directory names each by its number on this machine and, where the vendor's tool says,
by its serial number or UUID: a card that was replaced is free again, one that was moved is not. A person who knows
better starts with `--forget-isolated`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ascend.errors import UserError
from serve.doctor import npu_smi, nvidia_smi
from serve.planning.cards import VISIBLE, visible_cards
from serve.state import state_directory
from serve.watch.faults import TABLE, Fault

FILE = "isolated-cards.json"
VERSION = 1
MAX_BYTES = 1 << 20
REPEAT_SECONDS = 3600.0
_REPEATS = {kind.name for kind in TABLE if kind.repeats}
_UNCORRECTED = "ecc.errors.uncorrected.volatile.total"
_DOUBLE_BIT = "HBM Double Bit Error Count"
_NODES = {"npu": r"davinci\d+", "cuda": r"nvidia\d+"}
TOOL_SECONDS = 10.0


def isolated(device: str, directory: Path | None = None) -> dict[int, str]:
    """Return the numbers of the device's cards that must not be used, each with the reason. Raises `UserError`."""
    cards = [card for card in _read(directory)["cards"] if card["device"] == device]
    if not cards:
        return {}
    here = identities(device)
    found = {}
    for card in cards:
        if card["identity"] is None or card["index"] not in here:
            found[card["index"]] = card["reason"]
        for index, identity in here.items():  # where it is now, if anywhere
            if identity == card["identity"]:
                found[index] = card["reason"]
    return found


def isolate(
    cards: Sequence[int],
    reason: str,
    device: str = "",
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> tuple[int, ...]:
    """Record that cards are sick, and return their numbers on this machine.

    Args:
        cards: as the engine counts them; none: nobody knows which, so all that it sees.
        reason: one line for whoever reads it later.
        device: "npu" or "cuda"; "": whichever has cards here.
        environment: the engine's: it may make only some cards visible, which the engine then counts from 0.
    """
    kinds = [device] if device in _NODES else [kind for kind in _NODES if present(kind)]
    if not kinds:
        return ()
    seen = _visible(kinds[0], {**os.environ, **(environment or {})})
    numbers = tuple(seen[card] for card in cards if card < len(seen)) or seen
    isolate_numbers(numbers, reason, kinds[0], directory)
    return numbers


def isolate_numbers(numbers: Sequence[int], reason: str, device: str, directory: Path | None = None) -> None:
    """Record that cards are sick, by their numbers on this machine. Raises `UserError` if that cannot be written."""
    known = identities(device)
    record = _read(directory)
    kept = [card for card in record["cards"] if card["index"] not in numbers or card["device"] != device]
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    kept += [
        {"device": device, "index": one, "identity": known.get(one), "reason": reason[:500], "at": at}
        for one in numbers
    ]
    _write(record | {"cards": kept}, directory)


def sick_cards(device: str) -> tuple[int, ...] | None:
    """Return the cards that count uncorrectable memory errors since they were started; None if the tool does not say.

    Those that were counted over a card's whole life do not count: what they were of was dealt with, or was not noticed.
    """
    here = present(device)
    counts: dict[int, int | None] = {}
    if device == "cuda":
        said = _output("nvidia-smi", f"--query-gpu=index,{_UNCORRECTED}", "--format=csv,noheader,nounits")
        rows = nvidia_smi.parse_csv(said, ("index", _UNCORRECTED))
        counts = {int(row["index"]): nvidia_smi.number(row[_UNCORRECTED]) for row in rows if row["index"].isdecimal()}
    for card in here if device == "npu" else ():
        fields = npu_smi.parse_fields(_output("npu-smi", "info", "-t", "ecc", "-i", str(card)))
        counts[card] = (npu_smi.uncorrected_errors(fields) or {}).get(_DOUBLE_BIT)
        if counts[card] is None:
            break  # a tool that hangs is not asked eight times
    sick = tuple(sorted(card for card, count in counts.items() if count))
    is_whole = bool(here) and len(counts) >= len(here) and None not in counts.values()
    return sick if sick or is_whole else None


def forget(directory: Path | None = None) -> list[str]:
    """Clear the record, and return a line for each card that was in it: for `--forget-isolated`."""
    file = _file(directory)
    try:
        cards = _read(directory)["cards"]
    except UserError:
        cards = []
    file.unlink(missing_ok=True)
    return [f"{card['device']} card {card['index']} may be used again; isolated {card['at']}: {card['reason']}"
            for card in cards]  # fmt: skip


def judged(fault: Fault, directory: Path | None = None, now: float | None = None) -> Fault:
    """Return the fault, to be isolated if it is one that may happen once, and the same card had it within an hour."""
    if fault.name not in _REPEATS or not fault.cards:
        return fault
    now = time.time() if now is None else now
    record = _read(directory)
    recent = [one for one in record["faults"] if 0 <= now - one["at"] < REPEAT_SECONDS]
    again = any(one["name"] == fault.name and set(one["cards"]) & set(fault.cards) for one in recent)
    recent.append({"name": fault.name, "cards": list(fault.cards), "at": now})
    _write(record | {"faults": recent[-1000:]}, directory)
    if not again:
        return fault
    return replace(fault, action="isolate", meaning=f"{fault.meaning}, for the second time within an hour")


def present(device: str) -> tuple[int, ...]:
    """Return the numbers of a kind's cards on this machine."""
    from ascend.devices.base import Host

    return tuple(range(len(Host().nodes(_NODES[device]))))


def identities(device: str) -> dict[int, str]:
    """Return what tells each card from others of its kind (UUID or serial number), as far as the vendor's tool says."""
    if device == "cuda":
        said = _output("nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader")
        rows = [line.split(",") for line in said.splitlines() if line.count(",") == 1]
        return {int(index): uuid.strip() for index, uuid in rows if index.strip().isdecimal()}
    found = {}
    for card in present(device):
        serial = re.search(r"Serial Number\s*:\s*(\S+)", _output("npu-smi", "info", "-t", "board", "-i", str(card)))
        if serial and serial[1] not in ("NA", "N/A", "-"):
            found[card] = serial[1]
    return found


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _visible(device: str, environment: Mapping[str, str]) -> tuple[int, ...]:
    try:
        return visible_cards(environment.get(VISIBLE[device]), device, len(present(device)))
    except UserError:  # nobody can say which: all
        return present(device)


def _file(directory: Path | None) -> Path:
    if directory is None:
        directory = state_directory()
    return directory / FILE


def _read(directory: Path | None) -> dict[str, Any]:
    file = _file(directory)
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return {"version": VERSION, "cards": [], "faults": []}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}): which cards are sick is not known") from None
    try:
        record = json.loads(content)
        is_ours = len(content) <= MAX_BYTES and record["version"] == VERSION and set(record) == _KEYS
        is_ours = is_ours and all({key: type(card[key]) for key in card} in _CARDS for card in record["cards"])
        if not (is_ours and all(map(_is_fault, record["faults"]))):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(
            f"{file}: is damaged, so which cards are sick is not known: look at them, then give --forget-isolated"
        ) from None
    return record


_KEYS = {"version", "cards", "faults"}
_CARDS = [{"device": str, "index": int, "identity": kind, "reason": str, "at": str} for kind in (str, type(None))]


def _is_fault(one: Mapping[str, Any]) -> bool:
    is_whole = set(one) == {"name", "cards", "at"} and type(one["cards"]) is list and type(one["name"]) is str
    return is_whole and type(one["at"]) in (int, float) and all(type(card) is int for card in one["cards"])


def _write(record: Mapping[str, Any], directory: Path | None) -> None:
    file = _file(directory)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(record, indent=1) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}): a sick card would be used again") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
