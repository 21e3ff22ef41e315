"""vLLM's own BailingMoeV2, for checkpoints that carry MTP layers.

Why: vLLM 0.32 and 0.33 refuse a checkpoint with a tensor they have no parameter for, and the MTP layers, stored as
``model.layers.{num_hidden_layers + i}``, are such (``There is no module or parameter named 'layers.32'``); 0.23 passes
over them in silence. No issue or pull request of vLLM's is known to us. To be dropped when vLLM loads or skips them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from vllm.model_executor.models import bailing_moe

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class BailingMoeV2ForCausalLM(bailing_moe.BailingMoeV2ForCausalLM):
    """The main model: everything but the MTP layers."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load what belongs to the first ``num_hidden_layers`` layers and to no layer. Returns the names loaded."""
        loaded: set[str] = super().load_weights(_main_model(weights, self.config.num_hidden_layers))
        return loaded


def _main_model(
    weights: Iterable[tuple[str, torch.Tensor]], num_hidden_layers: int
) -> Iterable[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        layer = _LAYER.match(name)
        if layer is None or int(layer[1]) < num_hidden_layers:
            yield name, tensor
