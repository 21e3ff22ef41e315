"""`perf compare`: how sure ratios are, when two systems may be compared, what is derived, and the command line."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.compare.command import main
from perf.compare.comparison import Comparison, compare
from perf.compare.intervals import T_975, Ratio, ratio, student_t
from perf.compare.rules import ACROSS, Judgement, judge
from perf.compare.systems import METRICS, Point, System, read_systems
from perf.compare.table import as_document
from perf.result import Result, Run, ServeSettings, write
from perf.roofline import main as roofline
from tests.perf_results import CPU, H20, MODEL, NPU, VERSIONS, decode, ops, run, serve
from tests.tiny import user_error

REPOSITORY = Path(__file__).parents[1]

# How sure a ratio is.


def quantile_of_t(freedom: int) -> float:
    """97.5 % quantile by integrating the density (Gosset's) over a fine grid."""
    x = np.linspace(0, 40, 400_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(x**2 / freedom))
    below = 0.5 + np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * (x[1] - x[0]))])
    return float(x[np.searchsorted(below, 0.975)])


def test_the_table_is_students() -> None:
    assert len(T_975) == 30
    for freedom in range(1, 31):
        assert student_t(freedom) == T_975[freedom - 1] == pytest.approx(quantile_of_t(freedom), abs=2e-4)
        assert student_t(freedom + 0.999) == T_975[freedom - 1], "rounded down"
    for freedom in (31, 40, 60, 120, 1000, 10**6):
        assert quantile_of_t(freedom) < student_t(freedom) < 1.005 * quantile_of_t(freedom), "never on the narrow side"


def draws(seed: int, count: int, middle: float, spread: float) -> list[float]:
    draw = random.Random(seed)
    return [middle * draw.lognormvariate(0, spread) for _ in range(count)]


@pytest.mark.parametrize(
    ("counts", "spreads", "paired"),
    [
        ((5, 5), (0.05, 0.05), True),
        ((5, 5), (0.05, 0.05), False),
        ((3, 3), (0.02, 0.02), False),
        ((4, 10), (0.02, 0.1), False),
        pytest.param((40, 40), (0.2, 0.2), True, marks=pytest.mark.slow),
    ],
)
def test_bounds_hold_the_truth_95_times_in_100(
    counts: tuple[int, int], spreads: tuple[float, float], paired: bool
) -> None:
    held, times, truth = 0, 1000, 1.7
    for seed in range(times):
        a, b = draws(2 * seed, counts[0], 1.7, spreads[0]), draws(2 * seed + 1, counts[1], 1.0, spreads[1])
        if paired:  # what a round has in common with all of it falls out
            rounds = draws(10**6 + seed, counts[0], 1.0, 0.5)
            a, b = ([one * r for one, r in zip(side, rounds, strict=True)] for side in (a, b))
        found = ratio(a, b, paired)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    # Welch's with degrees of freedom rounded down is on the wide side with few values.
    assert 0.93 < held / times < (0.97 if paired else 0.985)


def test_bounds_by_hand() -> None:
    """A textbook's formulas, in numpy."""
    a, b = np.array([3.0, 3.3, 2.9, 3.6]), np.array([1.5, 1.4, 1.7, 1.6])
    difference = np.log(a) - np.log(b)
    found = ratio(a.tolist(), b.tolist(), True)
    error = difference.std(ddof=1) / 2
    assert found is not None
    assert found.value == pytest.approx(math.exp(difference.mean()))
    assert (found.low, found.high) == pytest.approx(
        tuple(math.exp(difference.mean() + sign * 3.1824 * error) for sign in (-1, 1))
    )
    c = np.array([1.5, 1.9])
    errors = [np.log(side).var(ddof=1) / len(side) for side in (a, c)]
    freedom = sum(errors) ** 2 / (errors[0] ** 2 / 3 + errors[1] ** 2 / 1)
    assert 1 < freedom < 2, "rounded down to 1"
    for swapped in (False, True):
        found = ratio(*((c.tolist(), a.tolist()) if swapped else (a.tolist(), c.tolist())), paired=True)
        middle = (np.log(a).mean() - np.log(c).mean()) * (-1 if swapped else 1)
        assert found is not None
        reach = 12.7062 * math.sqrt(sum(errors))
        assert (found.value, found.low, found.high) == pytest.approx(
            tuple(math.exp(middle + sign * reach) for sign in (0, -1, 1))
        )


POSITIVE = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6)


@given(a=POSITIVE, b=POSITIVE, paired=st.booleans(), unit=st.floats(1e-3, 1e3))
def test_a_ratio_and_its_inverse_say_the_same(a: list[float], b: list[float], paired: bool, unit: float) -> None:
    there, back = ratio(a, b, paired), ratio([unit * one for one in b], [unit * one for one in a], paired)
    assert there is not None
    assert back is not None
    assert there.value * back.value == pytest.approx(1)
    assert (there.low is None) == (there.high is None) == (back.low is None)
    assert (there.low is None) == (min(len(a), len(b)) < 2)
    if there.low is not None and there.high is not None and back.low is not None and there.high < 1e100:
        assert there.high * back.low == pytest.approx(1)
        assert there.low <= there.value * (1 + 1e-12)
        assert there.value <= there.high * (1 + 1e-12)


def test_no_bounds_are_invented() -> None:
    assert ratio([], [1.0], False) is ratio([1.0], [], True) is None
    assert ratio([1.0, 0.0], [1.0], False) is ratio([1.0], [1.0, -2.0], False) is None
    assert ratio([2.0], [1.0], True) == ratio([2.0], [1.0], False) == Ratio(2.0)
    assert ratio([2.0, 2.0], [1.0], False) == Ratio(2.0)
    assert ratio([2.0, 2.0], [1.0, 1.0], False) == Ratio(2.0, 2.0, 2.0)
    assert str(Ratio(2.0)) == "2.00 (no bounds)"
    assert str(Ratio(2.0, 1.5, 2.5)) == "2.00 (1.50 to 2.50)"


@pytest.mark.parametrize(
    ("bounds", "settled"), [((1.1, 2), True), ((0.5, 0.9), True), ((0.9, 1.1), False), ((1.0, 2), False), ((), False)]
)
def test_settled(bounds: Sequence[float], settled: bool) -> None:
    assert Ratio(1.05, *bounds).settled == settled


# When two systems may be compared.


def systems(tmp_path: Path, *results: Result) -> list[System]:
    found: list[System] = []
    for number, made in enumerate(results):
        write(tmp_path / f"{number}.json", made)
        found += read_systems(tmp_path / f"{number}.json", chr(ord("a") + number))
    return found


def judged(tmp_path: Path, a: Result, b: Result, across: Sequence[str] = ()) -> Judgement:
    return judge(*systems(tmp_path, a, b), across)


def serve_settings(**changes: Any) -> ServeSettings:
    return replace(serve().settings, **changes)


def model(**changes: Any) -> Run:
    return run(model=replace(MODEL, **changes))


ONE_CPU = {("lean", 1): [0.1, 0.11]}
HARD: dict[str, tuple[Result, Result, list[str]]] = {
    "an emulated card": (serve(run(replace(NPU, emulated=True))), serve(run(NPU)), ["emulated"]),
    "two emulated cards": (*[serve(run(replace(NPU, emulated=True)))] * 2, ["emulated"]),
    "another tool": (decode(ONE_CPU, run(H20)), serve(), ["tool"]),
    "workload": (serve(), serve(settings=serve_settings(workload="long-answer")), ["workload"]),
    "its hash": (serve(), serve(settings=serve_settings(workload_sha256="8" * 64)), ["workload's hash"]),
    "prompts": (serve(), serve(prompts_sha256="9" * 64), ["prompts at concurrency 1", "prompts at concurrency 8"]),
    "repeats": (serve(), serve(repeats=4), ["prompts at concurrency 1", "prompts at concurrency 8"]),
    "architecture": (serve(), serve(model(architecture_sha256="1" * 64)), ["model"]),
    "architecture unknown": (serve(), serve(model(architecture_sha256=None)), ["model"]),
    "both unknown": (serve(model(architecture_sha256=None)), serve(model(architecture_sha256=None)), ["model"]),
    "layers": (
        decode(ONE_CPU),
        decode(ONE_CPU, run(CPU, replace(MODEL, layers=4))),
        ["layers"],
    ),
    "prompt length": (
        decode(ONE_CPU),
        decode(ONE_CPU, settings=replace(decode(ONE_CPU).settings, prompt_length=33)),
        ["prompt length"],
    ),
    "new tokens": (
        decode(ONE_CPU),
        decode(ONE_CPU, settings=replace(decode(ONE_CPU).settings, new_tokens=65)),
        ["new tokens"],
    ),
    "kinds of load": (serve(), serve(rate=True), ["load"]),
}


@pytest.mark.parametrize("what", HARD)
def test_differences_that_no_ratio_survives(what: str, tmp_path: Path) -> None:
    a, b, whats = HARD[what]
    for one, other in ((a, b), (b, a)):
        for across in ([], list(ACROSS)):
            judgement = judged(tmp_path, one, other, across)
            assert not judgement.comparable
            # Where the tools differ, so does what they call their settings.
            found = [finding.what for finding in judgement.refused]
            assert found[: len(whats)] == whats if what == "another tool" else found == whats
            assert all(finding.across is None and finding.why for finding in judgement.refused)
            assert all(finding.a != finding.b or "emulated" in what or "both" in what for finding in judgement.refused)


SOFT: dict[str, tuple[Result, Result, str, list[str]]] = {
    "precision": (serve(), serve(model(precision="fp8")), "precision", ["precision"]),
    "weights": (serve(), serve(model(weights="6" * 64)), "weights", ["weights"]),
    "weights unknown": (serve(), serve(model(weights=None)), "weights", []),
    "random weights": (serve(), serve(model(weights="random")), "weights", ["weights"]),
    "an engine's random weights": (decode(ONE_CPU), decode(ONE_CPU, random_weights=True), "weights", ["weights"]),
    "captured": (decode(ONE_CPU, captured=True), decode(ONE_CPU, captured=False), "versions", ["decode step"]),
    "captured, of one that tells": (decode(ONE_CPU, captured=True), decode(ONE_CPU), "versions", []),
    "captured, of another engine": (
        decode(ONE_CPU, captured=True),
        decode({("vllm", 1): [0.1, 0.2]}, captured=False),
        "versions",
        [],
    ),
    "engine": (serve(), serve(settings=serve_settings(engine="vllm 0.33.0")), "versions", ["engine"]),
    "torch": (
        decode(ONE_CPU), decode(ONE_CPU, run(CPU, versions=VERSIONS | {"torch": "2.14.0"})), "versions", ["torch"]
    ),
    "driver": (
        decode(ONE_CPU, run()), decode(ONE_CPU, run(replace(H20, software={"driver": "580"}))), "versions", ["driver"]
    ),
    "torch of a load client": (serve(), serve(run(versions=VERSIONS | {"torch": "2.14.0"})), "versions", []),
    "an engine that is not named": (serve(), serve(settings=serve_settings(engine="unknown")), "versions", []),
    "cores": (serve(run(CPU)), serve(run(replace(CPU, cores=4))), "threads", ["cores"]),
    "threads": (
        decode(ONE_CPU),
        decode(ONE_CPU, settings=replace(decode(ONE_CPU).settings, threads=1)),
        "threads",
        ["threads"],
    ),
    "both": (serve(), serve(model(precision="fp8", weights="6" * 64)), "precision", ["precision"]),
}  # fmt: skip


@pytest.mark.parametrize("what", SOFT)
def test_differences_that_may_be_what_is_compared(what: str, tmp_path: Path) -> None:
    a, b, across, whats = SOFT[what]
    for one, other in ((a, b), (b, a)):
        judgement = judged(tmp_path, one, other)
        assert [finding.what for finding in judgement.refused] == whats
        assert {finding.across for finding in judgement.refused} <= {across}
        assert judgement.comparable == (not whats)
        others = [name for name in ACROSS if name != across]
        assert judged(tmp_path, one, other, others) == judgement, "another name lifts nothing"
        lifted = judged(tmp_path, one, other, [across])
        assert lifted.comparable
        assert [finding.what for finding in lifted.allowed] == whats


REMARKS: dict[str, tuple[Result, Result, str]] = {
    "cards": (serve(), serve(run(replace(H20, cards=8))), "4 against 8 cards: look at the figures per card"),
    "commits": (serve(), serve(run(commit=None)), "measured with commits 0123456789ab and None of this toolkit"),
    "engines": (
        serve(),
        serve(run(replace(NPU, cards=4)), settings=serve_settings(engine="vllm-ascend 0.13")),
        "engines differ with the platform: vllm 0.32.0 and vllm-ascend 0.13",
    ),
    "weights": (
        serve(),
        serve(model(weights=None)),
        "the weights' hash is known of one of the two only; that they fit is your word",
    ),
    "seed": (
        decode(ONE_CPU),
        decode(ONE_CPU, run(CPU, seed=1)),
        "seeds 0 and 1: other prompts, and other random weights",
    ),
    "driver of one": (serve(), serve(run(replace(H20, software={}))), "drivers: 570.86.15 and unknown"),
    "driver of a load client": (
        serve(),
        serve(run(replace(H20, software={"driver": "580"}))),
        "drivers: 570.86.15 and 580",
    ),
    "another engine": (
        serve(),
        serve(settings=serve_settings(engine="sglang 0.5")),
        "another engine: vllm 0.32.0 and sglang 0.5",
    ),
    "no version": (serve(), serve(settings=serve_settings(engine="unknown")), "the server does not say its version"),
    "service level": (
        serve(),
        serve(settings=serve_settings(service_level={"ttft": 500.0})),
        "goodput is left out: service levels {} and {'ttft': 500.0}",
    ),
}


@pytest.mark.parametrize("what", REMARKS)
def test_differences_that_are_said(what: str, tmp_path: Path) -> None:
    a, b, remark = REMARKS[what]
    assert judged(tmp_path, a, a) == Judgement([], [], [])
    assert judged(tmp_path, a, b) == Judgement([], [], [remark])


def test_random_weights_are_said_of_both(tmp_path: Path) -> None:
    made = serve(model(weights="random"))
    line = "random weights: speed as with uniform routing, answers without meaning"
    assert judged(tmp_path, made, made) == Judgement([], [], [line])
    # Two precisions have two hashes; random weights are other weights all the same.
    whats = [one.what for one in judged(tmp_path, serve(), serve(model(weights="random", precision="fp8"))).refused]
    assert whats == ["precision", "weights"]


def test_files_of_other_tools_are_taken_at_their_users_word() -> None:
    points = (Point("concurrency", 1, {"output_throughput": [1.0]}),)
    known = System("a", "a.json", "x", "vllm 1", points, run=run())
    unknown = System("b", "b.json", "x", "vllm 2", points)
    line = "b.json: does not say device, versions or model hash; that they fit is your word"
    assert judge(known, unknown) == Judgement([], [], [line])
    assert judge(replace(unknown, source="c.json"), unknown).remarks == [line.replace("b.json", "c.json, b.json")]


def test_another_driver_on_another_kind_of_device_is_no_finding(tmp_path: Path) -> None:
    other = run(replace(NPU, cards=4), versions=VERSIONS | {"torch": "2.10.0"})
    assert judged(tmp_path, serve(), serve(other)) == Judgement([], [], [])


# What is derived.


def test_ratios_are_b_over_a_at_the_loads_they_share(tmp_path: Path) -> None:
    a, b = systems(tmp_path, serve(), serve(run(NPU), (250.0, 9.0), (1, 4), seed=1))
    found = compare([a, b])
    (pair,) = found.pairs
    assert list(pair.ratios) == [("concurrency", 1)]
    for key, one in pair.ratios["concurrency", 1].items():
        mine, other = (next(p for p in side.points if p.load == 1).samples[key] for side in (a, b))
        expected = statistics.geometric_mean(other) / statistics.geometric_mean(mine)
        assert one.value == pytest.approx(expected)
        assert one.value == pytest.approx(0.5 if METRICS[key].more_is_better else 2, rel=0.1)
        assert one == ratio(other, mine, False)


def test_rounds_of_one_file_are_paired_and_those_of_two_are_not(tmp_path: Path) -> None:
    rounds = [1.0, 2.0, 4.0, 8.0]  # the machine got slower and slower
    made = decode({("lean", 1): rounds, ("vllm", 1): [1.1 * one for one in rounds]})
    lean, vllm = systems(tmp_path, made)
    paired = compare([lean, vllm]).pairs[0].ratios["batch", 1]["median_tpot_ms"]
    assert (paired.low, paired.high) == pytest.approx((1.1, 1.1))
    (alone,) = systems(tmp_path, replace(made, rows=made.rows[:1]))
    write(tmp_path / "x.json", replace(made, rows=made.rows[1:]))
    (other,) = read_systems(tmp_path / "x.json", "b")
    unpaired = compare([alone, replace(other, engine=alone.engine)]).pairs[0].ratios["batch", 1]["median_tpot_ms"]
    assert unpaired.low is not None
    assert unpaired.low < 0.5


def test_goodput_at_other_service_levels_gets_no_ratio(tmp_path: Path) -> None:
    def good(limit: float) -> Result:
        made = serve(settings=serve_settings(service_level={"ttft": limit}))
        for row in made.rows:
            row.result["request_goodput"] = 2.0
        return made

    same = compare(systems(tmp_path, good(1), good(1))).pairs[0].ratios["concurrency", 8]
    assert same["request_goodput"] == Ratio(1, 1, 1)
    other = compare(systems(tmp_path, good(1), good(2))).pairs[0].ratios["concurrency", 8]
    assert set(same) - set(other) == {"request_goodput"}


def test_what_the_client_did_not_reckon_is_left_out(tmp_path: Path) -> None:
    """`vllm bench serve` writes null for goodput where no service level is given."""
    made = serve()
    for row in made.rows:
        row.result.update({"request_goodput": None, "p99_itl_ms": "fast"})
    found = compare(systems(tmp_path, made, made))
    for line in found.lines:
        assert not {"request_goodput", "p99_itl_ms"} & set(line.figures)
        assert "output_throughput" in line.figures
    made.rows[1].result["median_ttft_ms"] = None
    assert "median_ttft_ms" not in compare(systems(tmp_path, made)).lines[0].figures
    assert "median_ttft_ms" in compare(systems(tmp_path, made)).lines[1].figures


def test_figures_per_card_and_per_watt(tmp_path: Path) -> None:
    made = serve(watts=700.0)
    first, second = compare(systems(tmp_path, made)).lines
    for line, load in ((first, 1), (second, 8)):
        speeds = [row.result["output_throughput"] for row in made.rows if row.max_concurrency == load]
        figure = line.figures["output_throughput"]
        middle = statistics.median(speeds)
        assert (figure.median, figure.low, figure.high, figure.count) == (middle, min(speeds), max(speeds), 3)
        assert (line.axis, line.load) == ("concurrency", load)
        assert line.per_card == pytest.approx(middle / 4)
        assert line.per_watt == pytest.approx(middle / 700)
        tpot = statistics.median(row.result["median_tpot_ms"] for row in made.rows if row.max_concurrency == load)
        assert line.tokens_per_second_per_user == pytest.approx(1000 / tpot)
    made.rows[0] = replace(made.rows[0], watts=None)
    first, second = compare(systems(tmp_path, made)).lines
    assert first.per_watt is None, "one of three repeats without a figure"
    assert second.per_watt is not None


def test_decode_is_held_against_its_own_read_rate(tmp_path: Path) -> None:
    made = decode({("lean", 4): [0.1, 0.2, 0.4]}, share_of_read_rate=0.37, watts=80.0)
    (system,) = systems(tmp_path, made)
    assert (system.label, system.engine, system.threads) == ("a, lean", "lean 1.0", 2)
    (line,) = compare([system]).lines
    assert line.figures["output_throughput"].median == pytest.approx(20)
    assert line.figures["median_tpot_ms"].median == pytest.approx(200)
    assert (line.share_of_limit, line.per_watt, line.per_card) == pytest.approx((0.37, 0.25, 20))
    assert read_systems(tmp_path / "0.json")[0].label == "a processor, bf16, lean"


def limit_by_roofline(capsys: pytest.CaptureFixture[str], batch: int, measured: float) -> float:
    capsys.readouterr()
    roofline(
        f"--model ling-flash --cards 4xH20-96G --precision fp8 --batch {batch} --context {256 + 128 // 2} "
        f"--measured {measured!r} --json".split()
    )
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    return float(document["rows"][0]["share_of_limit"])


def test_a_server_is_held_against_the_limit_of_perf_roofline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare(systems(tmp_path, serve(model(precision="fp8"))))
    assert len(found.lines) == 2
    for line in found.lines:
        expected = limit_by_roofline(capsys, int(line.load), line.figures["output_throughput"].median)
        assert line.share_of_limit == pytest.approx(expected, rel=1e-9)
        assert 0.05 < expected < 1


@pytest.mark.parametrize(
    "head",
    [
        run(replace(H20, device="NVIDIA H20-3e")),  # nobody has published its bandwidth
        run(NPU, replace(MODEL, precision="fp8")),  # computes no fp8
        run(CPU),
        model(shape=None),
        model(precision="gguf"),
        run(replace(NPU, emulated=True)),
    ],
)
def test_no_share_where_the_limit_is_unknown(head: Run, tmp_path: Path) -> None:
    assert [line.share_of_limit for line in compare(systems(tmp_path, serve(head))).lines] == [None, None]


def test_no_share_of_an_open_loop(tmp_path: Path) -> None:
    found = compare(systems(tmp_path, serve(rate=True)))
    assert [(line.axis, line.share_of_limit) for line in found.lines] == [("rate", None)] * 2


SCORES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1)), min_size=1, max_size=9)


def drawn(scores: Sequence[tuple[int, int, int]]) -> Comparison:
    """Systems of one card and one point each: tokens/s, tokens/s of one user, kind of load."""
    return compare(
        [
            System(
                str(number),
                "",
                "",
                "",
                (
                    Point(
                        ("concurrency", "rate")[axis],
                        1,
                        {"output_throughput": [float(tokens)], "median_tpot_ms": [1000 / user]},
                    ),
                ),
                cards=1,
            )
            for number, (tokens, user, axis) in enumerate(scores)
        ]
    )


@given(scores=SCORES)
def test_pareto_by_brute_force(scores: list[tuple[int, int, int]]) -> None:
    for line, mine in zip(drawn(scores).lines, scores, strict=True):
        rivals = [other for other in scores if other[2] == mine[2]]
        better = [o for o in rivals if o[0] >= mine[0] and o[1] >= mine[1] and (o[0] > mine[0] or o[1] > mine[1])]
        comparable = mine[2] == scores[0][2]  # under the same kind of load as the first
        assert line.pareto == (comparable and not better)


def test_an_emulated_card_beats_nobody(tmp_path: Path) -> None:
    found = compare(systems(tmp_path, serve(), serve(run(replace(NPU, emulated=True)), (1e6, 1e7))))
    assert [line.pareto for line in found.lines if line.system == 0] == [True, True]
    assert [line.pareto for line in found.lines if line.system == 1] == [False, False]


# The command line.


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    count = itertools.count()

    def made(*results: Result) -> list[str]:
        paths = [tmp_path / f"{next(count)}.json" for _ in results]
        for path, one in zip(paths, results, strict=True):
            write(path, one)
        return [str(path) for path in paths]

    return made


Files = Callable[..., list[str]]


def test_the_table(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    made = files(serve(watts=1000.0), serve(run(NPU), (200.0, 1495.0)))
    assert main([*made, "--label", "here", "--label", "there"]) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "A here"
    assert lines[1].startswith("4 x NVIDIA H20; vllm 0.32.0; AntAngelMed (checkpoint, bf16); perf serve, 2026")
    head = "load output tokens/s TPOT, median TPOT, p99 TTFT, median TTFT, p99 ITL, p99 per card per W of limit Pareto"
    assert lines[2] == head
    assert lines[3].startswith("concurrency 1 ")
    assert "B against A: how many times as much, with 95 % bounds" in lines
    assert "note: 4 against 8 cards: look at the figures per card" in lines
    ratios = [line for line in lines if " to " in line]
    assert ratios[0].startswith("concurrency 1 output tokens/s 0.")
    assert ratios[0].endswith("worse")
    assert ratios[1].startswith("concurrency 1 TPOT, median 2.")
    assert ratios[1].endswith("worse")
    unsettled = [line for line in ratios if line.startswith("concurrency 8")]
    assert unsettled
    assert all(line.endswith(") not settled") for line in unsettled)
    assert main([made[1], made[0]]) == 0
    assert "better" in capsys.readouterr().out


def test_the_document_says_the_same(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    made = files(serve(), serve(model(precision="fp8")))
    assert main([*made, "--across", "precision", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    document = json.loads(out[-1], parse_constant=lambda name: pytest.fail(name))
    comparison = compare([*read_systems(Path(made[0])), *read_systems(Path(made[1]))], ["precision"])
    assert document == json.loads(json.dumps(as_document(comparison)))
    assert [system["name"] for system in document["systems"]] == ["A", "B"]
    assert document["systems"][1]["run"]["model"]["precision"] == "fp8"
    assert len(document["points"]) == 4
    (pair,) = document["pairs"]
    assert (pair["a"], pair["b"], pair["comparable"], document["across"]) == ("A", "B", True, ["precision"])
    assert [finding["what"] for finding in pair["allowed"]] == ["precision"]
    assert {(one["axis"], one["load"]) for one in pair["ratios"]} == {("concurrency", 1), ("concurrency", 8)}


def test_no_ratio_where_two_are_not_comparable(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    made = files(serve(), serve(model(precision="fp8")), serve(run(NPU)))
    assert main([*made, "--json"]) == 1
    *table, last = capsys.readouterr().out.splitlines()
    refused, compared = json.loads(last)["pairs"]
    assert (refused["comparable"], refused["ratios"], compared["comparable"]) == (False, [], True)
    start = table.index("B against A: NOT COMPARABLE")
    why = "precision: bf16 against fp8 (another precision moves other bytes and gives other answers)"
    assert table[start + 1] == f"   {why}; if that is what you compare: --across precision"
    assert table[start + 2] == ""
    assert table[start + 3].startswith("C against A: how many")
    assert compared["ratios"]


def test_one_file_alone_is_shown(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files(serve())) == 0
    assert "against" not in capsys.readouterr().out


def test_more_systems_than_letters(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    made = files(*[serve()] * 27)
    labels = [part for number in range(27) for part in ("--label", f"site {number}")]
    assert main([*made, *labels]) == 0
    assert "\nZ  site 25\n" in (out := capsys.readouterr().out)
    assert "\n27  site 26\n" in out
    assert "27 against A" in out


def test_mistakes_get_one_line(files: Files, tmp_path: Path) -> None:
    a, b, ops_file = files(serve(), serve(run(NPU)), ops())
    gone, folder = tmp_path / "gone.json", tmp_path / "gone" / "page.html"
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    older = tmp_path / "older.json"
    older.write_text(json.dumps({"schema": 2, "kind": "serve", "run": {}, "settings": {}, "rows": []}))
    (alike,) = files(serve())
    twice = "two systems are both called '4 x NVIDIA H20, bf16'; name the files with --label, once for each file"
    ends = "; see python -m perf compare --help"
    unset = serve(max_concurrency=None)
    (without,) = files(unset)
    for arguments, line in (
        ([a, "--htm", "x"], f"unknown argument '--htm' (did you mean '--html'?){ends}"),
        ([], f"the following arguments are required: FILE{ends}"),
        ([str(gone)], f"{gone}: cannot be read (No such file or directory)"),
        ([str(broken)], f"{broken}: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "),
        ([str(older)], f"{older}: schema 2, this version reads 1; measure again"),
        ([ops_file], f"{ops_file}: a result of `perf ops`; compare takes those of decode and serve"),
        ([a, alike], twice),
        ([a, b, "--label", "x"], "--label: 1 for 2 files; give one for each, in their order"),
        ([a, b, "--label", "x", "--label", "x"], "two systems are both called 'x'; name the files with --label, "),
        ([a, b, "--across", "precison"], "--across: unknown 'precison' (did you mean 'precision'?); there is "),
        ([a, b, "--html", str(folder)], f"--html {folder}: there is no such folder"),
        ([a, b, "--html", str(tmp_path)], f"--html {tmp_path}: is a directory"),
        ([a, b, "--plots", str(gone)], f"--plots {gone}: there is no such folder"),
        ([without], f"{without}: rows.0: one of max_concurrency and request_rate must be set, not both"),
    ):
        assert user_error(main, arguments).startswith(line), arguments


@pytest.mark.slow
def test_exit_codes(files: Files) -> None:
    a, b, c = files(serve(), serve(run(NPU)), serve(model(precision="fp8")))
    for arguments, code in (([a, b], 0), ([a, c], 1), ([a, c, "--across", "precision"], 0), ([a, "gone"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "perf", "compare", *arguments], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert (done.stderr == "") == (code < 2)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"step_seconds": [0.1, 0.0]}, "rows.0: step_seconds must be above 0"),
        ({"step_seconds": []}, "rows.0: step_seconds must be above 0"),
        ({"batch": 0}, "rows.0: batch must be at least 1"),
    ],
)
def test_rows_that_cannot_be_are_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    result = decode({("lean", 1): [0.1, 0.2], ("lean", 8): [0.3, 0.2]})
    write(tmp_path / "a.json", replace(result, rows=[replace(result.rows[0], **changed), *result.rows[1:]]))
    assert said in user_error(read_systems, tmp_path / "a.json")


def test_a_row_that_stands_twice_is_refused(tmp_path: Path) -> None:
    result = decode({("lean", 1): [0.1, 0.2], ("lean", 8): [0.3, 0.2]})
    write(tmp_path / "a.json", replace(result, rows=[*result.rows, result.rows[0]]))
    assert "stand there twice" in user_error(read_systems, tmp_path / "a.json")


def test_a_run_with_failed_requests_is_refused(tmp_path: Path) -> None:
    result = serve()
    broken = replace(result.rows[0], result=result.rows[0].result | {"failed": 5})
    write(tmp_path / "a.json", replace(result, rows=[broken, *result.rows[1:]]))
    assert "rows.0: 5 requests failed" in user_error(read_systems, tmp_path / "a.json")
