"""Parameters and bytes of a BailingMoeV2 model, per part and per decode step, from its configuration alone.

What is counted: every weight that a decode step of ``batch`` tokens reads once. Distinct experts assume uniform
routing, ``E · (1 - (1 - K/E)^tokens)``, the most that can be expected: real routing is skewed and hits fewer. The
embedding table counts as one row per token. Source of the formula: a token misses an expert with probability 1 - K/E.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ascend.config import BailingMoeV2Config

FP32_BYTES = 4  # the router's weight, whatever the model's dtype


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights, by what a step does with them; MTP layers are not counted, a plain step reads none."""

    embedding: int
    head: int
    attention: int
    dense_mlp: int
    router: int
    shared_experts: int
    routed_experts: int
    norms: int

    @property
    def total(self) -> int:
        """All of them (a tied head is no weight of its own)."""
        return sum(vars(self).values())


def parameters(config: BailingMoeV2Config) -> Parameters:
    """Count the weights of the main model."""
    H, D, V = config.hidden_size, config.head_dim, config.vocab_size
    N, G = config.num_attention_heads, config.num_key_value_heads
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    qkv_bias = (N + 2 * G) * D if config.use_qkv_bias else 0
    attention = (N + 2 * G) * D * H + N * D * H + qkv_bias + (H if config.use_bias else 0)
    return Parameters(
        embedding=V * H,
        head=0 if config.tie_word_embeddings else V * H,
        attention=config.num_hidden_layers * attention,
        dense_mlp=(config.num_hidden_layers - moe_layers) * 3 * H * config.intermediate_size,
        router=moe_layers * config.num_experts * (H + 1),
        shared_experts=moe_layers * 3 * H * config.shared_intermediate_size,
        routed_experts=moe_layers * config.num_experts * 3 * H * config.moe_intermediate_size,
        norms=config.num_hidden_layers * (2 * H + (2 * D if config.use_qk_norm else 0)) + H,
    )


def distinct_experts(config: BailingMoeV2Config, tokens: int) -> float:
    """Experts of one layer that ``tokens`` tokens are expected to hit under uniform routing."""
    missed = (1 - config.num_experts_per_tok / config.num_experts) ** tokens
    return config.num_experts * (1 - missed)


def kv_bytes_per_token(config: BailingMoeV2Config, bytes_per_value: float = 2) -> float:
    """Bytes that one token of context takes in the KV cache."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_value


def decode_bytes(config: BailingMoeV2Config, batch: int, context: int = 0, bytes_per_weight: float = 2) -> float:
    """Fewest bytes that one decode step reads: weights once, plus the keys and values of ``context`` tokens a row."""
    part = parameters(config)
    experts = part.routed_experts * distinct_experts(config, batch) / config.num_experts
    head = part.head or part.embedding
    rows = batch * config.hidden_size
    weights = part.attention + part.dense_mlp + part.shared_experts + experts + head + part.norms + rows
    kv = batch * context * kv_bytes_per_token(config, bytes_per_weight)
    return weights * bytes_per_weight + part.router * FP32_BYTES + kv
