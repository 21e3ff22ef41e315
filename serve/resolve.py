"""What was asked for, the machine and the plan, put together into the command that will run.

settings ─► device ─► its cards ─► plan ─► this node's part ─► rules ─► command and environment
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import metadata
from typing import Any

from ascend.checkpoint import Checkpoint
from ascend.devices import choose
from ascend.errors import UserError
from ascend.precision import PRECISIONS
from convert.demo_config import demo_config
from convert.described import DESCRIPTION
from serve import emulated
from serve.demo import DEMO_NAME, demo_directory, demo_size
from serve.engine import KINDS, EngineCommand, engine_command
from serve.engine_flags import check_combination, read_flags
from serve.nodes.node import NodeSettings, check_nodes, node_address, node_settings
from serve.planning import Cards, Plan, Wanted, found_cards, make_plan, parse_cards
from serve.planning.model import model_in, model_of
from serve.planning.traps import TRAPS, graph_notes, graph_problem
from serve.settings import LaunchSettings
from serve.watch.isolation import isolated

PLANNED_DRAFTS = ("mtp", "eagle3")


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
    if settings.nodes > 1:
        node_address(settings)
    device, why = _device(settings)
    cards = _cards(settings, device)
    size = demo_size(settings.emulate)
    demo, _ = demo_config(size, 1, "bf16", None, {})
    model = model_in(checkpoint.path) if checkpoint else model_of(demo, DEMO_NAME)
    given = read_flags(settings.engine, engine_version(settings, device), device, settings.engine_flags)
    if device == "npu":
        _check_quantization(given.get("quantization"), checkpoint)
    plan = make_plan(model, cards, _wanted(settings, given), settings.engine, launcher=True)
    if settings.engine == "sglang":
        plan = _for_sglang(plan, settings)
    note = check_nodes(settings, device)
    node = node_settings(_with_sizes(settings, plan), device, cards.count)
    name = settings.served_model_name or (model.name if checkpoint else DEMO_NAME)
    directory = settings.model or demo_directory(size)
    flags = {"dtype": settings.dtype, **plan.settings, **node.flags}
    if settings.emulate:
        flags = emulated.with_settings(flags)
    notes = [*plan.warnings, note]
    notes += _own_graphs({**plan.settings, **given}, device, given)
    if not cards.confirmed:
        notes.append(f"no vendor's tool answered: that the cards are {cards} is only what --cards says")
    if settings.max_model_len is not None and settings.max_model_len > model.context:
        notes.append(f"config.json reaches {model.context} tokens: YaRN is switched on for {settings.max_model_len}")
    rope = flags.get("hf-overrides") or {}
    if rope.keys() - (given.get("hf-overrides") or rope).keys():
        raise UserError(
            "--hf-overrides would take the place of the plan's, and positions would silently be wrong: put this into "
            f"it, too: {json.dumps(rope)}"
        )
    own = given.get("speculative-config")
    if isinstance(own, Mapping) and own.get("method") in PLANNED_DRAFTS:
        raise UserError(
            f"--speculative-config {own['method']} would take memory that the plan has given to the cache: take "
            "--speculative, and --speculative-tokens for the number of drafts"
        )
    planned = {flag: value for flag, value in flags.items() if flag not in given}
    # torch's own place for compiled code is below /tmp: often noexec, and open to whoever was there first.
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(demo_directory().parent / "inductor")}
    if settings.engine == "vllm":
        environment["VLLM_HOST_IP"] = "127.0.0.1"  # on one server its processes talk on this machine only
    environment = {**environment, **plan.environment, **node.environment}
    if settings.emulate:
        environment |= emulated.ENVIRONMENT
    command = engine_command(settings, directory, name, planned, environment, node.headless)
    together = {**planned, **given}
    check_combination(together, device, cards.total, model.shape, cards.nodes, command.full_environment())
    if checkpoint is None and device != "cpu":
        notes.append("no --model: this is for the demo with random weights, not for AntAngelMed")
    meant = (settings.profile or "").rpartition("-")[2]
    if meant in PRECISIONS and meant != plan.precision:
        notes.append(f"--profile {settings.profile} was computed for weights in {meant}, these are in {plan.precision}")
    return Resolved(device, why, cards, plan, node, command, name, tuple(one for one in notes if one))


def _check_quantization(asked: str | None, checkpoint: Checkpoint | None) -> None:
    """Raise `UserError` for a name of a format that is not the checkpoint's: vLLM-Ascend finds the right one itself."""
    stored = None
    if checkpoint is not None:
        described = checkpoint.config.get("quantization_config") or {}
        is_modelslim = (checkpoint.path / DESCRIPTION).is_file()
        stored = "ascend" if is_modelslim else described.get("quant_method")
    if asked in ("ascend", "compressed-tensors") and asked != stored:
        raise UserError(f"--quantization {asked}: the model's is {stored or 'none'}: leave the flag out, it is found")


def _own_graphs(settings: Mapping[str, Any], device: str, given: Mapping[str, Any]) -> list[str]:
    """Judge sizes of graphs that the user gave by the plan's own rules. Raises `UserError` for what would fail."""
    own = given.get("compilation-config")
    own = own if isinstance(own, Mapping) else {}
    sizes = own.get("cudagraph_capture_sizes")
    if device != "npu" or not sizes:
        return []
    if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
        raise UserError(f"--compilation-config: cudagraph_capture_sizes {json.dumps(sizes)} is no list of numbers")
    drafts = (settings.get("speculative-config") or {}).get("num_speculative_tokens", 0)
    if problem := graph_problem(sizes, drafts, settings["max-num-batched-tokens"]):
        raise UserError(f"--compilation-config: {problem}: {TRAPS['graphs'].why}")
    if str(own.get("cudagraph_mode", "")).upper() != "FULL_DECODE_ONLY":
        return []
    return [f"--compilation-config: {note}" for note in graph_notes(sizes, drafts, settings["max-num-seqs"])]


def engine_version(settings: LaunchSettings, device: str) -> str | None:
    """Return the version of the engine that is installed; None for the one that the device is served with."""
    kind = emulated.NAME if settings.emulate else device
    package = KINDS.get((settings.engine, kind), KINDS["vllm", "cpu"]).packages[0][0]
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device(settings: LaunchSettings) -> tuple[str, str]:
    """Return the kind of device and why. A dry run for cards that are named needs none of them here."""
    if settings.emulate:
        emulated.check(settings)
        return "npu", emulated.WHY
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
    if settings.emulate:
        return _emulated_cards(settings)
    named = parse_cards(settings.cards, settings.nodes) if settings.cards else None
    if named and settings.dry_run:
        return named
    if named and named.device != device:
        raise UserError(f"--cards {settings.cards} are not for --device {device}: give one of them")
    found = found_cards(settings.nodes, named=named)
    broken = isolated(found.device)
    here = tuple(card for card in found.indices or () if card not in broken)
    if found.device != device:
        raise UserError(
            f"no whole card for --device {device} is in /dev: `python -m serve doctor` says what is missing"
        )
    if not here:
        raise UserError(f"all cards here are isolated ({_reasons(broken)}); --forget-isolated once they were replaced")
    if named and named.facts.name != found.facts.name:
        raise UserError(f"--cards {settings.cards}: the cards here are {found}; name these, or leave it out")
    wanted = named.count if named else len(here)
    if wanted > len(here):
        lacking = f", {_reasons(broken)}" if broken else ""
        raise UserError(f"--cards {settings.cards}: {len(here)} are to be had here{lacking}; name as many, or fewer")
    return replace(found, count=wanted, indices=here[:wanted])


def _emulated_cards(settings: LaunchSettings) -> Cards:
    named = parse_cards(settings.cards or emulated.CARDS)
    if named.device != "npu" or named.count > emulated.MOST_CARDS:
        raise UserError(f"--cards {settings.cards}: --emulate has up to {emulated.MOST_CARDS} Ascend cards")
    return named


def _for_sglang(plan: Plan, settings: LaunchSettings) -> Plan:
    """The plan without vLLM's own variables, and with SGLang's share of a card's memory.

    That is of weights and cache alone; vLLM's has the activations in it.
    """
    environment = {name: value for name, value in plan.environment.items() if not name.startswith("VLLM_")}
    share = settings.gpu_memory_utilization
    if share is None and plan.memory:
        share = math.floor(100 * (plan.memory.weights + plan.memory.kv) / plan.memory.total) / 100
    return replace(plan, settings={**plan.settings, "gpu-memory-utilization": share}, environment=environment)


def _with_sizes(settings: LaunchSettings, plan: Plan) -> LaunchSettings:
    """The settings with the sizes that the plan decided on."""
    names = ("tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size")
    return replace(settings, **{name: plan.settings.get(name.replace("_", "-"), 1) for name in names})


def _reasons(broken: Mapping[int, str]) -> str:
    return "; ".join(f"card {card}: {reason}" for card, reason in broken.items())


def _wanted(settings: LaunchSettings, given: Mapping[str, Any]) -> Wanted:
    """Return the wishes among the settings, which go by the same names, and the engine flags ``given``."""
    wishes: dict[str, Any] = {
        field.name: getattr(settings, field.name) for field in fields(Wanted) if hasattr(settings, field.name)
    }
    return Wanted(**wishes, quantization=given.get("quantization"))
