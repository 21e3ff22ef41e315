"""Rounding to few bits (`ops.quantise`), the ops on quantised weights, and a quantised model, on the CPU.

FP8 and the key/value cache in FP8: `tests/test_fp8.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ascend
import ops
from ascend.parallel import Parallel
from ascend.quantisation import check_on, quantise_model
from ascend.weights import Experts
from ascend.weights_quantised import FORMATS, quantised
from ops import quantise, reference
from tests import tiny
from tests.op_cases import BF16, FP32, make

DTYPES = st.sampled_from([BF16, FP32])
SEEDS = st.integers(0, 2**31)
SCALES = st.sampled_from([1e-30, 1e-3, 1.0, 1e6])
examples = settings(max_examples=50, deadline=None)


@examples
@given(seed=SEEDS, dtype=DTYPES, size=SCALES)
def test_int8_weights_are_within_half_a_step(seed: int, dtype: torch.dtype, size: float) -> None:
    weight = make(seed, dtype)(3, 5, 32, scale=size)
    value, scale = quantise.int8_weight(weight)
    assert (value.dtype, value.shape, scale.dtype, scale.shape) == (torch.int8, weight.shape, dtype, (3, 5))
    assert value.min() >= -127
    steps = weight.double() / scale.double()[..., None]
    # Where the scale was rounded down, the largest values are beyond the range by less than the rounding.
    assert (steps - value.double()).abs().max() <= 0.5 + 127 * 2.0**-8
    assert (value.abs().amax(-1) >= 126).all()


@examples
@given(seed=SEEDS, dtype=DTYPES, size=SCALES)
def test_int8_tokens_are_within_half_a_step(seed: int, dtype: torch.dtype, size: float) -> None:
    x = make(seed, dtype)(4, 32, scale=size)
    value, scale = quantise.int8_tokens(x)
    assert scale.dtype == FP32
    assert (value.float() * scale[:, None] - x.float()).abs().le(0.5001 * scale[:, None]).all()
    assert torch.equal(value.abs().amax(-1), torch.full((4,), 127, dtype=torch.int8))


def test_zeros_stay_zeros() -> None:
    zero = torch.zeros(2, 128, dtype=BF16)
    for value, scale in (quantise.int8_weight(zero), quantise.int8_tokens(zero)):
        assert not value.any()
        assert not scale.any()
    assert torch.equal(quantise.dequantised_int4(*quantise.int4_weight(zero)), zero)


def test_weights_too_small_for_a_scale_become_zero() -> None:
    weight = torch.full((1, 8), 2.0**-24, dtype=torch.float16)
    for value, scale in (quantise.int8_weight(weight), quantise.int4_weight(weight, 8)):
        assert scale.item() == 0
        assert not (value if value.dtype is torch.int8 else quantise.int4_values(value)).any()


@examples
@given(seed=SEEDS, dtype=DTYPES, group=st.sampled_from([8, 32, 128]))
def test_int4_packs_and_unpacks(seed: int, dtype: torch.dtype, group: int) -> None:
    weight = make(seed, dtype)(2, 6, 256)
    packed, scale = quantise.int4_weight(weight, group)
    assert (packed.shape, packed.dtype, scale.shape) == ((2, 6, 32), torch.int32, (2, 6, 256 // group))
    value = quantise.int4_values(packed)
    steps = weight.double().unflatten(-1, (-1, group)) / scale.double()[..., None]
    # Half a step, and what the scale's own rounding moved the ends by.
    assert (steps.flatten(-2) - value).abs().max() <= 0.5 + 8 * 2.0**-8
    restored = quantise.dequantised_int4(packed, scale)
    assert restored.dtype == dtype
    assert (restored.float() - weight.float()).norm() < 0.15 * weight.float().norm()


def test_int4_words_hold_the_first_input_lowest() -> None:
    weight = torch.tensor([[-7.5, -6, -5, -4, -3, -2, -1, 0]])
    packed, scale = quantise.int4_weight(weight, 8)
    assert scale.item() == 1
    expected = (-8, -6, -5, -4, -3, -2, -1, 0)
    assert packed.item() & 0xFFFFFFFF == sum((value + 8) << 4 * i for i, value in enumerate(expected))


@pytest.mark.parametrize(("inputs", "group"), [(100, 128), (24, 12), (7, 7)])
def test_int4_refuses_what_does_not_divide(inputs: int, group: int) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        quantise.int4_weight(torch.zeros(2, inputs), group)


def fake_int8(weight: Tensor) -> Tensor:
    value, scale = quantise.int8_weight(weight)
    return value.float() * scale.float().unsqueeze(-1)


def fake_tokens(x: Tensor) -> Tensor:
    value, scale = quantise.int8_tokens(x)
    return value.float() * scale.unsqueeze(-1)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, first=st.sampled_from([0, 2]))
def test_w8a8_ops_compute_with_the_rounded_numbers(seed: int, first: int) -> None:
    """Against plain fp32 arithmetic on weights and tokens that were rounded and widened again."""
    new = make(seed, FP32)
    x, gate_up, down = new(6, 32), new(4, 16, 32, scale=0.2), new(4, 32, 8)
    bias = new(16)
    out = ops.linear_w8a8(x, *quantise.int8_weight(gate_up[0]), bias)
    torch.testing.assert_close(out, F.linear(fake_tokens(x), fake_int8(gate_up[0]), bias), rtol=1e-5, atol=1e-5)

    def expert(x: Tensor, e: int) -> Tensor:
        gate, up = F.linear(fake_tokens(x), fake_int8(gate_up[e])).chunk(2, -1)
        return F.linear(fake_tokens(F.silu(gate) * up), fake_int8(down[e]))

    # The inner activations are rounded to int8: where two sums differ in their last bit, a step may go the other way.
    close = {"rtol": 0.0, "atol": 0.02 * float(expert(x, 0).abs().max())}
    out = ops.swiglu_mlp_w8a8(x, *quantise.int8_weight(gate_up[0]), *quantise.int8_weight(down[0]))
    torch.testing.assert_close(out, expert(x, 0), **close)
    weight, chosen = new(6, 2).abs(), torch.randint(0, 6, (6, 2), generator=torch.Generator().manual_seed(seed))
    exact = torch.zeros_like(x)
    for t in range(6):
        for k in range(2):
            if first <= chosen[t, k] < first + 4:
                exact[t] += weight[t, k] * expert(x[t : t + 1], int(chosen[t, k]) - first)[0]
    out = ops.moe_experts_w8a8(x, weight, chosen, *quantise.int8_weight(gate_up), *quantise.int8_weight(down), first, 6)
    torch.testing.assert_close(out, exact, rtol=0.0, atol=2 * close["atol"])


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, dtype=DTYPES)
def test_w4a16_experts_are_experts_with_the_restored_weights(seed: int, dtype: torch.dtype) -> None:
    new = make(seed, dtype)
    x, gate_up, down = new(6, 32), new(4, 16, 32, scale=0.2), new(4, 32, 8)
    weight, chosen = torch.rand(6, 2), torch.randint(0, 4, (6, 2), generator=torch.Generator().manual_seed(seed))
    packed = [quantise.int4_weight(one, 8) for one in (gate_up, down)]
    restored = [quantise.dequantised_int4(*one) for one in packed]
    out = ops.moe_experts_w4a16(x, weight, chosen, *packed[0], *packed[1])
    assert torch.equal(out, reference.moe_experts(x, weight, chosen, *restored))


@pytest.mark.parametrize(("to", "least"), [("w8a8", 0.99), ("w4a16", 0.8), ("fp8", 0.95)])
def test_a_quantised_model_is_near_the_whole_one(to: str, least: float, tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, moe_intermediate_size=32)
    ids = torch.randint(0, tiny.SHAPE["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = ascend.load_model(path)(ids)
        model = ascend.load_model(path, quantise=to)
        logits = model(ids)
    # Rounding moves some tokens to other experts, so it is the middle token that is looked at.
    near = torch.cosine_similarity(whole, logits, dim=-1).flatten().median()
    assert near > least
    assert not torch.equal(whole, logits)
    assert {p.dtype for n, p in model.named_parameters() if ".mlp.experts." in n and "scale" not in n} == {
        {"w8a8": torch.int8, "w4a16": torch.int32, "fp8": quantise.FP8}[to]
    }


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"moe_intermediate_size": 192}, "192 does not divide into groups of 128"),
        ({"moe_intermediate_size": 12}, "12 does not divide into groups of 128"),
    ],
)
def test_widths_that_have_no_groups_are_refused_before_anything_is_loaded(shape: dict[str, int], words: str) -> None:
    config = ascend.BailingMoeV2Config(**tiny.SHAPE | shape)
    assert words in tiny.user_error(check_on, torch.device("cpu"), FP32, "w4a16", config, Parallel())


@pytest.mark.parametrize("to", list(FORMATS))
def test_experts_are_rounded_one_by_one(to: str) -> None:
    """As all at once, and with no more beside the old and the new weights than one expert of 16 needs."""
    experts = Experts(16, 256, 128, 0, 16).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_()
    largest, stacks = 0, {one.untyped_storage().data_ptr() for one in experts.parameters()}

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                storage = out.untyped_storage()
                if func is torch.ops.aten.new_empty.default:
                    stacks.add(storage.data_ptr())  # of what is rounded
                if storage.data_ptr() not in stacks:
                    largest = max(largest, storage.nbytes())
            return out

    with Watched():
        rounded = quantised(experts, to)
    all_at_once = {"w8a8": quantise.int8_weight, "w4a16": quantise.int4_weight, "fp8": quantise.fp8_weight}[to]
    value, scale = all_at_once(experts.gate_up.data, **({"matrices": 2} if to == "fp8" else {}))
    assert torch.equal(rounded.gate_up.float(), value.float())
    assert torch.equal(rounded.gate_up_scale, scale)
    assert 0 < largest <= experts.gate_up[0].nbytes, "of one expert, in fp32 or int32"


def test_what_cannot_be_quantised_says_so(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path)
    assert "did you mean 'w8a8'" in tiny.user_error(ascend.load_model, path, quantise="w8a")
    model = ascend.load_model(path, quantise="w8a8")
    assert "as it was loaded" in tiny.user_error(quantise_model, model, "w4a16")
    assert "not quantised, can be saved" in tiny.user_error(model.save_pretrained, tmp_path / "copy")
