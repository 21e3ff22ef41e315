"""How vLLM finds this architecture's MTP layers as a draft model, and tells the compiled code of draft heads apart.

vLLM makes the draft's configuration from the target's by ``SpeculativeConfig.hf_config_override``, a chain of cases by
model type that none of 0.23 to 0.33 continues for BailingMoeV2 (``Unsupported speculative method: 'mtp'``), and that
vllm-ascend replaces by a chain of its own (``patch/platform/patch_speculative_config.py``). We put one case before
either. To be dropped when vLLM has it.

vLLM keeps compiled code under a hash of the configuration. In 0.23 (and so vllm-ascend's) that knows neither a draft
model's shape nor the layers that an EAGLE3 head names in its ``eagle_config``: for another head the code of the one
before is taken, which does not start, or taps other layers. We add the draft's configuration; 0.32 has it itself.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable
from typing import Any

TARGET = "BailingMoeV2ForCausalLM"
MTP = "BailingMoeV2MTPModel"
# One of vLLM's own names: it takes no others (``MTPModelTypes``), and counts the layers of this one by
# ``num_nextn_predict_layers``, as ours are counted.
MODEL_TYPE = "glm4_moe_mtp"

_NAME, _HASH = "hf_config_override", "compute_hash"
_vllm: Callable[[Any], Any] | None = None


def draft_config(config: Any) -> Any:
    """Return the draft's configuration for a model's. vLLM sends this function to its workers by its name."""
    layers = getattr(config, "num_nextn_predict_layers", 0)
    if TARGET in (getattr(config, "architectures", None) or ()) and layers:
        config.update({"model_type": MODEL_TYPE, "n_predict": layers, "architectures": [MTP]})
        return config
    add_draft_config()
    assert _vllm is not None, "kept above"
    return _vllm(config)


def add_draft_config() -> None:
    """Put `draft_config` before vLLM's chain, once."""
    global _vllm
    if importlib.util.find_spec("vllm_ascend"):
        import vllm_ascend.patch.platform.patch_speculative_config  # noqa: F401, replaces the chain when it is imported
    from vllm.config.speculative import SpeculativeConfig

    if (theirs := getattr(SpeculativeConfig, _NAME)) is not draft_config:
        _vllm = theirs
        setattr(SpeculativeConfig, _NAME, staticmethod(draft_config))
        setattr(SpeculativeConfig, _HASH, _with_draft(getattr(SpeculativeConfig, _HASH)))


def _with_draft(compute_hash: Callable[[Any], str]) -> Callable[[Any], str]:
    @functools.wraps(compute_hash)
    def whole(speculative: Any) -> str:
        known, draft = compute_hash(speculative), speculative.draft_model_config
        if draft is None:
            return known
        settings = json.dumps(draft.hf_config.to_dict(), sort_keys=True, default=str)
        anywhere = settings.replace(json.dumps(draft.model), "null")  # the same head at another path is the same code
        return hashlib.sha256((known + anywhere).encode()).hexdigest()

    return whole
