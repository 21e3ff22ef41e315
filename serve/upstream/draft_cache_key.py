"""vLLM 0.23 keeps compiled code under a key that knows nothing of an EAGLE3 head's shape or of the layers it taps.

Makes the engine's configuration for heads of one model and compares the keys; no weights are read. Without a card:
`python -m ascend.emulator -- python serve/upstream/draft_cache_key.py`.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from vllm import EngineArgs

os.environ["VLLM_PLUGINS"] = "ascend"  # the platform's: this toolkit's own completes the key

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 2}
MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", **SIZES}
HEAD = {**MODEL, "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": 32000}
OTHERS: dict[str, dict[str, Any]] = {
    "twice as wide": {"intermediate_size": 1024},
    "other layers, named in eagle_config": {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}},
    "other layers, named at the top": {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]},
}


def key(home: Path, number: int, head: dict[str, Any]) -> str:
    """What vLLM keeps the code of model and head under."""
    for path, config in ((home / "model", MODEL), (home / f"head{number}", head)):
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
    drafts = {"method": "eagle3", "model": str(home / f"head{number}"), "num_speculative_tokens": 2}
    args = EngineArgs(model=str(home / "model"), skip_tokenizer_init=True, speculative_config=drafts)
    return args.create_engine_config().compute_hash()


with tempfile.TemporaryDirectory() as directory:
    first = key(Path(directory), 0, HEAD)
    for number, (name, change) in enumerate(OTHERS.items(), 1):
        same = key(Path(directory), number, HEAD | change) == first
        print(f"{name}: {'the key of the first head' if same else 'a key of its own'}")
