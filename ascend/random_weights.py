"""A model of any shape with random weights made on the device, for measuring: nothing is read, written or carried.

Layer by layer, and each is quantised before the next is made: at most one layer is there unquantised, so that the whole
103 B fits where its quantised weights do. Routing is about uniform (normal weights, no bias), the costliest case.
"""

from __future__ import annotations

import torch
from torch import nn

from ascend.config import BailingMoeV2Config
from ascend.devices import get_device
from ascend.model import BailingMoeV2ForCausalLM
from ascend.quantisation import check_format, check_on, quantise_layer


def random_model(
    config: BailingMoeV2Config, device: str, dtype: torch.dtype, *, quantise: str | None = None, seed: int = 0
) -> BailingMoeV2ForCausalLM:
    """Return a model as `ascend.load_model` returns it, in eval mode and in the device's layout.

    Raises `UserError` for a format that the device or the shape does not take.
    """
    target = get_device(device).torch_device
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = BailingMoeV2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if quantise is not None:
        check_format(quantise)
        check_on(target, dtype, quantise, config, model.parallel)
    torch.manual_seed(seed)
    with torch.no_grad():
        for part in (model.model.word_embeddings, *model.model.layers, model.model.norm, model.lm_head):
            if part is not None:
                _fill(model, part, target)
                if quantise is not None and part in model.model.layers:
                    quantise_layer(part, quantise)
    model.quantised = quantise
    model.requires_grad_(False).eval()
    model.model.lay_out()
    model.plain_logits = True
    return model


def _fill(model: BailingMoeV2ForCausalLM, part: nn.Module, device: torch.device) -> None:
    part.to_empty(device=device)
    for module in part.modules():
        model._init_weights(module)
