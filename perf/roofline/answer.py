"""What `perf roofline` answers: one JSON document, numbers in bytes, FLOPs and seconds; unknown is null."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from ascend import roofline
from ascend.cost import active_parameters, decode_work, parameters, weight_bytes
from ascend.model_shape import DENSE_36B
from ascend.precision import KV_DTYPES, Precision
from ascend.roofline import Chip, StepLimit
from perf.roofline.question import Question

PROMPTS = (2048, 8192, 32768, 131072)  # lengths that the prefill limit is given for


def answer(q: Question) -> dict[str, Any]:
    """Return the document: model and card, then a row for each precision, context and batch."""
    counted = parameters(q.shape)
    totals = {"total": counted.total, "active_without_embeddings": active_parameters(q.shape)}
    return {
        "kind": "roofline",
        "model": q.model,
        "shape": asdict(q.shape),
        "parameters": asdict(counted) | totals,
        "weight_bytes": {one.name: asdict(weight_bytes(q.shape, one)) for one in q.precisions},
        "card": {"name": q.card, "figures": {name: asdict(figure) for name, figure in q.figures.items()}},
        "sharding": asdict(q.sharding) | {"cards": q.sharding.cards},
        "routing": q.routing.label,
        "all_reduce_seconds": q.all_reduce,
        "drafts": q.drafts,
        "acceptance": q.acceptance,
        "rows": [_row(q, one, context, batch) for one in q.precisions for context in q.contexts for batch in q.batches],
        "prefill": [_prefill(q, one) for one in q.precisions],
    }


def _row(q: Question, precision: Precision, context: int, batch: int) -> dict[str, Any]:
    """One point. Bytes and FLOPs are of the whole model on one card, memory is of one of the cards asked about."""
    kv_dtype = q.kv_dtype or ("fp32" if precision.name == "fp32" else "bf16")
    kv_bytes = KV_DTYPES[kv_dtype]
    distinct = q.routing.distinct(q.shape, batch)
    work = decode_work(q.shape, precision, batch, context, kv_bytes=kv_bytes, distinct=distinct)
    held, dense_held = (
        roofline.memory(model, precision, batch, context, q.figures["memory"].value, q.sharding, kv_bytes)
        for model in (q.shape, DENSE_36B)
    )
    row: dict[str, Any] = {
        "precision": precision.name,
        "kv_dtype": kv_dtype,
        "context": context,
        "batch": batch,
        "distinct_experts": distinct,
        "tokens_per_expert": batch * q.shape.num_experts_per_tok / distinct,
        "imbalance": q.routing.imbalance(q.shape, batch, q.sharding.experts),
        "bytes": {name: part.nbytes for name, part in work.items()},
        "flops": {name: part.flops for name, part in work.items()},
        "memory": asdict(held) | {"verdict": held.verdict},
        "limit": None,
        "against_dense_36b": None,
        "dense_36b_memory": dense_held.verdict,
        "speculation": None,
        "share_of_limit": None,
    }
    chip = q.chip({*precision.dtypes, *(["bf16"] if q.drafts else [])})
    if chip is None:
        return row

    def step(drafts: int = 0) -> StepLimit:
        return roofline.decode_step(
            q.shape, precision, batch, context, chip, q.sharding, kv_bytes, q.routing, drafts, q.all_reduce
        )

    plain, dense_sharding = step(), replace(q.sharding, experts=1)
    dense = roofline.decode_step(
        DENSE_36B, precision, batch, context, chip, dense_sharding, kv_bytes, all_reduce=q.all_reduce
    )
    row["limit"] = asdict(plain)
    row["against_dense_36b"] = plain.tokens_per_second / dense.tokens_per_second
    limit = plain.tokens_per_second
    if q.drafts:
        row["speculation"] = _speculation(q, chip, batch, plain, step(q.drafts))
        limit = row["speculation"]["tokens_per_second"] or limit
    if q.measured:
        row["share_of_limit"] = q.measured[q.batches.index(batch) if len(q.measured) > 1 else 0] / limit
    return row


def _speculation(q: Question, chip: Chip, batch: int, plain: StepLimit, verify: StepLimit) -> dict[str, Any]:
    """Cost of a speculative step in plain ones; what is gained is unknown without an acceptance."""
    gain = roofline.speculation(plain, verify, q.drafts, q.acceptance or 1.0, batch, chip, q.sharding)
    found = asdict(gain) | {"distinct_experts": q.routing.distinct(q.shape, batch * (q.drafts + 1))}
    return found if q.acceptance else found | {"speedup": None, "tokens_per_second": None}


def _prefill(q: Question, precision: Precision) -> dict[str, Any]:
    """Prompt tokens per second of one card by length of the prompt, and the chunk from which compute is the limit."""
    row: dict[str, Any] = {"precision": precision.name, "tokens_per_second": None, "compute_bound_chunk": None}
    chip = q.chip(precision.dtypes)
    if chip is not None:
        limits = {length: roofline.prefill(q.shape, precision, length, chip) for length in PROMPTS}
        row["tokens_per_second"] = {str(length): limit.tokens_per_second for length, limit in limits.items()}
        row["compute_bound_chunk"] = limits[PROMPTS[0]].compute_bound_chunk
    return row
