"""From a model, cards and wishes to a plan: divide the model, fill the cards, judge the whole by `traps.py`.

division (TP, DP, PP, EP) ─► load (context, sequences, tokens of a step) ─► memory ─► rules ─► limits ─► plan
what does not fit or breaks a rule ─► `nearest.py`: what would, each tried by planning it
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ascend.devices.facts import GiB
from ascend.errors import UserError
from ascend.precision import KV_DTYPES
from ascend.precision import precision as named_precision
from convert.cards import SEQUENCE_LENGTH
from serve.planning.cards import Cards
from serve.planning.choices import choices
from serve.planning.draft import Draft
from serve.planning.drafter import OFF, Drafter, drafters
from serve.planning.environment import variables
from serve.planning.gain import gain
from serve.planning.graphs import LARGEST, capture_sizes, default_sizes
from serve.planning.limits import PLANNED_SHARE, chip_of, expert_bytes, limits, rate
from serve.planning.memory import CardMemory, Division, Load, card_memory, kv_bytes_per_block, kv_tokens_needed
from serve.planning.model import PlannedModel
from serve.planning.nearest import nearest
from serve.planning.result import Choice, Plan
from serve.planning.rope import hf_overrides
from serve.planning.traps import TRAPS, mc2_buffer_mib, problems
from serve.planning.wanted import Wanted

TYPICAL = SEQUENCE_LENGTH  # tokens of a sequence; as many as the plan itself chooses have room for so much at once
LEAST = 1024  # the same for a number of sequences that was asked for
CONTEXTS = (131072, 65536, 32768, 16384, 8192, 4096, 2048, 1024)
SEQUENCES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
STEP_TOKENS = (8192, 4096, 2048)  # vLLM's default for a server is 8192 on large NVIDIA cards, 2048 elsewhere
EXPERTS_MAY_COST = 1.05  # bytes that whole experts may read more and still be taken: their matrices are wider
LEAST_SINGLE = 0.9  # of its speed without drafts, that a single sequence keeps where the number of drafts is chosen


class DoesNotFitError(Exception):
    """The message is why, half a line."""


def make_plan(model: PlannedModel, cards: Cards, wanted: Wanted, engine: str = "vllm", launcher: bool = False) -> Plan:
    """Return the plan. Raises `UserError`, one line: what does not go, and the nearest things that do.

    launcher: what would do is said in the launcher's flags, not in those of `serve plan`.
    """
    if engine == "sglang" and cards.device != "cuda":
        raise UserError(f"--engine sglang is for CUDA alone, the cards are {cards}; use --engine vllm")
    if cards.device == "cpu":
        from serve.planning.cpu import cpu_plan

        return cpu_plan(model, cards, wanted)
    _check_numbers(wanted)
    try:
        return _plan(model, cards, wanted, engine)
    except DoesNotFitError as failure:
        tries = nearest(model, cards, wanted, _would_do, launcher)
        raise UserError(f"{failure}; {tries}") from None


def _would_do(model: PlannedModel, cards: Cards, wanted: Wanted) -> Draft | None:
    try:
        return _decide(model, cards, wanted)[0]
    except DoesNotFitError:
        return None


def _decide(model: PlannedModel, cards: Cards, wanted: Wanted) -> tuple[Draft, CardMemory]:
    """Settle everything but whether experts lie whole where either goes; `DoesNotFitError` says what does not.

    Drafts of no fixed number: as many as make the most tokens of all sequences, of those that keep a single one from
    getting much slower; and none where all lose.
    """
    precision = named_precision(wanted.precision or model.precision).name
    tried = [_decide_with(one, model, cards, wanted, precision) for one in drafters(wanted, model, precision)]

    def worth(one: tuple[Draft, CardMemory]) -> tuple[bool, float]:
        gained = one[0].gain
        return (gained.single >= LEAST_SINGLE, gained.tokens_per_second) if gained else (False, 0.0)

    best = max(tried, key=worth)
    gained = best[0].gain
    if gained is None or gained.full > 1 or best[0].drafter.is_fixed:
        return best
    draft, memory = _decide_with(OFF, model, cards, wanted, precision)
    return replace(draft, gain=gained), memory


def _decide_with(
    drafter: Drafter, model: PlannedModel, cards: Cards, wanted: Wanted, precision: str
) -> tuple[Draft, CardMemory]:
    draft, memory = _loaded(_first_draft(drafter, model, cards, wanted, precision), wanted)
    draft = _with_settings(draft, memory, wanted)
    if found := problems(draft):
        raise DoesNotFitError(found[0])
    if (chip := chip_of(cards, precision)) is None:
        return draft, memory
    load, division = draft.load, draft.division
    sequences = load.sequences * division.data
    gained = gain(drafter, model.shape, precision, chip, division.sharding, sequences, load.kv_bytes)
    return replace(draft, gain=gained), memory


def _plan(model: PlannedModel, cards: Cards, wanted: Wanted, engine: str) -> Plan:
    draft, memory = _with_experts(*_decide(model, cards, wanted), wanted)
    precision = draft.precision
    sequences = draft.load.sequences * draft.division.data
    shape, load = model.shape, draft.load
    at_most = limits(shape, precision, cards, draft.division, sequences, load.kv_bytes, load.max_model_len)
    nbytes = sum(model.nbytes(precision).values())
    environment = variables(draft, nbytes)
    per_typical = min(TYPICAL, load.max_model_len)
    return Plan(
        device=cards.device,
        engine=engine,
        model=model.name,
        cards=str(cards),
        nodes=cards.nodes,
        precision=precision,
        division=str(draft.division),
        settings=draft.settings,
        environment=draft.environment,
        choices=(*choices(draft, memory, wanted, TYPICAL), *(Choice(*one) for one in environment)),
        memory=memory,
        kv_sequences={length: memory.kv_tokens // length for length in (load.max_model_len, per_typical)},
        limits=at_most,
        warnings=tuple(_warnings(draft, wanted, at_most.full and at_most.full.seconds, memory)),
    )


def _first_draft(drafter: Drafter, model: PlannedModel, cards: Cards, wanted: Wanted, precision: str) -> Draft:
    """Divide the model and take over what is fixed; a division that cannot be is refused at once."""
    kv_dtype = wanted.kv_cache_dtype or "auto"
    if kv_dtype not in ("auto", *KV_DTYPES):
        raise UserError(f"--kv-cache-dtype {kv_dtype}: there is auto, {', '.join(KV_DTYPES)}")
    block = wanted.block_size or (128 if cards.device == "npu" else 16)
    load = Load(
        max_model_len=wanted.max_model_len or model.context,
        sequences=wanted.max_num_seqs or 1,
        step_tokens=wanted.max_num_batched_tokens or STEP_TOKENS[0],
        block=block,
        kv_bytes=KV_DTYPES.get(kv_dtype, 2),
        drafts=drafter.tokens,
    )
    dtype = wanted.dtype if wanted.dtype not in (None, "auto") else "bfloat16"
    judged = Draft(model, cards, precision, dtype, kv_dtype, Division(), load, wanted.gpu_memory_utilization, drafter)
    first: Draft | None = None
    for division in _divisions(cards, wanted):
        draft = replace(judged, division=division)
        first = first or draft
        if not _division_problems(draft):
            return draft
    assert first is not None
    raise DoesNotFitError(_division_problems(first)[0])


def _division_problems(draft: Draft) -> list[str]:
    """What is wrong with a draft, but for what its settings and its environment will still bring."""
    names = ("tensor-in-server", "enough-cards", "divides", "scales-divide")
    checks = ((TRAPS[name].broken, TRAPS[name].why) for name in names)
    return [f"{problem}: {why}" for broken, why in checks if broken and (problem := broken(draft))]


def _divisions(cards: Cards, wanted: Wanted) -> Iterator[Division]:
    """Yield divisions, best first: all cards before some, as much tensor parallelism within a server as there is.

    Several servers, or groups of linked cards in one: groups of tokens of their own (DP) with whole experts over all
    cards; a pipeline only if asked for.
    """
    fixed = (wanted.tensor_parallel_size, wanted.data_parallel_size, wanted.pipeline_parallel_size)
    pipeline = fixed[2] or 1
    if fixed[0] and fixed[1]:
        counts = [fixed[0] * fixed[1] * pipeline]
    else:
        counts = [used * cards.nodes for used in range(cards.count, 0, -1)]
    for count in counts:
        for tensor in [fixed[0]] if fixed[0] else range(min(cards.count, cards.facts.linked, count), 0, -1):
            data = fixed[1] or max(1, count // (tensor * pipeline))
            if tensor * data * pipeline != count and not (fixed[0] and fixed[1]):
                continue
            several = not cards.all_linked
            for expert in [wanted.expert_parallel] if wanted.expert_parallel is not None else [several, True]:
                yield Division(tensor, data, pipeline, expert)
    # Where none of these goes, this is refused with the reason.
    yield Division(fixed[0] or 1, fixed[1] or 1, pipeline, bool(wanted.expert_parallel))


def _with_experts(draft: Draft, memory: CardMemory, wanted: Wanted) -> tuple[Draft, CardMemory]:
    """Take whole experts where both go, many sequences were asked for, and the busiest card reads no more for it."""
    division, load = draft.division, draft.load
    is_open = wanted.expert_parallel is None and not division.expert and division.tensor * division.data > 1
    if not is_open or wanted.max_num_seqs is None:
        return draft, memory
    sequences = load.sequences * division.data
    read = expert_bytes(draft.model.shape, draft.precision, division, sequences, load.kv_bytes)
    whole = replace(draft, division=replace(division, expert=True))
    if read.whole > read.divided * EXPERTS_MAY_COST:
        return draft, memory
    fixed = bool(wanted.max_num_batched_tokens)
    whole = replace(whole, load=_load(whole, load.max_model_len, load.sequences, load.step_tokens, fixed))
    held = _memory(whole)
    whole = _with_settings(whole, held, wanted)
    goes = _lacking(whole, held, LEAST) == 0 and not problems(whole)
    return (whole, held) if goes else (draft, memory)


def _loaded(draft: Draft, wanted: Wanted) -> tuple[Draft, CardMemory]:
    """Fill the cards: the longest context, then the largest step, then the most sequences that go."""
    model = draft.model
    contexts = [wanted.max_model_len] if wanted.max_model_len else _from(model.context, CONTEXTS)
    steps = [wanted.max_num_batched_tokens] if wanted.max_num_batched_tokens else STEP_TOKENS
    most = max(1, LARGEST // (draft.load.drafts + 1))
    counts = [wanted.max_num_seqs] if wanted.max_num_seqs else [one for one in SEQUENCES if one <= most]
    counts = _in_time(draft, counts, wanted)
    each = LEAST if wanted.max_num_seqs else TYPICAL
    best: tuple[float, Draft, CardMemory] | None = None
    for context in contexts:
        for step in steps:
            for sequences in counts:
                tried = replace(
                    draft, load=_load(draft, context, sequences, step, fixed=bool(wanted.max_num_batched_tokens))
                )
                memory = _memory(tried)
                lacks = _lacking(tried, memory, each)
                if not lacks:
                    return tried, memory
                if best is None or lacks < best[0]:
                    best = (lacks, tried, memory)
    assert best is not None
    lacks, tried, memory = best
    load = tried.load
    raise DoesNotFitError(
        f"{model.name} in {draft.precision} does not fit on {draft.cards} ({tried.division}): {lacks / GiB:,.1f} GiB a "
        f"card short, of {memory.total / GiB:.1f} with {memory.weights / GiB:,.1f} of weights, for "
        f"a sequence of {load.max_model_len} tokens and {load.sequences} of {min(each, load.max_model_len)}"
    )


def _load(draft: Draft, context: int, sequences: int, step: int, fixed: bool) -> Load:
    drafts = draft.load.drafts
    step = step if fixed else max(step, sequences * (drafts + 1))
    if draft.cards.device == "npu":
        multiple = draft.division.tensor if _uses_flashcomm(draft) else 1
        graphs = capture_sizes(sequences, drafts, multiple, step)
    else:
        graphs = default_sizes(sequences, drafts)
    return replace(draft.load, max_model_len=context, sequences=sequences, step_tokens=step, graphs=graphs)


def _memory(draft: Draft) -> CardMemory:
    buffer = mc2_buffer_mib(draft) if draft.uses_mc2 else 200
    nbytes = draft.model.nbytes(draft.precision)
    parts = (draft.cards, draft.division, draft.load, buffer, draft.utilisation, draft.drafter)
    return card_memory(nbytes, draft.model.shape, *parts)


def _lacking(draft: Draft, memory: CardMemory, each: int) -> float:
    """Bytes of a card that are missing: for keys and values, and for graphs in what the engine leaves alone."""
    load, shape = draft.load, draft.model.shape
    blocks = kv_tokens_needed(load, each) // load.block
    needed = blocks * kv_bytes_per_block(shape, draft.division, load.block, load.kv_bytes, draft.drafter)
    kept = draft.cards.memory - draft.cards.usable
    return max(0.0, needed - memory.kv) + max(0.0, kept - memory.reserve)


def _from(longest: int, steps: tuple[int, ...]) -> list[int]:
    return [longest, *(one for one in steps if one < longest)]


def _in_time(draft: Draft, counts: list[int], wanted: Wanted) -> list[int]:
    """Keep the counts of sequences whose step takes no longer than wanted."""
    chip = chip_of(draft.cards, draft.precision)
    if wanted.tpot_ms is None or chip is None:
        return counts
    shape, data, load = draft.model.shape, draft.division.data, draft.load

    def seconds(count: int) -> float:
        return rate(
            shape, draft.precision, chip, draft.division, count * data, load.kv_bytes, load.max_model_len
        ).seconds

    asked = wanted.tpot_ms / 1000
    if (least := seconds(min(counts))) > asked:
        raise DoesNotFitError(
            f"--tpot-ms {wanted.tpot_ms:g} with {min(counts) * data} sequences is out of reach: a step takes "
            f"{least * 1000:.2f} ms at the limit"
        )
    most = next((count for count in counts if seconds(count) / PLANNED_SHARE <= asked), min(counts))
    return counts[counts.index(most) :]


def _uses_flashcomm(draft: Draft) -> bool:
    """Whether tokens are divided among the cards of a server between exchanges; only tried within one."""
    division = draft.division
    return draft.cards.device == "npu" and draft.cards.all_linked and division.expert and division.tensor > 1


def _with_settings(draft: Draft, memory: CardMemory, wanted: Wanted) -> Draft:
    """Put the engine's flags and environment together."""
    division, load, npu = draft.division, draft.load, draft.cards.device == "npu"
    settings: dict[str, Any] = {"tensor-parallel-size": division.tensor}
    for name, value in (("data-parallel-size", division.data), ("pipeline-parallel-size", division.pipeline)):
        if value > 1:
            settings[name] = value
    if division.tensor * division.data > 1:
        settings["enable-expert-parallel"] = division.expert
    settings |= {
        "dtype": draft.dtype,
        "max-model-len": load.max_model_len,
        "max-num-seqs": load.sequences,
        "max-num-batched-tokens": load.step_tokens,
        "gpu-memory-utilization": memory.utilisation,
    }
    if npu or wanted.block_size:
        settings["block-size"] = load.block
    if draft.kv_dtype == "fp8":
        settings["kv-cache-dtype"] = "fp8"
    overrides = hf_overrides(draft.model, load.max_model_len, draft.cards.device)
    if overrides:
        settings["hf-overrides"] = overrides
    if npu:
        settings["compilation-config"] = {
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": list(load.graphs),
        }
        if _uses_flashcomm(draft):
            settings["additional-config"] = {"enable_flashcomm1": True}
    if draft.drafter.tokens:
        settings["speculative-config"] = draft.drafter.engine_setting()
    draft = replace(draft, settings=settings)
    nbytes = sum(draft.model.nbytes(draft.precision).values())
    return replace(draft, environment={one.name: one.value for one in variables(draft, nbytes)})


def _warnings(draft: Draft, wanted: Wanted, step: float | None, memory: CardMemory) -> Iterator[str]:
    model, cards, division = draft.model, draft.cards, draft.division
    if draft.precision != model.precision:
        yield (
            f"{model.name} is stored in {model.precision}: run `python -m convert {draft.precision} SRC DST` first; "
            "its bytes here are by formula"
        )
    if division.cards < cards.total:
        idle = cards.total - division.cards
        yield f"{idle} of {cards.total} cards stay idle: the model is divided over {division.cards}"
    typical = min(TYPICAL, draft.load.max_model_len)
    if (held := memory.kv_tokens // typical) < draft.load.sequences:
        yield f"the cache holds {held} sequences of {typical} tokens: of {draft.load.sequences} longer ones some wait"
    if cards.nodes > 1 and not division.expert:
        yield "without expert parallelism every layer's exchange goes over the network between the servers"
    yield from _draft_warnings(draft, wanted)
    if draft.dtype == "float16":
        yield TRAPS["float16"].why
    if step is None:
        yield f"nobody has said what bandwidth or peak a {cards.facts.name} has: its limits are unknown"
        if wanted.tpot_ms is not None:
            yield f"--tpot-ms {wanted.tpot_ms:g} could not be judged"
    elif wanted.tpot_ms is not None and step / PLANNED_SHARE > wanted.tpot_ms / 1000:
        yield (
            f"--tpot-ms {wanted.tpot_ms:g} needs more than {PLANNED_SHARE:.0%} of the limit: measure before you "
            "promise it"
        )
    yield "computed from sizes and published figures; this plan has not been run on these cards"


def _draft_warnings(draft: Draft, wanted: Wanted) -> Iterator[str]:
    gained, drafter = draft.gain, draft.drafter
    if drafter.method == "mtp" and drafter.layers > 1 and draft.cards.device == "npu":
        yield f"vLLM-Ascend drafts with the first of {drafter.layers} MTP layers alone: fewer later drafts are right"
    if gained is None:
        if drafter.method in ("mtp", "eagle3"):
            yield f"whether drafts pay on a {draft.cards.facts.name} is unknown: measure with and without them"
        return
    asked = (wanted.speculative or "").partition(":")[0]
    if drafter.method == "off":
        yield (
            f"--speculative {asked} is left off: with {draft.load.sequences * draft.division.data} sequences drafts "
            f"would make it {gained.full:.2f} times as fast at the limit; --speculative-tokens K insists"
        )
    elif gained.full < 1:
        yield f"drafts cost more than they gain here: {gained.full:.2f} times as fast at the limit with all sequences"
    if drafter.method != "off" and gained.single < 1:
        yield f"a single sequence is {gained.single:.2f} times as fast with drafts as without, at the limit"


def _check_numbers(wanted: Wanted) -> None:
    for name, value in vars(wanted).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g} must be above zero")
