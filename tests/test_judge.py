"""The verdict of `perf parity` on made-up numbers: each limit can be kept, and can be passed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.parity.judge import Comparison, Divergence, DriftNumbers, LayerNumbers, LogitNumbers, Verdict, all_checks
from perf.parity.judge import judge as summed_up
from perf.parity.judge_served import QuantileNumbers, ServedNumbers, served_checks
from perf.parity.limits import LIMITS, Limits

FIELDS = (
    "attention",
    "attention_gain",
    "norm",
    "norm_gain",
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


def judge(numbers: Comparison, limits: Limits) -> Verdict:
    return summed_up(all_checks(numbers, limits))


def comparison(**changed: Any) -> Comparison:
    good: dict[str, Any] = {"embedding": 0.0, "layers": [LayerNumbers("layer 0"), LayerNumbers("layer 1")]}
    good |= {"drift": [], "divergences": []}
    logits = ("head", "whole", "whole_clean", "decode", "decode_clean", "forced", "forced_decode")
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


@pytest.mark.parametrize("number", ["delta", "kl_max", "margin"])
def test_the_heads_logits_are_judged_strictly(number: str) -> None:
    assert not judge(comparison(head=LogitNumbers(8, **{number: 0.7})), LIMITS["bf16"]).passed


@pytest.mark.parametrize("where", ["forced", "forced_decode"])
@pytest.mark.parametrize(("number", "far"), [("delta", 1.6), ("kl_mean", 0.021), ("delta", float("nan"))])
def test_passes_on_the_same_experts_are_judged_strictly_and_others_are_not(where: str, number: str, far: float) -> None:
    verdict = judge(comparison(**{where: LogitNumbers(8, **{number: far})}), LIMITS["bf16"])
    assert len(verdict.reasons) == 1
    assert "on a's experts" in verdict.reasons[0]
    assert judge(comparison(whole=LogitNumbers(8, delta=9.0, kl_mean=1.9)), LIMITS["bf16"]).passed
    assert not judge(comparison(whole=LogitNumbers(8, kl_mean=3.0)), LIMITS["bf16"]).passed


def test_deeper_models_round_more() -> None:
    deep = [DriftNumbers(f"layer {index}", 0.0, 0.0, 0.0) for index in range(32)]
    numbers = LogitNumbers(8, delta=2.9, kl_mean=0.079)  # 1.5 times the root of four, 0.02 times four
    assert judge(comparison(forced=numbers, drift=deep), LIMITS["bf16"]).passed
    assert not judge(comparison(forced=numbers, drift=deep[:28]), LIMITS["bf16"]).passed


def test_the_first_reason_in_the_order_of_computation_names_the_cause() -> None:
    layer = LayerNumbers("layer 0", attention=1.0, first=0.0, mlp=1.0, stream=1.0)
    assert "what positions" in str(judge(comparison(layers=[layer]), LIMITS["fp32"]).cause)
    sized = LayerNumbers("layer 0", attention=0.0, attention_gain=1.0)
    assert "attention or its weights" in str(judge(comparison(layers=[sized]), LIMITS["fp32"]).cause)
    everywhere = dataclasses.replace(layer, first=1.0)
    assert "attention or its weights" in str(judge(comparison(layers=[everywhere]), LIMITS["fp32"]).cause)
    assert "embedding" in str(judge(comparison(layers=[layer], embedding=1e-9), LIMITS["fp32"]).cause)


def test_the_first_layer_whose_stream_has_drifted_too_far_is_named() -> None:
    limit = LIMITS["bf16"].drift
    near = [DriftNumbers(f"layer {n}", 0.9 * limit * (n + 1) ** 0.5, 9.0, 9.0) for n in range(4)]
    assert judge(comparison(drift=near), LIMITS["bf16"]).passed
    far = [*near[:2], *(dataclasses.replace(one, clean=2 * one.clean) for one in near[2:])]
    verdict = judge(comparison(drift=far), LIMITS["bf16"])
    assert verdict.reasons[0].startswith("whole pass after layer 2: drift of the stream ")
    assert "up to layer 2" in str(verdict.cause)


def test_a_diverged_token_is_explained_by_rounding_or_by_a_near_tie_before_it() -> None:
    limits = LIMITS["bf16"]
    one = Divergence("decode", 0, 3, lead=1.9 * limits.logits, moved=2 * limits.logits, after_flip=False)
    assert one.explained(limits)
    assert not dataclasses.replace(one, lead=2.1 * limits.logits).explained(limits)
    assert dataclasses.replace(one, lead=2.1 * limits.logits, after_flip=True).explained(limits)


def served(first: float, middle: float, tail: float, decode: float, begin: float = 1e3) -> ServedNumbers:
    shares = zip((0.1, 0.25, 0.5, 0.75, 0.9), (first, middle, middle, middle, tail), strict=True)
    quantiles = [QuantileNumbers(share, factor * 1e-3, 1e-3) for share, factor in shares]
    return ServedNumbers(400, 9, 0.0, 400, quantiles, begin * 1e-3, 40, decode * 1e-3, 0.1, 0.2, 0.01, 1.0, 1.0, [])


@given(st.floats(0.01, 0.99), st.floats(1.01, 100.0), st.sampled_from(("first", "middle", "tail", "decode")))
@pytest.mark.parametrize("precision", LIMITS)
def test_a_server_is_judged_by_how_far_rounding_takes_the_model(
    precision: str, share: float, excess: float, which: str
) -> None:
    limits = LIMITS[precision]
    at = {"first": limits.first, "middle": limits.middle, "tail": limits.tail, "decode": limits.tail}
    kept = {name: share * limit for name, limit in at.items()}
    assert summed_up(served_checks(served(**kept), limits)).passed
    for value in (excess * at[which], float("nan")):
        verdict = summed_up(served_checks(served(**kept | {which: value}), limits))
        assert len(verdict.reasons) == 1
        assert "no layers" in str(verdict.cause)


def test_where_first_tokens_agree_positions_are_named() -> None:
    limits = LIMITS["bf16"]
    far = {"first": 1.0, "middle": 2 * limits.middle, "tail": 1.0, "decode": 1.0}
    named, not_named = (
        summed_up(served_checks(served(**far, begin=factor * limits.middle), limits)) for factor in (0.9, 1.1)
    )
    assert str(named.cause).startswith("what positions or keys decide")
    assert "positions" not in str(not_named.cause)


def test_a_single_position_before_any_near_tie_is_enough() -> None:
    limits = LIMITS["fp32"]
    far = dataclasses.replace(served(1.0, 1.0, 1.0, 1.0), settled_max=2 * limits.logits)
    assert summed_up(served_checks(far, limits)).reasons[0].startswith("prompt: largest distance before any near-tie")
