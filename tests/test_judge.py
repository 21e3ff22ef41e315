"""The verdict of `perf parity` on made-up numbers: each limit can be kept, and can be passed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.judge import LIMITS, Comparison, LayerNumbers, LogitNumbers, Verdict, judge

FIELDS = (
    "attention",
    "attention_gain",
    "router",
    "scores",
    "misrouted",
    "unexplained",
    "weights",
    "mlp",
    "mlp_gain",
    "stream",
)
GOOD = LogitNumbers(8)


def comparison(**changed: Any) -> Comparison:
    good: dict[str, Any] = {"embedding": 0.0, "layers": [LayerNumbers("layer 0"), LayerNumbers("layer 1")]}
    logits = ("head", "whole", "whole_clean", "decode", "decode_clean")
    return Comparison(**good | dict.fromkeys(logits, GOOD) | changed)


@pytest.mark.parametrize("precision", LIMITS)
def test_nothing_different_passes_in_every_precision(precision: str) -> None:
    assert judge(comparison(), LIMITS[precision]) == Verdict()


@given(
    name=st.sampled_from(FIELDS), value=st.one_of(st.floats(0.21, 1e30), st.just(float("nan")), st.just(float("inf")))
)
@pytest.mark.parametrize("precision", LIMITS)
def test_one_number_out_of_its_limit_fails_and_names_the_layer(precision: str, name: str, value: float) -> None:
    verdict = judge(
        comparison(layers=[LayerNumbers("layer 0"), LayerNumbers("MTP 0", **{name: value})]), LIMITS[precision]
    )
    assert not verdict.passed
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith("MTP 0: ")
    assert verdict.cause


@given(st.sampled_from(("part", "stream", "gain", "router", "scores")), st.sampled_from([*LIMITS]), st.floats(0.01, 1))
def test_a_number_within_its_limit_passes(limit: str, precision: str, share: float) -> None:
    value = share * getattr(LIMITS[precision], limit)
    names = {"part": ("attention", "mlp"), "gain": ("attention_gain", "mlp_gain"), "router": ("router", "weights")}.get(
        limit, (limit,)
    )
    layer = LayerNumbers("layer 0", **dict.fromkeys(names, value))
    assert judge(comparison(layers=[layer]), LIMITS[precision]).passed


def test_a_factor_below_one_counts_as_one_above() -> None:
    assert not judge(comparison(layers=[LayerNumbers("layer 0", mlp_gain=-0.01)]), LIMITS["bf16"]).passed


@pytest.mark.parametrize("where", ["head", "whole_clean", "decode_clean"])
@pytest.mark.parametrize("number", ["delta", "kl_max", "margin"])
def test_logits_before_a_flip_are_judged_strictly_and_those_after_it_are_not(where: str, number: str) -> None:
    assert not judge(comparison(**{where: LogitNumbers(8, **{number: 0.7})}), LIMITS["bf16"]).passed
    assert judge(comparison(whole=LogitNumbers(8, **{number: 0.7})), LIMITS["bf16"]).passed
    assert not judge(comparison(whole=LogitNumbers(8, kl_mean=3.0)), LIMITS["bf16"]).passed


def test_the_first_reason_in_the_order_of_computation_names_the_cause() -> None:
    layer = LayerNumbers("layer 0", attention=1.0, first=0.0, mlp=1.0, stream=1.0)
    assert "positions" in str(judge(comparison(layers=[layer]), LIMITS["fp32"]).cause)
    everywhere = dataclasses.replace(layer, first=1.0)
    assert "attention or its weights" in str(judge(comparison(layers=[everywhere]), LIMITS["fp32"]).cause)
    assert "embedding" in str(judge(comparison(layers=[layer], embedding=1e-9), LIMITS["fp32"]).cause)
