"""vllm-ascend rounds the router's expert bias, kept in fp32 by the checkpoint, to the model's dtype.

Builds one `AscendFusedMoE` as the models with sigmoid routing and a bias do (BailingMoeV2 here: 256 experts, 8 chosen
of 4 of 8 groups), looks at the bias, and counts how many tokens choose other experts for it. One NPU, or none: then
`python -m ascend.emulator -- python serve/upstream/expert_bias.py`.
"""

import json
import tempfile
from pathlib import Path

import torch
from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.layers.fused_moe import FusedMoE
from vllm.utils.network_utils import get_open_port
from vllm_ascend.distributed.parallel_state import init_ascend_model_parallel
from vllm_ascend.utils import register_ascend_customop

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", **SIZES}

with tempfile.TemporaryDirectory() as directory:
    (Path(directory) / "config.json").write_text(json.dumps(MODEL))
    config = EngineArgs(model=directory, skip_tokenizer_init=True).create_engine_config()
torch.manual_seed(0)
stored = torch.nn.Parameter(0.01 * torch.randn(256), requires_grad=False)
kept = stored.data.clone()
with set_current_vllm_config(config):
    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "hccl")
    ensure_model_parallel_initialized(1, 1)
    init_ascend_model_parallel(config.parallel_config)
    register_ascend_customop(config)
    layer = FusedMoE(
        num_experts=256,
        top_k=8,
        hidden_size=256,
        intermediate_size=64,
        renormalize=True,
        use_grouped_topk=True,
        num_expert_group=8,
        topk_group=4,
        scoring_func="sigmoid",
        e_score_correction_bias=stored,
        params_dtype=torch.bfloat16,
        prefix="model.layers.1.mlp.experts",
    )
bias = layer.e_score_correction_bias.data.cpu()


def chosen(scores_TE: torch.Tensor, bias_E: torch.Tensor) -> torch.Tensor:
    """Experts of each token ``[T, 8]``, sorted: the 8 best of the 4 of 8 groups whose two best are the best."""
    grouped_TGE = (scores_TE + bias_E.float()).unflatten(1, (8, 32))
    kept_T4 = grouped_TGE.topk(2).values.sum(-1).topk(4).indices
    open_TG = torch.zeros(len(scores_TE), 8, dtype=torch.bool).scatter(1, kept_T4, True)
    masked_TE = grouped_TGE.masked_fill(~open_TG[..., None], float("-inf")).flatten(1)
    return masked_TE.topk(8).indices.sort().values


scores = torch.randn(20_000, 256).sigmoid()
others = (chosen(scores, bias) != chosen(scores, kept)).any(1).sum().item()
print(f"stored in {kept.dtype}, {type(layer).__name__} has it in {bias.dtype}")
print(f"it is off by up to {(bias.float() - kept).abs().max():.1e}")
print(f"of {len(scores)} random tokens {others} choose other experts for it")
