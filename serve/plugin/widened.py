"""Quantised checkpoints on the CPU: their weights are widened to the model's dtype as vLLM reads them.

Why: vLLM 0.32 has no kernel on a CPU for this architecture's INT8 and INT4 experts: those in its `cpu_moe.py` want AMX
(or ZenDNN, ARM, POWER), and none takes the routing, sigmoid in groups (`No Int8 MoE backend supports the deployment
configuration`). The one for FP8 takes it, with AMX. So vLLM is given a quantization method of ours, the layers of which
are plain ones. Who asks for `--quantization fp8` by name gets vLLM's own. To be dropped when vLLM has the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from ascend.checkpoint import MODEL_TYPES
from serve.plugin.drafts import MTP

NAME = "widened"
METHODS = ("fp8", "compressed-tensors")  # of config.json that are widened; ModelSlim's form names none


@register_quantization_config(NAME)
class WidenedConfig(QuantizationConfig):
    """vLLM's view of it: every layer is a plain one."""

    def get_name(self) -> str:  # type: ignore[override]  # vLLM lists its own names there
        """As it is registered."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Any: activations are never quantised."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU: none."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside `config.json`."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WidenedConfig:
        """Nothing in it matters: what is quantised is told from the tensors."""
        return cls()

    @classmethod
    def override_quantization_method(  # type: ignore[override]
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take over this architecture's quantised checkpoints, unless a method was asked for by name."""
        named = getattr(hf_config, "architectures", None) or ()
        ours = getattr(hf_config, "model_type", None) in MODEL_TYPES or MTP in named
        widens = ours and hf_quant_cfg.get("quant_method") in METHODS
        return NAME if widens and user_quant in (None, NAME) else None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The plain method of a layer."""
        # Here, because every process of vLLM imports this file as a plugin, and most build no layer.
        from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        return UnquantizedFusedMoEMethod(layer.moe_config) if isinstance(layer, RoutedExperts) else None
