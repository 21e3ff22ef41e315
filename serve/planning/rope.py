"""The rotary settings an engine must be told: vLLM-Ascend's YaRN rounds otherwise unless it is told not to.

The key is ``rope_parameters``. vLLM sets a dictionary of ``--hf-overrides`` as an attribute of the loaded configuration
*after* it has put its rotary settings together (vllm/config/model.py, `_apply_dict_overrides`, 0.23.0 line 449, the
same in 0.32), and the model reads `config.rope_parameters` (models/bailing_moe.py:139). In transformers 5
``rope_scaling`` is another name of that attribute; in 4.57, which vLLM 0.23 takes too, it is one that nobody reads any
more, and the override is lost in silence. For the same reason the dictionary must be whole: nothing fills in
``rope_type``, ``rope_theta`` (10000 would be taken, rotary_embedding/__init__.py:64) or the original length.
"""

from __future__ import annotations

from typing import Any

from serve.planning.model import YARN_FACTOR, PlannedModel, rope_settings

KEY = "rope_parameters"


def hf_overrides(model: PlannedModel, max_model_len: int, device: str) -> dict[str, Any] | None:
    """Return the value of ``--hf-overrides``, None where none is needed.

    On an NPU whenever YaRN is in use; elsewhere only to switch it on for a context that `config.json` does not reach.
    """
    settings = rope_settings(model.config)
    if not model.is_yarn:
        if max_model_len <= model.context:
            return None
        settings |= {"rope_type": "yarn", "factor": YARN_FACTOR, "original_max_position_embeddings": model.context}
    elif device != "npu":
        return None
    original = settings.get("original_max_position_embeddings") or model.config.get("max_position_embeddings")
    settings |= {"original_max_position_embeddings": original}
    settings.setdefault("factor", YARN_FACTOR)
    settings.setdefault("truncate", True)
    return {KEY: settings}
