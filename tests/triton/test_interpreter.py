"""Each repair against torch, on every bit pattern where there are few."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from tests.triton import interpreter

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
BLOCK = 1024


@triton.jit
def convert(source, target, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty))


@triton.jit
def arithmetic(left, right, target, less, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(left + index), tl.load(right + index)
    tl.store(target + index, -(a * b + a) - b)
    tl.store(less + index, a < b)


@triton.jit
def dot(left, right, target, PRECISION: tl.constexpr):
    row, inner = tl.arange(0, 32), tl.arange(0, 32)
    a, b = tl.load(left + row[:, None] * 32 + inner), tl.load(right + row[:, None] * 32 + inner)
    out = tl.dot(a, tl.trans(b), out_dtype=target.dtype.element_ty, input_precision=PRECISION)
    tl.store(target + row[:, None] * 32 + row, out)


@triton.jit
def total(source, target):
    index = tl.arange(0, 32)
    tl.store(target, tl.sum(tl.load(source + index), 0))


def converted(source: Tensor, dtype: torch.dtype) -> Tensor:
    target = torch.empty(source.shape, dtype=dtype, device=source.device)
    convert[(source.numel() // BLOCK,)](source, target, BLOCK)
    return target


def same(actual: Tensor, expected: Tensor) -> None:
    """Bit by bit, but for the payload of NaN."""
    assert torch.equal(actual.float().isnan(), expected.float().isnan())
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    differ = (actual.view(integer) != expected.view(integer)) & ~expected.float().isnan()
    assert not differ.any(), f"{actual[differ][:5]}, not {expected[differ][:5]}"


def all_codes(dtype: torch.dtype, device: str) -> Tensor:
    """Every bit pattern of a format of one or two bytes, in a multiple of BLOCK."""
    if dtype.itemsize == 1:
        return torch.arange(256, device=device).to(torch.uint8).repeat(BLOCK // 256).view(dtype)
    return torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)


def floats(device: str) -> Tensor:
    """fp32: each value of bf16 and the ones half way, just below and above; random bits; the borders of e4m3."""
    bf16 = torch.arange(2**16, dtype=torch.int32, device=device) << 16
    near = [bf16 + offset for offset in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    random = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(1)).to(
        device, torch.int32
    )
    codes = all_codes(E4M3, device).float().nan_to_num().unique()
    ties = (codes[1:] + codes[:-1]) / 2
    ties = torch.cat([ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1), codes, 1.03 * codes, 1.1 * codes])
    ties = ties.repeat(-(-BLOCK // ties.numel()) * BLOCK)[: 2 * BLOCK]
    return torch.cat([torch.cat([*near, random]).view(FP32), ties])


def saturated(values: Tensor) -> Tensor:
    return values.float().clamp(-448, 448).to(E4M3)


@pytest.mark.parametrize("wide", [FP32, FP16, BF16])
def test_every_e4m3_code_is_read(wide: torch.dtype, device: str) -> None:
    codes = all_codes(E4M3, device)
    same(converted(codes, wide), codes.to(wide))


@pytest.mark.parametrize("wide", [FP32, FP16])
def test_every_bf16_code_is_read(wide: torch.dtype, device: str) -> None:
    codes = all_codes(BF16, device)
    same(converted(codes, wide), codes.to(wide))


@pytest.mark.parametrize("source", [FP32, FP16, BF16])
def test_a_cast_to_e4m3_rounds_to_even_and_saturates(source: torch.dtype, device: str) -> None:
    values = floats(device) if source == FP32 else all_codes(source, device)
    same(converted(values, E4M3), saturated(values))


@pytest.mark.parametrize("source", [FP32, FP16])
def test_a_cast_to_bf16_rounds_to_even(source: torch.dtype, device: str) -> None:
    values = floats(device) if source == FP32 else all_codes(source, device)
    same(converted(values, BF16), values.to(BF16))


def test_a_cast_to_fp16_rounds_to_even(device: str) -> None:
    values = floats(device)
    same(converted(values, FP16), values.to(FP16))


def test_integers_become_bf16_and_come_back(device: str) -> None:
    numbers = torch.arange(-512, 512, dtype=torch.int32, device=device)
    same(converted(numbers, BF16), numbers.to(BF16))
    assert torch.equal(converted(numbers.to(BF16), torch.int32), numbers.to(BF16).to(torch.int32))


def test_arithmetic_on_bf16_rounds_each_step_once(device: str) -> None:
    a, b = torch.randn(2, BLOCK, generator=torch.Generator().manual_seed(2)).to(device, BF16)
    result, less = torch.empty_like(a), torch.empty_like(a, dtype=torch.bool)
    arithmetic[(1,)](a, b, result, less, BLOCK)
    assert torch.equal(less, a < b)
    if device == "cpu":
        same(result, -(a * b + a) - b)
    else:  # a compiler may fuse the product and the sum: one rounding less
        assert torch.allclose(result.float(), (-(a * b + a) - b).float(), rtol=2.0**-6, atol=2.0**-6)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, E4M3, torch.int8])
def test_dot(dtype: torch.dtype, device: str) -> None:
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(3)).mul(16).to(device).to(dtype)
    target = torch.empty(32, 32, dtype=torch.int32 if dtype == torch.int8 else FP32, device=device)
    dot[(1,)](a, b, target, "ieee")
    exact = a.double() @ b.double().T
    if dtype == torch.int8:
        assert torch.equal(target, exact.int())
    else:
        assert torch.allclose(target.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_a_dot_of_fp32_has_the_precision_it_asks_for(device: str) -> None:
    a = (1 + 2.0**-12) * torch.eye(32, device=device)
    target = torch.empty(32, 32, device=device)
    dot[(1,)](a, a, target, "tf32")
    assert target.diagonal().unique().tolist() == [1.0]
    dot[(1,)](a, a, target, "ieee")
    assert target[0, 0] > 1


def test_sums_of_bf16_are_refused(device: str) -> None:
    if device == "cuda":
        pytest.skip("a rule of the interpreter")
    with pytest.raises(Exception, match="cast to fp32 first"):
        total[(1,)](torch.ones(32, dtype=BF16), torch.empty(1, dtype=BF16))


@triton.jit
def all_or_nothing(source, limit, target):
    index, keep = tl.arange(0, 32), tl.load(limit) > 0
    tl.store(target + index, tl.load(source + index, mask=keep, other=0))


def test_one_comparison_masks_a_block(device: str) -> None:
    source = torch.arange(32, device=device)
    for limit in (0, 1):
        target = torch.empty_like(source)
        all_or_nothing[(1,)](source, torch.tensor([limit], device=device), target)
        assert torch.equal(target, source * limit)


def test_a_changed_interpreter_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b: None)
    with pytest.raises(RuntimeError, match="create_dot"):
        interpreter.repair()
