"""The CPU's plan: the KV cache's room, the cores, whether compiling pays, and weights that are widened as they load."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ascend.cost import Sharding, kv_bytes_per_card, parameters
from ascend.devices import get_device
from ascend.devices.facts import GiB, MiB
from ascend.errors import UserError
from convert.cards import SEQUENCE_LENGTH
from serve.planning.cards import Cards
from serve.planning.drafter import Drafter, drafters
from serve.planning.memory import Division
from serve.planning.model import PlannedModel
from serve.planning.result import Choice, Plan
from serve.planning.rope import hf_overrides
from serve.planning.traps import TRAPS
from serve.planning.wanted import Wanted

# Below this torch.compile costs more than it can win back: on 2 cores it made the first start of a 4 MB model
# take 83 s instead of 31 s, and every later one 54 s.
EAGER_BELOW_BYTES = 256 * MiB
KV_SEQUENCES = 16
BIND_ALL_CORES_UP_TO = 8  # vLLM keeps one core for its scheduler; where there are few, computing needs it more
KV_SPACE, CORES = "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"
MACHINE_DEPENDENT = (KV_SPACE, CORES)  # never in a file that is carried to another machine


def cpu_plan(model: PlannedModel, cards: Cards, wanted: Wanted) -> Plan:
    """Return the plan for this machine's CPU. Raises `UserError` for what does not fit or does not exist there."""
    _check(model, wanted)
    wide = 4 if wanted.dtype == "float32" else 2
    weight_bytes, note = engine_bytes(model, wide, wanted.quantization)
    length = wanted.max_model_len or model.context
    tensor, data = wanted.tensor_parallel_size or 1, wanted.data_parallel_size or wanted.nodes
    here = -(-data // wanted.nodes)  # replicas on this machine
    memory = get_device("cpu").memory()
    free = memory.free if cards.memory == memory.total else cards.memory
    drafter = drafters(wanted, model, model.precision)[0]
    weight_bytes += int(sum(drafter.nbytes.values()) + drafter.divided + drafter.whole) * wide // 2
    per_token = kv_bytes_per_card(model.shape, 1, 1, Sharding(tensor), wide) + drafter.kv_bytes_per_token(tensor, wide)
    space = kv_gib(per_token * length, weight_bytes * here, free, tensor * here)
    if weight_bytes * here + GiB > cards.memory:
        raise UserError(
            f"{model.name} takes {weight_bytes * here / GiB:.1f} GiB of memory and {space} GiB of KV cache, the "
            f"machine has {cards.memory / GiB:.1f} GiB; serve it on cards (--cards 8x910B3-64G), or a smaller model"
        )
    chosen = [*_asked(model, wanted, tensor, data, drafter)]
    if weight_bytes < EAGER_BELOW_BYTES:
        why = f"compiling pays from {EAGER_BELOW_BYTES / MiB:.0f} MiB of weights on: 83 s instead of 31 s to start"
        chosen.append(Choice("enforce-eager", True, why, "measured on 2 cores"))
    settings: dict[str, Any] = {one.name: one.value for one in chosen}
    holds = int(space * GiB // per_token)
    why = (
        f"GiB of each worker: room for {KV_SEQUENCES} sequences of {length} tokens, at most a quarter of what the "
        f"weights leave free; holds {holds:,} tokens"
    )
    environment = [Choice(KV_SPACE, str(space), why, "vllm/v1/worker/cpu_worker.py")]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= BIND_ALL_CORES_UP_TO and tensor * here == 1:
        why = "all of the few cores compute; by default one is kept for the scheduler"
        value = ",".join(map(str, cores))
        environment.append(Choice(CORES, value, why, "measured: 1.2 to 1.7 times as fast on 2 cores"))
    caching = TRAPS["prefix-caching"]
    return Plan(
        device="cpu",
        engine="vllm",
        model=model.name,
        cards="cpu",
        nodes=wanted.nodes,
        precision=model.precision,
        division=str(Division(tensor, data)) if tensor * data > 1 else "one machine",
        settings=settings,
        environment={one.name: one.value for one in environment},
        choices=(*chosen, *environment, Choice("enable-prefix-caching", "on", caching.why, caching.source)),
        kv_sequences={one: holds // one for one in (length, min(SEQUENCE_LENGTH, length))},
        warnings=(note,) if note else (),
    )


def _asked(model: PlannedModel, wanted: Wanted, tensor: int, data: int, drafter: Drafter) -> Iterator[Choice]:
    """Yield what was asked for, and what follows from it."""
    for name, value in (("tensor-parallel-size", tensor), ("data-parallel-size", data)):
        if value > 1:
            yield Choice(name, value, "as asked: a process each", "")
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"):
        value = getattr(wanted, name)
        if value is not None:
            yield Choice(name.replace("_", "-"), value, "as asked", "")
    if wanted.expert_parallel is not None and tensor * data > 1:
        yield Choice("enable-expert-parallel", wanted.expert_parallel, "as asked", "")
    if drafter.tokens:
        yield Choice("speculative-config", drafter.engine_setting(), "as asked", TRAPS["speculative"].source)
    overrides = hf_overrides(model, wanted.max_model_len or model.context, "cpu")
    if overrides:
        yield Choice("hf-overrides", overrides, TRAPS["yarn-cuda"].why, TRAPS["yarn-cuda"].source)


def kv_gib(sequence_bytes: float, weight_bytes: float, free: float, workers: int = 1) -> int:
    """Return the size of each worker's KV cache in whole GiB, as vLLM wants it.

    Room for `KV_SEQUENCES` of full length, but at most a quarter of what the weights leave free, and at least 1 GiB.
    """
    wanted = -(-sequence_bytes * KV_SEQUENCES // GiB)
    return int(max(1, min(wanted, (free - weight_bytes) // (4 * workers) // GiB)))


def engine_bytes(model: PlannedModel, wide: int, quantization: str | None = None) -> tuple[int, str | None]:
    """Return the bytes of the weights in the engine, and what to tell of those that `widened.py` widens."""
    plain = parameters(model.shape).total * wide
    if model.precision in ("bf16", "fp32"):
        return int(plain), None
    stored = sum(model.nbytes(model.precision, wide).values())
    if quantization is not None:
        return int(stored), None
    note = (
        f"weights stored as {model.precision} are widened to {wide * 8} bits ({_size(stored)} in the files, "
        f"{_size(plain)} of memory): vLLM has no kernels for them on this CPU. Answers are those of the rounded weights"
    )
    if not model.precision.startswith("w4a16"):
        note += "; activations are not rounded, as they are on an accelerator"
    return int(plain), note


def _size(nbytes: float) -> str:
    return f"{nbytes / MiB:.1f} MiB" if nbytes < GiB else f"{nbytes / GiB:.1f} GiB"


def _check(model: PlannedModel, wanted: Wanted) -> None:
    if (wanted.pipeline_parallel_size or 1) > 1:
        raise UserError("--pipeline-parallel-size is not for the CPU: leave it out")
    data = wanted.data_parallel_size or wanted.nodes
    if data % wanted.nodes:
        raise UserError(f"--data-parallel-size {data} does not spread over {wanted.nodes} nodes; leave it out")
    Sharding(wanted.tensor_parallel_size or 1).check(model.shape)
    if wanted.max_model_len is not None and wanted.max_model_len > model.longest:
        raise UserError(
            f"--max-model-len {wanted.max_model_len} is more than the model's {model.longest} tokens; lower it"
        )
    for name, value in (("precision", wanted.precision), ("kv-cache-dtype", wanted.kv_cache_dtype)):
        if value not in (None, "auto", "bf16", model.precision):
            raise UserError(f"--{name} {value} is not for the CPU: it serves what is stored, in 16 or 32 bits")
