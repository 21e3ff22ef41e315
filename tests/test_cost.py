"""Costs from sizes alone: they equal what real checkpoints, real quantised tensors and real ranks hold."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend.config import BailingMoeV2Config
from ascend.cost import (
    Sharding,
    active_parameters,
    decode_work,
    distinct_experts,
    kv_bytes_per_card,
    parameters,
    weight_bytes,
    weight_bytes_per_card,
)
from ascend.model import BailingMoeV2ForCausalLM
from ascend.model_shape import ModelShape
from ascend.parallel import Parallel
from ascend.precision import INT4_GROUP128, INT8_CHANNEL, PRECISIONS, precision
from convert.demo_config import SIZES, demo_config
from convert.shapes import count, tensor_shapes
from ops import quantise
from tests.test_parallel import Imagined
from tests.tiny import user_error

FLASH = demo_config("ling-flash", 0, "bf16", None, {})[0]
SHAPE = ModelShape.from_config(FLASH)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A `config.json` of any size, as the demo writes it."""
    heads = draw(st.sampled_from([1, 2, 4]))
    return demo_config(
        "tiny",
        0,
        draw(st.sampled_from(["bf16", "fp32"])),
        None,
        {
            "hidden_size": draw(st.integers(1, 9)) * 32,
            "intermediate_size": draw(st.integers(1, 300)),
            "moe_intermediate_size": draw(st.integers(1, 300)),
            "num_hidden_layers": draw(st.integers(1, 6)),
            "first_k_dense_replace": draw(st.integers(0, 7)),
            "num_attention_heads": heads * draw(st.integers(1, 4)),
            "num_key_value_heads": heads,
            "num_shared_experts": draw(st.integers(0, 2)),
            "moe_router_enable_expert_bias": True,
            "num_nextn_predict_layers": 0,
            "tie_word_embeddings": draw(st.booleans()),
            "use_qkv_bias": draw(st.booleans()),
            "use_bias": draw(st.booleans()),
            "use_qk_norm": draw(st.booleans()),
        },
    )[0]


@settings(deadline=None, max_examples=60)
@given(config=configs())
def test_weights_are_those_of_the_checkpoint(config: dict[str, Any]) -> None:
    shape = ModelShape.from_config(config)
    weights, nbytes = count(tensor_shapes(config))
    stored = PRECISIONS["bf16" if config["torch_dtype"] == "bfloat16" else "fp32"]
    assert parameters(shape).total == weights
    assert weight_bytes(shape, stored).total == nbytes


@pytest.mark.parametrize(
    "config",
    [
        *(demo_config(size, 0, "bf16", None, {})[0] for size in SIZES),
        {},
        {"head_dim": None, "n_group": None, "topk_group": None},
    ],
)
def test_a_shape_is_the_real_configuration(config: dict[str, Any]) -> None:
    shape, real = ModelShape.from_config(config), BailingMoeV2Config(**config)
    for name in (*(field.name for field in fields(shape)), "shared_intermediate_size"):
        assert getattr(shape, name) == getattr(real, name, None), name
    layers = range(shape.num_hidden_layers)
    assert [shape.is_moe_layer(i) for i in layers] == [real.is_moe_layer(i) for i in layers]
    assert parameters(shape) == parameters(real)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_experts": "256"}, "num_experts is '256'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_shared_experts": -1}, "at least 0"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not divisible by 5"),
        ({"n_group": 7}, "num_experts 256 is not divisible by 7"),
        ({"topk_group": 9}, "topk_group 9 is more than n_group 8"),
        ({"num_experts_per_tok": 129}, "more than the 128 experts"),
        ({"head_dim": None, "num_attention_heads": 0}, "num_attention_heads is 0"),
    ],
)
def test_a_shape_that_no_model_can_have_is_refused(changes: dict[str, Any], words: str) -> None:
    assert words in user_error(ModelShape.from_config, FLASH | changes)


@pytest.mark.parametrize(("rows", "columns"), [(6, 256), (128, 1024), (7, 128)])
def test_formats_take_the_bytes_of_real_quantised_tensors(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, dtype=torch.bfloat16)
    for format, tensors in (
        (INT8_CHANNEL, quantise.int8_weight(weight)),
        (INT4_GROUP128, quantise.int4_weight(weight)),
    ):
        assert format.nbytes(rows, columns) == sum(tensor.nbytes for tensor in tensors)


def test_fp8_has_a_scale_for_every_block_even_a_part_of_one() -> None:
    assert precision("fp8").experts.nbytes(129, 256) == 129 * 256 + 4 * 2 * 2
    assert "did you mean 'w8a8'" in user_error(precision, "w8a")


def test_only_w8a8_and_fp8_multiply_in_eight_bits() -> None:
    assert {name: one.dtypes for name, one in PRECISIONS.items()} == {
        "fp32": ("fp32",),
        "bf16": ("bf16",),
        "fp8": ("fp8", "bf16"),
        "w8a8": ("int8", "bf16"),
        "w4a16": ("bf16",),
        "w4a16-all": ("bf16",),
    }


@pytest.mark.parametrize(
    "sharding",
    [Sharding(), Sharding(2), Sharding(8), Sharding(8, 8), Sharding(4, 2), Sharding(2, 4, 4), Sharding(1, 4, 4)],
    ids=str,
)
def test_a_card_holds_what_a_rank_of_the_real_model_holds(sharding: Sharding) -> None:
    config, heads = BailingMoeV2Config(**FLASH), SHAPE.num_key_value_heads
    stored = PRECISIONS["fp32"]
    with torch.device("meta"):
        parallel = Parallel.mesh(Imagined(0, sharding.cards), sharding.tensor, sharding.experts)
        model = BailingMoeV2ForCausalLM(config, parallel)
    held = sum(parameter.nbytes for parameter in model.parameters())
    sharding.check(SHAPE)
    # vLLM divides the embedding too, the lean engine does not.
    undivided = weight_bytes(SHAPE, stored).embedding * (1 - 1 / sharding.tensor)
    assert weight_bytes_per_card(SHAPE, stored, sharding) + undivided == held
    assert sharding.kv_shards(SHAPE) == heads / len(parallel.heads(config)[1])


@pytest.mark.parametrize(
    ("sharding", "words"),
    [
        (Sharding(3), "num_attention_heads 32 does not divide into 3 cards"),
        (Sharding(4, 3), "3 blocks of experts do not divide the 4 cards"),
        (Sharding(0), "do not divide the 0 cards"),
        (Sharding(1, 1, 3), "moe_intermediate_size 1024 does not divide into 3 cards"),
    ],
)
def test_what_does_not_divide_is_refused(sharding: Sharding, words: str) -> None:
    assert words in user_error(sharding.check, SHAPE)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(list(PRECISIONS)),
    batch=st.integers(1, 300),
    context=st.integers(0, 10_000),
    tensor=st.sampled_from([1, 2, 4, 8]),
    data=st.sampled_from([1, 2, 4]),
    drafts=st.integers(0, 7),
)
def test_a_step_costs_all_cards_at_least_what_it_costs_one(
    name: str, batch: int, context: int, tensor: int, data: int, drafts: int
) -> None:
    whole = decode_work(SHAPE, PRECISIONS[name], batch, context, drafts=drafts)
    sharding = Sharding(tensor, 1, data)
    part = decode_work(SHAPE, PRECISIONS[name], batch, context, sharding, drafts=drafts)
    for what, work in whole.items():
        assert part[what].nbytes * sharding.cards >= work.nbytes * (1 - 1e-9)
        assert part[what].flops * sharding.cards >= work.flops * (1 - 1e-9)
        if data == 1:
            assert part[what].flops * tensor == pytest.approx(work.flops)
    assert part["attention"].nbytes == kv_bytes_per_card(SHAPE, batch, context, sharding)


def test_flops_are_two_for_every_active_weight() -> None:
    work = decode_work(SHAPE, PRECISIONS["bf16"], 3, 0)
    exact = active_parameters(SHAPE) + parameters(SHAPE).head
    idle = parameters(SHAPE).norms  # read, but multiplied with no matrix
    assert sum(part.flops for part in work.values()) == pytest.approx(2 * 3 * (exact - idle))


def test_distinct_experts_of_one_token_are_its_own_and_of_many_all() -> None:
    assert distinct_experts(SHAPE, 1) == pytest.approx(8)
    assert 255.9 < distinct_experts(SHAPE, 300) < 256
    assert decode_work(SHAPE, PRECISIONS["bf16"], 4, 0, distinct=8)["routed_experts"].nbytes == pytest.approx(
        decode_work(SHAPE, PRECISIONS["bf16"], 1, 0)["routed_experts"].nbytes
    )


def test_a_tied_head_is_read_though_it_is_stored_once() -> None:
    tied = replace(SHAPE, tie_word_embeddings=True)
    assert parameters(tied).head == 0
    assert decode_work(tied, PRECISIONS["bf16"], 1, 0)["head"] == decode_work(SHAPE, PRECISIONS["bf16"], 1, 0)["head"]
