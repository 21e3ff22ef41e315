"""What part of the model a tensor belongs to, told from its name: the classes that formats and reports speak of."""

from __future__ import annotations

import re

CLASSES = (
    "embedding",
    "head",
    "attention",
    "dense_mlp",
    "router",
    "shared_experts",
    "routed_experts",
    "norms",
    "mtp",  # what only an MTP layer has; its attention and experts count as those of other layers do
)
MATRICES = ("attention", "dense_mlp", "shared_experts", "routed_experts")  # the classes a format may quantise

# The first that matches the name within its layer, or the whole name, decides.
_PATTERNS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"model\.word_embeddings\.", "embedding"),
        (r"lm_head\.", "head"),
        (r"eh_proj\.|enorm\.|hnorm\.|final_layernorm\.", "mtp"),
        (r"mlp\.gate\.", "router"),
        (r"mlp\.experts\.\d+\.", "routed_experts"),
        (r"mlp\.shared_experts\.", "shared_experts"),
        (r"mlp\.", "dense_mlp"),
        (r"attention\.(query|key)_layernorm\.|\w+_layernorm\.|model\.norm\.", "norms"),
        (r"attention\.", "attention"),
    )
)
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(.+)")


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to; None for embedding, head and the final norm."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def tensor_class(name: str) -> str:
    """Return the class of a tensor of this architecture, a name of `CLASSES`; "other" for an unknown name."""
    match = _LAYER.match(name)
    rest = match[2] if match else name
    return next((known for pattern, known in _PATTERNS if pattern.match(rest)), "other")


def model_order(name: str) -> tuple[float, int, str]:
    """Sort key that brings names into the order a forward pass reads them in: embedding, layers, final norm, head."""
    layer = layer_of(name)
    if layer is None:
        return (-1 if name.startswith("model.word_embeddings") else float("inf"), -1, name)
    expert = re.search(r"\.experts\.(\d{1,9})\.", name)
    return (layer, int(expert[1]) if expert else -1, name)
