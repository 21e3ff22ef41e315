"""What a launch was asked for, all sources put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class LaunchSettings:
    """The launcher's flags, by their names; what is None the plan decides (``model`` None: the demo checkpoint).

    verify, canary: as `serve.args` lists them; key: of whoever must have signed the model's manifest. timeout, drain,
    hang: seconds. restarts: of an engine that was ready, within ten minutes. tpot_ms: milliseconds per token and
    sequence. engine_flags: as they go to the engine. environment: what a configuration file sets.
    """

    device: str
    emulate: bool
    engine: str
    model: Path | None
    verify: str
    key: Path | None
    host: str
    port: int
    served_model_name: str | None
    profile: str | None
    config: str | None
    print_config: bool
    dry_run: bool
    cards: str | None
    dtype: str
    max_model_len: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    tpot_ms: float | None
    tensor_parallel_size: int | None
    data_parallel_size: int | None
    pipeline_parallel_size: int | None
    expert_parallel: bool | None
    gpu_memory_utilization: float | None
    kv_cache_dtype: str | None
    block_size: int | None
    speculative: str | None
    speculative_tokens: int | None
    timeout: float
    canary: str
    hang: float
    restarts: int
    drain: float
    ready_file: Path | None
    forget_isolated: bool
    nodes: int
    node_rank: int
    node_address: str | None
    network_interface: str | None
    engine_flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
