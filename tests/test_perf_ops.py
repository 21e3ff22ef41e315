"""`perf ops`: what is run and counted, that a broken op is not timed, and what its rows say."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ops
import perf.ops as command
from ascend.devices.base import Memory
from ascend.devices.cpu import CpuDevice
from ascend.model_shape import ModelShape
from convert.demo_config import demo_config
from ops import reference
from ops.layout import interleaved_int4
from ops.quantise import dequantised_int4, int4_weight
from perf import moe_cases, op_cases, result
from perf.moe_cases import ROUTINGS, Layer, grouped_mm, routings, whole_int4, why_no_vllm
from perf.op_cases import OURS, Case, Place, cases
from perf.ops import TOLERANCE, main
from tests import tiny
from tests.tiny import user_error

TINY = ModelShape.from_config(demo_config("tiny", 0, "bf16", None, {})[0])
FLASH = ModelShape.from_config(demo_config("ling-flash", 0, "bf16", None, {})[0])
CPU = torch.device("cpu")
QUICK = ["--model", "tiny", "--context", "16", "--rounds", "2", "--walk-bytes", "300000", "--threads", "1"]
MATMUL = {"bfloat16": 1e11, "float16": 3e11, "float32": 5e10}
NAMES = [
    "add_rms_norm", "linear", "attention", "cached_attention", "linear", "add_rms_norm_gate", "moe_experts", "moe",
    "moe_layer", "swiglu_mlp", "linear",
]  # fmt: skip
FORMATS = ("w8a8", "w4a16", "fp8")


def bare(op: str) -> str:
    """The op's name without its format."""
    return next((op.removesuffix(f"_{one}") for one in FORMATS if op.endswith(one)), op)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates by a quick guess: half a second each is what the command takes for them."""
    monkeypatch.setattr(command, "read_rate", lambda device, emulated: 2e10)
    monkeypatch.setattr(command, "matmul_rate", lambda device, dtype, emulated: MATMUL[dtype])


def place(dtype: torch.dtype = torch.bfloat16, skew: float = 0.0, seed: int = 0) -> Place:
    return Place(CPU, dtype, skew, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("quantise", [None, *FORMATS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_implementation_gives_what_ours_gives(dtype: torch.dtype, quantise: str | None) -> None:
    several = 0
    for case in cases(TINY, place(dtype), 3, [9], quantise, "fp8" if quantise == "fp8" else None):
        copy = case.make()
        for number in (0, 1, ROUTINGS + 1):
            ours = case.calls[OURS](copy, number)
            assert case.values(ours).isfinite().all()
            assert case.values(ours).abs().max() > 0
            for name, call in case.calls.items():
                assert command._difference(case, call(copy, number), ours, name) is None, (case.op, name)
                several += name != OURS
        assert case.nbytes > 0
    assert several >= 3 * (8 if quantise is None else 5)


def test_copies_are_other_weights() -> None:
    for case in cases(TINY, place(), 2, [9], None):
        if case.op == "add_rms_norm_gate":
            continue  # its router chooses alike in all copies
        one, two = (case.values(case.calls[OURS](case.make(), 0)) for _ in range(2))
        assert not torch.equal(one, two), case.op


def parameters_of(copy: Any) -> list[Tensor]:
    if isinstance(copy, Tensor):
        return [copy]
    if isinstance(copy, Layer):
        shared = [] if copy.shared is None else parameters_of(copy.shared)
        return [*parameters_of(copy.routed), *shared, copy.router]
    return list(copy) if isinstance(copy, tuple) else [*copy.parameters(), *copy.buffers()]


@pytest.mark.parametrize(("T", "S"), [(1, 100), (5, 7)])
def test_bytes_and_flops_by_hand(T: int, S: int) -> None:
    """bf16, from the shapes alone; a multiplication and an addition are two operations."""
    by_op: dict[str, list[Case]] = {}
    for case in cases(FLASH, place(), T, [S], None):
        by_op.setdefault(case.op, []).append(case)
    H, I, V, E, K, N, G, D = 4096, 1024, 157184, 256, 8, 32, 4, 128  # noqa: E741
    counted = {name: [(case.nbytes, case.flops) for case in found] for name, found in by_op.items()}
    assert counted["add_rms_norm"] == [(2 * (4 * T * H + H), 0)]
    qkv = (N + 2 * G) * D
    assert counted["linear"] == [(2 * (O * H + T * (H + O)), 2 * T * H * O) for O in (qkv, H, V)]  # noqa: E741
    cached = 2 * 2 * T * G * S * D
    assert counted["attention"] == [(cached, 2 * 2 * T * N * S * D)]
    # And reads the projection and writes the queries' results.
    assert counted["cached_attention"] == [(cached + 2 * T * (qkv + N * D), 4 * T * N * S * D)]
    assert counted["add_rms_norm_gate"] == [(4 * E * H + 2 * 4 * T * H, 2 * T * E * H)]
    assert counted["swiglu_mlp"] == [(2 * (3 * H * I + 2 * T * H), 2 * 3 * T * H * I)]
    drawn = routings(replaying(T, S), E, K, T)
    hit = statistics.mean(len({int(e) for e in expert.flatten()}) for _, expert in drawn)
    assert counted["moe_experts"] == [(pytest.approx(2 * (hit * 3 * H * I + 2 * T * H)), 2 * 3 * T * K * H * I)]
    assert hit == K if T == 1 else K < hit < T * K
    shared, experts = 2 * 3 * H * I, 2 * 3 * H * I
    flops = 2 * 3 * T * (K + 1) * H * I
    assert counted["moe"] == [(pytest.approx(hit * experts + shared + 2 * 2 * T * H), flops)]
    ((layer_bytes, layer_flops),) = counted["moe_layer"]
    assert layer_flops == flops + 2 * T * E * H
    layer_hit = (layer_bytes - shared - 2 * 2 * T * H - 4 * E * H) / experts
    assert layer_hit == pytest.approx(hit, rel=1e-6 if T == 1 else 0.15)  # its own router's choices
    assert [case.op for case in cases(FLASH, place(), T, [S], None)] == NAMES


def replaying(T: int, S: int) -> Place:
    """A place whose generator stands where it stands before the experts' routings are drawn."""
    made = place()
    for case in cases(FLASH, made, T, [S], None):
        if case.op == "add_rms_norm_gate":
            return made  # all that comes before the routings has been drawn
    raise AssertionError("no router")


def test_bytes_of_quantised_weights() -> None:
    plain, int8, int4 = (
        {case.op: case for case in cases(FLASH, place(), 1, [9], quantise)} for quantise in (None, "w8a8", "w4a16")
    )
    H, I = 4096, 1024  # noqa: E741
    for name, width in (("linear", 6144 * H // 1), ("swiglu_mlp", 3 * H * I)):
        if name != "linear":  # of two linears the head comes last, unquantised
            assert plain[name].nbytes - int8[f"{name}_w8a8"].nbytes == width
    assert int8["linear_w8a8"].copy_bytes == H * H
    router = 4 * 256 * H
    assert plain["moe_experts"].copy_bytes == 256 * 2 * 3 * H * I + router
    assert int8["moe_experts_w8a8"].copy_bytes == 256 * 3 * H * I + router
    assert int4["moe_experts_w4a16"].copy_bytes == 256 * 3 * H * I * (0.5 + 2 / 128) + router
    whole = int4["moe_w4a16"].copy_bytes - int4["moe_experts_w4a16"].copy_bytes
    assert whole == 2 * 3 * H * I, "the shared expert is not quantised"
    assert {bare(name) for name in int4 if name != bare(name)} == {"moe_experts", "moe", "moe_layer"}
    assert (int8["linear"].precision, int8["linear_w8a8"].precision) == ("bf16", "w8a8")


@pytest.mark.parametrize("quantise", [None, *FORMATS])
def test_a_copy_holds_as_many_bytes_as_are_counted(quantise: str | None) -> None:
    for case in cases(TINY, place(), 1, [9], quantise, "fp8" if quantise == "fp8" else None):
        held = sum(tensor.nbytes for tensor in parameters_of(case.make()))
        assert held == pytest.approx(case.copy_bytes, rel=0.08), case.op


def test_a_cache_of_fp8_is_half_the_bytes() -> None:
    half, whole = (
        {(case.op, case.sizes.get("S")): case for case in cases(TINY, place(), 2, [9, 30], None, kv)}
        for kv in ("fp8", None)
    )
    for S in (9, 30):
        assert (
            whole["attention", S].nbytes
            == 2 * half["attention", S].nbytes
            == 2 * 2 * 2 * TINY.num_key_value_heads * S * TINY.head_dim
        )
        assert half["attention", S].precision == "fp8"
        assert {one.dtype for one in half["cached_attention", S].make()} == {torch.float8_e4m3fn}


def test_words_in_the_layout_of_cuda_are_the_same_weights() -> None:
    packed, scale = int4_weight(torch.randn(3, 256, generator=torch.Generator().manual_seed(1)), 64)
    laid_out = interleaved_int4(packed, 4)
    assert not torch.equal(laid_out, packed)
    assert torch.equal(whole_int4(laid_out, scale), dequantised_int4(packed, scale))


def test_why_a_peer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert why_no_vllm(CPU, None) == "its Triton kernels for experts run on CUDA alone"
    assert why_no_vllm(cuda, "w4a16") == "its w4a16 weights have a layout of their own"
    for spec, reason in ((None, "it is not installed"), (object(), None)):
        monkeypatch.setattr(moe_cases, "find_spec", lambda name, spec=spec: spec)
        assert why_no_vllm(cuda, "fp8") == reason


def test_routings_are_drawn_without_replacement() -> None:
    for weight, expert in routings(place(), 16, 4, 7):
        assert (weight.shape, weight.dtype, expert.shape, expert.dtype) == ((7, 4), torch.float32, (7, 4), torch.int64)
        assert all(len(set(row)) == 4 for row in expert.tolist())
    uniform, skewed = (
        torch.cat([expert.flatten() for _, expert in routings(place(skew=skew), 16, 4, 100)]).bincount(minlength=16)
        for skew in (0.0, 1.5)
    )
    assert uniform.max() / uniform.min() < 1.3
    assert skewed.max() / skewed.min() > 4
    assert len(routings(place(), 16, 4, 7)) == ROUTINGS


def test_grouped_mm_is_the_experts_by_definition() -> None:
    made = place()
    x, gate_up, down = made.random(5, 64), 0.1 * made.random(6, 96, 64), 0.1 * made.random(6, 64, 48)
    weight, expert = routings(made, 6, 3, 5)[0]
    expected = reference.moe_experts(x, weight, expert, gate_up, down).float()
    found = grouped_mm(x, weight, expert, gate_up, down).float()
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


# What is timed.


def test_a_walk_goes_through_the_copies() -> None:
    seen: list[tuple[str, int]] = []
    command._walk(lambda copy, number: seen.append((copy, number)), ["a", "b", "c"], 7)()  # type: ignore[arg-type,func-returns-value]
    assert seen == [(copy, number) for number, copy in enumerate("abcabca")]


@pytest.mark.parametrize("walked", [1, 10_000, 300_000])
def test_copies_together_are_what_is_walked(walked: int, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, int] = {}

    def watched(shape: Any, *arguments: Any) -> Any:
        for case in cases(shape, *arguments):

            def make(case: Case = case) -> Any:
                made[case.op] = made.get(case.op, 0) + 1
                return case.make()

            yield replace(case, make=make)

    monkeypatch.setattr(op_cases, "cases", watched)
    rows: list[Any] = []
    monkeypatch.setattr(command, "_line", lambda row, ours: rows.append(row))
    assert main([*QUICK, "--tokens", "1", "--walk-bytes", str(walked), "--rounds", "1"]) == 0
    for row in rows:
        if row.op == "linear":
            continue  # twice
        assert made[row.op] == row.copies
    least = {row.op: row for row in rows if row.implementation == OURS}
    case = next(one for one in cases(TINY, place(), 1, [16], None) if one.op == "moe_experts")
    copies = least["moe_experts"].copies
    assert (copies - 1) * case.copy_bytes < max(walked, 1) <= copies * case.copy_bytes


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        pytest.param(["--quantise", "w8a8"], marks=pytest.mark.slow),
        pytest.param(["--dtype", "fp32"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rows(arguments: list[str], quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.json"
    assert main([*QUICK, "--tokens", "1,3", *arguments, "--out", str(out), "--json"]) == 0
    text = capsys.readouterr().out
    made = result.read(out)
    assert json.loads(text.splitlines()[-1]) == json.loads(out.read_text())
    assert (made.kind, made.settings.rounds, made.settings.walked_bytes) == ("ops", 2, 300_000)
    assert (made.settings.threads, made.settings.captured) == (1, False)
    assert (made.run.model.name, made.run.model.weights) == ("tiny", "random")
    for row in made.rows:
        assert len(row.call_seconds) == len(row.read_rate) == len(row.matmul_rate) == 2
        assert min(row.call_seconds) > 0
        for amount, rate, share in (
            (row.bytes, 2e10, row.share_of_read_rate),
            (row.flops, 5e10 if row.precision == "fp32" else 1e11, row.share_of_matmul_rate),
        ):
            assert share == pytest.approx(statistics.median(amount / one / rate for one in row.call_seconds))
    ours = [row for row in made.rows if row.implementation == OURS]
    many = len(NAMES)
    assert [row.sizes.get("T", row.sizes.get("B")) for row in ours] == [1] * many + [3] * many
    assert [bare(row.op) for row in ours[:many]] == NAMES
    assert all(row.sizes["S"] == 16 for row in ours if "attention" in row.op)
    plain = "fp32" if "fp32" in arguments else "bf16"
    assert {row.precision for row in ours} == {"fp32", plain} | ({"w8a8"} & set(arguments))
    lines = [line.split() for line in text.splitlines() if f" {OURS} " in line]
    assert len(lines) == len(ours)
    assert all(line[-1] == "1.00" for line in lines)
    for row, line in zip(ours, lines, strict=True):
        assert f"{1e6 * statistics.median(row.call_seconds):.1f}" in line


def broken(which: str, factor: float) -> Callable[..., Any]:
    right = getattr(ops, which)

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = right(*arguments, **options)
        if isinstance(found, tuple):
            return (factor * found[0], *found[1:])
        return factor * found

    return wrong


@pytest.mark.parametrize(
    ("which", "op", "arguments"),
    [
        ("add_rms_norm", "add_rms_norm", []),
        ("attention", "attention", []),
        ("cached_attention", "cached_attention", []),
        ("add_rms_norm_gate", "add_rms_norm_gate", []),
        ("moe_experts", "moe_experts", []),
        ("moe", "moe", []),
        ("moe_gate", "moe_layer", []),
        ("swiglu_mlp", "swiglu_mlp", []),
        ("linear", "linear", []),
        *(
            pytest.param(which, which, ["--quantise", to], marks=pytest.mark.slow)
            for which, to in (
                ("linear_w8a8", "w8a8"),
                ("swiglu_mlp_w8a8", "w8a8"),
                ("moe_experts_w8a8", "w8a8"),
                ("moe_experts_w4a16", "w4a16"),
                ("moe_fp8", "fp8"),
            )
        ),
    ],
)
def test_a_broken_op_is_not_timed(
    which: str,
    op: str,
    arguments: list[str],
    quick: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ops, which, broken(which, 1.1))
    out = tmp_path / "a.json"
    code = main([*QUICK, "--rounds", "1", "--tokens", "2", "--dtype", "bf16", *arguments, "--out", str(out)])
    assert code == 1
    line = capsys.readouterr().err
    assert line.startswith(f"WRONG: {op} as ")
    assert line.endswith(": neither it nor what comes after it is reported\n")
    before = NAMES.index(bare(op))
    assert out.exists() == (before > 0)
    if before:
        found = [row.op for row in result.read(out).rows if row.implementation == OURS]
        assert list(map(bare, found)) == NAMES[:before]


def test_some_ops_of_a_part_of_the_width_at_several_contexts(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    few = ["--rounds", "1", "--tokens", "2", "--context", "8,24", "--width", "32", "--ops", "moe,attention"]
    assert main([*QUICK, *few, "--out", str(out)]) == 0
    made = result.read(out)
    assert made.settings.width == 32
    ours = [row for row in made.rows if row.implementation == OURS]
    assert [(row.op, row.sizes.get("S"), row.sizes.get("I")) for row in ours] == [
        ("attention", 8, None), ("attention", 24, None), ("moe", None, 32)
    ]  # fmt: skip
    # Routed experts and the shared one, which is divided alike.
    expert, rows = 2 * 3 * 128 * 32, 2 * 2 * 2 * 128
    assert (ours[-1].bytes - rows) / expert - 1 == pytest.approx(ours[-1].sizes["hit"], abs=0.5)
    assert "no peer vllm: its Triton kernels for experts run on CUDA alone\n" in capsys.readouterr().out


def test_what_does_not_fit_is_left_out(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CpuDevice, "memory", lambda self: Memory(10**6, 10**6, 0))  # the head takes half of it, twice
    assert main([*QUICK, "--rounds", "1", "--tokens", "2", "--ops", "add_rms_norm,linear"]) == 0
    text = capsys.readouterr().out
    left_out = [line for line in text.splitlines() if "left out: " in line]
    assert [line.split()[0:4] for line in left_out] == [["linear", "T=2", "H=128", "O=2048"]]


class Recording(CpuDevice):
    """A card that captures."""

    captures_graphs = True


def test_the_definition_is_checked_and_not_timed_where_graphs_are(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "get_device", lambda name: Recording())
    out = tmp_path / "a.json"
    few = [*QUICK, "--rounds", "1", "--tokens", "2", "--ops", "moe", "--out", str(out)]
    assert main(few) == 0
    assert [row.implementation for row in result.read(out).rows] == [OURS, "torch"]
    monkeypatch.setattr(ops, "moe", broken("moe", 1.1))
    assert main(few) == 1


class Uncapturing(CpuDevice):
    """A card whose graphs hold nothing."""

    captures_graphs = True

    def capture(self, fn: Any, pool: Any = None) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_captured_is_told_in_one_line(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "get_device", lambda name: Uncapturing())
    said = "add_rms_norm as ours cannot be captured on this device (operation not permitted when stream is capturing)"
    assert user_error(main, [*QUICK, "--rounds", "1", "--tokens", "1"]) == f"{said}: give --eager"
    assert main([*QUICK, "--rounds", "1", "--tokens", "1", "--eager"]) == 0


def test_a_cpu_is_walked_through_as_its_rate_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    device, MiB = CpuDevice(), 1 << 20
    free = device.memory().free // 2
    for cache, size in ((1 * MiB, 512 * MiB), (100 * MiB, 800 * MiB)):
        monkeypatch.setattr(CpuDevice, "_last_level_cache", lambda self, cache=cache: cache)
        assert command._walk_bytes(device, False) == device.uncached_bytes() == min(size, free // MiB * MiB)


def test_other_experts_with_the_same_weights_are_wrong_too(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.add_rms_norm_gate

    def wrong(*arguments: Any) -> tuple[Tensor, ...]:
        weight, expert, *rest = right(*arguments)
        return weight, (expert + 1) % TINY.num_experts, *rest

    monkeypatch.setattr(ops, "add_rms_norm_gate", wrong)
    assert main([*QUICK, "--rounds", "1", "--tokens", "2"]) == 1


def test_what_is_wrong_is_said_and_nan_is_wrong() -> None:
    case = next(iter(cases(TINY, place(), 1, [9], None)))
    ours = torch.tensor([1.0, -2.0])
    limit = TOLERANCE["bf16"]
    assert command._difference(case, ours + 1.9 * limit, ours, "x") is None
    said = command._difference(case, ours - torch.tensor([0.0, 4 * limit]), ours, "x")
    assert said == f"as x differs by {2 * limit:.1e} of its largest value, limit {limit:.0e}"
    for value in (torch.nan, torch.inf):
        assert command._difference(case, torch.tensor([1.0, value]), ours, "x") is not None
        assert command._difference(case, ours, torch.tensor([1.0, value]), "x") is not None


def test_mistakes_get_one_line(tmp_path: Path) -> None:
    least = "--rounds, --threads, --walk-bytes and --width must be at least 1, --skew at least 0"
    for arguments, line in (
        (["--model", "tinny"], "--model tinny: neither a directory nor one of tiny"),
        ([*QUICK, "--rounds", "0"], least),
        ([*QUICK, "--context", "0"], "--context '0' is not a list of different whole numbers"),
        ([*QUICK, "--width", "0"], least),
        ([*QUICK, "--width", "48"], "--width 48 is no part of the experts' width 64: it must divide it"),
        ([*QUICK, "--ops", "moe_gat"], "--ops: unknown 'moe_gat'"),
        ([*QUICK, "--skew", "-1"], least),
        ([*QUICK, "--walk-bytes", "0"], least),
        ([*QUICK, "--walk-bytes", "-1"], least),
        ([*QUICK, "--tokens", "1,1"], "--tokens '1,1' is not a list of different whole numbers"),
        ([*QUICK, "--out", str(tmp_path)], f"--out {tmp_path}: is a directory"),
        (
            [*QUICK, "--token", "1"],
            "unknown argument '--token' (did you mean '--tokens'?); see `python -m perf ops --help`",
        ),
        ([*QUICK, "--quantise", "w4a8"], "argument --quantise: invalid choice: 'w4a8'"),
        ([*QUICK, "--device", "npuu"], "unknown device 'npuu'"),
    ):
        assert user_error(main, arguments).startswith(line), arguments


@pytest.mark.slow
@pytest.mark.beside
def test_with_the_real_rates(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "demo", "bf16")
    out = tmp_path / "a.json"
    assert main(["--model", str(path), *QUICK[2:], "--rounds", "1", "--tokens", "2", "--out", str(out)]) == 0
    made = result.read(out)
    assert made.run.machine.device == CpuDevice().name()
    assert made.run.model.weights not in (None, "random")
    assert all(1e8 < row.read_rate[0] < 1e13 and 1e8 < row.matmul_rate[0] < 1e15 for row in made.rows)
