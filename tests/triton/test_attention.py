"""`attention` and `cached_attention` against their definition; the checker of this folder sees every launch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ops import reference
from ops.quantise import fp8_values
from ops.triton_kernels import attention as triton_attention
from ops.triton_kernels import launch, rope
from tests.op_cases import BF16, FP32, cache_case
from tests.triton.cases import DTYPES, FP8, SEEDS, examples, near
from tests.triton.checker import in_any_order, reads
from tests.triton.test_rope import projection

pytestmark = pytest.mark.slow  # `test_table` has its cases in the quick part

ATTENTION, CACHED = triton_attention.attention, triton_attention.cached_attention
ROWS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 60)), min_size=1, max_size=2)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 16 slots and parts of as few, so that short rows have many."""
    small = {key: tile._replace(slots=16, stages=2) for key, tile in triton_attention.TILES.items()}
    monkeypatch.setattr(triton_attention, "TILES", small)
    monkeypatch.setattr(triton_attention, "FEWEST_SLOTS", 16)


def case(device: str, seed: int, dtype: torch.dtype, fp8: bool, *shape: Any) -> tuple[Any, ...]:
    """`cache_case`; in the slots before a row's first, which hold padding, NaN as well as behind its last."""
    q, k, v, start, length, scale = cache_case(seed, dtype, *shape)
    padding = (torch.arange(k.shape[2]) < start[:, None])[:, None, :, None]
    k, v = (one.masked_fill(padding, float("nan")) for one in (k, v))
    if fp8:
        k, v = fp8_values(k), fp8_values(v)
    return *(one.to(device) for one in (q, k, v, start, length)), scale


def check(result: Tensor, q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float) -> None:
    """Two roundings in bf16 and fp16: of the weights, and of the result."""
    k, v = k.float().nan_to_num(), v.float().nan_to_num()
    exact = reference.attention(q.float(), k, v, start, length, scale)
    near(result, exact, reference.attention(q.float(), k, v.abs(), start, length, scale), roundings=2)


@examples
@given(
    seed=SEEDS,
    dtype=DTYPES,
    fp8=st.booleans(),
    tokens=st.sampled_from([1, 2, 4, 9, 20]),
    groups=st.integers(1, 2),
    per_group=st.sampled_from([1, 3, 8]),
    dim=st.sampled_from([1, 8, 40, 128, 136, 192]),
    rows=ROWS,
)
@pytest.mark.usefixtures("small_parts")
def test_attention(
    device: str,
    seed: int,
    dtype: torch.dtype,
    fp8: bool,
    tokens: int,
    groups: int,
    per_group: int,
    dim: int,
    rows: list[tuple[int, int]],
) -> None:
    # A row may be shorter than the tokens: its first ones are padding, which sees nothing and gives 0.
    rows = [(max(first, tokens - seen), seen) for first, seen in rows]
    arguments = case(device, seed, dtype, fp8, tokens, groups, per_group, dim, rows)
    check(ATTENTION(*arguments), *arguments)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_attention_with_the_tiles_of_a_card(device: str, tokens: int, fp8: bool) -> None:
    arguments = case(device, 1, BF16, fp8, tokens, 1, 8, 128, [(0, 700), (37, 300), (5, 128), (19, 1)])
    check(ATTENTION(*arguments), *arguments)


@pytest.mark.usefixtures("small_parts")
def test_each_slot_is_read_once_and_none_that_no_query_sees(device: str) -> None:
    if device != "cpu":
        pytest.skip("counting reads needs the interpreter")
    arguments = case(device, 2, BF16, False, 4, 2, 4, 32, [(0, 100), (13, 50), (4, 0)])
    with reads(arguments[1]) as keys, reads(arguments[2]) as values:
        ATTENTION(*arguments)
    slot = torch.arange(arguments[1].shape[2])
    seen = (slot >= arguments[3][:, None]) & (slot < arguments[4][:, None])
    for counted in (keys, values):
        assert torch.equal(counted.count, seen.long()[:, None, :, None].expand_as(counted.count))
    # The row of 100 slots and the row of 50 are shared out, whatever the cache could hold.
    assert len(keys.by) == 2 * (7 + 4)


@pytest.mark.parametrize("dim", [16, 15])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.usefixtures("small_parts")
def test_caches_and_queries_of_any_layout(device: str, fp8: bool, dim: int) -> None:
    q, k, v, *rest = case(device, 3, BF16, fp8, 3, 2, 3, dim, [(0, 40), (5, 12)])
    expected = ATTENTION(q, k, v, *rest)
    slots_first = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in (k, v)]
    shifted = [torch.zeros(one.numel() + 1, device=device).to(one.dtype)[1:].view_as(one).copy_(one) for one in (k, v)]
    for caches in (slots_first, shifted, [one.transpose(0, 3).contiguous().transpose(0, 3) for one in (k, v)]):
        assert torch.equal(ATTENTION(q, *caches, *rest), expected)
    assert torch.equal(ATTENTION(q.transpose(0, 3).contiguous().transpose(0, 3), k, v, *rest), expected)
    fewer_bits = [one.int() for one in rest[:2]]
    assert torch.equal(ATTENTION(q, k, v, *fewer_bits, rest[2]), expected)


@pytest.mark.usefixtures("small_parts")
def test_caches_beyond_the_reach_of_32_bits(device: str) -> None:
    q, k, v, *rest = case(device, 4, BF16, True, 1, 1, 2, 16, [(0, 40), (0, 3)])
    # Pages that nobody touches take no memory.
    memory = torch.from_numpy(np.zeros(2**33, np.uint8)).to(device).view(FP8)
    far = memory.as_strided(k.shape, (2**31 + 2**20, 2**31, 2**26, 1))
    for b, length in enumerate(rest[1].tolist()):
        far[b, :, :length] = k[b, :, :length]
    assert torch.equal(ATTENTION(q, far, v, *rest), ATTENTION(q, k, v, *rest))


@pytest.mark.parametrize(
    ("dtype", "fp8", "lengths", "library"),
    [
        (BF16, False, [20, 20], True),
        (BF16, False, [20, 21], False),
        (BF16, True, [20, 20], False),
        (BF16, False, None, False),
        (FP32, False, [20, 20], False),
    ],
)
def test_a_whole_prompt_is_the_librarys(
    device: str, dtype: torch.dtype, fp8: bool, lengths: Any, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(triton_attention, "LIBRARY_TOKENS", 20)
    rows = [(0, one) for one in lengths or [20, 20]]
    arguments = case(device, 5, dtype, fp8, 20, 1, 2, 16, rows)
    result = ATTENTION(*arguments, None, lengths)
    check(result, *arguments)
    assert result.is_contiguous()
    assert bool(calls) == library


def test_heads_that_do_not_divide_are_refused(device: str) -> None:
    cache = torch.zeros(1, 2, 8, 16, device=device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="3 query heads"):
        ATTENTION(torch.zeros(1, 1, 3, 16, device=device), cache, cache, row, row + 1, 1.0)


def test_no_row_and_no_token(device: str) -> None:
    cache = torch.zeros(2, 1, 8, 16, device=device)
    row = torch.zeros(2, dtype=torch.int64, device=device)
    assert ATTENTION(torch.zeros(2, 0, 4, 16, device=device), cache, cache, row, row, 1.0).shape == (2, 0, 4, 16)
    none = (cache[:0], cache[:0], row[:0], row[:0])
    assert ATTENTION(torch.zeros(0, 1, 4, 16, device=device), *none, 1.0).shape == (0, 1, 4, 16)


@pytest.mark.parametrize(
    ("tiles", "slots", "parts"),
    [(4, 131072, 63), (4, 2048, 16), (4, 128, 1), (128, 131072, 2), (512, 131072, 1), (8192, 131072, 1)],
)
def test_parts_fill_a_card(tiles: int, slots: int, parts: int) -> None:
    assert triton_attention._parts(tiles, slots, 2 * 132, 128) == parts


# With new tokens


def written_case(
    device: str, seed: int, dtype: torch.dtype, fp8: bool, tokens: int, heads: tuple[int, int, int], rows: Any
) -> tuple[Any, ...]:
    """Arguments of `cached_attention`, as (projection, caches, the rest); the new tokens' slots hold NaN."""
    groups, per_group, dim = heads
    _, k, v, start, length, scale = case(device, seed, dtype, fp8, tokens, *heads, rows)
    new = torch.arange(k.shape[2], device=device) >= (length - tokens)[:, None]
    k, v = (torch.where(new[:, None, :, None], torch.nan, one.float()).to(one.dtype) for one in (k, v))
    qkv = projection(seed, dtype, len(rows), tokens, groups, per_group, dim, max(dim // 4, 1), device)
    return qkv, (k, v), (start, length, 1e-6, scale)


def as_bytes(*tensors: Tensor) -> list[Tensor]:
    return [one.contiguous().view(torch.uint8) for one in tensors]


@examples
@given(
    seed=SEEDS,
    dtype=DTYPES,
    fp8=st.booleans(),
    tokens=st.sampled_from([1, 2, 4, 9, 20]),
    heads=st.tuples(st.integers(1, 2), st.sampled_from([1, 4, 7]), st.sampled_from([2, 40, 128])),
    normed=st.booleans(),
    rows=ROWS,
)
@pytest.mark.usefixtures("small_parts")
def test_cached_attention(
    device: str,
    seed: int,
    dtype: torch.dtype,
    fp8: bool,
    tokens: int,
    heads: tuple[int, int, int],
    normed: bool,
    rows: list[tuple[int, int]],
) -> None:
    rows = [(max(first, tokens - seen), seen) for first, seen in rows]
    qkv, (k, v), (start, length, eps, scale) = written_case(device, seed, dtype, fp8, tokens, heads, rows)
    qkv = qkv if normed else (qkv[0], None, None, *qkv[3:])
    parts_k, parts_v = k.clone(), v.clone()
    q = rope.rope_to_cache(*qkv, parts_k, parts_v, length, eps)
    result = CACHED(*qkv, k, v, start, length, eps, scale)
    # What is in the caches after, every byte of them, is what `rope_to_cache` leaves there.
    for found, wanted in zip(as_bytes(k, v), as_bytes(parts_k, parts_v), strict=True):
        assert torch.equal(found, wanted)
    check(result, q, k, v, start, length, scale)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens", [1, 4])
def test_decode_and_verify_are_one_launch_in_any_order(
    device: str, tokens: int, fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_called(*args: Any) -> Tensor:
        raise AssertionError("a launch of its own")

    monkeypatch.setattr(triton_attention, "rope_to_cache", not_called)
    rows = [(0, 300), (3, tokens)]
    qkv, caches, rest = written_case(device, 6, BF16, fp8, tokens, (2, 8, 128), rows)

    def step() -> tuple[Tensor, ...]:
        k, v = (one.clone() for one in caches)
        return CACHED(*qkv, k, v, *rest), *as_bytes(k, v)

    in_any_order(step, tries=0)
    counter = launch.counters(qkv[0].device, "attention", triton_attention.MOST_COUNTERS)
    assert not counter.any()


def test_a_captured_step_follows_the_lengths(device: str) -> None:
    if device == "cpu":
        pytest.skip("graphs need an NVIDIA GPU")
    qkv, (k, v), (start, length, eps, scale) = written_case(device, 7, BF16, False, 4, (4, 8, 128), [(0, 999), (3, 40)])
    k, v = k.nan_to_num(), v.nan_to_num()
    CACHED(*qkv, k, v, start, length, eps, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = CACHED(*qkv, k, v, start, length, eps, scale)
    for shorter in (0, 1, 20, 30):
        length -= shorter
        graph.replay()
        result = captured.clone()
        assert torch.equal(result, CACHED(*qkv, k, v, start, length, eps, scale))
