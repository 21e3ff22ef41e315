"""The plugin's experts' block on vllm-ascend: routed in fp32 to the end, bias and logits."""

from __future__ import annotations

from pathlib import Path

import torch

from convert.demo import write_demo
from tests.launcher import free_port


def test_bias_and_logits_stay_in_fp32(tmp_path: Path) -> None:
    """vllm-ascend rounds the bias to the model's dtype as it makes its experts; the plugin's block takes that back."""
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm_ascend.distributed.parallel_state import init_ascend_model_parallel
    from vllm_ascend.utils import register_ascend_customop

    from serve.plugin.register import register

    register()
    write_demo(tmp_path / "model", "tiny-npu")
    config = EngineArgs(model=str(tmp_path / "model"), dtype="bfloat16").create_engine_config()
    seen = []
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "hccl")
        ensure_model_parallel_initialized(1, 1)
        init_ascend_model_parallel(config.parallel_config)
        register_ascend_customop(config)
        from serve.plugin.model import BailingMoE  # vLLM's ops are replaced before they are imported

        parts = (config.model_config.hf_config.intermediate_size, config.model_config.hf_config, None, True)
        vllms_own = BailingMoE.__mro__[1]
        rounded = vllms_own(*parts, prefix="model.layers.1.mlp")
        assert rounded.experts.e_score_correction_bias.dtype == torch.bfloat16
        block = BailingMoE(*parts, prefix="model.layers.2.mlp")
    assert block.experts.e_score_correction_bias is block.gate.expert_bias
    assert block.gate.expert_bias.dtype == torch.float32
    block.experts.forward = lambda hidden_states, router_logits: seen.append(router_logits.dtype) or hidden_states
    block(torch.zeros(3, config.model_config.hf_config.hidden_size, dtype=torch.bfloat16))
    assert seen == [torch.float32]
