"""BailingMoeV2Config: defaults, spellings of the rotary settings, impossible values, and no remote code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

import ascend
from ascend.config import BailingMoeV2AliasConfig, BailingMoeV2Config
from ascend.errors import UserError
from ascend.rope import Rope
from tests.tiny import user_error

# What the model authors' configuration_bailing_moe_v2.py gives a key that is missing, and (the last five) what their
# modelling code does where vLLM reads a key that they do not have.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 157184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "use_bias": False,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
    "output_dropout": 0.0,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "rope_theta": 600000.0,
    "use_cache": True,
    "pad_token_id": 156892,
    "eos_token_id": 156892,
    "num_experts": 256,
    "num_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "moe_intermediate_size": 512,
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
    "num_nextn_predict_layers": 0,
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 1.0,
    "partial_rotary_factor": 1.0,
    "use_rmsnorm": True,
    "norm_head": False,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "norm_topk_prob": True,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}

# overrides → the line after "config.json: "
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 6}, "num_attention_heads 6 is not divisible by num_key_value_heads 4"),
    ({"num_experts": 250}, "num_experts 250 is not divisible by n_group 8"),
    ({"topk_group": 9}, "topk_group 9 is more than n_group 8"),
    ({"num_experts_per_tok": 129}, "num_experts_per_tok 129 is more than the 128 experts of the 4 kept groups"),
    (
        {"head_dim": 6, "partial_rotary_factor": 0.5},
        "partial_rotary_factor 0.5 of head_dim 6 makes 3 rotary dimensions, it must be an even number from 2 to "
        "head_dim",
    ),
    (
        {"partial_rotary_factor": 0},
        "partial_rotary_factor 0 of head_dim 128 makes 0 rotary dimensions, it must be an even number from 2 to "
        "head_dim",
    ),
    (
        {"partial_rotary_factor": 1.5},
        "partial_rotary_factor 1.5 of head_dim 128 makes 192 rotary dimensions, it must be an even number from 2 to "
        "head_dim",
    ),
    (
        {"partial_rotary_factor": 0.5, "rotary_dim": 32},
        "rotary_dim 32 contradicts partial_rotary_factor 0.5 of head_dim 128; remove one of the two",
    ),
    ({"partial_rotary_factor": "0.5"}, "partial_rotary_factor is '0.5', it must be a number of at least 0"),
    ({"rotary_dim": 0}, "rotary_dim is 0, it must be an integer of at least 2"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
    ({"score_function": "softmax"}, "score_function 'softmax' is not supported, only 'sigmoid'"),
    ({"use_rmsnorm": False}, "use_rmsnorm false (LayerNorm) is not supported"),
    (
        {"architectures": ["LlamaForCausalLM"]},
        "architectures ['LlamaForCausalLM'] is not ['BailingMoeV2ForCausalLM']; this toolkit serves Ling 2.0 and "
        "AntAngelMed models only",
    ),
    ({"vocab_size": 0}, "vocab_size is 0, it must be an integer of at least 1"),
    ({"hidden_size": -1}, "hidden_size is -1, it must be an integer of at least 1"),
    ({"hidden_size": "4096", "head_dim": None}, "hidden_size is '4096', it must be an integer of at least 1"),
    ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0, it must be an integer of at least 1"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True, it must be an integer of at least 1"),
    ({"num_hidden_layers": 20.0}, "num_hidden_layers is 20.0, it must be an integer of at least 1"),
    ({"num_key_value_heads": None}, "num_key_value_heads is None, it must be an integer of at least 1"),
    ({"head_dim": 1}, "head_dim is 1, it must be an integer of at least 2"),
    ({"intermediate_size": 0}, "intermediate_size is 0, it must be an integer of at least 1"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0, it must be an integer of at least 1"),
    ({"num_experts": 0}, "num_experts is 0, it must be an integer of at least 1"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0, it must be an integer of at least 1"),
    ({"num_shared_experts": -1}, "num_shared_experts is -1, it must be an integer of at least 0"),
    ({"n_group": -2}, "n_group is -2, it must be an integer of at least 1"),
    ({"topk_group": -2}, "topk_group is -2, it must be an integer of at least 1"),
    ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0, it must be an integer of at least 1"),
    (
        {"moe_shared_expert_intermediate_size": 0},
        "moe_shared_expert_intermediate_size is 0, it must be an integer of at least 1",
    ),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace is -1, it must be an integer of at least 0"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1, it must be an integer of at least 0"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', it must be a number of at least 0"),
    ({"routed_scaling_factor": math.nan}, "routed_scaling_factor is nan, it must be a number of at least 0"),
    ({"rope_theta": 1}, "rope_theta is 1, it must be a number of at least 2"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', it must be an object with a rope_type"),
    ({"rope_parameters": [1]}, "rope_parameters is [1], it must be an object with a rope_type"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling type 'linear' is not supported, only default and yarn"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling type 'llama3' is not supported, only default and yarn"),
    ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling factor is 0.5, it must be a number of at least 1"),
    ({"rope_scaling": YARN | {"factor": "4"}}, "rope_scaling factor is '4', it must be a number of at least 1"),
    ({"rope_scaling": YARN | {"beta_fast": -1}}, "rope_scaling beta_fast is -1, it must be a number of at least 0"),
    (
        {"rope_scaling": YARN | {"original_max_position_embeddings": -5}},
        "rope_scaling original_max_position_embeddings is -5, it must be a number of at least 1",
    ),
    (
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 65536}},
        "rope_scaling factor is 0.5, it must be a number of at least 1",
    ),
    ({"dtype": "float99"}, "transformers refuses it: module 'torch' has no attribute 'float99'"),
]


@pytest.mark.parametrize(("key", "value"), DEFAULTS.items())
def test_a_missing_key_gets_the_architectures_default(key: str, value: Any) -> None:
    assert getattr(BailingMoeV2Config(), key) == value
    assert type(getattr(BailingMoeV2Config(), key)) is type(value)


@pytest.mark.parametrize(("overrides", "line"), IMPOSSIBLE, ids=lambda value: str(value)[:60])
def test_an_impossible_config_gets_one_line(overrides: dict[str, Any], line: str) -> None:
    assert user_error(BailingMoeV2Config, **overrides) == f"config.json: {line}"


def test_auto_config_reports_an_impossible_config_in_the_same_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bailing_moe", "topk_group": 9}))
    assert user_error(AutoConfig.from_pretrained, tmp_path) == "config.json: topk_group 9 is more than n_group 8"


@pytest.mark.parametrize("key", ["num_shared_experts", "num_nextn_predict_layers", "n_group", "topk_group"])
def test_null_turns_a_feature_off(key: str) -> None:
    config = BailingMoeV2Config(**{"n_group": 1, "topk_group": 1} | {key: None})
    assert getattr(config, key) == (1 if key in ("n_group", "topk_group") else 0)


def test_head_dim_null_is_the_hidden_size_over_the_heads() -> None:
    assert BailingMoeV2Config(head_dim=None, hidden_size=1536, num_attention_heads=16).head_dim == 96


def test_a_padding_token_outside_a_small_vocabulary_is_dropped() -> None:
    assert BailingMoeV2Config(vocab_size=300).pad_token_id is None
    assert BailingMoeV2Config(vocab_size=300, pad_token_id=299).pad_token_id == 299


@pytest.mark.parametrize(("given_width", "width"), [({}, 3 * 512), ({"moe_shared_expert_intermediate_size": 100}, 300)])
def test_shared_experts_form_one_mlp(given_width: dict[str, int], width: int) -> None:
    assert BailingMoeV2Config(num_shared_experts=3, **given_width).shared_intermediate_size == width


def test_mtp_layers_have_experts_even_where_all_layers_are_dense() -> None:
    config = BailingMoeV2Config(num_hidden_layers=2, first_k_dense_replace=5, num_nextn_predict_layers=1)
    assert [config.is_moe_layer(layer) for layer in range(3)] == [False, False, True]


YARN_ROPE = Rope(64, 500000.0, 4.0, 8192, attention_factor=0.1 * math.log(4.0) + 1.0)
HALF = {"partial_rotary_factor": 0.5}
NESTED = {"rope_theta": 500000.0, "partial_rotary_factor": 0.5}
SPELLINGS: list[tuple[dict[str, Any], Rope]] = [
    ({"rope_theta": 500000.0, "rope_scaling": YARN, **HALF}, YARN_ROPE),
    ({"rope_theta": 500000, "rope_scaling": {"type": "yarn", **YARN}, **HALF}, YARN_ROPE),
    ({"rope_theta": 500000.0, "rope_scaling": {**YARN, "rope_type": None, "type": "yarn"}, **HALF}, YARN_ROPE),
    ({"rope_parameters": YARN | NESTED}, YARN_ROPE),
    ({"rope_parameters": YARN | NESTED, "rope_theta": 7.0}, YARN_ROPE),
    ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", **NESTED}}, YARN_ROPE),
    ({"rope_theta": 500000.0, "rope_scaling": YARN, "rotary_dim": 64}, YARN_ROPE),
    (
        {"rope_theta": 500000.0, "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 8192}, **HALF},
        YARN_ROPE,
    ),
    ({"rope_parameters": {"rope_type": "default", **NESTED}}, Rope(64, 500000.0)),
    ({"rope_scaling": None, **HALF}, Rope(64, 600000.0)),
    ({"rope_scaling": {}, "rope_parameters": {}}, Rope(128, 600000.0)),
    ({"rotary_dim": 32}, Rope(32, 600000.0)),
    ({"rotary_dim": 64, **HALF}, Rope(64, 600000.0)),
    ({}, Rope(128, 600000.0)),
]


@pytest.mark.parametrize(("spelling", "rope"), SPELLINGS, ids=lambda value: str(value)[:80])
def test_every_spelling_of_the_rotary_settings(spelling: dict[str, Any], rope: Rope) -> None:
    spelling = {key: {k: v for k, v in d.items() if v is not None} if isinstance(d, dict) else d
                for key, d in spelling.items()}  # fmt: skip
    before = json.dumps(spelling)
    assert Rope.from_config(BailingMoeV2Config(**spelling)) == rope
    assert json.dumps(spelling) == before, "the caller's dictionaries are not written to"


@given(head_dim=st.integers(1, 256).map(lambda half: 2 * half), data=st.data())
@settings(deadline=None, max_examples=200)
def test_rotary_dim_alone_survives_the_division(head_dim: int, data: st.DataObject) -> None:
    rotary_dim = 2 * data.draw(st.integers(1, head_dim // 2))
    config = BailingMoeV2Config(head_dim=head_dim, rotary_dim=rotary_dim)
    assert Rope.from_config(config).rotary_dim == rotary_dim
    assert BailingMoeV2Config(**config.to_dict()).partial_rotary_factor == config.partial_rotary_factor


@pytest.mark.parametrize("kind", [BailingMoeV2Config, BailingMoeV2AliasConfig])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"rope_scaling": YARN | {"beta_fast": 16, "truncate": False}, "rotary_dim": 64},
        {"num_shared_experts": 2, "moe_shared_expert_intermediate_size": 96, "tie_word_embeddings": True},
        {"eos_token_id": [5, 7], "dtype": "bfloat16", "num_nextn_predict_layers": 2, "mtp_loss_scaling_factor": 0.1},
    ],
    ids=str,
)
def test_a_config_survives_saving(kind: type[BailingMoeV2Config], overrides: dict[str, Any], tmp_path: Path) -> None:
    config = kind(**overrides)
    config.save_pretrained(tmp_path)
    for again in (
        kind(**config.to_dict()),
        kind.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=False),
        kind(**json.loads((tmp_path / "config.json").read_text())),
    ):
        assert type(again) is kind
        ignored = {"_name_or_path", "transformers_version"}
        assert {k: v for k, v in again.to_dict().items() if k not in ignored} == {
            k: v for k, v in config.to_dict().items() if k not in ignored
        }
        assert Rope.from_config(again) == Rope.from_config(config)


ASKED_FOR = pytest.param(
    True,
    marks=pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 runs remote code if told to"),
)


@pytest.mark.parametrize("trust", [None, False, ASKED_FOR])
@pytest.mark.parametrize(
    ("model_type", "kind"), [("bailing_moe", BailingMoeV2Config), ("bailing_moe_v2", BailingMoeV2AliasConfig)]
)
def test_no_remote_code(model_type: str, kind: type, trust: bool | None, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\n")
    written = {"model_type": model_type, "hidden_size": 128, "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)
    assert type(config) is kind
    assert config.hidden_size == 128
    assert "auto_map" not in config.to_dict()
    assert not ran.exists()


def test_public_names_are_the_classes_and_an_unknown_one_is_an_attribute_error() -> None:
    assert ascend.BailingMoeV2Config is BailingMoeV2Config
    with pytest.raises(AttributeError, match="module 'ascend' has no attribute 'lod_model'"):
        _ = ascend.lod_model
    assert issubclass(UserError, ValueError)
