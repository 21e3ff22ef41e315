"""Why each setting is what it is: one line, with the figures that decided, and who says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ascend.devices.facts import GiB, MiB
from ascend.roofline import TYPICAL_ACCEPTANCE
from serve.planning.draft import MC2_LEAST_CARDS, Draft
from serve.planning.limits import CONTEXT, PLANNED_SHARE, expert_bytes
from serve.planning.memory import CardMemory, communicators
from serve.planning.result import Choice
from serve.planning.traps import TRAPS
from serve.planning.wanted import Wanted

ARITHMETIC = "ascend/cost.py"


def choices(draft: Draft, memory: CardMemory, wanted: Wanted, typical: int) -> list[Choice]:
    """Return one for each setting, in the order of ``draft.settings``, and then what needs no flag."""
    reasons = _reasons(draft, memory, wanted, typical)
    found = [Choice(name, value, *reasons[name]) for name, value in draft.settings.items()]
    found += [Choice(name, *rest) for name, *rest in _unset(draft)]
    return found


def _reasons(draft: Draft, memory: CardMemory, wanted: Wanted, typical: int) -> dict[str, tuple[str, str]]:
    load, division, shape = draft.load, draft.division, draft.model.shape
    npu = draft.cards.device == "npu"
    groups = communicators(division, draft.cards.device)
    twice = division.tensor > shape.num_key_value_heads
    tensor = f"{memory.weights / GiB:.1f} GiB of weights a card; within one server"
    if twice:
        tensor += (
            f"; {shape.num_key_value_heads} KV heads, each on {division.tensor // shape.num_key_value_heads} cards: "
        )
        tensor += TRAPS["kv-twice"].why.split(", so ")[1]
    full, short = memory.kv_tokens // load.max_model_len, memory.kv_tokens // min(typical, load.max_model_len)
    reasons = {
        "tensor-parallel-size": (tensor, TRAPS["kv-twice"].source if twice else ARITHMETIC),
        "data-parallel-size": (
            "groups of cards with sequences of their own, so that only the experts' exchange leaves a "
            + ("server" if draft.cards.nodes > 1 else "group"),
            ARITHMETIC,
        ),
        "pipeline-parallel-size": (f"as asked; {division.layers(shape)} layers in a stage", ARITHMETIC),
        "enable-expert-parallel": _expert_parallel(draft, wanted),
        "dtype": _dtype(draft),
        "max-model-len": _context(draft, wanted),
        "max-num-seqs": (
            f"a group's cache holds {memory.kv_tokens:,} tokens: {full} sequences of full length, {short} of "
            f"{min(typical, load.max_model_len)}{_promised(wanted)}; vLLM's own 128 to 256 knows nothing of this cache",
            ARITHMETIC,
        ),
        "max-num-batched-tokens": (
            "tokens of a step: vLLM's 2048 keeps prompts waiting; more costs memory beside the cache "
            f"({memory.activations / GiB:.1f} GiB, an estimate) and delays the others' next token",
            "vllm/engine/arg_utils.py" + ("; vllm-ascend issue 8818 runs a sister model with 8192" if npu else ""),
        ),
        "gpu-memory-utilization": (
            f"leaves {(draft.cards.usable * (1 - memory.utilisation)) / GiB:.1f} GiB for graphs, which are not in "
            "vLLM's own profile, and for fragments (estimates)",
            ("vllm_ascend/worker/worker.py:469, 590" if npu else "vllm/config/cache.py")
            + "; vLLM's default 0.92 is never passed",
        ),
        "block-size": (TRAPS["block-128"].why, TRAPS["block-128"].source),
        "kv-cache-dtype": ("as asked: half the bytes of each token", ARITHMETIC),
        "hf-overrides": (_rope(draft), TRAPS["yarn-npu" if npu else "yarn-cuda"].source),
        "compilation-config": (
            f"few graphs, of decode steps alone: {TRAPS['graphs'].why}; {len(load.graphs)} sizes up to "
            f"{max(load.graphs, default=0)} tokens",
            TRAPS["graphs"].source,
        ),
        "additional-config": (f"with expert parallelism: {TRAPS['flashcomm1'].why}", TRAPS["flashcomm1"].source),
        "speculative-config": (_drafting(draft), TRAPS["speculative"].source),
    }
    if groups and npu:
        why, source = reasons["gpu-memory-utilization"]
        buffers = (
            f"; {len(groups)} communicators ({', '.join(groups)}) take {memory.collectives / MiB:.0f} MiB of buffers"
        )
        reasons["gpu-memory-utilization"] = (why + buffers, source)
    return reasons


def _drafting(draft: Draft) -> str:
    drafter, gained = draft.drafter, draft.gain
    if drafter.method == "ngram":
        return (
            f"as asked: {drafter.tokens} drafts out of the text itself; it gains where answers repeat the prompt, and "
            "costs elsewhere"
        )
    if gained is None:
        return f"as asked: {drafter.tokens} drafts a step; whether that pays here nobody has said"
    return (
        f"as asked: {drafter.tokens} drafts a step, at the limit {gained.full:.2f} times as fast with all sequences, "
        f"{gained.single:.2f} with one, if a draft is right {TYPICAL_ACCEPTANCE[0]:.0%} of the time, which fits the "
        "published heads of this family"
    )


def _dtype(draft: Draft) -> tuple[str, str]:
    if draft.dtype != "bfloat16":
        return "as asked", ""
    if draft.cards.device == "npu":
        return TRAPS["float32"].why.replace("; use bfloat16", ""), TRAPS["float32"].source
    return "what the model was trained in; float32 takes twice the bytes", "config.json"


def _promised(wanted: Wanted) -> str:
    if wanted.tpot_ms is None:
        return ""
    return f", as many as take {wanted.tpot_ms:g} ms a token at {PLANNED_SHARE:.0%} of the limit (an assumption)"


def _expert_parallel(draft: Draft, wanted: Wanted) -> tuple[str, str]:
    division, shape = draft.division, draft.model.shape
    if draft.uses_mc2:
        blocks = division.tensor * division.data
        return f"{shape.num_experts // blocks} whole experts a card over all servers, sent by MC2", TRAPS["mc2"].source
    is_few = draft.cards.device == "npu" and draft.cards.total < MC2_LEAST_CARDS
    gathered = f"; {TRAPS['allgather'].why}" if is_few and draft.cards.nodes == 1 else ""
    source = TRAPS["allgather"].source if gathered else ARITHMETIC
    if draft.cards.nodes > 1 and division.expert:
        return "whole experts on each card: only their tokens cross the network", source
    figures = []
    full = (wanted.max_num_seqs or draft.load.sequences) * division.data
    for sequences in dict.fromkeys((1, full)):
        one = expert_bytes(shape, draft.precision, replace(division, expert=False), sequences, draft.load.kv_bytes)
        figures.append(f"{one.whole / 1e9:.1f} GB instead of {one.divided / 1e9:.1f} with {sequences}")
    read = f"the busiest card would read with whole experts {', '.join(figures)} sequences of {CONTEXT} tokens"
    if wanted.expert_parallel is not None:
        return f"as asked; {read}{gathered}", source
    if division.expert:
        return f"{read}: no loss at what is asked for, and wider matrices{gathered}", source
    return f"{read}{gathered}", source


def _context(draft: Draft, wanted: Wanted) -> tuple[str, str]:
    model, length = draft.model, draft.load.max_model_len
    if wanted.max_model_len is not None:
        how = " by YaRN" if model.is_yarn or length > model.context else ""
        return f"as asked; the model reaches {model.longest}{how}", "config.json"
    if length == model.context:
        return "all that config.json reaches, and it fits", "config.json"
    return f"the model reaches {model.context}; so much fits", "config.json"


def _rope(draft: Draft) -> str:
    if draft.cards.device == "npu":
        return TRAPS["yarn-npu"].why
    return TRAPS["yarn-cuda"].why


def _unset(draft: Draft) -> Iterator[tuple[str, str, str, str]]:
    """What is left as the engine has it, and should be known."""
    caching, speculative = TRAPS["prefix-caching"], TRAPS["speculative"]
    yield "enable-prefix-caching", "on", caching.why, caching.source
    if draft.drafter.method == "off":
        declined = "asked for, but they do not pay here" if draft.gain else speculative.why
        yield "speculative-config", "off", declined, speculative.source
    if draft.cards.device == "cuda":
        yield "compilation-config", "vLLM's own", f"{len(draft.load.graphs)} sizes of graphs", "vllm/config/vllm.py"
