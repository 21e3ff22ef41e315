"""The emulated rotary, cache and attention ops, against complex rotation and `scaled_dot_product_attention`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.emulator_calls import BF16, FP16, FP32, bf16, call, causal_mask, int32, padded_attention, scatter

SEEDS = st.integers(0, 2**31)
TOLERANCE = {FP32: 1e-6, BF16: 2**-7, FP16: 2**-9}


# Rotary


def turned(x: Tensor, angle: Tensor, width: int) -> Tensor:
    """The first ``width`` dimensions as complex numbers (i, i + width/2), times e^(i·angle)."""
    real, imaginary = x[..., :width].double().chunk(2, -1)
    out = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((out.real, out.imag, x[..., width:].double()), -1)


@pytest.mark.parametrize("layout", ["TND", "BSND"])
@pytest.mark.parametrize(("head_dim", "width"), [(128, 64), (128, 128), (64, 64)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_apply_rotary_pos_emb(dtype: torch.dtype, head_dim: int, width: int, layout: str) -> None:
    lead = (5,) if layout == "TND" else (2, 3)
    query, key = torch.randn(*lead, 4, head_dim).to(dtype), torch.randn(*lead, 2, head_dim).to(dtype)
    angle = torch.rand(*lead, 1, width // 2, dtype=torch.float64) * 6
    cos, sin = (torch.cat((f, f), -1).to(dtype) for f in (angle.cos(), angle.sin()))
    exact = turned(query, angle, width), turned(key, angle, width)
    out = call("npu_apply_rotary_pos_emb", query=query, key=key, cos=cos, sin=sin, layout=layout)
    assert out[0] is query
    assert out[1] is key
    for got, wanted in zip(out, exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


def test_apply_rotary_pos_emb_writes_through_a_view() -> None:
    qkv = bf16(3, 8, 128)
    before = qkv.clone()
    query, key = qkv[:, :4], qkv[:, 4:6]
    cos, sin = torch.zeros(3, 1, 64, dtype=BF16), torch.ones(3, 1, 64, dtype=BF16)
    call("npu_apply_rotary_pos_emb", query=query, key=key, cos=cos, sin=sin, layout="TND")
    assert torch.equal(qkv[:, :6, :32], -before[:, :6, 32:64])
    assert torch.equal(qkv[:, :6, 32:64], before[:, :6, :32])
    assert torch.equal(qkv[:, :6, 64:], before[:, :6, 64:])
    assert torch.equal(qkv[:, 6:], before[:, 6:])


@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 3, 1), (2, 1, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_rotary_mul(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 4, 16).to(dtype)
    angle = torch.rand(*shape, 8, dtype=torch.float64) * 6
    cos, sin = (torch.cat((f, f), -1).float() for f in (angle.cos(), angle.sin()))
    out = call("npu_rotary_mul", input=x, r1=cos, r2=sin)
    assert out.dtype == dtype
    exact = turned(x, angle.expand(2, 3, 4, 8), 16)
    torch.testing.assert_close(out.double(), exact, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


# The cache


def test_scatter_writes_the_slots_and_skips_negative_ones() -> None:
    arguments = scatter()
    before = arguments["key_cache"].clone(), arguments["value_cache"].clone()
    assert call("npu_scatter_pa_kv_cache", **arguments) is None
    for new, cache, old in zip(("key", "value"), ("key_cache", "value_cache"), before, strict=True):
        old[0, 5], old[1, 1] = arguments[new][0], arguments[new][2]
        assert torch.equal(arguments[cache], old)


# Attention


def exact_attention(q: Tensor, k: Tensor, v: Tensor, left_out: Tensor | None, scale: float) -> Tensor:
    """``q [S, N, D]``, ``k`` and ``v`` ``[L, G, D]`` in fp64."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    mask = None if left_out is None else ~left_out
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True).transpose(0, 1)


def close(got: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(got.double(), exact, rtol=2**-6, atol=2**-6)


def bottom_right(new: int, keys: int) -> Tensor:
    return torch.ones(new, keys, dtype=torch.bool).triu(keys - new + 1)


@settings(max_examples=12, deadline=None)
@given(
    seed=SEEDS,
    sequences=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 40)), min_size=1, max_size=4),
    heads=st.sampled_from([(4, 4), (4, 1), (8, 2)]),
    paged=st.sampled_from([None, 3, 4]),
)
def test_attention_of_packed_sequences(
    seed: int, sequences: list[tuple[int, int]], heads: tuple[int, int], paged: int | None
) -> None:
    """Layout TND, causal: chunks of new tokens on contexts of several lengths, contiguous or in blocks of 16."""
    torch.manual_seed(seed)
    N, G = heads
    new = [n for n, _ in sequences]
    length = [n + context for n, context in sequences]
    q = bf16(sum(new), N, 128)
    keys = [(bf16(n, G, 128), bf16(n, G, 128)) for n in length]
    ends = torch.tensor(new).cumsum(0).tolist()
    arguments: dict[str, Any] = {"query": q, "actual_seq_lengths": ends, "num_heads": N, "num_key_value_heads": G}
    if paged is None:
        arguments["key"], arguments["value"] = (torch.cat(part) for part in zip(*keys, strict=True))
        arguments["actual_seq_lengths_kv"] = torch.tensor(length).cumsum(0).tolist()
    else:
        arguments.update(in_blocks(keys, G, paged))
        arguments["actual_seq_lengths_kv"] = length
    out, lse = call(
        "npu_fused_infer_attention_score",
        **arguments,
        input_layout="TND",
        scale=128**-0.5,
        sparse_mode=3,
        atten_mask=causal_mask(),
    )
    assert out.shape == q.shape
    assert (lse.shape, lse.dtype) == ((0,), FP32)
    for end, n, L, (k, v) in zip(ends, new, length, keys, strict=True):
        close(out[end - n : end], exact_attention(q[end - n : end], k, v, bottom_right(n, L), 128**-0.5))


def in_blocks(keys: list[tuple[Tensor, Tensor]], G: int, dims: int) -> dict[str, Any]:
    """A paged cache of blocks of 16 in random order, NaN where nothing was written, and the table of it."""
    widest = max(-(-len(k) // 16) for k, _ in keys)
    order = torch.randperm(len(keys) * widest).view(len(keys), widest)
    caches = torch.full((2, order.numel(), 16, G, 128), float("nan"), dtype=BF16)
    for row, pair in zip(order, keys, strict=True):
        for cache, new in zip(caches, pair, strict=True):
            for slot in range(len(new)):
                cache[row[slot // 16], slot % 16] = new[slot]
    key, value = caches.flatten(-2) if dims == 3 else caches.transpose(2, 3).contiguous()
    return {"key": key, "value": value, "block_table": order.int(), "block_size": 16}


def in_layout(x: Tensor, layout: str) -> Tensor:
    """``[B, S, N, D]`` in the layout."""
    return {"BSND": x, "BSH": x.flatten(-2), "BNSD": x.transpose(1, 2).contiguous()}[layout]


@pytest.mark.parametrize("layout", ["BSND", "BSH", "BNSD"])
@pytest.mark.parametrize("masked", [None, "2-D", "4-D", "causal"])
def test_attention_of_a_padded_batch(layout: str, masked: str | None) -> None:
    arguments = padded_attention()
    q, k, v = (arguments[name] for name in ("query", "key", "value"))
    left_out = torch.rand(2, 4, 9) < 0.3
    left_out[:, :, 0] = False
    if masked == "2-D":
        left_out[1] = left_out[0]
        arguments["atten_mask"] = left_out[0]
    elif masked == "4-D":
        arguments["atten_mask"] = left_out[:, None].to(torch.int8)
    elif masked == "causal":
        arguments.update({"atten_mask": causal_mask(), "sparse_mode": 3})
    arguments.update({name: in_layout(arguments[name], layout) for name in ("query", "key", "value")})
    arguments.update({"input_layout": layout, "softmax_lse_flag": True})
    out, lse = call("npu_fused_infer_attention_score", **arguments)
    assert out.shape == arguments["query"].shape
    assert lse.shape == (2, 4, 4, 1)
    out = out.view(2, 4, 4, 16) if layout != "BNSD" else out.transpose(1, 2)
    for b, (n, L) in enumerate([(3, 6), (4, 9)]):
        causal = bottom_right(n, L) if masked == "causal" else None
        mask = left_out[b, :n, :L] if masked in ("2-D", "4-D") else causal
        close(out[b, :n], exact_attention(q[b, :n], k[b, :L], v[b, :L], mask, 0.25))
        assert out[b, n:].isnan().all()
        score = torch.einsum("snd,lnd->nsl", q[b, :n].double(), k[b, :L].double().repeat_interleave(2, 1)) * 0.25
        score = score if mask is None else score.masked_fill(mask, float("-inf"))
        torch.testing.assert_close(lse[b, :, :n, 0].double(), score.logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_decode_ignores_the_sparse_mode_and_the_query_lengths() -> None:
    arguments = padded_attention()
    arguments.update({"query": bf16(2, 1, 4, 16), "sparse_mode": 3, "atten_mask": None, "actual_seq_lengths": [7, 7]})
    out = call("npu_fused_infer_attention_score", **arguments)[0]
    for b, L in enumerate([6, 9]):
        k, v = arguments["key"][b, :L], arguments["value"][b, :L]
        close(out[b], exact_attention(arguments["query"][b], k, v, None, 0.25))


def test_scale_is_one_unless_given() -> None:
    arguments = padded_attention()
    del arguments["scale"]
    out = call("npu_fused_infer_attention_score", **arguments)[0]
    q, k, v = (arguments[name][1] for name in ("query", "key", "value"))
    close(out[1], exact_attention(q, k, v, None, 1.0))


@pytest.mark.parametrize(("inner_precise", "zero"), [(0, False), (2, True)])
def test_a_query_without_keys_is_garbage_unless_corrected(inner_precise: int, zero: bool) -> None:
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[1] = True
    arguments = {**padded_attention(), "atten_mask": mask, "inner_precise": inner_precise}
    out = call("npu_fused_infer_attention_score", **arguments)[0]
    assert not out[:, 0].isnan().any()
    assert bool((out[:, 1] == 0).all()) is zero
    assert bool(out[:, 1].isnan().all()) is not zero


def test_more_queries_than_keys_give_zero_in_the_causal_mode() -> None:
    arguments = {**padded_attention(), "sparse_mode": 3, "atten_mask": causal_mask(), "actual_seq_lengths_kv": [2, 9]}
    out = call("npu_fused_infer_attention_score", **arguments)[0]
    assert (out[0, 0] == 0).all()
    assert (out[0, 1] != 0).all()


def test_a_sequence_without_keys_gives_zero() -> None:
    arguments = {**padded_attention(), "actual_seq_lengths_kv": [0, 9]}
    out = call("npu_fused_infer_attention_score", **arguments)[0]
    assert (out[0, :3] == 0).all()


def test_slots_may_be_int64() -> None:
    arguments = {**scatter(), "slot_mapping": int32(0, 1, 2).long()}
    call("npu_scatter_pa_kv_cache", **arguments)
    assert torch.equal(arguments["key_cache"][0, :3], arguments["key"])
