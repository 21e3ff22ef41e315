"""What would do instead: the nearest changes of a wish that cannot be met, each tried by planning it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from serve.planning.cards import Cards
from serve.planning.draft import Draft
from serve.planning.model import PlannedModel
from serve.planning.traps import MOST_TOKENS_EACH
from serve.planning.wanted import Wanted

Try = Callable[[PlannedModel, Cards, Wanted], Draft | None]

Change = tuple[str, Cards, Wanted]  # in words, and what is planned with

FIXED = (
    "tensor_parallel_size",
    "data_parallel_size",
    "pipeline_parallel_size",
    "expert_parallel",
    "block_size",
    "kv_cache_dtype",
    "dtype",
    "speculative",
    "speculative_tokens",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "tpot_ms",
)
DIVISION = FIXED[:4]
CONTEXTS = (131072, 65536, 32768, 16384, 8192, 4096, 2048, 1024)
FEWER = (256, 128, 64, 32, 16, 8, 4, 2, 1)
OTHERS = {"npu": ("w8a8", "w4a16"), "cuda": ("fp8", "w8a8", "w4a16")}  # fewer bits, the least change first
COUNTS = (1, 2, 4, 8, 16)
MOST_NAMED = 4


def nearest(model: PlannedModel, cards: Cards, wanted: Wanted, would_do: Try, launcher: bool = False) -> str:
    """Return "what would do: …", or that nothing near does. At most one of each kind of change.

    launcher: in the launcher's flags. It has no ``--precision``, as it serves what is stored: convert, and serve that.
    """
    found = []
    for kind in (_without, _shorter, _fewer, _precisions, _more_cards):
        for text, changed_cards, changed in kind(model, cards, wanted):
            if draft := would_do(model, changed_cards, changed):
                found.append(_with_value(text, draft))
                break
    if not found:  # two changes at once: the fewest cards, whatever was fixed
        for text, changed_cards, changed in _together(model, cards, _free(wanted, FIXED)):
            if would_do(model, changed_cards, changed):
                given = [name for name in (*FIXED, "max_num_seqs") if getattr(wanted, name) not in (None, "auto")]
                left_out = " and ".join(f"--{name.replace('_', '-')}" for name in given)
                found.append(text + (f" without {left_out}" if left_out else ""))
                break
    if not found:
        return "nothing near it would do: a smaller model or larger cards"
    if launcher:
        found = [_for_launcher(text) for text in found]
    return f"what would do: {', or '.join(found[:MOST_NAMED])}"


def _for_launcher(text: str) -> str:
    """The same change for `serve/launch.sh`, which asks for an address where there are several servers."""
    text = re.sub(r"--precision (\S+)( \(convert it first\))?", r"`python -m convert \1 SRC DST` and --model DST", text)
    return re.sub(r"(--nodes \d+)", r"\1 --node-address ADDRESS", text)


def _with_value(text: str, draft: Draft) -> str:
    """Say what the plan takes in place of what was fixed, where it is a value."""
    name = text.removeprefix("without --")
    if name == "expert-parallel":
        return "--expert-parallel" if draft.division.expert else "--no-expert-parallel"
    return f"--{name} {draft.settings[name]}" if name != text and name in draft.settings else text


def _free(wanted: Wanted, names: Iterable[str]) -> Wanted:
    changes: dict[str, Any] = dict.fromkeys(names)
    return replace(wanted, **changes)


def _without(model: PlannedModel, cards: Cards, wanted: Wanted) -> Iterator[Change]:
    """A value that was fixed is left to the plan."""
    given = [name for name in FIXED if getattr(wanted, name) not in (None, "auto")]
    drafts = (wanted.speculative or "").removeprefix("ngram:")
    if drafts.isdecimal() and int(drafts) >= MOST_TOKENS_EACH:
        fewer = f"ngram:{MOST_TOKENS_EACH - 1}"
        yield f"--speculative {fewer}", cards, replace(wanted, speculative=fewer)
    if (wanted.speculative_tokens or 0) >= MOST_TOKENS_EACH:
        least = MOST_TOKENS_EACH - 1
        yield f"--speculative-tokens {least}", cards, replace(wanted, speculative_tokens=least)
    for name in given:
        names = ["speculative", "speculative_tokens"] if name == "speculative" else [name]
        yield f"without --{name.replace('_', '-')}", cards, _free(wanted, names)
    several = [name for name in given if name in DIVISION]
    if len(several) > 1:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in several)
        yield f"without {flags}", cards, _free(wanted, several)


def _shorter(model: PlannedModel, cards: Cards, wanted: Wanted) -> Iterator[Change]:
    asked = wanted.max_model_len or model.context
    lengths = sorted({*CONTEXTS, model.longest}, reverse=True)
    for length in (one for one in lengths if one < asked):
        yield f"--max-model-len {length}", cards, replace(wanted, max_model_len=length)


def _fewer(model: PlannedModel, cards: Cards, wanted: Wanted) -> Iterator[Change]:
    for count in (one for one in FEWER if wanted.max_num_seqs and one < wanted.max_num_seqs):
        yield f"--max-num-seqs {count}", cards, replace(wanted, max_num_seqs=count)


def _precisions(model: PlannedModel, cards: Cards, wanted: Wanted) -> Iterator[Change]:
    now = wanted.precision or model.precision
    for name in OTHERS[cards.device]:
        if name != now:
            yield f"--precision {name} (convert it first)", cards, replace(wanted, precision=name)


def _more_cards(model: PlannedModel, cards: Cards, wanted: Wanted) -> Iterator[Change]:
    counts = [(count, 1) for count in COUNTS if cards.nodes == 1 and cards.count < count <= cards.facts.per_server]
    most = cards.facts.per_server
    counts += [(most, 2)] if cards.total < 2 * most else []
    for count, nodes in counts:
        more = replace(cards, count=count, nodes=nodes, indices=None, confirmed=True)
        yield f"--cards {more}{f' --nodes {nodes}' if nodes > 1 else ''}", more, replace(wanted, nodes=nodes)


def _together(model: PlannedModel, cards: Cards, wanted: Wanted) -> Iterator[Change]:
    changes = [("", cards, wanted), *_more_cards(model, cards, wanted)]
    for name in (wanted.precision or model.precision, *OTHERS[cards.device]):
        for length in (wanted.max_model_len or model.context, 32768, 8192):
            for text, more, changed in changes:
                length = min(length, model.longest)
                converted = f"--precision {name}" if name != model.precision else ""
                words = [converted, f"--max-model-len {length}", text]
                least = replace(changed, precision=name, max_model_len=length, max_num_seqs=None)
                yield " ".join(word for word in words if word), more, least
