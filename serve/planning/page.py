"""A plan on paper: a page to read, and the file that the launcher takes with ``--config``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ascend.devices.facts import GiB
from serve.planning.cards import VISIBLE
from serve.planning.cpu import MACHINE_DEPENDENT
from serve.planning.limits import CONTEXT, Rate
from serve.planning.result import Choice, Plan

WIDTH = 118
# Settings that are the launcher's own flags, some by another name; all else goes to the engine as it is.
LAUNCHER_NAMES = {"enable-expert-parallel": "expert-parallel"}
LAUNCHERS = (
    "tensor-parallel-size",
    "data-parallel-size",
    "pipeline-parallel-size",
    "enable-expert-parallel",
    "dtype",
    "max-model-len",
    "max-num-seqs",
    "max-num-batched-tokens",
    "gpu-memory-utilization",
    "block-size",
    "kv-cache-dtype",
)
# What a plan derives from the model and the rest at every start: written down, it would be wrong for another model.
DERIVED = ("hf-overrides", "compilation-config", "additional-config", "speculative-config")
NOT_RUN = "Computed by `python -m serve plan`, and not yet run on such a machine."


def page(plan: Plan) -> str:
    """Return the plan as text: settings with their reasons, memory, limits, warnings."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    servers = f" in {plan.nodes} servers" if plan.nodes > 1 else ""
    yield f"{plan.model} in {plan.precision} on {plan.cards}{servers}, {plan.engine}: {plan.division}"
    yield ""
    for one in plan.choices:
        yield f"{one.name} = {_value(one.value)}"
        source = f" [{one.source}]" if one.source else ""
        yield from textwrap.wrap(f"{one.why}{source}", WIDTH, initial_indent="    ", subsequent_indent="    ")
    yield ""
    if plan.memory is not None:
        memory = plan.memory
        yield "memory of one card, GiB"
        for name, nbytes in memory.rows().items():
            yield f"  {name:<14}{nbytes / GiB:>8.2f}{_said(name)}"
        yield f"  {'total':<14}{memory.total / GiB:>8.2f}  as installed"
        yield ""
    held = ", or ".join(f"{count} sequences of {length} tokens" for length, count in plan.kv_sequences.items())
    yield f"the KV cache{' of a group' if plan.division.count('DP') else ''} holds {held}; more wait their turn"
    if plan.limits.single is not None and plan.limits.full is not None:
        yield f"limits at {CONTEXT} tokens each, which no engine reaches (published: 8 to 62 % of them):"
        yield f"  {_rate(plan.limits.single)}"
        yield f"  {_rate(plan.limits.full)}"
        yield f"  prompts: {plan.limits.prefill:,.0f} tokens/s"
    elif plan.device != "cpu":
        yield "limits: unknown"
    for warning in plan.warnings:
        yield from textwrap.wrap(f"NOTE  {warning}", WIDTH, subsequent_indent="      ")


def config_file(plan: Plan, own: Mapping[str, Any] | None = None, given: Collection[str] = ()) -> str:
    """Return the plan as YAML for ``serve/launch.sh --config``, the reason of each value above it.

    own: what the launcher was asked for besides, by its flags without dashes; what the plan has it says itself.
    given: engine flags that the user gave; of `DERIVED` no others are written.
    """
    lines = [f"# {plan.model} in {plan.precision} on {plan.cards}, {plan.division}. {NOT_RUN}"]
    reasons = {(one.name, _value(one.value)): one for one in plan.choices}
    lines += [f"device: {plan.device}"]
    if plan.device != "cpu":
        lines += [f"cards: {plan.cards}"]
    if plan.engine != "vllm":
        lines += [f"engine: {plan.engine}"]
    if plan.nodes > 1:
        lines += [f"nodes: {plan.nodes}"]
    said = {"device", "cards", "engine", "nodes", *(LAUNCHER_NAMES.get(name, name) for name in plan.settings)}
    lines += [f"{name}: {_yaml(value)}" for name, value in (own or {}).items() if name not in said]

    def put(name: str, value: Any, indent: str, shown: str | None = None) -> None:
        reason = reasons.get((name, _value(value)))
        lines.extend(_comment(reason, indent) if reason else [])
        lines.append(f"{indent}{shown or name}: {_yaml(value)}")

    for name, value in plan.settings.items():
        if name == "speculative-config" and "speculative" not in (own or {}):  # a flag of the launcher's, too
            lines += _speculative(value)
        if name in LAUNCHERS:
            put(name, value, "", LAUNCHER_NAMES.get(name))
    engine_only = {
        name: value for name, value in plan.settings.items() if name not in (*LAUNCHERS, *DERIVED) or name in given
    }
    if engine_only:
        lines.append("engine-flags:")
        for name, value in engine_only.items():
            put(name, value, "  ")
    environment = {
        name: value for name, value in plan.environment.items() if name not in (*MACHINE_DEPENDENT, *VISIBLE.values())
    }
    if environment:
        lines.append("environment:")
        for name, value in environment.items():
            put(name, value, "  ")
    elif plan.device == "cpu":
        lines.append("# The KV cache's room and the cores are taken from the machine at each start.")
    unset = [one for one in plan.choices if one.name not in {**plan.settings, **plan.environment}]
    for one in unset:
        lines += _comment(one._replace(why=f"{one.name} {_value(one.value)}: {one.why}"), "")
    return "\n".join(lines) + "\n"


def _speculative(value: Mapping[str, Any]) -> list[str]:
    head = f":{value['model']}" if "model" in value else ""
    return [
        f"speculative: {_yaml(value['method'] + head)}",
        f"speculative-tokens: {value['num_speculative_tokens']}",
    ]


def _comment(choice: Choice, indent: str) -> list[str]:
    source = f" [{choice.source}]" if choice.source else ""
    start = f"{indent}# "
    return textwrap.wrap(
        f"{choice.why}{source}", WIDTH, initial_indent=start, subsequent_indent=start, break_long_words=False
    )


def _yaml(value: Any) -> str:
    """A value in YAML; JSON is a part of it."""
    is_word = isinstance(value, str) and value.isidentifier() and value not in ("true", "false", "on", "off")
    return value if is_word else json.dumps(value)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _rate(one: Rate) -> str:
    return (
        f"{one.sequences:>4} sequences: {one.per_sequence:,.0f} tokens/s each, {one.total:,.0f} in all "
        f"({one.seconds * 1000:.2f} ms a token)"
    )


def _said(name: str) -> str:
    return {
        "kv": "  what is left for keys and values",
        "activations": "  estimate: the largest step, workspaces",
        "graphs": "  estimate",
        "collectives": "  buffers of communicators",
        "reserve": "  left alone: the runtime's own, fragments",
    }.get(name, "")
