"""For each rule on combinations of flags: what breaks it, and what just does not, by flag names without dashes.

Beside the flags: ``cards`` and ``nodes`` there are, the ``device``, the ``environment``, and attention ``heads`` of the
model, where the case needs other ones than the tests' own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def extra(**keys: Any) -> dict[str, Any]:
    return {"additional-config": keys}


EP = {"enable-expert-parallel": True}
TP2 = {"tensor-parallel-size": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 6e5,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
    "truncate": True,
}
EPLB = extra(eplb_config={"dynamic_eplb": True})
CONSUMER = {"kv-transfer-config": {"kv_role": "kv_consumer", "kv_connector": "ExampleConnector"}}
PRODUCER = {"kv-transfer-config": {"kv_role": "kv_producer", "kv_connector": "ExampleConnector"}}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3}
A_FILE = str(Path(__file__).parent.parent / "serve" / "engine_flags" / "data" / "vllm-0.23.json")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "heads": ({"tensor-parallel-size": 3}, {"tensor-parallel-size": 8}),
    "cards": ({"tensor-parallel-size": 16}, {"tensor-parallel-size": 8}),
    "batch": (
        {"max-num-batched-tokens": 8, "max-num-seqs": 9},
        {"max-num-batched-tokens": 9, "max-num-seqs": 9},
    ),
    "unchunked": (
        {"enable-chunked-prefill": False, "max-num-batched-tokens": 8, "max-model-len": 9},
        {"enable-chunked-prefill": True, "max-num-batched-tokens": 8, "max-model-len": 9},
    ),
    "graph-mode": (
        {"compilation-config": {"cudagraph_mode": "FULL_DECODE"}},
        {"compilation-config": {"cudagraph_mode": "full_decode_only"}},
    ),
    "no-sizes": (
        {"compilation-config": {"cudagraph_capture_sizes": []}},
        {"compilation-config": {"cudagraph_capture_sizes": []}, "enforce-eager": True},
    ),
    "sizes-twice": (
        {"cudagraph-capture-sizes": [1, 2], "compilation-config": {"cudagraph_capture_sizes": [1, 2]}},
        {"cudagraph-capture-sizes": [1, 2], "compilation-config": {"cudagraph_mode": "FULL"}},
    ),
    "largest-graph": (
        {"max-cudagraph-capture-size": 4, "compilation-config": {"cudagraph_capture_sizes": [1, 2]}},
        {"max-cudagraph-capture-size": 2, "compilation-config": {"cudagraph_capture_sizes": [1, 2]}},
    ),
    "random-weights": ({"load-format": "dummy"}, {"load-format": "safetensors"}),
    "unchecked-weights": ({"load-format": "pt"}, {"load-format": "auto"}),
    "logprobs": ({"max-logprobs": -1}, {"max-logprobs": 1000}),
    "executor": ({"distributed-executor-backend": "external_launcher"}, {"distributed-executor-backend": "mp"}),
    "sleep": ({"enable-sleep-mode": True}, {"enable-sleep-mode": False}),
    "lora": ({"enable-lora": True}, {"enable-lora": False}),
    "rope-theta": (
        {"hf-overrides": {"rope_parameters": {key: YARN[key] for key in YARN if key != "rope_theta"}}},
        {"hf-overrides": {"rope_parameters": YARN}},
    ),
    "yarn-truncate": (
        {"hf-overrides": {"rope_scaling": {**YARN, "truncate": False}}},
        {"hf-overrides": {"rope_scaling": YARN}},
    ),
    "rope-part": (
        {"hf-overrides": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 6e5, "truncate": True}}},
        {"hf-overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 6e5}}},
    ),
    "speculative": (
        {"speculative-config": {"method": "medusa", "num_speculative_tokens": 3}},
        {"speculative-config": NGRAM},
    ),
    "draft-count": ({"speculative-config": {"method": "ngram"}}, {"speculative-config": NGRAM}),
    "draft-model": (
        {"speculative-config": {"method": "draft_model", "num_speculative_tokens": 3}},
        {"speculative-config": NGRAM},
    ),
    "drafts": (
        {"speculative-config": {"method": "ngram", "num_speculative_tokens": 16}},
        {"speculative-config": {"method": "ngram", "num_speculative_tokens": 15}},
    ),
    "float32": ({"dtype": "float32"}, {"dtype": "bfloat16"}),
    "fp8-cache": ({"kv-cache-dtype": "fp8"}, {"kv-cache-dtype": "auto"}),
    "quantization": ({"quantization": "gptq"}, {"quantization": None}),
    "set-back": ({"enable-dbo": True}, {"enable-dbo": False}),
    "block-size": ({"block-size": 64}, {"block-size": 128}),
    "eplb-flag": ({"enable-eplb": True}, {"enable-eplb": False}),
    "eplb-switch": (EPLB, {**EPLB, "environment": {"DYNAMIC_EPLB": "true"}}),
    "eplb-policy": (extra(eplb_config={"eplb_policy_type": 4}), extra(eplb_config={"eplb_policy_type": 3})),
    "eplb-map": (extra(eplb_config={"expert_map_path": "none.json"}), extra(eplb_config={"expert_map_path": A_FILE})),
    "eplb-numbers": (
        extra(eplb_config={"num_redundant_experts": -1}),
        extra(eplb_config={"num_redundant_experts": 0}),
    ),
    "eplb-stage": (
        extra(eplb_config={"eplb_heat_collection_stage": "both"}),
        extra(eplb_config={"eplb_heat_collection_stage": "decode"}),
    ),
    "blocking-graphs": (
        {"environment": {"ASCEND_LAUNCH_BLOCKING": "1"}},
        {"environment": {"ASCEND_LAUNCH_BLOCKING": "1"}, "enforce-eager": True},
    ),
    "flashcomm1-tp": ({**extra(enable_flashcomm1=True), **EP}, {**extra(enable_flashcomm1=True), **EP, **TP2}),
    "flashcomm1-ep": ({**extra(enable_flashcomm1=True), **TP2}, {**extra(enable_flashcomm1=True), **EP, **TP2}),
    "flashcomm1-sizes": (
        {**extra(enable_flashcomm1=True), **EP, **TP2, "compilation-config": {"cudagraph_capture_sizes": [1, 3]}},
        {**extra(enable_flashcomm1=True), **EP, **TP2, "compilation-config": {"cudagraph_capture_sizes": [1, 4]}},
    ),
    "flashcomm2": (
        {**extra(enable_flashcomm2_parallel_size=2), **TP2},
        {**extra(enable_flashcomm2_parallel_size=1), **TP2},
    ),
    "shared-dp": ({**extra(enable_shared_expert_dp=True), **TP2}, {**extra(enable_shared_expert_dp=True), **EP, **TP2}),
    "layer-sharding": (extra(layer_sharding=["o_proj"]), {**extra(layer_sharding=["o_proj"]), **PRODUCER}),
    "recompute": (extra(recompute_scheduler_enable=True), {**extra(recompute_scheduler_enable=True), **CONSUMER}),
    "balance": ({**extra(enable_balance_scheduling=True), **CONSUMER}, extra(enable_balance_scheduling=True)),
    "hierarchy": (
        extra(enable_mc2_hierarchy_comm=True, enable_fused_mc2=1),
        extra(enable_mc2_hierarchy_comm=True, enable_fused_mc2=0),
    ),
    "chunk-pp": (
        extra(profiling_chunk_config={"enabled": True}),
        {**extra(profiling_chunk_config={"enabled": True}), "pipeline-parallel-size": 2},
    ),
    "chunk-balance": (
        {
            **extra(profiling_chunk_config={"enabled": True}, enable_balance_scheduling=True),
            "pipeline-parallel-size": 2,
        },
        {**extra(profiling_chunk_config={"enabled": False}, enable_balance_scheduling=True)},
    ),
    "finegrained": (
        extra(finegrained_tp_config={"lmhead_tensor_parallel_size": 2}),
        {**extra(finegrained_tp_config={"lmhead_tensor_parallel_size": 2}), "data-parallel-size": 4},
    ),
    "finegrained-decode": (
        extra(finegrained_tp_config={"oproj_tensor_parallel_size": 1}, recompute_scheduler_enable=False),
        {
            **extra(finegrained_tp_config={"oproj_tensor_parallel_size": 1}, recompute_scheduler_enable=True),
            **CONSUMER,
        },
    ),
    "finegrained-oproj": (
        {
            **extra(finegrained_tp_config={"oproj_tensor_parallel_size": 1}, recompute_scheduler_enable=True),
            **CONSUMER,
            **TP2,
        },
        {
            **extra(finegrained_tp_config={"oproj_tensor_parallel_size": 1}, recompute_scheduler_enable=True),
            **CONSUMER,
        },
    ),
    "finegrained-recompute": (
        extra(finegrained_tp_config={"embedding_tensor_parallel_size": 1}),
        {
            **extra(finegrained_tp_config={"embedding_tensor_parallel_size": 1}, recompute_scheduler_enable=True),
            **CONSUMER,
        },
    ),
    "kv-connector": ({"kv-transfer-config": {"kv_role": "kv_producer"}}, PRODUCER),
    "modes": (extra(weight_nz_mode=3), extra(weight_nz_mode=2)),
    "sparse": (
        extra(hamming_sparse={"enabled": True}),
        extra(hamming_sparse={"enabled": False, "sparse_json_location": ""}),
    ),
    "kv-nz": (extra(enable_kv_nz=True), extra(enable_kv_nz=False)),
    "mega-moe": (extra(mega_moe_max_tokens=0), extra(mega_moe_max_tokens=1)),
    "reduce-sample": (extra(enable_reduce_sample=True), extra(enable_reduce_sample=False)),
    "mix-placement": (
        extra(mix_placement=True, multistream_overlap_shared_expert=True),
        extra(mix_placement=True, multistream_overlap_shared_expert=False),
    ),
    "static-kernel": (
        extra(ascend_compilation_config={"enable_static_kernel": True, "enable_npugraph_ex": False}),
        extra(ascend_compilation_config={"enable_static_kernel": True}),
    ),
    "xlite": (extra(xlite_graph_config={"enabled": True}), extra(xlite_graph_config={"enabled": False})),
    "dump": (extra(dump_config={"task": "statistics"}), extra()),
    "pcp-dp": (
        {"prefill-context-parallel-size": 2, "data-parallel-size": 2},
        {"prefill-context-parallel-size": 2, "data-parallel-size": 1},
    ),
    "dcp-divides": (
        {"decode-context-parallel-size": 3, "tensor-parallel-size": 8},
        {"decode-context-parallel-size": 2, "tensor-parallel-size": 8},
    ),
    "dcp": (
        {"decode-context-parallel-size": 2, "tensor-parallel-size": 4},
        {"decode-context-parallel-size": 2, "tensor-parallel-size": 8},
    ),
    "server": (
        {"tensor-parallel-size": 16, "cards": 16, "nodes": 2},
        {"tensor-parallel-size": 8, "data-parallel-size": 2, "cards": 16, "nodes": 2},
    ),
    "kv-heads": (
        {"tensor-parallel-size": 6, "heads": 12},
        {"tensor-parallel-size": 4, "heads": 12},
    ),
    "additional-config": ({**extra(enable_flashcomm1=True), "device": "cuda"}, {"device": "cuda"}),
}  # fmt: skip
