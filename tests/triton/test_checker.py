"""The checks see what is wrong with kernels that are wrong on purpose, and nothing in those that are right."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.triton import races
from tests.triton.checker import KernelFault, in_any_order, reads

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the checks are the interpreter's")


@triton.jit
def copy(source, target, size, shift, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size if MASKED else index >= 0
    tl.store(target + index, tl.load(source + index + shift, mask=mask, other=0), mask=mask)


def copied(size: int, shift: int = 0, masked: bool = True) -> None:
    source, target = torch.randn(size), torch.empty(size)
    copy[(triton.cdiv(size, 16),)](source, target, size, shift, 16, masked)
    assert torch.equal(source, target)


def test_a_right_kernel_passes() -> None:
    copied(37)
    copied(32, masked=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"size": 37, "shift": 1},
            r"kernel copy, program \(2, 0, 0\).*load goes 0 bytes after the end of source \(float32",
        ),
        (
            {"size": 37, "shift": -1},
            r"program \(0, 0, 0\), test_checker.py:\d+: load goes 4 bytes before the begin of source",
        ),
        ({"size": 37, "masked": False}, "11 of 16 lanes outside"),
    ],
)
def test_memory_out_of_bounds(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(KernelFault, match=message):
        copied(**arguments)


def test_memory_beside_a_view_is_out_of_bounds() -> None:
    whole = torch.randn(64)
    with pytest.raises(KernelFault, match="after the end of source"):
        copy[(2,)](whole[:20], torch.empty(32), 32, 0, 16, True)


@triton.jit
def words(source, target):
    tl.store(target, tl.load((source + 1).to(tl.pointer_type(tl.int32), bitcast=True)))


def test_misaligned() -> None:
    with pytest.raises(KernelFault, match="no multiple of 4"):
        words[(1,)](torch.zeros(16, dtype=torch.int8), torch.zeros(1, dtype=torch.int32))


@triton.jit
def half(target, BLOCK: tl.constexpr):
    tl.store(target + tl.arange(0, BLOCK), 1.0, mask=tl.arange(0, BLOCK) % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "empty",
    [
        lambda dtype: torch.empty(16, dtype=dtype),
        lambda dtype: torch.empty_like(torch.zeros(16, dtype=dtype)),
        lambda dtype: torch.zeros(16, dtype=dtype).new_empty(16),
        lambda dtype: torch.empty_strided((16,), (1,), dtype=dtype),
    ],
)
def test_unwritten_output_is_nan(empty, dtype: torch.dtype) -> None:
    target = empty(dtype)
    half[(1,)](target, 16)
    assert target.float().isnan().tolist() == [False, True] * 8


@triton.jit
def lanes(target, SAME: tl.constexpr):
    index = tl.arange(0, 16)
    tl.store(target + index // 2, index // 2 if SAME else index)


def test_lanes_with_different_values_for_one_place() -> None:
    target = torch.zeros(16, dtype=torch.int32)
    lanes[(1,)](target, True)
    with pytest.raises(KernelFault, match="different values to one place"):
        lanes[(1,)](target, False)


@triton.jit
def total(source, target, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    value = tl.sum(tl.load(source + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), 0)
    if ATOMIC:
        tl.atomic_add(target, value, sem="relaxed")
    else:
        tl.store(target, tl.load(target) + value)


@pytest.mark.parametrize("dense", [0, 2**24])
def test_a_sum_without_atomics_races(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(races, "DENSE", dense)
    source, target = torch.arange(64.0), torch.zeros(9)[8:]
    total[(4,)](source, target, 16, True)
    assert target.item() == source.sum().item()
    with pytest.raises(
        KernelFault, match=r"nothing orders the store of program \(0, 0, 0\).* the load of program \(1, 0, 0\)"
    ):
        total[(4,)](source, target, 16, False)


@triton.jit
def last_one_sums(
    source, parts, counter, target, BLOCK: tl.constexpr, BEFORE: tl.constexpr, SEM: tl.constexpr, AFTER: tl.constexpr,
    LANES: tl.constexpr, SCOPE: tl.constexpr,
):  # fmt: skip
    program, index = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(parts + program * BLOCK + index, tl.load(source + program * BLOCK + index) * 2)
    if BEFORE:
        tl.debug_barrier()
    if LANES:
        done = tl.max(tl.atomic_add(counter + tl.arange(0, 2), 1, sem=SEM, scope=SCOPE), 0)
    else:
        done = tl.atomic_add(counter, 1, sem=SEM, scope=SCOPE)
    if AFTER:
        tl.debug_barrier()
    if done == tl.num_programs(0) - 1:
        sum = tl.zeros((BLOCK,), tl.float32)
        for other in range(tl.num_programs(0)):
            sum += tl.load(parts + other * BLOCK + index)
        tl.store(target + index, sum)
        tl.store(counter, 0)


def summed(
    before: bool = True, sem: str = "acq_rel", after: bool = True, lanes: bool = False, scope: str = "gpu"
) -> torch.Tensor:
    source, target = torch.arange(64.0), torch.empty(16)
    counter = torch.zeros(2, dtype=torch.int32)
    last_one_sums[(4,)](source, torch.empty(64), counter, target, 16, before, sem, after, lanes, scope)
    assert torch.equal(target, source.view(4, 16).sum(0) * 2)
    return target


@pytest.mark.parametrize("right", [{}, {"after": False}, {"lanes": True}])
def test_the_last_program_may_sum(right: dict[str, bool]) -> None:
    in_any_order(lambda: summed(**right))


@pytest.mark.parametrize(
    "wrong",
    [
        {"before": False},
        {"sem": "relaxed"},
        {"sem": "acquire"},
        {"sem": "release"},
        {"scope": "cta"},
        {"lanes": True, "after": False},
        {"lanes": True, "before": False},
    ],
)
def test_the_last_program_may_not_sum(wrong: dict[str, bool]) -> None:
    with pytest.raises(
        KernelFault, match=r"nothing orders the store of program .* and the load of program .* of parts"
    ):
        summed(**wrong)


@triton.jit
def accumulate_and_read(target, counter, result, SEM: tl.constexpr, WAIT: tl.constexpr):
    tl.atomic_add(target, 1.0, sem="relaxed")
    tl.debug_barrier()
    done = tl.atomic_add(counter, 1, sem=SEM)
    if (done == tl.num_programs(0) - 1) | (not WAIT):
        tl.store(result + tl.program_id(0), tl.load(target))


def test_a_load_beside_atomics() -> None:
    def launch(sem: str, wait: bool) -> None:
        accumulate_and_read[(3,)](torch.zeros(1), torch.zeros(1, dtype=torch.int32), torch.zeros(3), sem, wait)

    launch("acq_rel", True)
    for sem, wait in [("relaxed", True), ("acq_rel", False)]:
        with pytest.raises(KernelFault, match=r"the atomic of .* and the load of|the load of .* and the atomic of"):
            launch(sem, wait)


@triton.jit
def load_then_store(target, FIRST: tl.constexpr):
    if tl.program_id(0) == FIRST:
        tl.store(target + 1, tl.load(target))
    else:
        tl.store(target, 1.0)


@pytest.mark.parametrize("first", [0, 1])
def test_a_load_before_or_after_anothers_store(first: int) -> None:
    with pytest.raises(KernelFault, match=r"nothing orders the .* of element 0 of target"):
        load_then_store[(2,)](torch.zeros(2), first)


@triton.jit
def turn(scratch, target, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(scratch + index, index)
    if BARRIER:
        tl.debug_barrier()
    tl.store(target + index, tl.load(scratch + BLOCK - 1 - index))


def test_reading_back_wants_a_barrier() -> None:
    scratch, target = torch.empty(2, 16, dtype=torch.int32)
    turn[(1,)](scratch, target, 16, True)
    with pytest.raises(KernelFault, match="wants a tl"):
        turn[(1,)](scratch, target, 16, False)


@triton.jit
def first_wins(target):
    if tl.atomic_cas(target, 0, tl.program_id(0) + 1) == 0:
        tl.store(target + 1, tl.program_id(0))


def test_a_result_that_depends_on_the_order() -> None:
    def launch() -> torch.Tensor:
        target = torch.zeros(2, dtype=torch.int32)
        first_wins[(4,)](target)
        return target

    with pytest.raises(AssertionError, match="not equal"):
        in_any_order(launch)


@triton.jit
def pick(source, rows, target, WIDTH: tl.constexpr):
    index, row = tl.arange(0, WIDTH), tl.load(rows + tl.program_id(0))
    tl.store(target + tl.program_id(0) * WIDTH + index, tl.load(source + row * WIDTH + index, mask=row >= 0, other=0))


def test_loads_are_counted() -> None:
    source = torch.randn(5, 16).bfloat16()
    with reads(source) as counted, reads(source[3]) as third:
        pick[(4,)](source, torch.tensor([1, 3, -1, 1]), torch.empty(4, 16, dtype=torch.bfloat16), 16)
    assert counted.count.tolist() == [[n] * 16 for n in (0, 2, 0, 1, 0)]
    assert counted.bytes == 3 * 16 * 2
    assert counted.by == {("pick", 0): 16, ("pick", 1): 16, ("pick", 3): 16}
    assert third.count.tolist() == [1] * 16
