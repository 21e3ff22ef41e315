"""ModelSlim's loader has no mapping of modules for `bailing_moe` (Ling, Ring): a standard description is a KeyError.

What the loader asks for the first MoE layer of such a model, with a description that names every tensor of it. Without
a card: `python -m ascend.emulator -- python serve/upstream/modelslim_experts.py`.
"""

from vllm_ascend.quantization.modelslim_config import get_linear_quant_type, get_packed_modules_mapping

EXPERTS = "model.layers.1.mlp.experts"
PARTS = ("gate_proj", "up_proj", "down_proj")
DESCRIPTION = {f"{EXPERTS}.{expert}.{part}.weight": "W8A8_DYNAMIC" for expert in range(256) for part in PARTS}

for model_type in ("bailing_moe", "bailing_moe_v2", "bailing_hybrid"):
    mapping = get_packed_modules_mapping(model_type)
    try:
        print(f"{model_type}: {get_linear_quant_type(DESCRIPTION, EXPERTS, mapping)}")
    except KeyError as error:
        print(f"{model_type}: mapping {mapping}, KeyError {error}")
