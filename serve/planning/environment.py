"""The environment of an engine on each kind of card: a table, with the reason beside each value."""

from __future__ import annotations

import math
from typing import NamedTuple

from serve.planning.draft import Draft
from serve.planning.traps import LONGEST_CONNECT, TRAPS, mc2_buffer_mib

SLOWEST_DISK = 0.2e9  # bytes a second that loading is given at least
START_SECONDS = 600  # for all but reading the weights: imports, graphs, profiling


class Variable(NamedTuple):
    """A variable of the environment."""

    name: str
    value: str
    why: str
    source: str


def variables(draft: Draft, weight_bytes: float) -> list[Variable]:
    """Return the variables for ``draft``; ``weight_bytes`` are those of the whole model."""
    seconds = 60 * math.ceil((START_SECONDS + weight_bytes / SLOWEST_DISK) / 60)
    found = [
        Variable(
            "VLLM_ENGINE_READY_TIMEOUT_S",
            str(seconds),
            f"{weight_bytes / 1e9:.0f} GB from a disk of {SLOWEST_DISK / 1e9:g} GB/s, and {START_SECONDS} s; the "
            "default is 600",
            "vllm/envs.py",
        ),
        *(_npu(draft, seconds) if draft.cards.device == "npu" else []),
    ]
    visible = _visible(draft)
    return [visible, *found] if visible else found


def _npu(draft: Draft, ready: int) -> list[Variable]:
    guide = "vllm-ascend 0.23.0, docs/source/tutorials/models/Qwen3-235B-A22B.md"
    timeouts = TRAPS["hccl-timeouts"]
    found = [
        Variable("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", "less memory lost to fragments", guide),
        Variable("TASK_QUEUE_ENABLE", "1", "operators are handed over in a queue of their own", guide),
        Variable("OMP_NUM_THREADS", "1", "a worker per card: more threads each would fight for cores", guide),
        Variable("OMP_PROC_BIND", "false", "vLLM-Ascend binds the workers itself", guide),
        Variable("ASCEND_LAUNCH_BLOCKING", "0", TRAPS["launch-blocking"].why, TRAPS["launch-blocking"].source),
    ]
    if draft.division.cards == 1:
        return found
    if draft.uses_mc2:
        buffer, why = (
            mc2_buffer_mib(draft),
            "MC2's buffer for a step's tokens on all cards; other groups have their own",
        )
    else:
        buffer, why = 200, "the default, said aloud: every communicator costs twice as much of each card"
    source = TRAPS["mc2"].source if draft.uses_mc2 else "CANN: HCCL_BUFFSIZE, 200 by default"
    several = draft.cards.nodes > 1
    connect, execute = (min(ready, LONGEST_CONNECT), ready) if several else (120, 300)
    waiting = "seconds to wait for the other cards at the start" + (", as long as they may load" if several else "")
    dead = f"{timeouts.why}; the launcher's --hang sees a dead card sooner" if several else timeouts.why
    found += [
        Variable("HCCL_BUFFSIZE", str(buffer), why, source),
        Variable("HCCL_CONNECT_TIMEOUT", str(connect), waiting, timeouts.source),
        Variable("HCCL_EXEC_TIMEOUT", str(execute), dead, timeouts.source),
    ]
    if draft.cards.all_linked:
        why = "exchanges run on the vector cores, which works within a server"
        found.append(Variable("HCCL_OP_EXPANSION_MODE", "AIV", why, "CANN's HCCL pages; " + guide))
    return found


def _visible(draft: Draft) -> Variable | None:
    """Which cards to use, where that is fewer than there are."""
    cards, used = draft.cards, draft.division.cards // draft.cards.nodes
    if used == cards.count and cards.indices in (None, tuple(range(cards.count))):
        return None
    chosen = (cards.indices or tuple(range(cards.count)))[:used]
    name = "ASCEND_RT_VISIBLE_DEVICES" if cards.device == "npu" else "CUDA_VISIBLE_DEVICES"
    return Variable(name, ",".join(map(str, chosen)), f"{used} of the cards are used", "torch_npu and CUDA")
