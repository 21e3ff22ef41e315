"""BailingMoeV2Config: what `config.json` says, with the architecture's defaults, refused early where it cannot be."""

from __future__ import annotations

import math
from typing import Any, ClassVar

try:
    from transformers import PreTrainedConfig
except ImportError:  # transformers 4.57 spells it with a small t
    from transformers import PretrainedConfig as PreTrainedConfig

from ascend.errors import UserError

ROPE_TYPES = ("default", "yarn")


class BailingMoeV2Config(PreTrainedConfig):
    """Configuration of BailingMoeV2 (Ling-mini-2.0, Ling-flash-2.0, AntAngelMed).

    A key that is missing gets the default of the model authors' `configuration_bailing_moe_v2.py`; the keys that vLLM's
    implementation reads beyond those (`use_rmsnorm`, `score_function`, `router_dtype`, `norm_topk_prob`) get the value
    that the authors' modelling code implies. Rotary settings are understood in every spelling: `rope_theta` beside
    `rope_scaling` (transformers 4), `rope_parameters` (transformers 5), `type` or `rope_type`, `rotary_dim` instead of
    `partial_rotary_factor`. Raises `UserError`, one line, for what no model can be built from.
    """

    model_type = "bailing_moe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        intermediate_size: int = 5120,
        num_hidden_layers: int = 20,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 4,
        head_dim: int | None = 128,
        hidden_act: str = "silu",
        use_qkv_bias: bool = False,
        use_bias: bool = False,
        use_qk_norm: bool = True,
        use_rmsnorm: bool = True,
        rms_norm_eps: float = 1e-6,
        tie_word_embeddings: bool = False,
        norm_head: bool = False,
        max_position_embeddings: int = 32768,
        rope_theta: float = 600000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        partial_rotary_factor: float | None = None,
        rotary_dim: int | None = None,
        num_experts: int = 256,
        num_shared_experts: int | None = 1,
        num_experts_per_tok: int = 8,
        n_group: int | None = 8,
        topk_group: int | None = 4,
        moe_intermediate_size: int = 512,
        first_k_dense_replace: int = 1,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        score_function: str = "sigmoid",
        router_dtype: str | None = "fp32",
        moe_router_enable_expert_bias: bool = True,
        num_nextn_predict_layers: int | None = 0,
        embedding_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        output_dropout: float = 0.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int | None = 156892,
        eos_token_id: int | list[int] | None = 156892,
        **kwargs: Any,
    ) -> None:
        # Never remote code: the keys that would ask for it do not survive loading, so nothing can save them again.
        kwargs.pop("auto_map", None)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        for key in ("hidden_size", "num_attention_heads"):
            _check_number(key, getattr(self, key), _LEAST[key])
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.use_qkv_bias = use_qkv_bias
        self.use_bias = use_bias
        self.use_qk_norm = use_qk_norm
        self.use_rmsnorm = use_rmsnorm
        self.rms_norm_eps = rms_norm_eps
        self.norm_head = norm_head
        self.max_position_embeddings = max_position_embeddings
        self.num_experts = num_experts
        self.num_shared_experts = num_shared_experts or 0
        self.num_experts_per_tok = num_experts_per_tok
        self.n_group = n_group or 1
        self.topk_group = topk_group or 1
        self.moe_intermediate_size = moe_intermediate_size
        self.first_k_dense_replace = first_k_dense_replace
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.score_function = score_function
        self.router_dtype = router_dtype
        self.moe_router_enable_expert_bias = moe_router_enable_expert_bias
        self.num_nextn_predict_layers = num_nextn_predict_layers or 0
        self.embedding_dropout = embedding_dropout
        self.attention_dropout = attention_dropout
        self.output_dropout = output_dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        for key, least in _LEAST.items():
            _check_number(key, getattr(self, key), least)
        for key, rope in (("rope_parameters", rope_parameters), ("rope_scaling", rope_scaling)):
            if not isinstance(rope, dict | None):
                raise UserError(f"config.json: {key} is {rope!r}, it must be an object with a rope_type")
        self._set_rope(
            {**(rope_parameters or {}), **(rope_scaling or {})}, rope_theta, partial_rotary_factor, rotary_dim
        )
        if isinstance(pad_token_id, int) and isinstance(vocab_size, int) and pad_token_id >= vocab_size:
            pad_token_id = None  # the family's default, in a model with a smaller vocabulary
        try:
            super().__init__(  # type: ignore[call-arg]
                pad_token_id=pad_token_id, eos_token_id=eos_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # a key of transformers' own, such as dtype
            raise UserError(f"config.json: transformers refuses it: {str(error).splitlines()[-1].strip()}") from None
        self.validate_model()

    def _set_rope(
        self, rope: dict[str, Any], theta: float, partial_rotary_factor: float | None, rotary_dim: int | None
    ) -> None:
        self.rope_theta = rope.pop("rope_theta", None) or theta
        _check_number("rope_theta", self.rope_theta, 2.0)  # its logarithm divides
        # Authors' code and vLLM rotate the whole head where neither key says otherwise.
        factor = partial_rotary_factor if partial_rotary_factor is not None else rope.pop("partial_rotary_factor", None)
        if factor is not None:
            _check_number("partial_rotary_factor", factor, 0.0)
        if rotary_dim is not None:
            _check_number("rotary_dim", rotary_dim, 2)
            self.rotary_dim = rotary_dim
            if factor is None:
                factor = rotary_dim / self.head_dim
                if int(self.head_dim * factor) < rotary_dim:  # rounded down; all who read it multiply and cut off
                    factor = math.nextafter(factor, 1.0)
            if int(self.head_dim * factor) != rotary_dim:
                raise UserError(
                    f"config.json: rotary_dim {rotary_dim} contradicts partial_rotary_factor {factor} of head_dim "
                    f"{self.head_dim}; remove one of the two"
                )
        self.partial_rotary_factor = factor if factor is not None else 1.0
        rope_type = rope.pop("type", None)
        rope_type = rope.setdefault("rope_type", rope_type or "default")
        if rope_type not in ROPE_TYPES:
            raise UserError(
                f"config.json: rope_scaling type {rope_type!r} is not supported, only {' and '.join(ROPE_TYPES)}"
            )
        if rope_type == "yarn":
            for key, least in _YARN_LEAST.items():
                if rope.get(key) is not None:
                    _check_number(f"rope_scaling {key}", rope[key], least)
            # Spelt out, so that every engine that reads this configuration takes the same two numbers.
            original = rope.get("original_max_position_embeddings") or self.max_position_embeddings
            rope["original_max_position_embeddings"] = original
            rope["factor"] = rope.get("factor") or self.max_position_embeddings / original
            # vLLM-Ascend reads an absent key as false, all others as true; its positions would then differ.
            rope.setdefault("truncate", True)
            _check_number("rope_scaling factor", rope["factor"], 1.0)
        # One dictionary for both major versions: in transformers 5 `rope_scaling` is another name of `rope_parameters`.
        self.rope_scaling = rope if rope_type != "default" else None

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the one fused MLP that all shared experts form; 0 where there is none."""
        width = getattr(self, "moe_shared_expert_intermediate_size", None) or self.moe_intermediate_size
        return self.num_shared_experts * width

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder (or MTP) layer ``layer`` has routed experts; the first ``first_k_dense_replace`` have not."""
        return layer >= self.first_k_dense_replace or layer >= self.num_hidden_layers

    def validate_model(self) -> None:
        """Raise `UserError`, one line, if no model can be built from these values."""
        architectures = getattr(self, "architectures", None) or ["BailingMoeV2ForCausalLM"]
        if not isinstance(architectures, list) or "BailingMoeV2ForCausalLM" not in architectures:
            raise UserError(
                f"config.json: architectures {architectures} is not ['BailingMoeV2ForCausalLM']; "
                "this toolkit serves Ling 2.0 and AntAngelMed models only"
            )
        shared_width = getattr(self, "moe_shared_expert_intermediate_size", None)
        if shared_width is not None:
            _check_number("moe_shared_expert_intermediate_size", shared_width, 1)
        experts_per_group, remainder = divmod(self.num_experts, self.n_group)
        rotary_dim = int(self.head_dim * self.partial_rotary_factor)
        problems = {
            f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
            f"{self.num_key_value_heads}": self.num_attention_heads % self.num_key_value_heads,
            f"num_experts {self.num_experts} is not divisible by n_group {self.n_group}": remainder,
            f"topk_group {self.topk_group} is more than n_group {self.n_group}": self.topk_group > self.n_group,
            f"num_experts_per_tok {self.num_experts_per_tok} is more than the {self.topk_group * experts_per_group} "
            f"experts of the {self.topk_group} kept groups": self.num_experts_per_tok
            > self.topk_group * experts_per_group,
            f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim} makes {rotary_dim} rotary "
            "dimensions, it must be an even number from 2 to head_dim": rotary_dim % 2
            or not 2 <= rotary_dim <= self.head_dim,
            f"hidden_act {self.hidden_act!r} is not supported, only 'silu'": self.hidden_act != "silu",
            f"score_function {self.score_function!r} is not supported, only 'sigmoid'": self.score_function
            != "sigmoid",
            "use_rmsnorm false (LayerNorm) is not supported": not self.use_rmsnorm,
        }
        for problem, found in problems.items():
            if found:
                raise UserError(f"config.json: {problem}")


# The least value of each number: integers, and after them (written with a point) those that may be fractions.
_LEAST: dict[str, float] = {
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "max_position_embeddings": 1,
    "num_experts": 1,
    "num_shared_experts": 0,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 1,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 0.0,
    "routed_scaling_factor": 0.0,
}
_YARN_LEAST = {
    "factor": 1.0,
    "original_max_position_embeddings": 1.0,
    "beta_fast": 0.0,
    "beta_slow": 0.0,
    "mscale": 0.0,
    "mscale_all_dim": 0.0,
    "attention_factor": 0.0,
}


def _check_number(key: str, value: Any, least: float) -> None:
    """Raise `UserError` unless ``value`` is a number (an integer, where ``least`` is one) of at least ``least``."""
    kinds, kind = (int, "an integer") if isinstance(least, int) else ((int, float), "a number")
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
        raise UserError(f"config.json: {key} is {value!r}, it must be {kind} of at least {least:g}")


class BailingMoeV2AliasConfig(BailingMoeV2Config):
    """The same configuration under the other `model_type` that checkpoints of this architecture carry."""

    model_type = "bailing_moe_v2"

    def __init__(self, **kwargs: Any) -> None:
        # transformers 5 gives a class without one an `__init__` that knows nothing of the one above
        super().__init__(**kwargs)
