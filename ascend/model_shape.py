"""`ModelShape`: the numbers of a `config.json` that decide what a model weighs and computes, read without transformers.

`BailingMoeV2Config` is what a model is built from and checks everything, but importing transformers takes seconds; a
question about memory or limits is answered before that. Both have the same names, so `ascend.cost` takes either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ascend.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a BailingMoeV2 model; names, defaults and derived values are those of `BailingMoeV2Config`."""

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    moe_intermediate_size: int = 512
    moe_shared_expert_intermediate_size: int | None = None
    first_k_dense_replace: int = 1
    n_group: int = 8
    topk_group: int = 4
    use_qkv_bias: bool = False
    use_bias: bool = False
    use_qk_norm: bool = True
    tie_word_embeddings: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Take the sizes out of a `config.json`. Raises `UserError`, one line, for one that no model can have."""
        given = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        if "head_dim" in given and not given["head_dim"]:
            del given["head_dim"]
            hidden_size, heads = (
                given.get("hidden_size", cls.hidden_size),
                given.get("num_attention_heads", cls.num_attention_heads),
            )
            if isinstance(hidden_size, int) and isinstance(heads, int) and heads > 0:
                given["head_dim"] = hidden_size // heads
        for key, least in (("num_shared_experts", 0), ("n_group", 1), ("topk_group", 1)):
            if key in given and given[key] is None:
                given[key] = least
        shape = cls(**given)
        shape._check()
        return shape

    def _check(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in _MAY_BE_ZERO else 1
            if isinstance(field.default, bool) or (value is None and field.default is None):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"config.json: {field.name} is {value!r}, it must be an integer of at least {least}")
        for name, value, divisor in (
            ("num_attention_heads", self.num_attention_heads, self.num_key_value_heads),
            ("num_experts", self.num_experts, self.n_group),
        ):
            if value % divisor:
                raise UserError(f"config.json: {name} {value} is not divisible by {divisor}")
        if self.topk_group > self.n_group:
            raise UserError(f"config.json: topk_group {self.topk_group} is more than n_group {self.n_group}")
        eligible = self.topk_group * (self.num_experts // self.n_group)
        if self.num_experts_per_tok > eligible:
            raise UserError(
                f"config.json: num_experts_per_tok {self.num_experts_per_tok} is more than the {eligible} experts of "
                f"the {self.topk_group} kept groups"
            )

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the one MLP that all shared experts form; 0 where there is none."""
        return self.num_shared_experts * (self.moe_shared_expert_intermediate_size or self.moe_intermediate_size)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` has routed experts."""
        return layer >= self.first_k_dense_replace


def context_limit(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens the positions reach; with YaRN that is its factor times the original length."""
    longest = config.get("max_position_embeddings")
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if isinstance(rope, dict) and "yarn" in (rope.get("type"), rope.get("rope_type")):
        original, factor = rope.get("original_max_position_embeddings") or longest, rope.get("factor")
        if isinstance(original, int) and isinstance(factor, (int, float)):
            return int(original * factor)
    return longest if isinstance(longest, int) else None


_MAY_BE_ZERO = ("num_shared_experts", "first_k_dense_replace")

# The dense model that the family's "three times as fast as 36B" is taken to mean: the published shape of Seed-OSS-36B,
# 36.15 B parameters. All its layers are dense, so the routed experts' part is empty.
DENSE_36B = ModelShape(
    vocab_size=155136,
    hidden_size=5120,
    intermediate_size=27648,
    num_hidden_layers=64,
    num_attention_heads=80,
    num_key_value_heads=8,
    head_dim=128,
    first_k_dense_replace=64,
    use_qkv_bias=True,
    use_qk_norm=False,
)
