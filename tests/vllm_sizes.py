"""Run by `test_plan_vllm.py` in a process of its own: what the real vLLM holds of a checkpoint, and how it counts KV.

`python -m tests.vllm_sizes ASKED.json OUT.json`: OUT gets under "engines", for each ``[DIR, DTYPE, TP]`` asked for, the
blocks of its KV cache, their tokens, and the bytes of weights; under "pages" what vLLM's own code counts for the real
model's shape; under "ropes", for each ``[DIR, OVERRIDES, LENGTH]``, the rotary settings and the length it makes of it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # sends the function below to the workers
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
HEADS, HEAD_DIM, LAYERS = 4, 128, 32  # of Ling-flash
LOADED: list[int] = []


def main() -> None:
    from serve.plugin import model as vllm_model

    asked = json.loads(Path(sys.argv[1]).read_text())
    load_weights = vllm_model.BailingMoeV2ForCausalLM.load_weights

    def counted(self: object, weights: object) -> set:
        names = load_weights(self, weights)
        LOADED.append(nbytes(self))
        return names

    vllm_model.BailingMoeV2ForCausalLM.load_weights = counted  # in this process: with one worker alone
    result = {
        "pages": pages(),
        "ropes": [rope(*one) for one in asked["ropes"]],
        "engines": [sizes(*one) for one in asked["engines"]],
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


def sizes(directory: str, dtype: str, tensor: int) -> dict:
    from vllm import LLM

    llm = LLM(
        directory,
        dtype=dtype,
        tensor_parallel_size=tensor,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        gpu_memory_utilization=0.3,
        trust_remote_code=False,
    )
    cache = llm.llm_engine.vllm_config.cache_config
    found = {
        "dtype": dtype,
        "tensor": tensor,
        "blocks": cache.num_gpu_blocks,
        "block": cache.block_size,
        "loaded": LOADED[-1] if tensor == 1 else None,
        "kept": llm.apply_model(nbytes),
    }
    del llm
    gc.collect()
    return found


def nbytes(model: object) -> int:
    """Of all parameters: as loaded, or once the CPU engine has packed its linear layers, of all others."""
    return sum(one.numel() * one.element_size() for one in model.parameters())  # type: ignore[attr-defined]


def rope(directory: str, overrides: dict, length: int) -> list:
    from vllm.engine.arg_utils import EngineArgs

    from serve.plugin.register import register

    register()
    arguments = EngineArgs(directory, hf_overrides=overrides, max_model_len=length, skip_tokenizer_init=True)
    config = arguments.create_model_config()
    return [config.hf_config.rope_parameters, config.max_model_len]


def pages() -> list[dict]:
    """By vLLM's own code: the blocks that some memory holds, for the real model divided over cards."""
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    config, found = VllmConfig(), []
    config.cache_config.kv_cache_layout = "LBNHC"
    for tensor in (1, 2, 4, 8, 16):
        for block, dtype in ((16, torch.bfloat16), (128, torch.bfloat16), (16, torch.float8_e4m3fn)):
            heads = max(1, HEADS // tensor)  # vllm/config/model.py, get_num_kv_heads
            spec = FullAttentionSpec(block_size=block, num_kv_heads=heads, head_size=HEAD_DIM, dtype=dtype)
            groups = get_kv_cache_groups(config, {f"layers.{layer}": spec for layer in range(LAYERS)})
            memory = 20 * 2**30 + 12345
            blocks = get_kv_cache_config_from_groups(config, groups, memory).num_blocks
            row = {"tensor": tensor, "block": block, "bytes": dtype.itemsize, "page": spec.page_size_bytes}
            found.append(row | {"memory": memory, "blocks": blocks})
    return found


if __name__ == "__main__":
    main()
