"""What flags must not be combined, in one table: refused by the engine minutes later, or by nobody and still wrong.

Sources are files and lines of vllm-ascend at v0.23.0 (below `vllm_ascend/`) unless they say vLLM, which is 0.23.0.
"nobody" before a source: the engine takes it, and what was asked for does not happen, or goes wrong later, which may be
in its workers. The real engine is asked whether it is so: tests/npu_serve/test_configuration.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ascend.errors import UserError
from ascend.model_shape import ModelShape
from serve.engine_flags.additional_config import check_additional_config

_TND_TOKENS = 16  # attention/attention_v1.py:251
_BLOCK = 128  # tokens; utils.py:1369
_MOST_LOGPROBS = 1000
_GRAPH_MODES = ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
_NO_FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc")
_EPLB_NUMBERS = ("expert_heat_collection_interval", "algorithm_execution_interval", "num_redundant_experts")
_EPLB_STAGES = ("all", "prefill", "decode")
# Flags that vLLM-Ascend sets back with a line in the log; those that it has something else for are left out.
_SET_BACK = (
    "calculate-kv-scales", "enable-dbo", "enable-layerwise-nvtx-tracing",
    "max-num-partial-prefills", "numa-bind-cpus", "numa-bind-nodes", "ray-workers-use-nsight", "ubatch-size",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A configuration: ``settings`` by flag names without dashes, JSON as objects; ``cards`` over all ``nodes``."""

    settings: Mapping[str, Any]
    device: str
    cards: int
    nodes: int = 1
    shape: ModelShape | None = None
    environment: Mapping[str, str] | None = None

    def size(self, kind: str) -> int:
        """Return tensor-, data- or pipeline-parallel-size."""
        return int(self.settings.get(f"{kind}-parallel-size") or 1)

    def on(self, name: str) -> bool:
        """Tell whether a flag is set and true."""
        return bool(self.settings.get(name))

    def inside(self, path: str, default: Any = None) -> Any:
        """Return a value inside JSON: "flag.key.key"."""
        value: Any = self.settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return default if value is None else value

    def extra(self, path: str, default: Any = None) -> Any:
        """Return a value inside `--additional-config`."""
        return self.inside(f"additional-config.{path}", default)

    @property
    def graphs(self) -> bool:
        """Whether graphs are captured."""
        mode = str(self.inside("compilation-config.cudagraph_mode", "FULL_AND_PIECEWISE")).upper()
        return not self.on("enforce-eager") and mode != "NONE"

    @property
    def rope(self) -> Mapping[str, Any]:
        """The rope settings of `--hf-overrides`, empty if there are none."""
        for key in ("rope_parameters", "rope_scaling"):
            value = self.inside(f"hf-overrides.{key}")
            if isinstance(value, Mapping):
                return value
        return {}

    @property
    def role(self) -> str | None:
        """This engine's part where prefill and decode are on different servers."""
        return self.inside("kv-transfer-config.kv_role")


class Rule(NamedTuple):
    """``wrong`` tells whether it is broken, ``message`` what is wrong and the remedy, ``source`` who says so."""

    name: str
    wrong: Callable[[Asked], Any]
    message: str
    source: str
    devices: tuple[str, ...] = ("npu",)


_ALL = ("npu", "cuda", "cpu")
_DRAFTING = ("", "ngram", "ngram_gpu", "suffix", "draft_model", "mtp", "eagle3")


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) else 0


def _heads(a: Asked) -> bool:
    return a.shape is not None and a.shape.num_attention_heads % a.size("tensor") != 0


def _kv_heads(a: Asked) -> bool:
    if a.shape is None:
        return False
    heads, ranks = a.shape.num_key_value_heads, a.size("tensor")
    return heads % ranks != 0 if ranks <= heads else ranks % heads != 0


def _flashcomm_sizes(a: Asked) -> bool:
    sizes = a.inside("compilation-config.cudagraph_capture_sizes")
    ranks = a.size("tensor")
    return bool(a.extra("enable_flashcomm1") and a.graphs and sizes and all(size % ranks for size in sizes))


def _flashcomm2(a: Asked) -> bool:
    size = a.extra("enable_flashcomm2_parallel_size", 0)
    return size > 0 and (size >= a.size("tensor") or a.size("tensor") % size != 0)


def _finegrained(a: Asked) -> bool:
    return any(size > 0 and a.size("data") % size for size in a.extra("finegrained_tp_config", {}).values())


def _eplb_switch(a: Asked) -> bool:
    wanted = a.extra("eplb_config.dynamic_eplb") or a.extra("eplb_config.expert_map_record_path")
    given = a.environment or {}
    switch = given.get("DYNAMIC_EPLB", "").lower() in ("true", "1") or given.get("EXPERT_MAP_RECORD") == "true"
    return bool(wanted) and not switch


def _eplb_files(a: Asked) -> bool:
    used, written = (a.extra(f"eplb_config.expert_map_{name}") for name in ("path", "record_path"))
    is_named = all(str(file).endswith(".json") for file in (used, written) if file is not None)
    return not is_named or (used is not None and not Path(str(used)).is_file())


def _sparse(a: Asked) -> bool:
    given = a.extra("hamming_sparse", {"enabled": False, "sparse_json_location": ""})
    if not given.keys() >= {"enabled", "sparse_json_location"}:
        return True
    return bool(given["enabled"]) and not Path(str(given["sparse_json_location"])).is_file()


def _decode_parts(a: Asked) -> bool:
    parts = (f"finegrained_tp_config.{name}_tensor_parallel_size" for name in ("oproj", "olora"))
    return a.role != "kv_consumer" and any(a.extra(part, 0) > 0 for part in parts)


def _part_rope(a: Asked) -> bool:
    if not a.rope:
        return False
    wanted = {"rope_type"}
    if a.rope.get("rope_type") == "yarn":
        wanted |= {"factor", "original_max_position_embeddings"}
    return not a.rope.keys() >= wanted


def _method(a: Asked) -> str:
    return str(a.inside("speculative-config.method", ""))


def _steps(a: Asked) -> bool:
    tokens, sequences = a.settings.get("max-num-batched-tokens"), a.settings.get("max-num-seqs")
    return tokens is not None and sequences is not None and tokens < sequences


def _unchunked(a: Asked) -> bool:
    tokens, length = a.settings.get("max-num-batched-tokens"), a.settings.get("max-model-len")
    if tokens is None or length is None:
        return False
    return a.settings.get("enable-chunked-prefill") is False and tokens < length


def _capture_sizes(a: Asked) -> list[int]:
    sizes = a.inside("compilation-config.cudagraph_capture_sizes")
    return sizes if isinstance(sizes, list) and all(type(size) is int for size in sizes) else []


def _no_sizes(a: Asked) -> bool:
    return a.graphs and a.inside("compilation-config.cudagraph_capture_sizes") == []


def _largest_graph(a: Asked) -> bool:
    asked = a.settings.get("max-cudagraph-capture-size", a.inside("compilation-config.max_cudagraph_capture_size"))
    sizes = _capture_sizes(a)
    return asked is not None and bool(sizes) and asked != max(sizes)


RULES = (
    Rule("heads", _heads, "--tensor-parallel-size does not divide the model's attention heads: take a power of two",
         "vLLM config/model.py verify_with_parallel_config", _ALL),
    Rule("kv-heads", _kv_heads, "--tensor-parallel-size and the model's key-value heads do not divide one another: "
         "take a power of two", "nobody; vLLM model_executor/models/bailing_moe.py, BailingAttention", _ALL),
    Rule("cards", lambda a: a.device != "cpu" and a.size("tensor") * a.size("data") * a.size("pipeline") > a.cards,
         "tensor, data and pipeline parallel sizes need more cards than there are: make their product smaller, or give "
         "more with --cards", "nobody; worker/worker.py:490", ("npu", "cuda")),
    Rule("server", lambda a: a.size("tensor") * a.nodes > a.cards,
         "--tensor-parallel-size is more than the cards of one server, and its exchange would leave it at every layer: "
         "divide by --data-parallel-size between servers", "nobody; worker/worker.py:490", ("npu", "cuda")),
    Rule("batch", _steps, "--max-num-batched-tokens is less than --max-num-seqs: each sequence needs a token a step",
         "vLLM config/scheduler.py verify_max_model_len", _ALL),
    Rule("unchunked", _unchunked, "without chunked prefill --max-num-batched-tokens must hold --max-model-len: leave "
         "--no-enable-chunked-prefill out", "vLLM config/scheduler.py verify_max_model_len", _ALL),
    Rule("graph-mode", lambda a: str(a.inside("compilation-config.cudagraph_mode", "NONE")).upper() not in _GRAPH_MODES,
         f"--compilation-config: cudagraph_mode is one of {', '.join(_GRAPH_MODES)}",
         "vLLM config/compilation.py, CUDAGraphMode", _ALL),
    Rule("no-sizes", _no_sizes, "--compilation-config: cudagraph_capture_sizes is empty: leave it out, or add "
         "--enforce-eager", "vLLM config/vllm.py:1691"),
    Rule("sizes-twice", lambda a: a.on("cudagraph-capture-sizes") and _capture_sizes(a), "--cudagraph-capture-sizes: "
         "--compilation-config has sizes, too, the plan's if not yours: give yours in it, with cudagraph_mode",
         "vLLM engine/arg_utils.py", _ALL),
    Rule("largest-graph", _largest_graph, "--max-cudagraph-capture-size must be the largest of cudagraph_capture_sizes "
         "in --compilation-config, the plan's if there are none of yours: leave it out", "vLLM config/vllm.py", _ALL),
    Rule("random-weights", lambda a: a.settings.get("load-format") == "dummy", "--load-format dummy: the weights would "
         "be random, and so would what is told of patients: leave it out", "nobody", _ALL),
    Rule("unchecked-weights", lambda a: a.settings.get("load-format") in ("pt", "npcache", "tensorizer"),
         "--load-format: what was checked are safetensors, and this reads other files: leave it out",
         "nobody; serve/preflight.py", _ALL),
    Rule("logprobs", lambda a: not 0 <= _number(a.settings.get("max-logprobs")) <= _MOST_LOGPROBS,
         f"--max-logprobs: one request could ask for the whole vocabulary at every token, and hold up the others: take "
         f"0 to {_MOST_LOGPROBS}", "nobody; vLLM config/model.py: -1 is no limit", _ALL),
    Rule("executor", lambda a: a.settings.get("distributed-executor-backend") not in (None, "mp", "uni"),
         "--distributed-executor-backend: only processes of this machine (mp) are watched and ended together: leave it "
         "out; --nodes is for several servers", "nobody", _ALL),
    Rule("sleep", lambda a: a.on("enable-sleep-mode"), "--enable-sleep-mode: what puts it to sleep is open to every "
         "client, and so is turned off here: leave it out", "nobody; vLLM 0.32 launchers/api_server/routers.py", _ALL),
    Rule("lora", lambda a: a.on("enable-lora"), "--enable-lora: the plan has no memory for adapters, and nothing "
         "vouches for them: merge one into the weights, and convert those", "nobody", _ALL),
    Rule("rope-theta", lambda a: a.rope and "rope_theta" not in a.rope, "--hf-overrides: rope settings without "
         "'rope_theta' rotate with 10000 instead of the model's: copy it from config.json into them",
         "nobody; vLLM rotary_embedding/__init__.py:64", _ALL),
    Rule("yarn-truncate", lambda a: a.rope.get("rope_type", a.rope.get("type")) == "yarn"
         and not a.rope.get("truncate"),
         "--hf-overrides: YaRN without '\"truncate\": true' gives other positions than the model's beyond its original "
         "length: add it", "nobody; ops/rotary_embedding.py:269"),
    Rule("rope-part", _part_rope, "--hf-overrides: rope settings need 'rope_type', and YaRN 'factor' and "
         "'original_max_position_embeddings', too: add them", "vLLM config/model.py:2178, 2186"),
    Rule("speculative", lambda a: _method(a) not in _DRAFTING,
         "--speculative-config: that method is not for this architecture: take --speculative mtp, eagle3:DIR or ngram",
         "vLLM config/speculative.py; model_runner_v1.py:3756", _ALL),
    Rule("draft-count", lambda a: a.on("speculative-config")
         and a.inside("speculative-config.num_speculative_tokens") is None,
         "--speculative-config: num_speculative_tokens is missing: give it", "vLLM config/speculative.py"),
    Rule("draft-model", lambda a: a.on("speculative-config") and _method(a) in ("", "draft_model")
         and not a.inside("speculative-config.model"),
         "--speculative-config: this method needs 'model', the draft's directory", "vLLM config/speculative.py:587"),
    Rule("drafts", lambda a: _number(a.inside("speculative-config.num_speculative_tokens")) >= _TND_TOKENS,
         "--speculative-config: num_speculative_tokens is at most 15 here", "nobody; attention/attention_v1.py:251"),
    Rule("additional-config", lambda a: a.on("additional-config"),
         "--additional-config is vLLM-Ascend's, and this device's engine ignores it: leave it out",
         "nobody; vLLM config/vllm.py", ("cuda", "cpu")),
    Rule("float32", lambda a: a.settings.get("dtype") in ("float32", "float"),
         "--dtype float32: a 910B's matrix units do not compute in it: take bfloat16", "nobody; platform.py"),
    Rule("fp8-cache", lambda a: a.settings.get("kv-cache-dtype") in _NO_FP8,
         "--kv-cache-dtype fp8: a 910B has no FP8: take auto", "nobody; platform.py"),
    Rule("quantization", lambda a: a.settings.get("quantization") not in (None, "ascend", "compressed-tensors"),
         "--quantization: not a format of a 910B: `python -m convert w8a8` writes one, found without the flag",
         "vLLM platforms/interface.py"),
    Rule("block-size", lambda a: a.settings.get("block-size") not in (None, _BLOCK),
         "--block-size: vLLM-Ascend changes it to 128 in silence: leave it out", "nobody; utils.py:1369"),
    Rule("set-back", lambda a: any(a.settings.get(flag) not in (None, False) for flag in _SET_BACK),
         f"--{', --'.join(_SET_BACK)}: vLLM-Ascend sets each of them back: leave it out", "nobody; platform.py:1056"),
    Rule("eplb-flag", lambda a: a.on("enable-eplb"), "--enable-eplb is for CUDA: use "
         "--additional-config '{\"eplb_config\": …}'", "vLLM config/parallel.py"),
    Rule("eplb-switch", _eplb_switch, "--additional-config: eplb_config needs DYNAMIC_EPLB=true in the environment",
         "ascend_config.py:888"),
    Rule("eplb-policy", lambda a: a.extra("eplb_config.eplb_policy_type", 2) not in range(4),
         "--additional-config: eplb_policy_type is 0, 1, 2 or 3", "ascend_config.py:884"),
    Rule("eplb-map", _eplb_files, "--additional-config: expert_map_path and expert_map_record_path must be names that "
         "end in .json, and the first of a file that is there", "ascend_config.py:869, 871"),
    Rule("eplb-numbers", lambda a: any(_number(a.extra(f"eplb_config.{key}")) < 0 for key in _EPLB_NUMBERS),
         f"--additional-config: {', '.join(_EPLB_NUMBERS)} of eplb_config must not be below 0", "ascend_config.py:882"),
    Rule("eplb-stage", lambda a: a.extra("eplb_config.eplb_heat_collection_stage", "all") not in _EPLB_STAGES,
         f"--additional-config: eplb_heat_collection_stage is one of {', '.join(_EPLB_STAGES)}",
         "ascend_config.py:891"),
    Rule("blocking-graphs", lambda a: a.graphs and (a.environment or {}).get("ASCEND_LAUNCH_BLOCKING") == "1",
         "ASCEND_LAUNCH_BLOCKING=1 does not go with graphs: unset it, or add --enforce-eager to look for an error",
         "platform.py:651"),
    Rule("flashcomm1-tp", lambda a: a.extra("enable_flashcomm1") and a.size("tensor") == 1,
         "--additional-config: enable_flashcomm1 needs --tensor-parallel-size above 1", "platform.py:764"),
    Rule("flashcomm1-ep", lambda a: a.extra("enable_flashcomm1") and not a.on("enable-expert-parallel"),
         "--additional-config: enable_flashcomm1 needs --expert-parallel for this model", "platform.py:768"),
    Rule("flashcomm1-sizes", _flashcomm_sizes, "--compilation-config: with enable_flashcomm1 some of "
         "cudagraph_capture_sizes must be multiples of --tensor-parallel-size", "platform.py:557"),
    Rule("flashcomm2", _flashcomm2, "--additional-config: enable_flashcomm2_parallel_size must be less than "
         "--tensor-parallel-size and divide it; it does nothing for this model: leave it out", "utils.py:1327"),
    Rule("shared-dp", lambda a: a.extra("enable_shared_expert_dp")
         and not (a.on("enable-expert-parallel") and a.size("tensor") > 1), "--additional-config: "
         "enable_shared_expert_dp does nothing without --expert-parallel and --tensor-parallel-size above 1",
         "nobody; ascend_config.py:112"),
    Rule("layer-sharding", lambda a: a.extra("layer_sharding") and a.role != "kv_producer", "--additional-config: "
         "layer_sharding is for prefill servers of a divided service alone: leave it out", "platform.py:346"),
    Rule("recompute", lambda a: a.extra("recompute_scheduler_enable") and a.role not in ("kv_consumer", "kv_producer"),
         "--additional-config: recompute_scheduler_enable is for decode servers of a divided service: leave it out",
         "platform.py:702"),
    Rule("balance", lambda a: a.extra("enable_balance_scheduling") and a.role not in (None, "kv_both"),
         "--additional-config: enable_balance_scheduling is not for a divided service: leave it out",
         "platform.py:681"),
    Rule("hierarchy", lambda a: a.extra("enable_mc2_hierarchy_comm") and a.extra("enable_fused_mc2"),
         "--additional-config: enable_fused_mc2 does not go with enable_mc2_hierarchy_comm: take one",
         "platform.py:793"),
    Rule("chunk-pp", lambda a: a.extra("profiling_chunk_config.enabled") and a.size("pipeline") == 1,
         "--additional-config: profiling_chunk_config needs --pipeline-parallel-size above 1", "ascend_config.py:70"),
    Rule("chunk-balance", lambda a: a.extra("profiling_chunk_config.enabled") and a.extra("enable_balance_scheduling"),
         "--additional-config: profiling_chunk_config does not go with enable_balance_scheduling",
         "ascend_config.py:91"),
    Rule("finegrained", _finegrained, "--additional-config: sizes of finegrained_tp_config must divide "
         "--data-parallel-size", "ascend_config.py:593"),
    Rule("finegrained-decode", _decode_parts, "--additional-config: oproj and olora of finegrained_tp_config need "
         "kv_role kv_consumer in --kv-transfer-config: leave them out", "ascend_config.py:558"),
    Rule("finegrained-oproj", lambda a: a.extra("finegrained_tp_config.oproj_tensor_parallel_size", 0) > 0
         and (a.size("tensor") > 1 or a.on("enforce-eager")), "--additional-config: oproj of finegrained_tp_config "
         "needs graphs and --tensor-parallel-size 1", "ascend_config.py:546"),
    Rule("finegrained-recompute", lambda a: not a.extra("recompute_scheduler_enable")
         and (a.extra("finegrained_tp_config.oproj_tensor_parallel_size", 0) > 0
              or a.extra("finegrained_tp_config.embedding_tensor_parallel_size", 0) > 0), "--additional-config: oproj "
         "and embedding of finegrained_tp_config are for decode servers of a divided service: leave them out",
         "ascend_config.py:156"),
    Rule("kv-connector", lambda a: a.role and not a.inside("kv-transfer-config.kv_connector"), "--kv-transfer-config: "
         "kv_role without kv_connector: name what carries the cache",
         "vLLM distributed/kv_transfer/kv_connector/factory.py"),
    Rule("modes", lambda a: any(a.extra(mode, 0) not in range(3) for mode in ("weight_nz_mode", "enable_fused_mc2")),
         "--additional-config: weight_nz_mode and enable_fused_mc2 are 0, 1 or 2", "nobody; ascend_config.py"),
    Rule("sparse", _sparse, "--additional-config: hamming_sparse needs 'enabled' and 'sparse_json_location', the name "
         "of a file that is there", "ascend_config.py:346"),
    Rule("kv-nz", lambda a: a.extra("enable_kv_nz"), "--additional-config: enable_kv_nz is for models with latent "
         "attention (MLA), which this is not: leave it out", "ascend_config.py:274"),
    Rule("mega-moe", lambda a: a.extra("mega_moe_max_tokens", 1) <= 0,
         "--additional-config: mega_moe_max_tokens must be above 0", "ascend_config.py:313"),
    Rule("reduce-sample", lambda a: a.extra("enable_reduce_sample"), "--additional-config: enable_reduce_sample "
         "returns wrong logprobs, which the canary compares: leave it out", "nobody; additional_config.md"),
    Rule("mix-placement", lambda a: a.extra("mix_placement")
         and (a.extra("enable_shared_expert_dp") or a.extra("multistream_overlap_shared_expert")),
         "--additional-config: mix_placement does not go with enable_shared_expert_dp nor "
         "multistream_overlap_shared_expert",
         "ascend_config.py:396"),
    Rule("static-kernel", lambda a: a.extra("ascend_compilation_config.enable_static_kernel")
         and not a.extra("ascend_compilation_config.enable_npugraph_ex", True), "--additional-config: "
         "enable_static_kernel needs enable_npugraph_ex", "ascend_config.py:659"),
    Rule("xlite", lambda a: a.extra("xlite_graph_config.enabled"), "--additional-config: xlite_graph_config is for "
         "dense Llama and Qwen models, which this is not: leave it out", "nobody; ascend_config.py:690 knows no model"),
    Rule("dump", lambda a: a.extra("dump_config") or a.extra("dump_config_path"), "--additional-config: dump_config "
         "writes what is computed from patients' data to disk: leave it out", "nobody; ascend_config.py, dump_config"),
    Rule("pcp-dp", lambda a: a.size("data") > 1 and a.on("prefill-context-parallel-size")
         and a.settings["prefill-context-parallel-size"] > 1,
         "--prefill-context-parallel-size does not go with --data-parallel-size: take one", "platform.py:352"),
    Rule("dcp-divides", lambda a: a.size("tensor") % int(a.settings.get("decode-context-parallel-size") or 1),
         "--decode-context-parallel-size must divide --tensor-parallel-size", "vLLM config/parallel.py:488", _ALL),
    Rule("dcp", lambda a: a.shape is not None and (a.settings.get("decode-context-parallel-size") or 1) > 1
         and a.size("tensor") <= a.shape.num_key_value_heads, "--decode-context-parallel-size needs "
         "--tensor-parallel-size above the model's key-value heads", "vLLM config/model.py", _ALL),
)  # fmt: skip


def check_combination(
    settings: Mapping[str, Any],
    device: str,
    cards: int,
    shape: ModelShape | None = None,
    nodes: int = 1,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Raise `UserError` for settings that do not go together, or not with this device.

    Args:
        settings: of the engine by flag names without dashes, as `read_flags` and `Plan.settings` have them.
        device: "npu", "cuda" or "cpu". cards: over all ``nodes``; on the CPU any number.
        shape: of the model. environment: of the engine.
    """
    additional = settings.get("additional-config") or {}
    if not isinstance(additional, Mapping):  # the parser takes any text, and the engine fails of it later
        raise UserError(f"--additional-config '{additional}' is not a JSON object such as {{\"weight_nz_mode\": 1}}")
    if device == "npu":
        check_additional_config(additional)
    asked = Asked(settings, device, cards, nodes, shape, environment)
    for rule in RULES:
        if device in rule.devices and rule.wrong(asked):
            raise UserError(rule.message)
