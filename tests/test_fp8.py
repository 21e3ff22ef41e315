"""FP8: rounding weights and tokens in blocks, the ops on them, and a key/value cache that stores its values in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ascend
import ops
from ascend.cache import StaticCache
from ops import quantise, reference
from ops.quantise import FP8, FP8_BLOCK, FP8_MAX
from tests import tiny
from tests.op_cases import BF16, FP32, cache_case, make, op_cases

DTYPES = st.sampled_from([BF16, FP32])
SEEDS = st.integers(0, 2**31)
SCALES = st.sampled_from([1e-30, 1e-3, 1.0, 1e6])
# Below, at and beside whole blocks.
SIZES = st.sampled_from([1, 5, 127, 128, 129, 200, 256, 300])
HALF_STEP = 2.0**-4  # of a value: e4m3 has three bits after the leading one
LEAST = 2.0**-10  # half of the smallest step, as all below 2^-6 have the same
examples = settings(max_examples=10, deadline=None)


def near(value: Tensor, exact: Tensor) -> bool:
    """Whether values of e4m3 are within half a step of ``exact``, in units of the scale (and fp32's own roundings)."""
    off = (value.double() - exact.double()).abs()
    return bool((off <= (HALF_STEP * exact.double().abs()).clamp(min=LEAST) * (1 + 1e-6)).all())


@examples
@given(seed=SEEDS, dtype=DTYPES, size=SCALES, rows=SIZES, columns=SIZES, matrices=st.integers(1, 2))
def test_weights_are_within_half_a_step(
    seed: int, dtype: torch.dtype, size: float, rows: int, columns: int, matrices: int
) -> None:
    weight = make(seed, dtype)(2, matrices * rows, columns, scale=size)
    value, scale = quantise.fp8_weight(weight, matrices)
    high, wide = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    assert (value.dtype, value.shape, scale.dtype) == (FP8, weight.shape, FP32)
    assert scale.shape == (2, matrices * high, wide)
    # Each block by itself: its scale is that of its largest value, which becomes 448 at either end.
    for number, matrix in enumerate(weight.double().split(rows, 1)):
        for p, band in enumerate(matrix.split(FP8_BLOCK, 1)):
            for s, block in enumerate(band.split(FP8_BLOCK, 2)):
                own = scale[:, number * high + p, s].double()
                torch.testing.assert_close(own, block.abs().amax((1, 2)) / FP8_MAX, rtol=1e-6, atol=0.0)
                first = number * rows + p * FP8_BLOCK
                stored = value[:, first : first + block.shape[1], s * FP8_BLOCK : s * FP8_BLOCK + block.shape[2]]
                assert near(stored, block / own[:, None, None])
                assert torch.equal(stored.float().abs().amax((1, 2)), torch.full((2,), FP8_MAX))
    restored = quantise.dequantised_fp8(value, scale, matrices)
    assert restored.dtype == FP32
    assert (restored - weight.float()).norm() <= HALF_STEP * weight.float().norm()


@examples
@given(seed=SEEDS, dtype=DTYPES, size=SCALES, columns=SIZES)
def test_tokens_are_within_half_a_step(seed: int, dtype: torch.dtype, size: float, columns: int) -> None:
    x = make(seed, dtype)(4, columns, scale=size)
    value, scale = quantise.fp8_tokens(x)
    assert (value.dtype, value.shape, scale.dtype) == (FP8, x.shape, FP32)
    assert scale.shape == (4, -(-columns // FP8_BLOCK))
    for block, stored, own in zip(x.split(FP8_BLOCK, 1), value.split(FP8_BLOCK, 1), scale.T, strict=True):
        torch.testing.assert_close(own, block.float().abs().amax(1) / FP8_MAX, rtol=1e-6, atol=0.0)
        assert near(stored, block.double() / own.double()[:, None])


def test_a_block_of_zeros_has_no_scale_and_stays_zeros() -> None:
    weight = make(0, BF16)(256, 256)
    weight[:128, 128:] = 0
    for value, scale, made in (
        (*quantise.fp8_weight(weight), quantise.dequantised_fp8(*quantise.fp8_weight(weight))),
        (*quantise.fp8_tokens(weight), None),
    ):
        assert not value[:128, 128:].float().any()
        assert not scale[: len(scale) // 2, 1].any()
        assert scale[len(scale) // 2 :].all()
        assert made is None or (made.isfinite().all() and not made[:128, 128:].any())
    nothing = ops.linear_fp8(torch.zeros(2, 256, dtype=BF16), *quantise.fp8_weight(weight), None)
    assert torch.equal(nothing, torch.zeros(2, 256, dtype=BF16))


def test_values_beyond_the_range_become_its_ends_and_ties_go_to_even() -> None:
    x = torch.tensor([1e9, 449.0, 465.0, -500.0, float("inf"), -float("inf"), 17.0, 19.0, 2.0**-10, 3 * 2.0**-10])
    expected = [448.0, 448.0, 448.0, -448.0, 448.0, -448.0, 16.0, 20.0, 0.0, 2.0**-8]
    for dtype in (FP32, BF16):
        assert quantise.fp8_values(x.to(dtype)).float().tolist() == expected
    assert quantise.fp8_values(torch.tensor([float("nan")])).isnan().all()


@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, dtype=DTYPES, tokens=st.integers(0, 3), hidden=SIZES, inner=SIZES, first=st.sampled_from([0, 2]))
def test_ops_compute_with_the_rounded_numbers(
    seed: int, dtype: torch.dtype, tokens: int, hidden: int, inner: int, first: int
) -> None:
    """Against plain fp64 arithmetic on weights and tokens that were rounded and widened again."""
    new = make(seed, dtype)
    x, bias = new(tokens, hidden), new(2 * inner)
    gate_up, down = new(4, 2 * inner, hidden, scale=hidden**-0.5), new(4, hidden, inner, scale=inner**-0.5)
    shared = [*quantise.fp8_weight(gate_up[0]), *quantise.fp8_weight(down[0])]

    def product(x: Tensor, weight: Tensor, scale: Tensor, matrices: int = 1) -> Tensor:
        value, own = quantise.fp8_tokens(x)
        spread = own.repeat_interleave(FP8_BLOCK, -1)[:, : x.shape[1]]
        return F.linear(value.double() * spread, quantise.dequantised_fp8(weight, scale, matrices).double())

    rounding = {"rtol": 0.0, "atol": {BF16: 2.0**-7, FP32: 1e-5}[dtype] * 4}
    out = ops.linear_fp8(x, *shared[:2], bias)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), product(x, *shared[:2]) + bias.double(), **rounding)

    pairs = [(*quantise.fp8_weight(g, 2), *quantise.fp8_weight(d)) for g, d in zip(gate_up, down, strict=True)]

    def mlp(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        gate, up = product(x, *weights[:2], matrices=2).float().chunk(2, -1)
        return product(F.silu(gate) * up, *weights[2:])

    # The inner activations are rounded to e4m3: where two sums differ in their last bit, one may go the other way.
    close = {"rtol": 0.0, "atol": rounding["atol"] + 0.03}
    out = ops.swiglu_mlp_fp8(x, *pairs[0])
    torch.testing.assert_close(out.double(), mlp(x, pairs[0]), **close)
    weight, chosen = torch.rand(tokens, 2), torch.randint(0, 6, (tokens, 2), generator=torch.Generator().manual_seed(1))
    exact = torch.zeros(tokens, hidden, dtype=torch.float64)
    for t in range(tokens):
        for k in range(2):
            if first <= chosen[t, k] < first + 4:
                exact[t] += weight[t, k] * mlp(x[t : t + 1], pairs[int(chosen[t, k]) - first])[0]
    stacked = [torch.stack(parts) for parts in zip(*pairs, strict=True)]
    out = ops.moe_experts_fp8(x, weight, chosen, *stacked, first, 6)
    torch.testing.assert_close(out.double(), exact, rtol=0.0, atol=2 * close["atol"])


# The key/value cache


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_cache_in_fp8_takes_the_nearest_values(dtype: torch.dtype) -> None:
    args = op_cases(dtype)["rope_to_cache"]
    qkv = args[0].clone()
    qkv[..., -16:] *= 1000  # values, which no norm keeps small
    exact_k, exact_v = (cache.clone() for cache in args[5:7])
    stored_k, stored_v = (quantise.fp8_values(cache) for cache in args[5:7])
    before = bits(stored_k).clone()
    q = ops.rope_to_cache(qkv, *args[1:5], stored_k, stored_v, *args[7:])
    exact_q = reference.rope_to_cache(qkv, *args[1:5], exact_k, exact_v, *args[7:])
    assert torch.equal(q, exact_q)
    for stored, exact in ((stored_k, exact_k), (stored_v, exact_v)):
        assert torch.equal(stored.isnan(), exact.isnan()), "slots that are not written stay as they were"
        assert torch.equal(stored.float().nan_to_num(), quantise.fp8_values(exact).float().nan_to_num())
    assert stored_v.float().nan_to_num().abs().max() == FP8_MAX
    slot = int(args[7][0]) - 3
    assert torch.equal(bits(stored_k)[0, :, slot], before[0, :, slot])


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, dtype=DTYPES, tokens=st.integers(1, 3))
def test_attention_reads_an_fp8_cache_as_its_values(seed: int, dtype: torch.dtype, tokens: int) -> None:
    q, k, v, start, length, scale = cache_case(seed, dtype, tokens, 2, 3, 16, [(0, 9), (2, 5)])
    k, v = quantise.fp8_values(k), quantise.fp8_values(v)
    out = ops.attention(q, k, v, start, length, scale)
    assert out.dtype == dtype
    assert torch.equal(out, ops.attention(q, k.to(dtype), v.to(dtype), start, length, scale))
    exact = reference.attention(q.float(), k.to(FP32), v.to(FP32), start, length, scale)
    torch.testing.assert_close(
        out.float(), exact, atol=1e-5 if dtype is FP32 else 1e-2, rtol=0 if dtype is FP32 else 1e-2
    )
    assert out.isfinite().all()


@torch.inference_mode()
def test_a_model_decodes_from_an_fp8_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ascend import generation

    model = ascend.load_model(tiny.checkpoint(tmp_path, dtype="bf16"))
    ids = torch.randint(0, tiny.SHAPE["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(0))

    def logits() -> tuple[Tensor, torch.dtype]:
        decoder = generation.Decoder(model, ids, None, 2)
        decoder.prefill()
        return decoder.step(ids[:, 0]), decoder.cache.keys[0].dtype

    exact, plain = logits()
    monkeypatch.setattr(generation, "StaticCache", lambda *args: StaticCache(*args[:-2], FP8, args[-1]))
    near_ones, stored = logits()
    assert (plain, stored) == (BF16, FP8)
    assert not torch.equal(near_ones, exact)
    assert torch.cosine_similarity(near_ones, exact, dim=-1).min() > 0.97
