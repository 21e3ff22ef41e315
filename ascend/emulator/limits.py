"""What a 910B (Atlas A2) refuses, as exceptions: the checks that the emulator's kernels share.

The limits are those of the op-plugin documentation for A2 and of CANN 9.1's host code; each kernel says which it takes
from where. An argument that a kernel does not implement is refused by name as well: nothing is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ND = 2
"""The storage format of a plain row-major tensor (`aclFormat`)."""
FRACTAL_NZ = 29
"""The blocked storage format of matrices that `npu_format_cast(tensor, 29)` produces."""
INNER_LIMIT = 65536
"""Matmul ops: the last dimension in memory of either operand is smaller than this. Source: npu_grouped_matmul page."""
VECTOR_CORES = 40
"""Vector cores of a 910B3 or 910B4 (48 on B1 and B2). Source: CANN runtime's platform files."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""The floating point types of the device."""
FP8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)
_DTYPE_OF_CODE = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
    16: torch.quint4x2,
}


class Refused(RuntimeError):  # noqa: N818
    """A call that a 910B would refuse or get silently wrong, or that the emulator does not cover."""


def require(condition: bool, op: str, problem: str) -> None:
    """Raise `Refused` with ``op`` and ``problem`` unless ``condition`` holds."""
    if not condition:
        raise Refused(f"{op}: {problem}")


def short(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def require_dtype(op: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Refuse a tensor of another dtype than ``allowed``; for FP8 the reason is the device."""
    if tensor.dtype in allowed:
        return
    if tensor.dtype in FP8:
        raise Refused(f"{op}: {name} is {short(tensor.dtype)}; the 910B has no FP8 in any op, convert the checkpoint")
    names = ", ".join(short(dtype) for dtype in allowed)
    raise Refused(f"{op}: {name} is {short(tensor.dtype)}; the device takes {names}")


def require_dim(op: str, name: str, tensor: Tensor, *allowed: int) -> None:
    """Refuse a tensor with another number of dimensions than ``allowed``."""
    wanted = " or ".join(f"{dim}-D" for dim in allowed)
    require(tensor.dim() in allowed, op, f"{name} has shape {list(tensor.shape)}; the device takes {wanted}")


def require_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Refuse a tensor of another shape than ``shape``."""
    require(list(tensor.shape) == list(shape), op, f"{name} has shape {list(tensor.shape)}; needed is {list(shape)}")


def require_contiguous(op: str, **tensors: Tensor | None) -> None:
    """Refuse the named tensors that are not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None:
            require(tensor.is_contiguous(), op, f"{name} is not contiguous; the device takes contiguous input only")


def require_nd(op: str, **tensors: Tensor | None) -> None:
    """Refuse the named tensors that lie in FRACTAL_NZ, for the ops that read plain row-major memory."""
    for name, tensor in tensors.items():
        if tensor is not None:
            require(format_of(tensor) == ND, op, f"{name} is in format {format_of(tensor)}; the op takes ND (2)")


def require_absent(op: str, **arguments: object) -> None:
    """Refuse the named arguments unless they are None: the A2 has no such feature, or the emulator lacks it."""
    for name, value in arguments.items():
        require(
            value is None, op, f"{name} is given; the 910B does not take it here, or the emulator does not cover it"
        )


def require_value(op: str, name: str, value: object, allowed: Sequence[object], why: str = "") -> None:
    """Refuse a value that is not one of ``allowed``."""
    names = ", ".join(repr(choice) for choice in allowed)
    reason = f" ({why})" if why else ""
    require(value in allowed, op, f"{name} is {value!r}; the 910B takes, and the emulator covers, {names}{reason}")


def format_of(tensor: Tensor) -> int:
    """The `aclFormat` of a tensor: ND unless `npu_format_cast` said otherwise on its alias."""
    return getattr(tensor, "acl_format", ND)


def dtype_of(op: str, name: str, code: int | torch.dtype) -> torch.dtype:
    """The dtype an integer argument stands for: the dispatcher passes ``torch.dtype`` as its `ScalarType` number.

    Numbers from 256 on are torch_npu's own types (FP8, FP4, HiFloat8 …), which the 910B lacks.
    """
    if isinstance(code, torch.dtype):
        dtype: torch.dtype | None = code
    else:
        dtype = _DTYPE_OF_CODE.get(code)
    if dtype is None or dtype in FP8:
        raise Refused(f"{op}: {name} {code} is no type of the 910B (FP8, FP4 and the like start with the 950)")
    return dtype


def transposed(matrix: Tensor) -> bool:
    """Whether the last two dimensions are a transposed view of contiguous memory (the stride test of op-plugin)."""
    return matrix.dim() >= 2 and matrix.stride(-2) == 1 and matrix.stride(-1) == matrix.size(-2) > 1
