"""Every op: the CPU kernels against `ops.reference`, the promises of `ops.cpu`, and the shapes of the meta kernels.

How near is near enough is said in `tests/op_cases.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ops
from ops import cpu, quantise, reference
from tests.op_cases import (
    BF16,
    FP32,
    UNIT,
    cache_case,
    check,
    check_attention,
    flat,
    kernels_used,
    make,
    op_cases,
    same,
)

DTYPES = st.sampled_from([BF16, FP32])
SEEDS = st.integers(0, 2**31)
# Ragged on purpose: below, at and beside the widths of the vectors and of the tiles.
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([96, 127, 128, 160, 257]))
TOKENS = st.one_of(st.integers(1, 9), st.sampled_from([13, 31, 32, 70]))
examples = settings(max_examples=25, deadline=None)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_kernels_are_compiled_here() -> None:
    assert kernels_used(BF16)
    assert kernels_used(FP32)
    assert not kernels_used(torch.float16)


# What each op computes


@examples
@given(seed=SEEDS, dtype=DTYPES, rows=TOKENS, width=SIZES, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_rms_norm(seed: int, dtype: torch.dtype, rows: int, width: int, scale: float) -> None:
    new = make(seed, dtype)
    x, residual, weight = new(rows, width, scale=scale), new(rows, width, scale=scale), new(width)
    exact = reference.rms_norm(x.float(), weight.float(), 1e-6)
    check(ops.rms_norm(x, weight, 1e-6), exact, exact)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    exact = reference.rms_norm(total.float(), weight.float(), 1e-6)
    check(normed, exact, exact)


@examples
@given(seed=SEEDS, dtype=DTYPES, tokens=TOKENS, width=SIZES, rows=SIZES, biased=st.booleans())
def test_linear(seed: int, dtype: torch.dtype, tokens: int, width: int, rows: int, biased: bool) -> None:
    new = make(seed, dtype)
    x, weight, bias = new(1, tokens, width), new(rows, width), new(rows) if biased else None
    exact = reference.linear(x.float(), weight.float(), None if bias is None else bias.float())
    magnitude = reference.linear(x.float().abs(), weight.float().abs(), None if bias is None else bias.float().abs())
    check(ops.linear(x, weight, bias), exact, magnitude)


def gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The MLP in fp32, and the same with the magnitudes of its products."""
    gate, up = reference.linear(x.float(), gate_up.float(), None).chunk(2, -1)
    silu = torch.nn.functional.silu(gate)
    # Where gate or up cancel, the inner activation has their fp32 error; the slope of silu is 1.1 at most.
    gate_magnitude, up_magnitude = reference.linear(x.float().abs(), gate_up.float().abs(), None).chunk(2, -1)
    inner_error = (1.1 * gate_magnitude * up.abs() + silu.abs() * up_magnitude) * (UNIT[FP32] / UNIT[x.dtype])
    magnitude = reference.linear((silu * up).abs() + inner_error, down.float().abs(), None)
    return reference.linear(silu * up, down.float(), None), magnitude


@examples
@given(seed=SEEDS, dtype=DTYPES, tokens=TOKENS, hidden=SIZES, inner=SIZES)
def test_swiglu_mlp(seed: int, dtype: torch.dtype, tokens: int, hidden: int, inner: int) -> None:
    new = make(seed, dtype)
    x, gate_up, down = new(tokens, hidden), new(2 * inner, hidden, scale=hidden**-0.5), new(hidden, inner)
    exact, magnitude = gated_mlp(x, gate_up, down)
    torch.testing.assert_close(exact, reference.swiglu_mlp(x.float(), gate_up.float(), down.float()))
    check(ops.swiglu_mlp(x, gate_up, down), exact, magnitude, roundings=2)


@examples
@given(
    seed=SEEDS,
    dtype=DTYPES,
    tokens=TOKENS,
    hidden=SIZES,
    inner=SIZES,
    experts=st.integers(1, 12),
    top_k=st.integers(1, 5),
)
def test_moe_experts(
    seed: int, dtype: torch.dtype, tokens: int, hidden: int, inner: int, experts: int, top_k: int
) -> None:
    new = make(seed, dtype)
    x, gate_up, down = (
        new(tokens, hidden),
        new(experts, 2 * inner, hidden, scale=hidden**-0.5),
        new(experts, hidden, inner),
    )
    weight = make(seed + 1, FP32)(tokens, top_k).sigmoid()
    # Beyond both ends, repeated, and often leaving experts without a token.
    chosen = torch.randint(-2, experts + 2, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    exact = reference.moe_experts(x.float(), weight, chosen, gate_up.float(), down.float())
    magnitude = torch.zeros_like(exact)
    for token, k in (((chosen >= 0) & (chosen < experts)).nonzero()).tolist():
        expert = chosen[token, k]
        magnitude[token] += weight[token, k] * gated_mlp(x[token], gate_up[expert], down[expert])[1]
    check(ops.moe_experts(x, weight, chosen, gate_up, down), exact, magnitude, roundings=2)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_moe_experts_of_one_and_of_none(dtype: torch.dtype) -> None:
    new = make(0, dtype)
    x, gate_up, down = new(40, 64), new(6, 2 * 24, 64, scale=0.1), new(6, 64, 24)
    one = torch.full((40, 1), 4)
    exact, magnitude = gated_mlp(x, gate_up[4], down[4])
    check(ops.moe_experts(x, torch.ones(40, 1), one, gate_up, down), exact, magnitude, roundings=2)
    assert torch.equal(ops.moe_experts(x, torch.ones(40, 1), one + 2, gate_up, down), torch.zeros_like(x))
    assert ops.moe_experts(x[:0], torch.ones(0, 1), one[:0], gate_up, down).shape == (0, 64)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_moe_experts_reads_only_the_experts_that_are_hit(dtype: torch.dtype) -> None:
    new = make(0, dtype)
    x, gate_up, down = new(3, 64), new(6, 2 * 24, 64, scale=0.1), new(6, 64, 24)
    gate_up[[0, 2, 3, 5]] = float("nan")
    down[[0, 2, 3, 5]] = float("nan")
    chosen = torch.tensor([[1, 4], [4, 1], [1, 6]])
    assert ops.moe_experts(x, torch.ones(3, 2), chosen, gate_up, down).isfinite().all()


@examples
@given(
    seed=SEEDS,
    dtype=DTYPES,
    weights_fp32=st.booleans(),
    tokens=TOKENS,
    hidden=SIZES,
    groups=st.integers(1, 8),
    per_group=st.integers(1, 9),
    biased=st.booleans(),
    normalise=st.booleans(),
    data=st.data(),
)
def test_moe_gate(
    seed: int,
    dtype: torch.dtype,
    weights_fp32: bool,
    tokens: int,
    hidden: int,
    groups: int,
    per_group: int,
    biased: bool,
    normalise: bool,
    data: st.DataObject,
) -> None:
    kept = data.draw(st.integers(1, groups), label="kept")
    top_k = data.draw(st.integers(1, kept * per_group), label="top_k")
    experts = groups * per_group
    x, weight = make(seed, dtype)(tokens, hidden), make(seed + 1, FP32 if weights_fp32 else dtype)(experts, hidden)
    weight *= hidden**-0.5
    bias = make(seed + 2, FP32)(experts, scale=0.1) if biased else None
    args = (bias, top_k, groups, kept, normalise, 2.5)
    actual, expected = ops.moe_gate(x, weight, *args), reference.moe_gate(x, weight, *args)
    assert actual[0].dtype == FP32
    assert actual[1].dtype == torch.int64
    # Where two candidates are nearly equal, fp32 sums in another order may choose the other one.
    score = torch.sigmoid(reference.linear(x.float(), weight.float(), None)) + (0 if bias is None else bias)
    group = score.unflatten(-1, (groups, -1)).topk(min(2, per_group), dim=-1).values.sum(-1)
    clear = _least_gap(score) > 1e-5
    clear &= _least_gap(group) > 1e-5
    assert torch.equal(actual[1][clear], expected[1][clear])
    torch.testing.assert_close(actual[0][clear], expected[0][clear], rtol=1e-5, atol=1e-6)


def _least_gap(score: Tensor) -> Tensor:
    return (score.sort(-1).values.diff(dim=-1)).amin(-1) if score.shape[-1] > 1 else torch.ones(len(score))


def test_moe_gate_gives_ties_to_the_lowest_expert() -> None:
    weight, chosen = ops.moe_gate(torch.zeros(3, 16), torch.ones(12, 16), None, 4, 4, 2, True, 1.0)
    assert chosen.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(weight, torch.full((3, 4), 0.25))


@examples
@given(
    seed=SEEDS,
    dtype=DTYPES,
    batch=st.integers(1, 4),
    tokens=TOKENS,
    groups=st.integers(1, 3),
    per_group=st.integers(1, 5),
    dim=st.sampled_from([2, 6, 16, 24, 64, 128, 200]),
    normed=st.booleans(),
    spare=st.integers(0, 9),
    data=st.data(),
)
def test_rope_to_cache(
    seed: int,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    groups: int,
    per_group: int,
    dim: int,
    normed: bool,
    spare: int,
    data: st.DataObject,
) -> None:
    half = data.draw(st.integers(1, dim // 2), label="half")
    length = torch.tensor(data.draw(st.lists(st.integers(tokens, tokens + spare), min_size=batch, max_size=batch)))
    new, heads = make(seed, dtype), groups * per_group
    qkv = new(batch, tokens, (heads + 2 * groups) * dim)
    norms = (new(dim), new(dim)) if normed else (None, None)
    angle = make(seed + 1, FP32)(batch, tokens, half, scale=10.0)
    cos, sin = angle.cos(), angle.sin()
    # What is not written must stay as it was: NaN.
    k = torch.full((batch, groups, tokens + spare, dim), float("nan"), dtype=dtype)
    v = k.clone()
    exact_k, exact_v = k.float(), v.float()
    q = ops.rope_to_cache(qkv, *norms, cos, sin, k, v, length, 1e-6)

    fp32_norms = tuple(None if n is None else n.float() for n in norms)
    exact_q = reference.rope_to_cache(qkv.float(), *fp32_norms, cos, sin, exact_k, exact_v, length, 1e-6)
    # A rotation keeps the length of each pair: that length is the magnitude.
    check(q, exact_q, _pair_lengths(exact_q, half), roundings=2)
    assert torch.equal(k.isnan(), exact_k.isnan())
    check(k.nan_to_num(), exact_k.nan_to_num(), _pair_lengths(exact_k.nan_to_num(), half), roundings=2)
    assert torch.equal(v.nan_to_num(), exact_v.nan_to_num().to(dtype))
    assert torch.equal(v.isnan(), exact_v.isnan())


def _pair_lengths(x: Tensor, half: int) -> Tensor:
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    length = 1.5 * torch.hypot(first, second)
    return torch.cat([length, length, rest], dim=-1)


def test_rope_to_cache_refuses_slots_outside_the_cache() -> None:
    new = make(0, BF16)
    args = (new(1, 3, 3 * 16), None, None, torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    k, v = torch.zeros(1, 1, 8, 16, dtype=BF16), torch.zeros(1, 1, 8, 16, dtype=BF16)
    with pytest.raises(IndexError):
        ops.rope_to_cache(*args, k, v, torch.tensor([9]), 1e-6)
    assert not k.any()


@examples
@given(
    seed=SEEDS,
    dtype=DTYPES,
    tokens=TOKENS,
    groups=st.integers(1, 3),
    per_group=st.integers(1, 9),
    dim=st.sampled_from([1, 8, 16, 40, 64, 128, 136, 192]),
    rows=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 90)), min_size=1, max_size=4),
)
def test_attention(
    seed: int, dtype: torch.dtype, tokens: int, groups: int, per_group: int, dim: int, rows: list[tuple[int, int]]
) -> None:
    # A row may be shorter than the tokens: its first ones are padding, which sees nothing and gives 0.
    rows = [(max(first, tokens - seen), seen) for first, seen in rows]
    check_attention(*cache_case(seed, dtype, tokens, groups, per_group, dim, rows))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_attention_over_several_chunks(dtype: torch.dtype, tokens: int) -> None:
    check_attention(*cache_case(1, dtype, tokens, 2, 4, 64, [(0, 700), (37, 300), (5, 512), (0, 301)]))


def test_attention_takes_a_cache_that_is_part_of_a_larger_one() -> None:
    q, k, v, start, length, scale = cache_case(2, BF16, 2, 2, 4, 32, [(0, 70), (9, 33)])
    layers = torch.stack([k, v]).repeat(3, 1, 1, 2, 1)
    view_k, view_v = layers[2, :, :, : k.shape[2]], layers[5, :, :, : k.shape[2]]
    assert not view_k.is_contiguous()
    assert torch.equal(
        ops.attention(q, view_k, view_v, start, length, scale), ops.attention(q, k, v, start, length, scale)
    )


# What the kernels promise


def spread(*shape: int) -> Tensor:
    """Experts for a case: all different per token, as a router gives them."""
    return torch.stack([torch.randperm(16)[: shape[1]] for _ in range(shape[0])])


def token_cases(dtype: torch.dtype, tokens: int) -> dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], Tensor]]:
    """Op -> (the op as a function of its tokens, tokens), large enough for several threads and tiles."""
    torch.manual_seed(0)
    new = make(3, dtype)
    width = 1000
    weight, router = new(700, width), make(4, FP32)(16, width, scale=0.03)
    gate_up, down = new(16, 2 * 130, width, scale=0.03), new(16, width, 130)
    return {
        "rms_norm": (lambda x, w, e: ops.rms_norm(x, weight[0], 1e-6), new(tokens, width)),
        "add_rms_norm": (
            lambda x, w, e: ops.add_rms_norm(x, x.flip(-1).contiguous(), weight[0], 1e-6),
            new(tokens, width),
        ),
        "linear": (lambda x, w, e: ops.linear(x, weight, None), new(tokens, width)),
        "swiglu_mlp": (lambda x, w, e: ops.swiglu_mlp(x, gate_up[0], down[0]), new(tokens, width)),
        "moe_experts": (lambda x, w, e: ops.moe_experts(x, w, e, gate_up, down), new(tokens, width)),
        "moe_gate": (lambda x, w, e: ops.moe_gate(x, router, router[:, 0], 4, 4, 2, True, 2.5), new(tokens, width)),
    }


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "linear", "swiglu_mlp", "moe_experts", "moe_gate"])
def test_a_token_alone_is_the_token_in_a_batch(name: str, dtype: torch.dtype) -> None:
    op, x = token_cases(dtype, 33)[name]
    weight, chosen = torch.rand(33, 4), spread(33, 4)
    together = flat(op(x, weight, chosen))
    for rows in (slice(0, 1), slice(32, 33), slice(5, 8), slice(2, 31)):
        alone = flat(op(x[rows], weight[rows], chosen[rows]))
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "linear", "swiglu_mlp", "moe_experts", "moe_gate"])
def test_threads_do_not_change_a_bit(name: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    op, x = token_cases(dtype, 40)[name]
    weight, chosen = torch.rand(40, 4), spread(40, 4)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(flat(op(x, weight, chosen)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("tokens", [1, 4, 70])
def test_attention_depends_on_nothing_but_its_row(
    dtype: torch.dtype, tokens: int, threads: Callable[[int], None]
) -> None:
    q, k, v, start, length, scale = cache_case(5, dtype, tokens, 2, 4, 64, [(0, 900), (40, 650), (3, 90)])
    threads(1)
    together = ops.attention(q, k, v, start, length, scale)
    # Threads beyond the pieces of work make the chunks of a row be shared out.
    for count in (2, 32):
        threads(count)
        assert torch.equal(ops.attention(q, k, v, start, length, scale), together)
        for row in range(3):
            one = slice(row, row + 1)
            alone = ops.attention(q[one], k[one], v[one], start[one], length[one], scale)
            assert torch.equal(alone, together[one])
    threads(2)
    # The same row with other padding before it, and its tokens one by one.
    first, end = int(start[1]), int(length[1])
    moved = ops.attention(q[1:2], k[1:2, :, first:], v[1:2, :, first:], start[1:2] * 0, length[1:2] - first, scale)
    assert torch.equal(moved, together[1:2])
    for t in range(tokens):
        step = ops.attention(q[1:2, t : t + 1], k[1:2], v[1:2], start[1:2], torch.tensor([end - tokens + t + 1]), scale)
        assert torch.equal(step[0, 0], together[1, t])


def test_rope_to_cache_depends_on_nothing_but_its_row(threads: Callable[[int], None]) -> None:
    new, length = make(6, BF16), torch.tensor([40, 33, 60])
    qkv, norm, angle = new(3, 32, 12 * 64), new(64), torch.rand(3, 32, 16)
    results = []
    for count in (1, 2):
        threads(count)
        k, v = torch.zeros(3, 2, 64, 64, dtype=BF16), torch.zeros(3, 2, 64, 64, dtype=BF16)
        q = ops.rope_to_cache(qkv, norm, norm, angle.cos(), angle.sin(), k, v, length, 1e-6)
        results.append((q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    k, v = torch.zeros(1, 2, 64, 64, dtype=BF16), torch.zeros(1, 2, 64, 64, dtype=BF16)
    last = (angle[1:2, 31:].cos(), angle[1:2, 31:].sin())
    q = ops.rope_to_cache(qkv[1:2, 31:], norm, norm, *last, k, v, length[1:2], 1e-6)
    assert torch.equal(q[0, 0], results[0][0][1, 31])
    assert torch.equal(k[0, :, 32], results[0][1][1, :, 32])


# What they leave to the reference, and inputs of every layout


@pytest.mark.parametrize("dtype", [BF16, FP32, torch.float16])
@pytest.mark.parametrize("name", list(cpu.KERNELS))
def test_inputs_of_any_layout(name: str, dtype: torch.dtype) -> None:
    args = op_cases(dtype)[name]
    same(name, args, dtype)
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor) and arg.dim() > 1 and not (name == "rope_to_cache" and i in (5, 6)):
            # The same numbers, laid out backwards.
            other = arg.transpose(0, -1).contiguous().transpose(0, -1)
            assert not other.is_contiguous()
            same(name, (*args[:i], other, *args[i + 1 :]), dtype)


@pytest.mark.parametrize("name", ["moe_gate", "moe_experts", "rope_to_cache", "attention"])
def test_integers_and_tables_of_another_width(name: str) -> None:
    wide = {torch.int64: torch.int32, FP32: torch.float64}
    tried = 0
    for i, arg in enumerate(args := op_cases(BF16)[name]):
        if isinstance(arg, Tensor) and arg.dtype in wide and (name, i) not in {("moe_gate", 1), ("moe_experts", 1)}:
            same(name, (*args[:i], arg.to(wide[arg.dtype]), *args[i + 1 :]), BF16)
            tried += 1
    assert tried


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "linear", "swiglu_mlp", "moe_gate", "moe_experts"])
def test_no_token(name: str) -> None:
    args = op_cases(BF16)[name]
    tokens = {"add_rms_norm": 2, "moe_experts": 3}.get(name, 1)
    empty = (*(a[:0] for a in args[:tokens]), *args[tokens:])
    for actual, expected in zip(flat(getattr(ops, name)(*empty)), flat(getattr(reference, name)(*empty)), strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("name", list(ops.SCHEMAS))
def test_meta_kernels_and_schemas(name: str, dtype: torch.dtype) -> None:
    args = op_cases(dtype)[name]
    real = flat(getattr(ops, name)(*(a.clone() if isinstance(a, Tensor) else a for a in args)))
    meta = flat(getattr(ops, name)(*(a.to("meta") if isinstance(a, Tensor) else a for a in args)))
    assert [(m.shape, m.dtype, m.stride()) for m in meta] == [(r.shape, r.dtype, r.stride()) for r in real]
    with torch.inference_mode(False):
        plain = op_cases(dtype)[name]
        if name in (
            "rope_to_cache",
            "attention",
            "cached_attention",
        ):  # opcheck compares caches before and after, where NaN is never equal
            plain = tuple(a.nan_to_num() if isinstance(a, Tensor) and a.is_floating_point() else a for a in plain)
        # What checks the schema compares the arguments before and after too, and torch cannot compare FP8.
        compared = all(a.dtype is not quantise.FP8 for a in plain if isinstance(a, Tensor))
        checks = ("test_schema", "test_faketensor") if compared else ("test_faketensor",)
        torch.library.opcheck(getattr(ops, name), plain, test_utils=checks)


def test_nan_and_infinity_get_through() -> None:
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 1.0], [-float("inf"), 2.0], [3e38, 3e38]], dtype=BF16)
    weight = torch.eye(2, dtype=BF16)
    assert torch.equal(ops.linear(x, weight, None).isnan(), reference.linear(x, weight, None).isnan())
    # Rounding must not carry a NaN's low bits into its sign.
    nan = torch.full((1, 1, 1), 0x7FFFFFFF, dtype=torch.int32).view(FP32)
    qkv, k, v = (
        torch.ones(1, 1, 6, dtype=BF16),
        torch.zeros(1, 1, 1, 2, dtype=BF16),
        torch.zeros(1, 1, 1, 2, dtype=BF16),
    )
    assert ops.rope_to_cache(qkv, None, None, nan, nan, k, v, torch.tensor([1]), 1e-6).isnan().all()
    gate_up = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=FP32)
    for value in (-200.0, -88.0, -1e-30, 0.0, 1e-30, 50.0, 200.0):
        row = torch.tensor([[value, 3.0]])
        expected = reference.swiglu_mlp(row, gate_up, torch.ones(2, 1))
        torch.testing.assert_close(ops.swiglu_mlp(row, gate_up, torch.ones(2, 1)), expected, rtol=5e-7, atol=1e-37)
