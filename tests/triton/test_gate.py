"""The router in one launch against its definition: which experts, in which order, with which weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ops import fused, reference
from ops.triton_kernels import gate
from tests.op_cases import BF16, FP32, make
from tests.triton.cases import DTYPES, SEEDS, examples, near
from tests.triton.checker import in_any_order


@examples
@given(
    seed=SEEDS,
    dtype=DTYPES,
    tokens=st.sampled_from([0, 1, 2, 3, 8, 19, gate.DECODE_TOKENS + 2]),
    hidden=st.sampled_from([16, 60, 200]),
    groups=st.integers(1, 6),
    per_group=st.integers(1, 6),
    biased=st.booleans(),
    normalise=st.booleans(),
    normed=st.booleans(),
    data=st.data(),
)
def test_gate(
    device: str,
    seed: int,
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    groups: int,
    per_group: int,
    biased: bool,
    normalise: bool,
    normed: bool,
    data: st.DataObject,
) -> None:
    kept = data.draw(st.integers(1, groups), label="kept")
    top_k = data.draw(st.integers(1, kept * per_group), label="top_k")
    E = groups * per_group
    x, weight = make(seed, dtype)(tokens, hidden), make(seed + 1, FP32)(E, hidden, scale=hidden**-0.5)
    bias = make(seed + 2, FP32)(E, scale=0.1) if biased else None
    args = (top_k, groups, kept, normalise, 2.5)
    on = partial(torch.Tensor.to, device=device)
    router = (on(weight), None if bias is None else on(bias), *args)
    if normed:
        residual, norm = make(seed + 3, dtype)(tokens, hidden), make(seed + 4, dtype)(hidden)
        mix, expert, out, total = gate.add_rms_norm_gate(on(x), on(residual), on(norm), 1e-6, *router)
        exact = reference.add_rms_norm(x, residual, norm, 1e-6)
        assert torch.equal(total.cpu(), exact[1])
        near(out.cpu(), exact[0].float(), roundings=2)
        x = out.cpu()  # a bit of rounding in it would move a near-tie
    else:
        mix, expert = gate.moe_gate(on(x), *router)
    wanted_mix, wanted_expert = reference.moe_gate(x, weight, bias, *args)
    score = torch.sigmoid(reference.linear(x.float(), weight, None)) + (0 if bias is None else bias)
    group = score.unflatten(-1, (groups, -1)).topk(min(2, per_group), dim=-1).values.sum(-1)
    clear = (_least_gap(score) > 1e-5) & (_least_gap(group) > 1e-5)
    assert expert.dtype == torch.int64
    assert torch.equal(expert.cpu()[clear], wanted_expert[clear])
    torch.testing.assert_close(mix.cpu()[clear], wanted_mix[clear], rtol=1e-5, atol=1e-6)


def _least_gap(score: torch.Tensor) -> torch.Tensor:
    if score.shape[-1] == 1 or not len(score):
        return torch.ones(len(score))
    return score.sort(-1).values.diff(dim=-1).amin(-1)


@pytest.mark.parametrize("tokens", [1, 3, gate.DECODE_TOKENS + 1])
def test_ties_go_to_the_lowest_expert(device: str, tokens: int) -> None:
    x, weight = torch.zeros(tokens, 16, device=device), torch.ones(12, 16, device=device)
    mix, expert = gate.moe_gate(x, weight, None, 4, 4, 2, True, 1.0)
    assert expert.tolist() == [[0, 1, 2, 3]] * tokens
    torch.testing.assert_close(mix.cpu(), torch.full((tokens, 4), 0.25))


def test_programs_in_any_order_give_the_same_bits(device: str) -> None:
    new = make(1, BF16)
    args = (new(20, 64), new(20, 64), new(64))
    router = (make(2, FP32)(16, 64).to(device), None, 4, 4, 2, True, 2.5)
    in_any_order(partial(gate.add_rms_norm_gate, *(one.to(device) for one in args), 1e-6, *router))


def test_fused_is_its_parts(device: str) -> None:
    new = make(3, FP32)
    args = (*(one.to(device) for one in (new(5, 96), new(5, 96), new(96))), 1e-6)
    router = (new(16, 96).to(device), new(16).to(device), 4, 4, 2, True, 2.5)
    for found, wanted in zip(
        gate.add_rms_norm_gate(*args, *router), fused.add_rms_norm_gate(*args, *router), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
