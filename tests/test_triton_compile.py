"""The Triton kernels as the compiler makes them for Hopper, at full size; and whether its output is read rightly."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import ops.cuda
from tests.triton import full_size
from tests.triton.compiled import MOST_SHARED, compiled, reason, recording

pytestmark = [pytest.mark.beside, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

# Source lines that read what a step is made of: weights, each once, and the cache.
STREAMS = r"evict_first|tl\.load\((k|v|pair)_ptr"
# No product in them, or of fp32 that is too small for a matrix unit.
WITHOUT_PRODUCTS = ("norm.", "rope.", "gate.", "grouped._sum")
# Which ops, at how many tokens: a decode step, its smallest and largest, a prompt.
STEPS: dict[int, tuple[str, ...]] = {
    32: ("",),
    1: ("moe_fp8", "linear_fp8", "add_rms_norm_gate"),
    128: ("moe_fp8", "linear_fp8", "add_rms_norm_gate"),
    1024: ("moe_fp8", "moe_w8a8", "moe_w4a16", "expert_rows", "add_rms_norm_gate"),
}
# Parts of other cases, or near enough to one.
ALSO_ELSEWHERE = (
    "moe_experts",
    "moe_gate",
    "swiglu_mlp, shared",
    "swiglu_mlp_fp8, shared",
    "swiglu_mlp_w8a8, shared",
    "rope_to_cache, fp8 cache, 4",
    "attention, bf16 cache, 4",
    "attention, fp8 cache, 1",
)
# The compiler keeps to 168 registers where it could take more. Only a cache that is not written in place comes here.
SPILLS = {"attention, fp8 cache, 4 new": 6}


@triton.jit
def copy(source, target, stride, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    values = tl.load(source + index * stride)
    tl.store(target + index, values)


@triton.jit
def product(left, right, target, PRECISION: tl.constexpr):
    row, inner = tl.arange(0, 64), tl.arange(0, 64)
    a, b = tl.load(left + row[:, None] * 64 + inner), tl.load(right + row[:, None] * 64 + inner)
    tl.store(target + row[:, None] * 64 + row, tl.dot(a, tl.trans(b), input_precision=PRECISION))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_launch_is_recorded_and_does_not_run() -> None:
    target = torch.zeros(4)
    with recording() as launches:
        copy[lambda arguments: (arguments["BLOCK"], 2)](meta(4), target, 48, 4, num_warps=8)
        copy[(1,)](meta(4), target, 3, 4)
    wide, narrow = launches
    assert (wide.name, wide.grid) == ("test_triton_compile.copy", (4, 2))
    assert (wide.options.num_warps, wide.constexprs) == (8, {(3,): 4})
    assert wide.signature == {"source": "*fp32", "target": "*fp32", "stride": "i32", "BLOCK": "constexpr"}
    assert (bool(wide.attributes[2,]), bool(narrow.attributes[2,])) == (True, False)  # a multiple of 16
    assert wide.key != narrow.key
    assert target.tolist() == [0] * 4


@pytest.mark.slow
def test_what_the_compiler_made_is_read() -> None:
    with recording() as launches:
        for stride in (1, 3):
            copy[(1,)](meta(1024), meta(1024), stride, 1024)
        product[(1,)](*(meta(64, 64, dtype=torch.bfloat16) for _ in range(3)), "tf32")
        product[(1,)](*(meta(64, 64) for _ in range(3)), "ieee", maxnreg=48)
    wide, narrow, cores, spilling = map(compiled, launches)
    assert wide.widths("values = ") == {16: 2}
    assert narrow.widths("values = ") == {4: 8}
    assert not wide.widths("tl.store")
    assert cores.tensor_core
    assert not spilling.tensor_core
    assert spilling.spills > 20
    assert (spilling.registers, wide.spills) == (48, 0)
    assert (wide.shared, wide.programs) == (0, 16)  # 64 warps
    assert spilling.shared >= 2 * 64 * 64 * 4
    assert spilling.programs == min(65536 // (48 * 128), 228 * 1024 // (spilling.shared + 1024))


def test_every_cuda_op_has_a_case() -> None:
    assert {op for _, op, _ in full_size.cases(1)} == set(ops.cuda.KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "op", "arguments"),
    [
        pytest.param(label, op, arguments, id=f"{label}, {tokens} tokens")
        for tokens, labels in STEPS.items()
        for label, op, arguments in full_size.cases(tokens)
        if label.startswith(labels) and not label.startswith(ALSO_ELSEWHERE)
    ],
)
def test_compiled_for_hopper(label: str, op: str, arguments: tuple[object, ...]) -> None:
    """No spills, streams 16 bytes wide, tensor cores where there is a product, and a program fits."""
    for launch in full_size.launches(op, arguments):
        try:
            found = compiled(launch)
        except triton.CompilationError as error:
            pytest.fail(f"{launch.name}: {reason(error)}")
        assert found.spills <= SPILLS.get(label, 0), launch.name
        assert found.shared <= MOST_SHARED, launch.name
        assert set(found.widths(STREAMS)) <= {16}, launch.name
        if not launch.name.startswith(WITHOUT_PRODUCTS):
            assert found.widths(STREAMS), launch.name
            assert found.tensor_core, launch.name
