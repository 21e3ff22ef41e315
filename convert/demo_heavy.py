"""The heavy-tailed shape of trained weights, for demos on which a quantiser has a harder time than on normal noise.

What is known of trained language models, and what of it `write_demo(..., weights="heavy")` imitates:

- **Elements.** Weights of 30 networks fit a Student t better than a normal distribution, with about 5 degrees of
  freedom (Dotzel et al. 2024, arXiv 2405.03103): elements of the layers' matrices are drawn from that one.
- **Rows.** The outputs of a trained matrix differ in norm, which is why scales are kept per output channel. Each row is
  multiplied by ``exp(0.3 z)`` with a normal ``z`` (no paper's figure: 0.3 makes the largest of 1000 rows about seven
  times the smallest). Both together have a Weibull shape of 1.10, where normal weights have 1.20 and trained ones 1.10
  to 1.16 for queries and keys, but 1.19 to 1.20 for MLPs (arXiv 2605.18898): for experts it is a hard case.
- **Channels.** In 0.1 to 1 % of the hidden dimensions, the same in all layers, what the matrices read is 6 to 20 times
  as large as elsewhere (LLM.int8(), arXiv 2208.07339; SmoothQuant, 2211.10438; AWQ, 2306.00978), and large gains of the
  norms before them make it so (BERT busters, 2105.06990; Outlier Suppression, 2209.13325). Here the gains of 0.3 % of
  the channels, at least one, are multiplied by 8. The matrices' columns for them are like others: the same papers find
  weights flat where activations are not, and such channels contribute less than the rest (2601.22966).
- **Depth.** Each layer changes the residual stream by a little (a cosine distance of a few percent in the middle of
  trained models, ShortGPT, 2403.03853), as GPT-2 and Megatron-LM begin training: what is added to the stream, the
  outputs of attention and of MLPs, is scaled by ``1/√(2 · layers)``. The plain demo lacks this, so its layers overwrite
  one another and amplify any error; that makes the heavy demo the truer one, not the easier one.

Imitated are distributions only. Nothing is learned, so rows and columns are uncorrelated and no error is averaged out
by low rank or made harmless by confidence: as far as that goes, trained models suffer less from rounding.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

DEGREES_OF_FREEDOM = 5
ROW_SPREAD = 0.3
OUTLIER_SHARE = 0.003
OUTLIER_GAIN = 8.0
_TO_STREAM = ("attention.dense.weight", "down_proj.weight")
# Ends of the names of the norms that matrices of a layer read; the final norm's reader, the head, is never quantised.
_GAINS = ("input_layernorm.weight", "post_attention_layernorm.weight", "enorm.weight", "hnorm.weight")


@cache
def student_t_quantiles(count: int) -> np.ndarray[Any, Any]:
    """Return ``count`` (even) equally likely values of Student's t with 5 degrees of freedom, with a variance of one.

    With ``x = √5 tan θ`` its distribution is ``F = 1/2 + (θ + sin θ cos θ (1 + 2/3 cos² θ)) / π`` (Abramowitz and
    Stegun 26.7.3), solved for θ by Newton's method. `math` and not numpy, whose sine is not the same on every machine.
    """
    upper = []
    theta = 0.0
    for i in range(count // 2, count):
        target = ((i + 0.5) / count - 0.5) * math.pi
        for _ in range(50):
            sine, cosine = math.sin(theta), math.cos(theta)
            step = (theta + sine * cosine * (1 + 2 / 3 * cosine**2) - target) / (8 / 3 * cosine**4)
            theta -= step
            if abs(step) < 1e-13:
                break
        upper.append(math.tan(theta) * math.sqrt(DEGREES_OF_FREEDOM - 2))  # √5 tan θ over a deviation of √(5/3)
    positive = np.array(upper)
    return np.concatenate([-positive[::-1], positive])


def row_scales(index: np.ndarray[Any, Any], quantiles: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a factor for each row, ``exp(0.3 z)`` over its root mean square; ``z`` is ``quantiles[index]``, normal."""
    z = [float(quantiles[i]) for i in index]
    return np.array([math.exp(ROW_SPREAD * value - ROW_SPREAD**2) for value in z], np.float32)


def stream_scale(name: str, layers: int) -> float:
    """Return the factor of a matrix that adds to the residual stream, 1 for any other."""
    return 1 / math.sqrt(2 * layers) if name.endswith(_TO_STREAM) else 1.0


def is_gain(name: str) -> bool:
    """Whether ``name`` is a norm whose gains have the outlier channels."""
    return name.endswith(_GAINS)


def outlier_channels(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Choose the outlier channels: those with the smallest of one random word per hidden dimension."""
    return np.argsort(words, kind="stable")[: max(1, round(OUTLIER_SHARE * len(words)))]
