"""`convert.cards`: the fewest cards that hold a checkpoint, by the arithmetic of `ascend.cost`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend.cost import Sharding, kv_bytes_per_card, weight_bytes, weight_bytes_per_card
from ascend.devices.facts import TABLE, GiB
from ascend.model_shape import ModelShape
from ascend.precision import PRECISIONS
from ascend.roofline import USABLE_MEMORY
from convert.cards import ACTIVATIONS, COUNTS, Fit, fits, table
from convert.demo_config import demo_config

ROOT = Path(__file__).parents[1]
FLASH = ModelShape.from_config(demo_config("ling-flash", 0, "bf16", 4.0, {})[0])
CONTEXT = 131072


def of_flash(name: str) -> dict[str, Fit]:
    return {fit.card: fit for fit in fits(FLASH, weight_bytes(FLASH, PRECISIONS[name]), {name}, CONTEXT)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # 192, 97, 97 and 54 GiB of weights, 8 GiB of keys and values
        ("bf16", {"910B2": 4, "910B4": 8, "H20-96G": 4, "H100-80G": 4, "H200-141G": 2}),
        ("fp8", {"910B2": None, "910B4": None, "H20-96G": 2, "H100-80G": 2, "H200-141G": 1}),
        ("w8a8", {"910B2": 2, "910B4": 4, "H20-96G": 2, "H100-80G": 2, "H200-141G": 1}),
        ("w4a16", {"910B2": 1, "910B4": 4, "H20-96G": 1, "H100-80G": 1, "H200-141G": 1}),
    ],
)
def test_the_real_model_on_real_cards(name, expected):
    found = of_flash(name)
    assert set(found) == set(TABLE) - {"CPU"}
    # One 910B holds the INT4 weights, but not the keys and values of 128K tokens beside them.
    expected = expected | ({"910B2": 2} if name == "w4a16" else {})
    assert {card: found[card].cards for card in expected} == expected


@pytest.mark.parametrize("name", ["bf16", "w8a8", "w4a16"])
def test_bytes_of_a_card_are_those_of_cost(name):
    for fit in of_flash(name).values():
        assert fit.cards is not None
        division = Sharding(fit.cards, fit.cards)
        assert fit.weights == pytest.approx(
            weight_bytes_per_card(FLASH, PRECISIONS[name], division), rel=1e-5
        )  # the bias is fp32
        assert fit.kv == kv_bytes_per_card(FLASH, 1, CONTEXT, division)
        assert fit.free == pytest.approx(fit.memory * USABLE_MEMORY - ACTIVATIONS - fit.weights - fit.kv)
        assert fit.free >= 0


def test_a_card_without_fp8_is_told_what_to_do():
    found = of_flash("fp8")
    assert found["910B2"].why == "it has no FP8; convert to w8a8 first"
    assert not found["H20-3e-141G"].why  # it has FP8, at a speed that nobody has said
    channel = fits(FLASH, {}, {"plain", "fp8-channel"}, CONTEXT)
    assert {fit.card for fit in channel if fit.why} == {name for name in TABLE if name.startswith(("910B", "A"))}


def test_what_is_stored_counts_and_not_the_formula():
    bf16 = vars(weight_bytes(FLASH, PRECISIONS["bf16"]))
    base = {fit.card: fit for fit in fits(FLASH, bf16, {"plain"}, CONTEXT)}["H200-141G"]
    assert base.cards == 2
    for part, extra, share in (("routed_experts", 4e9, 2), ("head", 2e9, 2), ("mtp", 1e9, 1), ("router", 1e9, 1)):
        more = fits(FLASH, bf16 | {part: bf16.get(part, 0) + extra}, {"plain"}, CONTEXT)
        weights = {fit.card: fit for fit in more}["H200-141G"].weights
        assert weights - base.weights == pytest.approx(extra / share, rel=0.01), part


def test_too_large_a_model_says_how_much_is_short():
    doubled = {part: 8 * nbytes for part, nbytes in vars(weight_bytes(FLASH, PRECISIONS["bf16"])).items()}
    found = {fit.card: fit for fit in fits(FLASH, doubled, {"plain"}, CONTEXT)}
    lost = found["910B4"]
    assert lost.cards is None
    assert lost.division == "TP16 EP16"
    assert lost.short == pytest.approx(lost.weights + lost.kv + ACTIVATIONS - 32 * GiB * USABLE_MEMORY)
    assert f"no: {lost.short / GiB:.1f} GiB short on each of 16 (TP16 EP16)" in table(list(found.values()))
    assert found["H200-141G"].cards == 16


def test_the_longer_load_decides():
    long, short = (
        {fit.card: fit for fit in fits(FLASH, {}, {"plain"}, context)}["910B2"].kv for context in (131072, 16384)
    )
    assert long == kv_bytes_per_card(FLASH, 1, 131072)
    assert short == kv_bytes_per_card(FLASH, 8, 8192)
    assert {fit.kv for fit in fits(FLASH, {}, {"plain"}, 1024)} == {kv_bytes_per_card(FLASH, 8, 1024)}


def test_heads_that_do_not_divide_are_divided_by_data():
    shape = replace(FLASH, num_attention_heads=6, num_key_value_heads=2, moe_intermediate_size=1023)
    nbytes = weight_bytes(shape, PRECISIONS["bf16"])
    found = {fit.card: fit for fit in fits(shape, nbytes, {"plain"}, 4096)}
    assert found["910B4"].division == "TP2 EP8 DP4"
    odd = replace(FLASH, num_experts=7, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=9)
    large = {"routed_experts": 1e12}
    assert {fit.division for fit in fits(odd, large, {"plain"}, 4096)} == {"whole"}
    assert all(fit.cards is None and fit.short > 0 for fit in fits(odd, large, {"plain"}, 4096))


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 40),
    experts=st.sampled_from([2, 5, 8, 60, 256]),
    width=st.integers(1, 2000),
    gigabytes=st.floats(0, 5000),
    context=st.integers(1, 10**6),
)
def test_the_answer_is_the_fewest_that_fit(heads, experts, width, gigabytes, context):
    shape = replace(
        FLASH, num_attention_heads=heads, num_key_value_heads=1, num_experts=experts, moe_intermediate_size=width,
        n_group=1, topk_group=1, num_experts_per_tok=1,
    )  # fmt: skip
    found = fits(shape, {"routed_experts": gigabytes * 1e9}, {"plain"}, context)
    for fit in found:
        assert (fit.cards is None) == (fit.short > 0)
        assert fit.cards is None or (fit.cards in COUNTS and fit.free >= 0)
        larger = [other for other in found if other.memory > fit.memory]
        assert all(fit.cards is None or (other.cards or 99) <= fit.cards for other in larger)
    assert len(table(found).splitlines()) <= 1 + len(found)


def test_a_table_names_alike_cards_once():
    text = table(list(of_flash("w8a8").values()))
    assert text.count("910B1/2/2C/3/4-1 ") == 1
    assert "H20-3e-141G, H200-141G" in text
    assert max(map(len, text.splitlines())) <= 100


def test_it_needs_neither_torch_nor_transformers():
    code = (
        "import sys, json, convert.cards, convert.inspect;"
        "print(json.dumps(sorted({'torch', 'transformers'} & set(sys.modules))))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert json.loads(result.stdout) == [], result.stderr
