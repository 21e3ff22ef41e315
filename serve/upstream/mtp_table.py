"""vllm-ascend replaces vLLM's table of MTP models by a copy of its own, which has fallen behind and has a fault.

Asks both copies of `hf_config_override` for the draft of each kind of model. Without a card: `python -m
ascend.emulator -- python serve/upstream/mtp_table.py`.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

from vllm.config.speculative import SpeculativeConfig
from vllm.transformers_utils.config import PretrainedConfig

vllm_own = SpeculativeConfig.__dict__["hf_config_override"].__func__

ascend_own = importlib.import_module("vllm_ascend.patch.platform.patch_speculative_config").hf_config_override

print("hf_config_override is", SpeculativeConfig.hf_config_override.__module__)


def names(function: Callable[[Any], Any]) -> set[str]:
    """Architectures of drafts that a copy knows."""
    return set(re.findall(r'"architectures": \[\s*"(\w+)"', inspect.getsource(function)))


print("drafts that only vLLM knows:", *sorted(names(vllm_own) - names(ascend_own)))

for name, function in (("vLLM", vllm_own), ("vllm-ascend", ascend_own)):
    config = PretrainedConfig(architectures=["DeepSeekMTPModel"], num_nextn_predict_layers=1)
    config.model_type = "deepseek_mtp"
    try:
        print(f"{name}, a draft that says deepseek_mtp itself: {function(config).architectures}")
    except UnboundLocalError as error:
        print(f"{name}, a draft that says deepseek_mtp itself: UnboundLocalError: {error}")
