"""Limits: every number of the reference tables, sampled ones within their noise, and the command that prints them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ascend.cost import (
    Sharding,
    active_parameters,
    decode_work,
    distinct_experts,
    kv_bytes_per_token,
    parameters,
    weight_bytes,
)
from ascend.model_shape import DENSE_36B, ModelShape
from ascend.precision import PRECISIONS
from ascend.roofline import USABLE_MEMORY, StepLimit, decode_step, memory, prefill, speculation
from ascend.routing import MeasuredRouting, Routing, SkewedRouting
from convert.demo_config import demo_config
from ops.placement import write_loads
from perf.roofline import main
from tests import roofline_tables as tables
from tests.tiny import user_error

FLASH = ModelShape.from_config(demo_config("ling-flash", 0, "bf16", None, {})[0])
BF16, FP8 = PRECISIONS["bf16"], PRECISIONS["fp8"]
# The tables leave out what is below 0.02 % of a step: norms, biases and the embedding's row.
LEFT_OUT = 2.5e-4


def equals(ours: float, printed: float, decimals: int) -> bool:
    """Whether ``ours`` is what was rounded to ``printed``, but for what the tables leave out."""
    return abs(ours - printed) <= 0.5 * 10**-decimals + LEFT_OUT * printed


def step(
    precision: str, chip: str, tensor: int, batch: int, context: int, shape: ModelShape = FLASH, **how: Any
) -> StepLimit:
    return decode_step(shape, PRECISIONS[precision], batch, context, tables.CHIPS[chip], Sharding(tensor), **how)


def test_t1_parameters() -> None:
    ours = parameters(FLASH)
    for part, printed in tables.PARAMETERS.items():
        assert equals(getattr(ours, part) / 1e9, printed, 3), part
    active, read = active_parameters(FLASH), active_parameters(FLASH) + ours.head
    assert equals(ours.total / 1e9, tables.TOTAL, 3)
    assert equals(active / 1e9, tables.ACTIVE, 3)
    assert equals((read + ours.embedding) / 1e9, tables.ACTIVE_WITH_EMBEDDINGS, 3)
    assert equals(read / 1e9, tables.READ_AT_BATCH_1, 3)
    dense = parameters(DENSE_36B)
    assert equals(dense.total / 1e9, tables.DENSE_TOTAL, 3)
    assert equals((dense.total - dense.embedding) / 1e9, tables.DENSE_READ, 3)


@pytest.mark.parametrize("batch", tables.WEIGHTS)
def test_t2_distinct_experts_and_bytes(batch: int) -> None:
    experts, per_expert, *cells = tables.WEIGHTS[batch]
    distinct = distinct_experts(FLASH, batch)
    assert equals(distinct, experts, 1)
    assert equals(batch * 8 / distinct, per_expert, 2)
    for name, (per_step, per_token) in zip(tables.PRECISIONS, cells, strict=True):
        nbytes = sum(part.nbytes for part in decode_work(FLASH, PRECISIONS[name], batch, 0).values()) / 1e9
        assert equals(nbytes, per_step, 2), name
        assert equals(nbytes / batch, per_token, 2), name


def test_t2_whole_model() -> None:
    for name, printed in zip(tables.PRECISIONS, tables.WHOLE, strict=True):
        assert equals(weight_bytes(FLASH, PRECISIONS[name]).total / 1e9, printed, 1), name


@pytest.mark.parametrize(("shape", "row"), [(FLASH, tables.KV), (DENSE_36B, tables.KV_DENSE)], ids=["moe", "dense"])
def test_t3_kv_cache(shape: ModelShape, row: tuple[float, ...]) -> None:
    assert kv_bytes_per_token(shape) == row[0]
    for tokens, printed in zip((4096, 32768, 131072), row[1:], strict=False):
        assert equals(tokens * kv_bytes_per_token(shape) / 1e9, printed, 2)
    assert equals(131072 * kv_bytes_per_token(shape, 1) / 1e9, row[4], 2)


@pytest.mark.parametrize(("precision", "chip", "tensor"), tables.DECODE)
def test_t4_decode(precision: str, chip: str, tensor: int) -> None:
    for batch, printed in zip((1, 8, 32, 128), tables.DECODE[precision, chip, tensor], strict=True):
        assert equals(step(precision, chip, tensor, batch, 2048).tokens_per_second, printed, 0), batch


@pytest.mark.parametrize(("precision", "context"), tables.LONG)
def test_t5_long_context(precision: str, context: int) -> None:
    for batch, printed in zip((1, 8, 32, 128), tables.LONG[precision, context], strict=True):
        installed = tables.CHIPS["H20-96G"].memory
        held = memory(FLASH, PRECISIONS[precision], batch, context, installed, Sharding(4))
        assert held.verdict == ("fits" if printed else "KV does not fit"), batch
        if printed:
            assert equals(step(precision, "H20-96G", 4, batch, context).tokens_per_second, printed, 0), batch


@pytest.mark.parametrize(
    ("table", "too_large", "batches", "point"),
    [
        (tables.DENSE_BF16, tables.DENSE_BF16_TOO_LARGE, (1, 8, 32, 128), ("bf16", "H20-96G", 4)),
        (tables.DENSE_FP8, tables.DENSE_FP8_TOO_LARGE, (1, 2, 4, 8, 16, 32, 128), ("fp8", "H200-141G", 1)),
    ],
    ids=["t6", "t6b"],
)
def test_t6_against_the_dense_model(
    table: dict[int, tuple[float, ...]],
    too_large: set[tuple[int, int]],
    batches: tuple[int, ...],
    point: tuple[str, str, int],
) -> None:
    precision, chip, tensor = point
    for context, row in table.items():
        for batch, printed in zip(batches, row, strict=True):
            ours, dense = (step(*point, batch, context, shape).tokens_per_second for shape in (FLASH, DENSE_36B))
            assert equals(ours / dense, printed, 2), (context, batch)
            installed = tables.CHIPS[chip].memory
            held = [
                memory(shape, PRECISIONS[precision], batch, context, installed, Sharding(tensor)).verdict
                for shape in (FLASH, DENSE_36B)
            ]
            assert (held != ["fits", "fits"]) == ((context, batch) in too_large), (context, batch)


@pytest.mark.parametrize("chip", tables.PREFILL)
def test_t7_prefill(chip: str) -> None:
    low = PRECISIONS["w8a8" if chip.startswith("910") else "fp8"]
    points = [*((BF16, length * 1024) for length in (2, 8, 32, 128)), *((low, length * 1024) for length in (2, 32))]
    *printed, chunk = tables.PREFILL[chip]
    for (precision, length), tokens in zip(points, printed, strict=True):
        assert equals(prefill(FLASH, precision, length, tables.CHIPS[chip]).tokens_per_second, tokens, 0)
    assert equals(prefill(FLASH, BF16, 2048, tables.CHIPS[chip]).compute_bound_chunk, chunk, 0)


@pytest.mark.slow
def test_t8_expert_parallel_imbalance() -> None:
    """Both sides are sampled: two digits, and 2 % where the table's own few samples scatter (3.51, exactly 3.48)."""
    for tokens, row in tables.IMBALANCE.items():
        for blocks, (uniform, grouped) in zip((2, 4, 8), row, strict=True):
            for grouping, printed in ((False, uniform), (True, grouped)):
                ours = Routing(grouped=grouping).imbalance(FLASH, tokens, blocks)
                assert ours == pytest.approx(printed, abs=0.01, rel=0.015), (tokens, blocks, grouping)
    assert Routing().imbalance(FLASH, 1, 1) == 1


@pytest.mark.parametrize(("precision", "chip", "tensor"), tables.SPECULATION)
def test_t9_speculation(precision: str, chip: str, tensor: int) -> None:
    for batch, (experts, *cells) in tables.SPECULATION[precision, chip, tensor].items():
        assert equals(distinct_experts(FLASH, batch), experts[0], 0)
        assert equals(distinct_experts(FLASH, 4 * batch), experts[1], 0)
        plain = step(precision, chip, tensor, batch, 1024)
        for (drafts, acceptance), (speedup, cost) in zip(tables.DRAFTS, cells, strict=True):
            verify = step(precision, chip, tensor, batch, 1024, drafts=drafts)
            ours = speculation(plain, verify, drafts, acceptance, batch, tables.CHIPS[chip], Sharding(tensor))
            assert equals(ours.cost, cost, 2), (batch, drafts)
            assert equals(ours.speedup, speedup, 2), (batch, drafts)
            assert ours.tokens_per_second == pytest.approx(plain.tokens_per_second * ours.speedup)


@pytest.mark.slow  # samples for some seconds
def test_t11_skewed_routing() -> None:
    """Both sides are sampled; the table seems to have drawn few popularities, so 2 % or its rounding."""
    for tokens, (uniform, *row) in tables.SKEWED.items():
        assert equals(Routing().distinct(FLASH, tokens), uniform, 0)
        for sigma, printed in zip((0.5, 1.0, 1.5, 2.0), row, strict=True):
            assert SkewedRouting(sigma=sigma).distinct(FLASH, tokens) == pytest.approx(printed, abs=0.5, rel=0.02)


@pytest.mark.parametrize(("width", "precision"), tables.LAYER)
def test_t12_one_moe_layer(width: int, precision: str) -> None:
    layer = replace(
        FLASH,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        moe_intermediate_size=width,
        moe_shared_expert_intermediate_size=width,
    )
    stored = weight_bytes(layer, PRECISIONS[precision])
    for tokens, printed in zip((1, 8, 32, 64, 128), tables.LAYER[width, precision], strict=True):
        routed = stored.routed_experts * distinct_experts(layer, tokens) / layer.num_experts
        assert equals((routed + stored.shared_experts + stored.router) / 1e6, printed, 0)


@pytest.mark.parametrize(("precision", "chip", "tensor"), tables.ALL_REDUCE)
def test_t13_all_reduces(precision: str, chip: str, tensor: int) -> None:
    for microseconds, printed in zip((0, 5, 10, 20, 40), tables.ALL_REDUCE[precision, chip, tensor], strict=True):
        limit = step(precision, chip, tensor, 1, 1024, all_reduce=microseconds * 1e-6)
        assert equals(limit.tokens_per_second, printed, 0), microseconds


def test_a_step_takes_the_time_of_its_parts() -> None:
    limit = step("bf16", "H20-96G", 4, 128, 2048, all_reduce=1e-6)
    assert limit.seconds == pytest.approx(sum(limit.parts.values()))
    assert limit.tokens_per_second == pytest.approx(128 / limit.seconds)
    assert limit.compute_bound == ("matmuls", "head")
    assert limit.parts["communication"] == pytest.approx(64e-6)
    alone = decode_step(FLASH, BF16, 8, 0, tables.CHIPS["H20-96G"], Sharding(1, 4, 4), all_reduce=1e-6)
    assert alone.parts["communication"] == pytest.approx(32e-6)  # whole attention on each card: one exchange a layer


def test_whole_experts_slow_a_step_by_their_imbalance() -> None:
    even, uneven = (
        decode_step(FLASH, FP8, 1, 0, tables.CHIPS["H20-96G"], Sharding(8, experts)).parts["routed_experts"]
        for experts in (1, 8)
    )
    assert uneven / even == pytest.approx(Routing().imbalance(FLASH, 1, 8))


@pytest.mark.parametrize(
    ("share", "verdict"),
    [(0.99, "weights do not fit"), (1.0, "KV does not fit"), (1.5, "fits"), (None, "unknown")],
)
def test_memory_verdicts(share: float | None, verdict: str) -> None:
    weights = weight_bytes(FLASH, FP8).total
    installed = None if share is None else weights * share / USABLE_MEMORY * (1 + 1e-9)
    assert memory(FLASH, FP8, 1, 1, installed).verdict == verdict


def test_measured_loads_give_their_own_distinct_experts() -> None:
    equal = MeasuredRouting.of({1: [5.0] * 256, 2: [1.0] * 256}, 8)
    for tokens in (1, 7, 100):
        assert equal.distinct(FLASH, tokens) == pytest.approx(distinct_experts(FLASH, tokens))
    only_eight = MeasuredRouting.of({1: [9.0] * 8 + [0.0] * 248}, 8)
    assert only_eight.distinct(FLASH, 50) == pytest.approx(8)
    assert only_eight.imbalance(FLASH, 50, 8) == pytest.approx(8)  # all of them lie in the first block
    assert "fewer than 8 experts" in user_error(MeasuredRouting.of, {1: [1.0] * 7 + [0.0] * 249}, 8)
    assert "no layer" in user_error(MeasuredRouting.of, {}, 8)


ACCEPTANCE = ["--model", "ling-flash", "--cards", "4xH20-96G", "--precision", "fp8", "--batch", "1,8,32"]


def document(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[dict[str, Any], str]:
    assert main([*argv, "--json"]) == 0
    text = capsys.readouterr().out
    *lines, last = text.splitlines()
    return json.loads(last), "\n".join(lines)


def test_the_command_answers_without_torch() -> None:
    code = (
        f"import sys; from perf.roofline import main; main({ACCEPTANCE}); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for printed in ("LIMITS of ling-flash on 4 x H20-96G", "102.890", " 4,822 ", "LMSYS"):
        assert printed in done.stdout


def test_the_document_says_what_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    found, text = document(capsys, *ACCEPTANCE, "--context", "4096", "--measured", "200")
    for row, printed in zip(found["rows"], tables.LONG["fp8", 4096], strict=False):
        speed = row["limit"]["tokens_per_second"]
        assert equals(speed, printed, 0)
        assert row["share_of_limit"] == pytest.approx(200 / speed)
        assert f"{speed:,.0f}" in text
        assert f"{200 / speed:.0%} of limit" in text
        assert row["memory"]["verdict"] == "fits"


def test_speculation_and_measured_loads_and_data_parallel_groups(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_loads(tmp_path / "loads.json", {1: [1.0] * 256})
    how = ["--draft", "3", "--acceptance", "2.84", "--loads", str(tmp_path / "loads.json"), "--tp", "2"]
    found, text = document(capsys, *ACCEPTANCE, *how, "--measured", "100,200,300")
    assert found["sharding"] == {"tensor": 2, "experts": 1, "data": 2, "cards": 4}
    assert "as recorded in 1 layers" in text
    for row, measured in zip(found["rows"], (100, 200, 300), strict=True):
        gain = row["speculation"]
        assert gain["speedup"] == pytest.approx(2.84 / gain["cost"])
        assert row["share_of_limit"] == pytest.approx(measured / gain["tokens_per_second"])
        assert row["distinct_experts"] == pytest.approx(distinct_experts(FLASH, row["batch"]))
    verified = document(capsys, *ACCEPTANCE, "--draft", "3")[0]["rows"][0]["speculation"]
    assert verified["speedup"] is None
    assert verified["cost"] > 2


def test_flags_reach_the_limits(capsys: pytest.CaptureFixture[str]) -> None:
    (plain, *_), (latent, *_), (whole, *_), (small, *_), (skewed, *_) = (
        document(capsys, *ACCEPTANCE, *flags)[0]["rows"][-1:]
        for flags in ([], ["--allreduce-us", "10"], ["--ep", "4"], ["--kv-dtype", "fp8"], ["--skew", "1"])
    )
    assert latent["limit"]["seconds"] - plain["limit"]["seconds"] == pytest.approx(64 * 10e-6)
    assert whole["limit"]["parts"]["routed_experts"] == pytest.approx(
        whole["imbalance"] * plain["limit"]["parts"]["routed_experts"]
    )
    assert whole["imbalance"] > 1.1
    assert small["memory"]["kv"] == plain["memory"]["kv"] / 2
    assert skewed["distinct_experts"] < 0.8 * plain["distinct_experts"]


def test_unknown_figures_stay_unknown_until_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    cards = ["--model", "ling-flash", "--cards", "H20-3e-141G", "--precision", "fp8", "--draft", "3"]
    found, text = document(capsys, *cards)
    assert "unknown        no NVIDIA sheet found; 4.8 TB/s is only inferred" in text
    for row in found["rows"]:
        assert row["limit"] is row["against_dense_36b"] is row["speculation"] is row["share_of_limit"] is None
        assert row["bytes"]["routed_experts"] > 0
    assert found["prefill"][0]["tokens_per_second"] is None
    assert document(capsys, *cards, "--bandwidth", "4.8e12")[0]["rows"][0]["limit"] is None
    given = ["--bandwidth", "4.8e12", "--peak", "bf16=148e12,fp8=296e12"]
    found, text = document(capsys, *cards, *given)
    assert text.count("as given") == 3
    for row, printed in zip(found["rows"], tables.DECODE["fp8", "H20-3e-141G", 1], strict=False):
        assert equals(row["limit"]["tokens_per_second"], printed, 0)


def test_what_does_not_fit_has_no_speed_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    _, text = document(capsys, *ACCEPTANCE[:-1], "32", "--context", "131072")
    (line,) = (line for line in text.splitlines() if "KV does not fit" in line)
    assert line.split()[3:6] == ["-", "-", "-"]


def test_a_checkpoint_and_its_config_file_are_models(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = demo_config("ling-mini", 0, "bf16", None, {})[0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    where = [str(tmp_path), str(tmp_path / "config.json"), "ling-mini"]
    parts = [document(capsys, "--model", one, "--cards", "910B3")[0]["parameters"] for one in where]
    assert parts[0] == parts[1] == parts[2]
    cut = document(capsys, "--model", "ling-mini", "--cards", "910B3", "--layers", "1")[0]["parameters"]
    assert cut["routed_experts"] == 0 < cut["dense_mlp"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "ling-flsh"], "did you mean 'ling-flash'"),
        (["--cards", "4xH20-96"], "did you mean 'H20-96G'"),
        (["--cards", "0xH20-96G"], "write a number and a card"),
        (["--cards", "910B3"], "910B3 does not compute in fp8"),
        (["--cards", "3xH20-96G"], "does not divide into 3 cards"),
        (["--precison", "fp8"], "did you mean '--precision'"),
        (["--precision", "fp9"], "did you mean 'fp8'"),
        (["--tp", "3"], "--tp 3 does not divide the 4 cards"),
        (["--ep", "3"], "3 blocks of experts do not divide the 4 cards"),
        (["--tp", "0"], "--tp 0 is less than 1"),
        (["--acceptance", "2"], "between 1 and 1"),
        (["--skew", "nan"], "between 0"),
        (["--skew", "1", "--loads", "x"], "give one"),
        (["--loads", "/nowhere"], "cannot read expert loads"),
        (["--bandwidth", "-3"], "--bandwidth '-3' is not a number above zero"),
        (["--peak", "fp9=3"], "unknown dtype 'fp9'"),
        (["--peak", "bf16="], "not a number above zero"),
        (["--measured", "1,2"], "2 numbers for 3 batches"),
        (["--layers", "33"], "1 to 32 layers"),
        (["--allreduce-us", "inf"], "not a number from 0"),
    ],
)
def test_mistakes_get_one_line(argv: list[str], words: str) -> None:
    assert words in user_error(main, [*ACCEPTANCE, *argv])
