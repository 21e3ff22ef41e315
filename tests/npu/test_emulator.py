"""The emulator itself: the real torch_npu on cards that are not there, and what it refuses as they would."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ascend.devices import get_device
from ascend.devices.base import Memory
from ascend.emulator import log
from ascend.emulator.limits import Refused

CARD, OTHER = "npu:0", "npu:1"
GiB = 2**30
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.int64, torch.bool]


def npu_ops() -> Any:
    return torch.ops.npu


def test_eight_cards_are_seen_through_the_device_contract() -> None:
    device = get_device("npu:7")
    assert (device.count(), device.name(), device.facts().name) == (8, "Ascend910B3", "910B3")
    assert device.memory() == Memory(64 * GiB, 61 * GiB, 0)
    block = torch.empty(GiB // 4, dtype=torch.float32, device="npu:7")
    assert device.memory().free <= 60 * GiB
    assert device.memory().reserved >= GiB
    del block
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(62 * GiB, dtype=torch.int8, device="npu:7")


@settings(max_examples=40, deadline=None)
@given(dtype=st.sampled_from(DTYPES), shape=st.lists(st.integers(0, 5), max_size=4), turned=st.booleans())
def test_what_is_copied_there_comes_back(dtype: torch.dtype, shape: list[int], turned: bool) -> None:
    host = torch.randint(0, 2, shape).to(dtype)
    if turned and host.dim() > 1:
        host = host.transpose(0, -1)
    there = host.to(CARD)
    assert (there.device.type, there.dtype, there.shape) == ("npu", dtype, host.shape)
    assert torch.equal(there.cpu(), host)
    assert torch.equal(there.to(OTHER).cpu(), host)


def test_new_memory_holds_nothing_of_use() -> None:
    assert torch.empty(5, device=CARD).isnan().all()
    assert torch.empty_strided((2, 3), (3, 1), dtype=torch.bfloat16, device=CARD).isnan().all()
    assert (torch.empty(5, dtype=torch.int32, device=CARD) == -1).all()
    old = torch.zeros(1000, device=CARD)
    address = old.data_ptr()
    del old
    again = torch.empty(1000, device=CARD)
    assert again.data_ptr() == address
    assert again.isnan().all()


ATEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "matmul": lambda a, b: a @ b.T,
    "a view is written through": lambda a, b: (a[1:3].mul_(2), a)[1],
    "out": lambda a, b: torch.add(a, b, out=torch.empty_like(a)),
    "out, made larger": lambda a, b: torch.add(a, b, out=torch.empty(0, device=a.device)),
    "two outs": lambda a, b: torch.max(
        a, 1, out=(torch.empty(4, device=a.device), torch.empty(4, device=a.device).long())
    )[0],
    "strides": lambda a, b: a.T.contiguous() + b.T,
    "several results": lambda a, b: torch.cat(list(torch.sort(a, dim=1, stable=True)[:1]) + list(b.split(2))),
    "reduction": lambda a, b: (a * b).sum(0).softmax(-1),
    "scalar of the host": lambda a, b: a * torch.tensor(3.0) + 1,
    "indices": lambda a, b: a.index_select(0, b.argmax(1) % 4),
    "index_put": lambda a, b: a.index_put_((torch.tensor([1, 2], device=a.device),), b[:2]),
    "dtype": lambda a, b: a.bfloat16().float() + b.int(),
    "factory": lambda a, b: torch.arange(6, device=a.device) + torch.zeros(6, device=a.device),
}


@pytest.mark.parametrize("name", ATEN)
def test_aten_ops_are_those_of_the_cpu(name: str) -> None:
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    expected = ATEN[name](a.clone(), b.clone())
    result = ATEN[name](a.to(CARD), b.to(CARD))
    assert result.device == torch.device(CARD)
    assert torch.equal(result.cpu(), expected)


def test_an_op_stays_on_its_card() -> None:
    x = torch.ones(3, device="npu:5")
    assert (x + 1).device == torch.device("npu:5")
    assert torch.zeros_like(x).device == torch.device("npu:5")
    with torch.npu.device(3):
        assert torch.ones(2, device="npu").device == torch.device("npu:3")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "host memory in a device op": (lambda: torch.ones(2, device=CARD) + torch.ones(2), "found host memory: [2]"),
    "host memory in an npu op": (
        lambda: npu_ops().npu_rms_norm(torch.ones(2, 16, device=CARD), torch.ones(16), 1e-6),
        "npu::npu_rms_norm: expected all tensors on npu:0",
    ),
    "two cards": (lambda: torch.ones(2, device=CARD) + torch.ones(2, device=OTHER), "npu:0 and npu:1"),
    "float64": (lambda: torch.ones(2, device=CARD, dtype=torch.float64) * 2, "no float64"),
    "FP8": (lambda: torch.ones(2, device=CARD).to(torch.float8_e4m3fn).float(), "FP8"),
    "an npu op the emulator lacks": (
        lambda: npu_ops().npu_fast_gelu(torch.ones(2, device=CARD)),
        "npu::npu_fast_gelu: the emulator has no kernel for it",
    ),
    "an aten op the card would do on the host": (
        lambda: torch.linalg.eigvals(torch.ones(2, 2, device=CARD)),
        "torch_npu has no kernel for it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_card_would_refuse_is_refused(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(Refused, match=re.escape(words)):
        call()


WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "mask written": lambda x: x.__setitem__(x > 0, 1.0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(),
    "from the host": lambda x: x.copy_(torch.ones(4)),
    "a list to the card": lambda x: torch.tensor([1, 2], device=x.device),
    "synchronize": lambda x: torch.npu.synchronize(),
    "event": lambda x: torch.npu.current_stream().synchronize(),
}
NOT_WAITING: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x + 1).clamp(min=0).sum(),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "index_select": lambda x: x.index_select(0, torch.arange(2, device=x.device)),
    "topk": lambda x: x.topk(2),
    "to another dtype": lambda x: x.bfloat16(),
    "zeros": lambda x: torch.zeros(3, device=x.device),
}


@pytest.mark.parametrize("name", [*WAITING, *NOT_WAITING])
def test_waiting_of_the_host_is_counted(name: str) -> None:
    x = torch.randn(4, device=CARD)
    with log.recording() as seen:
        (WAITING | NOT_WAITING)[name](x)
    assert bool(seen.syncs) == (name in WAITING), seen.syncs


def test_the_log_names_the_ops_in_order() -> None:
    x, weight = torch.randn(2, 16, device=CARD), torch.ones(16, device=CARD)
    with log.recording() as seen:
        npu_ops().npu_rms_norm(x, weight, 1e-6)
        npu_ops().npu_swiglu(x, dim=-1)
        x.add_(1)
    assert seen.ops == ["npu::npu_rms_norm", "npu::npu_swiglu", "aten::add_.Tensor"]
    assert seen.of("npu") == ["npu_rms_norm", "npu_swiglu"]


def test_formats_are_kept_on_the_real_storage() -> None:
    weight = torch.randn(2, 32, 48, device=CARD).bfloat16()
    cast = npu_ops().npu_format_cast(weight, 29)
    assert npu_ops().get_npu_format(weight) == 2
    assert npu_ops().get_npu_format(cast) == 29
    assert torch.equal(cast.cpu(), weight.cpu())
    assert npu_ops().get_npu_format(npu_ops().npu_format_cast(cast, 2)) == 2
    with pytest.raises(Refused, match="FRACTAL_NZ is for matrices"):
        npu_ops().npu_format_cast(weight[0, 0].contiguous(), 29)
    x = torch.randn(4, 32, device=CARD).bfloat16()
    with pytest.raises(Refused, match=r"npu_rms_norm.*NZ|npu_rms_norm.*format"):
        npu_ops().npu_rms_norm(npu_ops().npu_format_cast(x.repeat(4, 1), 29), torch.ones(32, device=CARD).bfloat16())


def test_streams_and_events_keep_time() -> None:
    device = get_device("npu")
    device.activate()
    start, end, side = device.event(), device.event(), device.stream()
    with device.on(side):
        start.record()
        for _ in range(20):
            torch.ones(300, 300, device=CARD) @ torch.ones(300, 300, device=CARD)
        end.record()
    end.synchronize()
    assert 0 < start.elapsed_time(end) < 10_000


def test_a_runtime_function_that_is_not_emulated_says_its_name() -> None:
    runtime = ctypes.CDLL("libascendcl.so")
    assert runtime.aclrtMemcpyBatchAsync() == 207000
    runtime.aclGetRecentErrMsg.restype = ctypes.c_char_p
    assert b"has no aclrtMemcpyBatchAsync" in runtime.aclGetRecentErrMsg()
