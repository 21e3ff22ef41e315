"""vllm-ascend's W4A16 ignores the group size of a compressed-tensors checkpoint and takes 32.

It looks for `group_size` at the top level of `quantization_config`, where the format has none: it is in the weights of
each of `config_groups`. Without a card: `python -m ascend.emulator -- python serve/upstream/w4a16_group.py`.
"""

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm_ascend.ascend_config import init_ascend_config
from vllm_ascend.quantization.compressed_tensors_config import AscendCompressedTensorsConfig
from vllm_ascend.quantization.methods.w4a16 import AscendW4A16FusedMoEMethod

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}
WRITTEN = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
}
INPUTS, OUTPUTS = 4096, 1024

for described in (WRITTEN, {**WRITTEN, "group_size": 128}):
    config = VllmConfig()
    config.quant_config = AscendCompressedTensorsConfig.from_config(described)
    init_ascend_config(config)
    with set_current_vllm_config(config):
        method = AscendW4A16FusedMoEMethod()
    place = method.get_dynamic_quant_param(8, OUTPUTS, INPUTS, torch.bfloat16)["w13_weight_scale"]
    top = "128" if "group_size" in described else "none"
    print(f"groups of {WEIGHTS['group_size']}, at the top level {top}: taken are {method.group_size};", end=" ")
    print(f"scales of two projections are {[2 * OUTPUTS, INPUTS // 128]}, their place is {list(place.shape[1:])}")
