"""Parameters, bytes and FLOPs of a BailingMoeV2 model: per part, per decode step and per card, from its sizes alone.

What a decode step is charged with: every weight that its tokens touch once, a row of the embedding per token, and the
keys and values of the whole context of every sequence once. Activations, KV writes, and reading anything twice are not
counted, so these are the fewest bytes possible. A product counts as two FLOPs; norms, softmax and routing as none.

Distinct experts assume uniform routing, ``E · (1 - (1 - K/E)^tokens)``, the most that can be expected: a token misses
an expert with probability 1 - K/E. Real routing is skewed and hits fewer; `ascend.routing` has that.

Letters: H hidden_size, D head_dim, N query heads, G key/value heads, V vocab_size, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from ascend.errors import UserError
from ascend.precision import Precision

if TYPE_CHECKING:
    from typing import TypeAlias

    from ascend.config import BailingMoeV2Config
    from ascend.model_shape import ModelShape

    Model: TypeAlias = BailingMoeV2Config | ModelShape

FP32_BYTES = 4  # of the experts' bias, whatever the checkpoint's dtype
MATMULS = ("attention", "dense_mlp", "shared_experts")  # beside the routed experts, what a precision may quantise


@dataclass(frozen=True)
class ByPart:
    """One number (weights, bytes) per part of the model; MTP layers are not counted, a plain step reads none."""

    embedding: float
    head: float
    attention: float
    dense_mlp: float
    router: float
    shared_experts: float
    routed_experts: float
    norms: float

    @property
    def total(self) -> float:
        """All of them (a tied head is no weight of its own)."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Sharding:
    """How a model is divided over cards, as `ascend.parallel.Parallel.mesh` does it.

    tensor: cards that share one stream of tokens and divide attention, dense MLPs, shared experts and head.
    experts: blocks of whole routed experts; within a block an expert's width is divided.
    data: such tensor groups, each with tokens of its own. The routed experts are divided over all cards.
    """

    tensor: int = 1
    experts: int = 1
    data: int = 1

    @property
    def cards(self) -> int:
        """How many cards there are."""
        return self.tensor * self.data

    def kv_shards(self, config: Model) -> int:
        """Among how many cards the keys and values are divided: beyond G cards, each head lies on several."""
        return min(self.tensor, config.num_key_value_heads)

    def check(self, config: Model) -> None:
        """Raise `UserError` if the model does not divide so."""
        if min(self.tensor, self.experts, self.data) < 1 or self.cards % self.experts:
            raise UserError(f"{self.experts} blocks of experts do not divide the {self.cards} cards")
        G = config.num_key_value_heads
        for name, value, parts in (
            ("num_attention_heads", config.num_attention_heads, self.tensor),
            ("intermediate_size", config.intermediate_size, self.tensor),
            ("the shared experts' width", config.shared_intermediate_size, self.tensor),
            ("moe_intermediate_size", config.moe_intermediate_size, self.cards // self.experts),
            ("num_experts", config.num_experts, self.experts),
        ):
            if value % parts:
                raise UserError(f"{name} {value} does not divide into {parts} cards")
        if G % self.tensor and self.tensor % G:
            raise UserError(f"num_key_value_heads {G} does not divide into {self.tensor} cards, nor they into it")


ONE_CARD = Sharding()


@dataclass(frozen=True)
class Work:
    """What one part of a step costs the busiest card: bytes read and FLOPs, the latter in dtype ``compute``."""

    nbytes: float
    flops: float
    compute: str


def parameters(config: Model) -> ByPart:
    """Count the weights of the main model."""
    return _by_part(config, lambda part, shape: math.prod(shape))


def active_parameters(config: Model) -> float:
    """Weights that one token multiplies with, embedding and head left out: the family's "4.8 B non-embedding"."""
    part = parameters(config)
    routed = part.routed_experts * config.num_experts_per_tok / config.num_experts
    return part.attention + part.dense_mlp + part.router + part.shared_experts + part.norms + routed


def weight_bytes(config: Model, precision: Precision) -> ByPart:
    """Bytes of all weights as a checkpoint of ``precision`` stores them, scales included."""
    formats = dict.fromkeys(MATMULS, precision.matmuls)
    formats |= {"routed_experts": precision.experts, "router": precision.router or precision.plain}

    def nbytes(part: str, shape: tuple[int, ...]) -> float:
        if len(shape) == 1:
            return shape[0] * (FP32_BYTES if part == "router" else precision.plain.bytes_per_weight)
        return formats.get(part, precision.plain).nbytes(*shape)

    return _by_part(config, nbytes)


def weight_bytes_per_card(config: Model, precision: Precision, sharding: Sharding = ONE_CARD) -> float:
    """Bytes of weights that one card holds: router and norms whole, key/value heads as `kv_shards` says.

    The embedding is divided, as vLLM does it; this project's own engine keeps it whole on every card.
    """
    whole, N, G = weight_bytes(config, precision), config.num_attention_heads, config.num_key_value_heads
    kv_share = G / (N + G)  # of the attention's weights: 2·G of 2·N + 2·G heads, the output projection among them
    attention = whole.attention * ((1 - kv_share) / sharding.tensor + kv_share / sharding.kv_shards(config))
    divided = (whole.embedding + whole.head + whole.dense_mlp + whole.shared_experts) / sharding.tensor
    return divided + attention + whole.router + whole.norms + whole.routed_experts / sharding.cards


def kv_bytes_per_token(config: Model, bytes_per_value: float = 2) -> float:
    """Bytes that one token of context takes in the KV cache: ``2 · layers · G · D · bytes_per_value``."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_value


def kv_bytes_per_card(
    config: Model, sequences: int, context: int, sharding: Sharding = ONE_CARD, bytes_per_value: float = 2
) -> float:
    """Bytes of keys and values on the fullest card; ``sequences`` are spread over the tensor groups."""
    on_this_group = -(-sequences // sharding.data)
    return on_this_group * context * kv_bytes_per_token(config, bytes_per_value) / sharding.kv_shards(config)


def distinct_experts(config: Model, tokens: int) -> float:
    """Experts of one layer that ``tokens`` tokens are expected to hit under uniform routing."""
    missed = (1 - config.num_experts_per_tok / config.num_experts) ** tokens
    return config.num_experts * (1 - missed)


def decode_work(
    config: Model,
    precision: Precision,
    batch: int,
    context: int,
    sharding: Sharding = ONE_CARD,
    kv_bytes: float = 2,
    drafts: int = 0,
    distinct: float | None = None,
    imbalance: float = 1.0,
) -> dict[str, Work]:
    """Bytes and FLOPs of one decode step on a card, in four parts: routed_experts, matmuls, head, attention.

    Args:
        config: a `ModelShape` or `BailingMoeV2Config`.
        precision: formats of the weights; attention computes in the plain one.
        batch: sequences in all, spread over the tensor groups as evenly as they go.
        context: tokens of each that are in the cache.
        sharding: divided perfectly: a card's share is 1/cards of the routed experts and 1/tensor of the rest, though
            the routers are in fact on every card. Only key/value heads that cannot be divided further are charged.
        kv_bytes: bytes per value of the cache.
        drafts: draft tokens verified with each sequence's own: the step has ``batch · (drafts + 1)`` tokens, and
            reads the cache once for all of a sequence's.
        distinct: experts hit in each layer; None: `distinct_experts`, uniform routing.
        imbalance: experts read by the busiest block over the mean (`Routing.imbalance`), where experts lie whole.
    """
    tokens, sequences = batch * (drafts + 1), -(-batch // sharding.data)  # of all groups, of the fullest
    group_tokens = sequences * (drafts + 1)
    hit = (distinct_experts(config, tokens) if distinct is None else distinct) / config.num_experts
    counted, stored = parameters(config), weight_bytes(config, precision)
    rows = group_tokens * config.hidden_size * precision.plain.bytes_per_weight
    head_bytes, head_weights = stored.head or stored.embedding, counted.head or counted.embedding
    routed = counted.routed_experts * config.num_experts_per_tok / config.num_experts
    others = sum(getattr(counted, part) for part in (*MATMULS, "router"))
    other_bytes = sum(getattr(stored, part) for part in (*MATMULS, "router", "norms")) + rows
    # Two FLOPs for the score and two for the sum, per query head, head dimension and token of context.
    scores = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context
    kv = sequences * context * kv_bytes_per_token(config, kv_bytes) / sharding.kv_shards(config)
    cards, tensor, plain = sharding.cards, sharding.tensor, precision.plain.compute
    return {
        "routed_experts": Work(
            stored.routed_experts * hit * imbalance / cards, 2 * tokens * routed / cards, precision.experts.compute
        ),
        "matmuls": Work(other_bytes / tensor, 2 * group_tokens * others / tensor, precision.matmuls.compute),
        "head": Work(head_bytes / tensor, 2 * group_tokens * head_weights / tensor, plain),
        "attention": Work(kv, group_tokens * scores / tensor, plain),
    }


def _by_part(config: Model, measure: Callable[[str, tuple[int, ...]], float]) -> ByPart:
    """Add up ``measure(part, shape)`` over all weights of the main model; a vector is a bias or a norm."""
    H, D, V, E = config.hidden_size, config.head_dim, config.vocab_size, config.num_experts
    N, G, layers = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    moe = sum(config.is_moe_layer(layer) for layer in range(layers))
    qkv = (N + 2 * G) * D
    weights = [
        ("embedding", 1, (V, H)),
        ("head", int(not config.tie_word_embeddings), (V, H)),
        ("attention", layers, (qkv, H)),
        ("attention", layers, (H, N * D)),
        ("attention", layers * config.use_qkv_bias, (qkv,)),
        ("attention", layers * config.use_bias, (H,)),
        *_mlp("dense_mlp", layers - moe, config.intermediate_size, H),
        *_mlp("shared_experts", moe * (config.shared_intermediate_size > 0), config.shared_intermediate_size, H),
        *_mlp("routed_experts", moe * E, config.moe_intermediate_size, H),
        ("router", moe, (E, H)),
        ("router", moe, (E,)),
        ("norms", 2 * layers + 1, (H,)),
        ("norms", 2 * layers * config.use_qk_norm, (D,)),
    ]
    total = {field.name: 0.0 for field in fields(ByPart)}
    for part, count, shape in weights:
        if count:
            total[part] += count * measure(part, shape)
    return ByPart(**total)


def _mlp(part: str, count: int, width: int, hidden_size: int) -> list[tuple[str, int, tuple[int, ...]]]:
    """Gate, up and down of ``count`` MLPs."""
    return [(part, 2 * count, (width, hidden_size)), (part, count, (hidden_size, width))]
