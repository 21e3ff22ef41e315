"""Check `--additional-config` for vLLM-Ascend, which ignores a key that it does not know in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ascend.errors import UserError, suggest
from serve.engine_flags.tables import ASCEND, table

# Keys of older versions, issue threads and the documentation, none of which vllm-ascend 0.23.0 reads
# (its source: data/vllm-ascend-0.23.json), with what took their place.
STALE = {
    "torchair_graph_config": "graphs are ACL graphs now: --compilation-config '{\"cudagraph_mode\": …}'",
    "ascend_scheduler_config": "vLLM's own scheduler is used now: --max-num-batched-tokens, --max-num-seqs",
    "flashcomm2_parallel_size": "it is 'enable_flashcomm2_parallel_size', whatever the documentation says",
    "enable_weight_nz_layout": "it is 'weight_nz_mode' now: 0 never, 1 quantised weights, 2 all",
    "expert_tensor_parallel_size": "experts are divided by --enable-expert-parallel or --tensor-parallel-size",
    "dynamic_eplb": "it is inside 'eplb_config' now",
    "expert_map_path": "it is inside 'eplb_config' now",
    "expert_map_record_path": "it is inside 'eplb_config' now",
    "init_redundancy_expert": "it is 'num_redundant_experts' inside 'eplb_config' now",
    "num_iterations_eplb_update": "it is 'expert_heat_collection_interval' inside 'eplb_config' now",
    "num_wait_worker_iterations": "it is 'algorithm_execution_interval' inside 'eplb_config' now",
    "lmhead_tensor_parallel_size": "it is inside 'finegrained_tp_config' now",
    "oproj_tensor_parallel_size": "it is inside 'finegrained_tp_config' now",
}
# By the names that ast gives types; a whole number is a number, True is not.
_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "list": (list, tuple),
    "dict": (Mapping,),
}
_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "list": "a list",
    "dict": "an object",
}


def check_additional_config(value: Mapping[str, Any]) -> None:
    """Raise `UserError` for a key that vllm-ascend 0.23 does not read, or a value of another type than it expects."""
    keys = table(ASCEND)["additional_config"]
    for key, one in value.items():
        _check(key, one, keys)
        if keys[key] == "dict" and any(known.startswith(f"{key}.") for known in keys):
            for inner, inside in one.items():
                _check(f"{key}.{inner}", inside, keys)


def _check(key: str, value: Any, keys: Mapping[str, str]) -> None:
    if key not in keys:
        stale = STALE.get(key)
        rest = f": {stale}" if stale else suggest(key, keys)
        # Of all its keys it looks at these alone (ascend_config.py:856).
        does = "does not know" if key.startswith("eplb_config.") else "would ignore"
        silent = "" if key.startswith("eplb_config.") else " in silence"
        raise UserError(f"--additional-config: vllm-ascend 0.23 {does} '{key}'{silent}{rest}")
    type_ = keys[key]
    fits = isinstance(value, _TYPES[type_]) and not (isinstance(value, bool) and type_ in ("int", "float"))
    if not fits:
        raise UserError(f"--additional-config: '{key}' is {_WORDS[type_]}, not {value!r}")
