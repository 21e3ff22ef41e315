"""When two systems may be compared: what must be equal, what may differ if one says so, and what is only remarked.

A ratio of tokens per second means something only if both did the same work. What differs is therefore named, and no
ratio is given, unless that very difference is what is being compared (``--across precision``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from perf.compare.systems import System

# What `--across` may name, and why it matters otherwise.
ACROSS = {
    "precision": "another precision moves other bytes and gives other answers",
    "weights": "other weights route tokens to other experts",
    "versions": "another version of the engine, or another way to run it, on the same kind of device is another engine",
    "threads": "another number of threads is another machine",
}

RANDOM, UNKNOWN, SERVE = "random", "unknown", "perf serve"


@dataclass(frozen=True)
class Finding:
    """One difference between two systems. across: what `--across` must name for a ratio all the same; None: nothing."""

    what: str
    a: str
    b: str
    why: str
    across: str | None = None

    def __str__(self) -> str:
        return f"{self.what}: {self.a} against {self.b} ({self.why})"


@dataclass(frozen=True)
class Judgement:
    """Of two systems: why there is no ratio, what was allowed to differ, what else differs and may explain a ratio."""

    refused: list[Finding]
    allowed: list[Finding]
    remarks: list[str]

    @property
    def comparable(self) -> bool:
        """Whether ratios may be given."""
        return not self.refused


def judge(a: System, b: System, across: Iterable[str] = ()) -> Judgement:
    """Say whether ``b`` may be compared with ``a``, across the differences that are named."""
    found = [*_hard(a, b), *_soft(a, b)]
    names = set(across)
    allowed = [one for one in found if one.across in names]
    return Judgement([one for one in found if one not in allowed], allowed, _remarks(a, b))


def _hard(a: System, b: System) -> list[Finding]:
    """Differences that no ratio survives."""
    found = []
    for system in (a, b):
        if system.run is not None and system.run.machine.emulated:
            reason = "an emulated card computes on this computer's processor: its times say nothing"
            found.append(Finding("emulated", _yes_no(a), _yes_no(b), reason))
            break
    if {a.tool, b.tool} & {"perf decode"} and a.tool != b.tool:
        found.append(Finding("tool", a.tool, b.tool, "one times an engine's step, the other a server's answers"))
    for key in dict.fromkeys((*a.settings, *b.settings)):
        if key != "service level" and a.settings.get(key) != b.settings.get(key):  # that only decides what goodput is
            found.append(Finding(key, _short(a.settings.get(key)), _short(b.settings.get(key)), "not the same work"))
    for point in b.points:
        other = next((one for one in a.points if (one.axis, one.load) == (point.axis, point.load)), None)
        if other is not None and other.work != point.work:
            load = f"prompts at {point.axis} {point.load:g}"
            found.append(Finding(load, _short(other.work), _short(point.work), "not the same work"))
    found += _differ(a, b, "model", lambda run: run.model.architecture_sha256, "not the same model", unknown=True)
    loads_a, loads_b = (dict.fromkeys(f"{point.axis} {point.load:g}" for point in one.points) for one in (a, b))
    if not loads_a.keys() & loads_b.keys():
        found.append(Finding("load", "/".join(loads_a), "/".join(loads_b), "no load that both were measured under"))
    return found


def _soft(a: System, b: System) -> list[Finding]:
    """Differences that may be what is compared."""
    found = _differ(a, b, "precision", lambda run: run.model.precision, ACROSS["precision"], "precision")
    # Two precisions of one checkpoint have two hashes; random weights are other weights at any precision.
    if a.weights and b.weights and a.weights != b.weights and (not found or RANDOM in (a.weights, b.weights)):
        found.append(Finding("weights", _short(a.weights), _short(b.weights), ACROSS["weights"], "weights"))
    if _one_kind_of_device(a, b) and _name(a) == _name(b) != UNKNOWN:
        if a.engine != b.engine:
            found.append(Finding("engine", a.engine, b.engine, ACROSS["versions"], "versions"))
        if None not in (a.captured, b.captured) and a.captured != b.captured:
            found.append(Finding("decode step", _step(a), _step(b), ACROSS["versions"], "versions"))
        if SERVE not in (a.tool, b.tool):  # there they are those of the load client's environment
            found += _differ(a, b, "torch", lambda run: run.versions.get("torch"), ACROSS["versions"], "versions")
            found += _differ(a, b, "driver", _driver, ACROSS["versions"], "versions")
    if a.run and b.run and a.run.machine.device_type == b.run.machine.device_type == "cpu":
        found += _differ(a, b, "cores", lambda run: run.machine.cores, ACROSS["threads"], "threads")
        if a.threads != b.threads:
            found.append(Finding("threads", _short(a.threads), _short(b.threads), ACROSS["threads"], "threads"))
    return found


def _remarks(a: System, b: System) -> list[str]:
    """What may differ between two sites without making the comparison void, but has to be said."""
    made = [
        f"{one.label}: the device is as --cards names it, the load client did not see it"
        for one in (a, b)
        if one.run is not None and "device" in one.run.machine.software
    ]
    if a.cards and b.cards and a.cards != b.cards:
        made.append(f"{a.cards} against {b.cards} cards: look at the figures per card")
    if a.run is None or b.run is None:
        files = ", ".join(one.source for one in (a, b) if one.run is None)
        made.append(f"{files}: does not say device, versions or model hash; that they fit is your word")
    else:
        made += _remarks_on_engines(a, b)
        if RANDOM in (a.weights, b.weights):
            made.append("random weights: speed as with uniform routing, answers without meaning")
        if (a.weights is None) != (b.weights is None):
            made.append("the weights' hash is known of one of the two only; that they fit is your word")
        if a.run.commit != b.run.commit:
            made.append(f"measured with commits {a.run.commit} and {b.run.commit} of this toolkit")
        if a.run.seed != b.run.seed:
            made.append(f"seeds {a.run.seed} and {b.run.seed}: other prompts, and other random weights")
    levels = [one.settings.get("service level") for one in (a, b)]
    if levels[0] != levels[1]:
        made.append(f"goodput is left out: service levels {levels[0]} and {levels[1]}")
    return made


def _remarks_on_engines(a: System, b: System) -> list[str]:
    made = []
    if UNKNOWN in (_name(a), _name(b)):
        made.append("the server does not say its version")
    elif not _one_kind_of_device(a, b):
        if a.engine != b.engine:
            made.append(f"engines differ with the platform: {a.engine} and {b.engine}")
    elif _name(a) != _name(b):
        made.append(f"another engine: {a.engine} and {b.engine}")
    drivers = [_driver(one.run) for one in (a, b)]
    if _one_kind_of_device(a, b) and drivers[0] != drivers[1] and (None in drivers or SERVE in (a.tool, b.tool)):
        made.append(f"drivers: {_short(drivers[0])} and {_short(drivers[1])}")
    return made


def _one_kind_of_device(a: System, b: System) -> bool:
    return bool(a.run and b.run and a.run.machine.device_type == b.run.machine.device_type)


def _driver(run: Any) -> str | None:
    version: str | None = run.machine.software.get("driver")
    return version


def _step(system: System) -> str:
    return "captured" if system.captured else "eager"


def _differ(
    a: System,
    b: System,
    what: str,
    of: Callable[[Any], Any],
    why: str,
    across: str | None = None,
    unknown: bool = False,
) -> list[Finding]:
    """Return a finding if the two runs differ in it; an unknown value counts as different where ``unknown`` says so."""
    if a.run is None or b.run is None:
        return []
    of_a, of_b = of(a.run), of(b.run)
    if None in (of_a, of_b):
        return [Finding(what, _short(of_a), _short(of_b), why, across)] if unknown else []
    return [] if of_a == of_b else [Finding(what, _short(of_a), _short(of_b), why, across)]


def _short(value: Any) -> str:
    if isinstance(value, tuple):  # hashes, of every repeat
        value = " ".join(one[:7] for one in value) or None
    return "unknown" if value is None else str(value)[:40]


def _name(system: System) -> str:
    return system.engine.split()[0]


def _yes_no(system: System) -> str:
    return "emulated" if system.run is not None and system.run.machine.emulated else "real"
