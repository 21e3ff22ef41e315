"""`--hf-overrides` with rope settings that leave out `rope_theta` drops the model's own, and 10000 is used in silence.

It is vLLM's (0.23.0, and still so in 0.32.0), on any platform. Without a card: `python -m ascend.emulator -- python
serve/upstream/rope_theta.py`.
"""

import json
import tempfile
from pathlib import Path

from vllm import EngineArgs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 600000.0, **SIZES}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}

for overrides in ({}, {"rope_scaling": YARN}, {"rope_parameters": YARN}):
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(MODEL))
        arguments = EngineArgs(model=directory, skip_tokenizer_init=True, hf_overrides=overrides)
        rope = arguments.create_model_config().hf_config.rope_parameters
    print(f"--hf-overrides '{json.dumps(overrides)}': rope_theta {rope.get('rope_theta', 'missing')}")

with set_current_vllm_config(VllmConfig()):
    print("get_rope without rope_theta: base", get_rope(128, 8192, True, {"rope_type": "default"}).base)
