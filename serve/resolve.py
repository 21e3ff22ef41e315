"""What was asked for, the machine and the plan, put together into the command that will run.

settings ─► device ─► its cards ─► plan ─► this node's part ─► rules ─► command and environment
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ascend.checkpoint import Checkpoint
from ascend.devices import choose
from ascend.errors import UserError
from convert.demo_config import demo_config
from serve.demo import DEMO_NAME, demo_directory
from serve.engine import EngineCommand, engine_command
from serve.nodes import NodeSettings, check_nodes, node_settings
from serve.planning import Cards, Plan, Wanted, found_cards, make_plan, parse_cards
from serve.planning.model import model_in, model_of
from serve.settings import LaunchSettings


@dataclass(frozen=True)
class Resolved:
    """A start that was decided on. why: this device; notes: lines for the user; node: what several servers add."""

    device: str
    why: str
    cards: Cards
    plan: Plan
    node: NodeSettings
    command: EngineCommand
    name: str
    notes: tuple[str, ...]


def resolve(settings: LaunchSettings, checkpoint: Checkpoint | None) -> Resolved:
    """Decide everything that was not asked for. Raises `UserError` for what is not there, or cannot be."""
    device, why = _device(settings)
    cards = _cards(settings, device)
    demo, _ = demo_config("tiny", 1, "bf16", None, {})
    model = model_in(checkpoint.path) if checkpoint else model_of(demo, DEMO_NAME)
    plan = make_plan(model, cards, _wanted(settings), settings.engine)
    note = check_nodes(settings, device) if not settings.dry_run else None
    node = node_settings(settings, device, cards.count)
    name = settings.served_model_name or (model.name if checkpoint else DEMO_NAME)
    directory = settings.model or demo_directory()
    flags = {"dtype": settings.dtype, **plan.settings, **node.flags}
    given = given_flags(settings.engine_flags)
    planned = {flag: value for flag, value in flags.items() if flag not in given}
    # On one server the engine's processes talk to one another on this machine only.
    environment = {"VLLM_HOST_IP": "127.0.0.1", **plan.environment, **node.environment}
    command = engine_command(settings, directory, name, planned, environment)
    return Resolved(device, why, cards, plan, node, command, name, (*plan.warnings, *([note] if note else [])))


def given_flags(words: Sequence[str]) -> dict[str, str | None]:
    """Return the flags among an engine's arguments without dashes, with values; to vLLM `_` is `-`."""
    found: dict[str, str | None] = {}
    last = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            last = name.replace("_", "-").removeprefix("no-").partition(".")[0]
            found[last] = value if equals else None
        elif last is not None and found[last] is None:
            found[last] = word
    return found


def _device(settings: LaunchSettings) -> tuple[str, str]:
    """Return the kind of device and why. A dry run for cards that are named needs none of them here."""
    if not (settings.cards and settings.dry_run):
        device, why = choose(settings.device)
        return device.type, why
    named = parse_cards(settings.cards, settings.nodes).device
    if settings.device not in ("auto", named):
        raise UserError(f"--cards {settings.cards} are for --device {named}, not {settings.device}: give one of them")
    return named, f"device {named}: planned for {settings.cards}, which need not be here"


def _cards(settings: LaunchSettings, device: str) -> Cards:
    """Return the cards to plan for: those found, less the isolated, or those named, if they are here."""
    if device == "cpu":
        if settings.cards and parse_cards(settings.cards).device != "cpu":
            raise UserError(f"--cards {settings.cards} are not for --device cpu: give one of them")
        return parse_cards("cpu")
    named = parse_cards(settings.cards, settings.nodes) if settings.cards else None
    if named and settings.dry_run:
        return named
    from serve.isolation import isolated

    found = found_cards(settings.nodes)
    broken = isolated()
    here = tuple(card for card in found.indices or () if card not in broken)
    if not here:
        raise UserError(f"all cards here are isolated ({_reasons(broken)}); --forget-isolated once they were replaced")
    if named and named.facts.name != found.facts.name:
        raise UserError(f"--cards {settings.cards}: the cards here are {found}; name these, or leave it out")
    wanted = named.count if named else len(here)
    if wanted > len(here):
        lacking = f", {_reasons(broken)}" if broken else ""
        raise UserError(f"--cards {settings.cards}: {len(here)} are to be had here{lacking}; name as many, or fewer")
    return replace(found, count=wanted, indices=here[:wanted])


def _reasons(broken: Mapping[int, str]) -> str:
    return "; ".join(f"card {card}: {reason}" for card, reason in broken.items())


def _wanted(settings: LaunchSettings) -> Wanted:
    """Return the wishes among the settings; they go by the same names."""
    given: dict[str, Any] = {
        field.name: getattr(settings, field.name) for field in fields(Wanted) if hasattr(settings, field.name)
    }
    flags = given_flags(settings.engine_flags)
    return Wanted(**given, quantization=flags.get("quantization"))
