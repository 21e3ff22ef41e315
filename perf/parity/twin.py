"""How far rounding alone may take this model on these prompts: the yardstick that an endpoint is judged by.

Of a server nothing but log-probabilities is seen, and how far these move between two correct servers depends on the
model: with other experts at a near-tie, a whole position moves. So side a computes its whole pass a few times more,
each time with noise of the size of rounding on what every attention and every MLP gives, and keeps how far the noisy
log-probabilities ("twins") are from its own. A correct server is about as far.

Shapes: B rows, T tokens, H hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

TWINS = 4
TOP = 20  # best tokens of a position that are compared: what a vLLM server gives at most unless it was told otherwise
# Relative, uniform. Chosen so that the twins are as far from side a as the real vLLM CPU engine is: `limits.py` has the
# ratios that were seen. Two units in the last place of bf16; in fp32 more, for sums of many terms in another order.
AMPLITUDE = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-20}


def noisy(layers: Iterable[Any], dtype: torch.dtype, seed: int, run: Callable[[], Tensor]) -> Tensor:
    """Call ``run`` while the attention and the MLP of each layer add noise to what they give."""
    generator, amplitude = torch.Generator().manual_seed(seed), AMPLITUDE[dtype]

    def add(module: nn.Module, inputs: Any, out_BTH: Tensor) -> Tensor:
        noise_BTH = (2 * torch.rand(out_BTH.shape, generator=generator) - 1) * amplitude
        return (out_BTH.float() * (1 + noise_BTH.to(out_BTH.device))).to(out_BTH.dtype)

    handles = [module.register_forward_hook(add) for layer in layers for module in (layer.attention, layer.mlp)]
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


def distance(a_V: Tensor, token_K: Tensor, logprob_K: Tensor) -> float:
    """Root mean square difference of these tokens' log-probabilities, in standard deviations of a's logits."""
    a_V = a_V.double()
    return float((a_V.log_softmax(-1)[token_K] - logprob_K.double()).square().mean().sqrt() / a_V.std())


def best_distance(a_V: Tensor, b_V: Tensor) -> float:
    """`distance` over b's `TOP` best tokens."""
    logprob_K, token_K = b_V.double().log_softmax(-1).topk(min(TOP, len(b_V)))
    return distance(a_V, token_K, logprob_K)
