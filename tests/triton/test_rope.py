"""`rope_to_cache` against its definition: queries, what is in the cache after, and what must not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ops import reference
from ops.triton_kernels import rope
from tests.op_cases import BF16, FP32, make
from tests.triton.cases import DTYPES, FP8, FP16, SEEDS, examples, near


def pair_lengths(x: Tensor, half: int) -> Tensor:
    """A rotation keeps the length of each pair: the magnitude of what is rounded."""
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    length = 1.5 * torch.hypot(first, second)
    return torch.cat([length, length, rest], dim=-1)


def projection(
    seed: int,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    groups: int,
    per_group: int,
    dim: int,
    half: int,
    device: str,
) -> tuple[Any, ...]:
    """``(qkv, q_norm, k_norm, cos, sin)``."""
    new = make(seed, dtype)
    qkv, norms = new(batch, tokens, groups * (per_group + 2) * dim), (new(dim), new(dim))
    angle = make(seed + 1, FP32)(batch, tokens, half, scale=10.0)
    return tuple(one.to(device) for one in (qkv, *norms, angle.cos(), angle.sin()))


@examples
@given(
    seed=SEEDS,
    dtype=DTYPES,
    batch=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 5, 17, 33]),
    groups=st.integers(1, 2),
    per_group=st.integers(1, 3),
    dim=st.sampled_from([2, 6, 16, 40, 128]),
    normed=st.booleans(),
    data=st.data(),
)
def test_rope_to_cache(
    device: str,
    seed: int,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    groups: int,
    per_group: int,
    dim: int,
    normed: bool,
    data: st.DataObject,
) -> None:
    half = data.draw(st.integers(1, dim // 2), label="half")
    spare = data.draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch), label="spare")
    length = torch.tensor(spare, device=device) + tokens
    qkv, q_norm, k_norm, cos, sin = projection(seed, dtype, batch, tokens, groups, per_group, dim, half, device)
    norms = (q_norm, k_norm) if normed else (None, None)
    # What is not written must stay as it was: NaN.
    k = torch.full((batch, groups, tokens + 9, dim), float("nan"), dtype=dtype, device=device)
    v, exact_k, exact_v = k.clone(), k.float(), k.float()
    q = rope.rope_to_cache(qkv, *norms, cos, sin, k, v, length, 1e-6)
    fp32_norms = tuple(None if one is None else one.float() for one in norms)
    exact_q = reference.rope_to_cache(qkv.float(), *fp32_norms, cos, sin, exact_k, exact_v, length, 1e-6)

    near(q, exact_q, pair_lengths(exact_q, half), roundings=3)
    assert torch.equal(k.isnan(), exact_k.isnan())
    near(k.nan_to_num(), exact_k.nan_to_num(), pair_lengths(exact_k.nan_to_num(), half), roundings=3)
    assert torch.equal(v.isnan(), exact_v.isnan())
    assert torch.equal(v.nan_to_num(), exact_v.nan_to_num().to(dtype))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_cache_of_another_layout_and_of_fp8(device: str, fp8: bool, dtype: torch.dtype, tokens: int) -> None:
    cache = FP8 if fp8 else dtype
    qkv, *rest = projection(1, dtype, 2, tokens, 2, 2, 24, 6, device)
    qkv[0, 0, -24:] = torch.tensor([1e4, -1e4, 448.0, 460.0, -470.0, 0.0, 1e-9, 0.3] * 3, device=device)
    length = torch.tensor([tokens, 7], device=device, dtype=torch.int32)
    results = []
    for function in (rope.rope_to_cache, reference.rope_to_cache):
        # Slots outside heads, in a larger cache, as bytes that show every write.
        memory = torch.full((2, 2, 9, 3, 24), 1.5, device=device).to(cache)
        k, v = memory[0, :, :, :2].transpose(1, 2), memory[1, :, :, :2].transpose(1, 2)
        q = function(qkv, *rest, k, v, length, 1e-6)
        results.append((q, memory))
    near(results[0][0], results[1][0], 10 * torch.ones_like(q))
    found, wanted = (memory.float() for _, memory in results)
    assert torch.equal(found == 1.5, wanted == 1.5)
    assert torch.equal(found[1], wanted[1])
    # Where fp32 sums in another order cross a boundary of the cache's dtype, one step of it.
    step = {BF16: 2.0**-7, FP16: 2.0**-10, FP32: 1e-5, FP8: 2.0**-3}[cache]
    assert ((found - wanted).abs() <= step * wanted.abs() + 1e-2 * step).all()


def test_heads_laid_out_backwards_and_one_table_for_all_rows(device: str) -> None:
    qkv, q_norm, k_norm, cos, sin = projection(2, FP32, 2, 3, 1, 2, 16, 4, device)
    cos, sin = cos[:1].expand(2, -1, -1), sin[:1].expand(2, -1, -1)
    length = torch.tensor([3, 5], device=device)
    results = []
    for one in (qkv, qkv.transpose(0, -1).contiguous().transpose(0, -1)):
        k, v = (torch.zeros(2, 1, 6, 16, device=device) for _ in range(2))
        results.append((rope.rope_to_cache(one, q_norm, k_norm, cos, sin, k, v, length, 1e-6), k, v))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_is_written_outside_the_cache(device: str) -> None:
    qkv, *rest = projection(3, BF16, 2, 3, 1, 1, 16, 8, device)
    k, v = (torch.zeros(2, 1, 8, 16, dtype=BF16, device=device) for _ in range(2))
    rope.rope_to_cache(qkv, *rest, k, v, torch.tensor([10, 1], device=device), 1e-6)
    written = (k != 0).any(-1)[:, 0]
    assert written.nonzero().tolist() == [[0, 7], [1, 0]]


def test_no_token_and_no_row(device: str) -> None:
    for batch, tokens in ((0, 3), (2, 0)):
        qkv, *rest = projection(4, BF16, batch, tokens, 1, 2, 16, 8, device)
        k = torch.zeros(batch, 1, 8, 16, dtype=BF16, device=device)
        length = torch.zeros(batch, dtype=torch.int64, device=device)
        assert rope.rope_to_cache(qkv, *rest, k, k.clone(), length, 1e-6).shape == (batch, tokens, 2, 16)
        assert not k.any()
