"""What a user asks of a plan. What is None, the plan decides; what is given is obeyed, or refused with a reason."""

from __future__ import annotations

from dataclasses import dataclass

METHODS = ("off", "mtp", "eagle3:DIR", "ngram")  # of drafting


@dataclass(frozen=True)
class Wanted:
    """Wishes, by the names of the launcher's flags.

    precision: a name of `ascend.precision.PRECISIONS`; None is what is stored. max_num_seqs: of one data-parallel
    group, as the engine's flag of that name. tpot_ms: the longest time per token and sequence, in milliseconds.
    kv_cache_dtype: "auto", "bf16" or "fp8". speculative: "off", "mtp", "eagle3:DIR", "ngram" or
    "ngram:DRAFTS"; speculative_tokens: drafts a step. quantization: an engine's
    method that was asked for by name. nodes: servers, of the same cards each.
    """

    precision: str | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    tpot_ms: float | None = None
    kv_cache_dtype: str | None = None
    tensor_parallel_size: int | None = None
    data_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    expert_parallel: bool | None = None
    gpu_memory_utilization: float | None = None
    block_size: int | None = None
    speculative: str | None = None
    speculative_tokens: int | None = None
    quantization: str | None = None
    nodes: int = 1
