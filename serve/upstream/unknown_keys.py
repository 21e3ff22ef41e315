"""Keys of `--additional-config` that vllm-ascend does not read are ignored without a word, misspelt ones too.

Makes the engine's configuration with each; no weights are read. Without a card: `python -m ascend.emulator -- python
serve/upstream/unknown_keys.py`.
"""

import json
import tempfile
from pathlib import Path

from vllm import EngineArgs
from vllm_ascend.ascend_config import clear_ascend_config, get_ascend_config

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
ASKED = (
    {"enable_flashcom1": True},  # misspelt
    {"flashcomm2_parallel_size": 2},  # as docs/source/user_guide/configuration/additional_config.md spells it
    {"enable_weight_nz_layout": True},  # of an older version, seen in issue 16600
    {"torchair_graph_config": {"enabled": True}},  # of an older version
    {"ascend_scheduler_config": {"enabled": True}},  # of an older version
    {"eplb_config": {"dynamic_eplbb": True}},  # here, and here alone, it is told
    {"enable_prefill_mc2": "false"},  # a known key: a text that is not empty is true
)

with tempfile.TemporaryDirectory() as directory:
    (Path(directory) / "config.json").write_text(json.dumps(MODEL))
    for asked in ASKED:
        clear_ascend_config()
        try:
            EngineArgs(model=directory, skip_tokenizer_init=True, additional_config=dict(asked)).create_engine_config()
        except ValueError as error:
            print(json.dumps(asked), "is refused:", error.errors()[0]["msg"])
        else:
            known = {key: getattr(get_ascend_config(), key) for key in asked if key == "enable_prefill_mc2"}
            print(json.dumps(asked), "is taken", *(f"as {value}" for value in known.values()))
