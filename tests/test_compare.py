"""`perf compare`: how sure ratios are, when two systems may be compared, what is derived, and the command line."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.compare.comparison import Comparison, compare
from perf.compare.intervals import Ratio, ratio
from perf.compare.rules import ACROSS, Judgement, judge
from perf.compare.systems import METRICS, Point, System, read_systems
from perf.result import Result, Run, ServeSettings, write
from perf.roofline import main as roofline
from tests.perf_results import CPU, H20, MODEL, NPU, VERSIONS, decode, model, run, serve

REPOSITORY = Path(__file__).parents[1]

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
