"""Rotary frequencies against transformers' own functions, and angles against fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

from ascend.config import BailingMoeV2Config
from ascend.rope import Rope, cos_sin

MANY = settings(deadline=None, max_examples=200)
THETA = st.floats(100.0, 1e7)
# Even rotary dimensions of a head, as (head_dim, rotary_dim).
DIMENSIONS = st.integers(1, 64).flatmap(lambda half: st.tuples(st.integers(half, 64), st.just(half))).map(
    lambda halves: (2 * halves[0], 2 * halves[1])
)  # fmt: skip
YARN = st.fixed_dictionaries(
    {
        "factor": st.floats(1.0, 64.0),
        "original_max_position_embeddings": st.integers(1, 131072),
    },
    optional={
        "beta_fast": st.floats(2.0, 128.0),
        "beta_slow": st.floats(0.1, 2.0),
        "mscale": st.floats(0.1, 4.0),
        "mscale_all_dim": st.floats(0.1, 4.0),
        "attention_factor": st.floats(0.1, 4.0),
        "truncate": st.booleans(),
    },
)


def ours(config: BailingMoeV2Config) -> tuple[Tensor, float]:
    rope = Rope.from_config(config)
    return rope.inverse_frequencies(), rope.attention_factor


@given(yarn=YARN, theta=THETA, dimensions=DIMENSIONS, spelling=st.sampled_from(["type", "rope_type"]))
@MANY
def test_yarn_is_transformers_own(
    yarn: dict[str, Any], theta: float, dimensions: tuple[int, int], spelling: str
) -> None:
    head_dim, rotary_dim = dimensions
    config = BailingMoeV2Config(
        head_dim=head_dim, rotary_dim=rotary_dim, rope_theta=theta, rope_scaling={spelling: "yarn", **yarn}
    )
    frequencies, attention_factor = ours(config)
    expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    assert frequencies.shape == (rotary_dim // 2,)
    assert torch.equal(frequencies, expected)
    assert attention_factor == expected_factor


@given(theta=THETA, dimensions=DIMENSIONS)
@MANY
def test_plain_rope_is_transformers_own(theta: float, dimensions: tuple[int, int]) -> None:
    head_dim, rotary_dim = dimensions
    config = BailingMoeV2Config(head_dim=head_dim, rotary_dim=rotary_dim, rope_theta=theta)
    # transformers 5 has it in each model's own file, of which Glm4Moe's knows partial rotary embedding.
    default = ROPE_INIT_FUNCTIONS.get("default") or Glm4MoeRotaryEmbedding.compute_default_rope_parameters
    expected, expected_factor = default(config, torch.device("cpu"))
    frequencies, attention_factor = ours(config)
    assert torch.equal(frequencies, expected)
    assert attention_factor == expected_factor == 1.0
    by_hand = torch.tensor([theta ** (-2 * pair / rotary_dim) for pair in range(rotary_dim // 2)])
    torch.testing.assert_close(frequencies, by_hand, rtol=1e-6, atol=0)


def test_antangelmeds_yarn_in_numbers() -> None:
    # Pairs that turn over 32 times within the 32K of training stay as they are, those that turn less than once are
    # slowed by the factor, and those between by something between.
    config = BailingMoeV2Config(
        partial_rotary_factor=0.5,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        max_position_embeddings=131072,
    )
    frequencies, attention_factor = ours(config)
    plain = 600000.0 ** (-torch.arange(32) / 32)
    turns = 32768 * plain / (2 * math.pi)
    ratio = frequencies / plain
    assert torch.allclose(ratio[: int((turns > 32).sum()) - 1], torch.tensor(1.0))
    assert torch.allclose(ratio[int((turns > 1).sum()) + 1 :], torch.tensor(0.25))
    assert ((ratio[1:] - ratio[:-1]) < 1e-6).all()
    assert attention_factor == pytest.approx(1.1386294)


def test_theta_written_into_the_rope_dictionary_later_wins() -> None:
    config = BailingMoeV2Config(rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64})
    config.rope_scaling["rope_theta"] = 1234.0
    assert Rope.from_config(config).theta == 1234.0


@given(position=st.integers(0, 131071), factor=st.floats(0.5, 2.0))
@MANY
def test_angles_are_those_of_fp64(position: int, factor: float) -> None:
    frequencies = Rope(64, 600000.0).inverse_frequencies()
    cos, sin = cos_sin(frequencies, factor, torch.tensor([[position]]))
    # fp32 holds the product to 24 bits, which at an angle of 131071 is 0.008 radians.
    angle = (position * frequencies.double()).float().double()
    assert cos.shape == sin.shape == (1, 1, 32)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos[0, 0].double(), angle.cos() * factor, atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[0, 0].double(), angle.sin() * factor, atol=1e-6, rtol=0)
