"""vLLM's own BailingMoeV2, for checkpoints that carry MTP layers, and on the CPU for quantised ones.

MTP layers: vLLM 0.32 and 0.33 refuse a checkpoint with a tensor they have no parameter for, and these layers, stored
as ``model.layers.{num_hidden_layers + i}``, have none (``There is no module or parameter named 'layers.32'``); 0.23
passes over them in silence. No issue or pull request of vLLM's is known to us. To be dropped when vLLM loads or skips
them.
Quantised weights on the CPU: see `widened.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from vllm.model_executor.models import bailing_moe
from vllm.platforms import current_platform

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class BailingMoeV2ForCausalLM(bailing_moe.BailingMoeV2ForCausalLM):
    """The main model: everything but the MTP layers; quantised weights are widened where vLLM's layers are plain."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load what belongs to the first ``num_hidden_layers`` layers and to no layer. Returns the names loaded."""
        weights = _main_model(weights, self.config.num_hidden_layers)
        if current_platform.is_cpu():
            from serve.plugin.widened import WidenedConfig  # here, as its import registers the method
            from serve.plugin.widening import widened

            if self.quant_config is None or isinstance(self.quant_config, WidenedConfig):  # None: plain, or ModelSlim's
                weights = widened(weights, next(self.parameters()).dtype)
        loaded: set[str] = super().load_weights(weights)
        return loaded


def _main_model(
    weights: Iterable[tuple[str, torch.Tensor]], num_hidden_layers: int
) -> Iterable[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        layer = _LAYER.match(name)
        if layer is None or int(layer[1]) < num_hidden_layers:
            yield name, tensor
