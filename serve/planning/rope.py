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

    The rotary settings on an NPU whenever YaRN is in use; elsewhere only to switch it on for a context that
    `config.json` does not reach. And ``max_position_embeddings`` where that is not as long as the context: vLLM 0.23
    takes the original length times the factor, 0.32 takes this number (config/model.py, _get_and_verify_max_len).
    """
    overrides: dict[str, Any] = {}
    settings = rope_settings(model.config)
    is_switched_on = not model.is_yarn and max_model_len > model.context
    if is_switched_on:
        settings |= {"rope_type": "yarn", "factor": YARN_FACTOR, "original_max_position_embeddings": model.context}
    if is_switched_on or (model.is_yarn and device == "npu"):
        original = settings.get("original_max_position_embeddings") or model.config.get("max_position_embeddings")
        settings |= {"original_max_position_embeddings": original, "factor": settings.get("factor") or YARN_FACTOR}
        settings.setdefault("truncate", True)
        overrides[KEY] = settings
    longest = model.config.get("max_position_embeddings")
    if max_model_len > (longest if isinstance(longest, int) else model.context):
        overrides["max_position_embeddings"] = model.longest
    return overrides or None
