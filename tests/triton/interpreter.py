"""Repairs of Triton's interpreter, so that a kernel computes on the CPU what it computes on a Hopper card.

Seen in 3.6.0 and in 3.9.0, both of which keep bf16 as uint16 and fp8 as uint8:

- Casts between fp32 and bf16 cut the mantissa off. Casts to fp8 round halves up instead of to even, wrap instead of
  saturating, and know no NaN of e4m3; its NaN codes are read as 480. Casts between bf16 or fp8 and integers move bits.
  → `cast`: torch's conversion, to nearest even, and for e4m3 clamped to ±448 first: the PTX that Triton emits for
  sm_90 is ``cvt.rn.satfinite.e4m3x2``, by which NaN stays NaN and everything beyond 448 becomes ±448.
- Arithmetic on bf16 adds, multiplies and compares the stored bits. → `binary_op`, `unary_op`: in fp32, rounded once.
- `tl.dot` multiplies the stored bits of bf16; fp8 operands suffer from the cast above. On fp32 operands it ignores
  ``input_precision``, whose default on a card is TF32. → `create_dot`: values in fp32; with TF32 the operands lose the
  13 bits that the tensor cores do not read. Sums are in fp32, in numpy's order. A Hopper card sums fp8 products in less
  than fp32, which this does not show.
- The result of a comparison keeps the type of what was compared, so that a scalar one does not work as the mask of a
  block. → `binary_op`: int1.
- Reductions, scans, fma and clamp on bf16 work on the stored bits. A kernel has no reason to (it would round at every
  step): refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

MAX_E4M3 = 448.0
# Number formats that numpy lacks. The other fp8 formats of Triton have no user here and are refused.
PACKED = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}

# What is replaced, with the parameters that the replacement relies on.
REPLACED = {
    "cast_impl": ["self", "src", "dst_type"],
    "create_fp_to_fp": ["self", "src", "dst_type", "rounding_mode"],
    "binary_op": ["self", "lhs", "rhs", "op"],
    "unary_op": ["self", "arg", "op"],
    "create_dot": ["self", "a", "b", "d", "input_precision", "max_num_imprecise_acc"],
}
REFUSED = {
    (InterpreterBuilder, "create_fma"): ["self", "x", "y", "z"],
    (InterpreterBuilder, "create_clampf"): ["self", "arg", "lo", "hi", "propagate_nans"],
    (ReduceOps, "apply"): ["self", "input"],
    (ScanOps, "apply"): ["self", "input"],
}


def _numpy(dtype: tl.dtype) -> np.dtype:
    return triton_interpreter._get_np_dtype(dtype)


def decode(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """What the interpreter stores for ``dtype``, as numbers: bf16 and e4m3 in fp32, everything else as it is."""
    if dtype not in PACKED:
        if dtype.is_fp8():
            raise NotImplementedError(f"{dtype} in the interpreter: tests/triton/interpreter.py repairs only e4m3")
        return data
    data = np.array(data, order="C")
    whole = data.view(np.int16 if data.itemsize == 2 else np.uint8)
    return torch.from_numpy(whole).view(PACKED[dtype]).float().numpy()


def encode(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Numbers as the interpreter stores them for ``dtype``, rounded to nearest even; e4m3 saturates."""
    if dtype not in PACKED:
        if dtype.is_fp8():
            raise NotImplementedError(f"{dtype} in the interpreter: tests/triton/interpreter.py repairs only e4m3")
        with np.errstate(over="ignore"):  # to infinity, as a card does
            return values.astype(_numpy(dtype))
    wide = torch.from_numpy(np.array(values, np.float64 if values.dtype == np.float64 else np.float32, order="C"))
    if dtype == tl.float8e4nv:
        return wide.clamp(-MAX_E4M3, MAX_E4M3).to(PACKED[dtype]).view(torch.uint8).numpy()
    return wide.to(PACKED[dtype]).view(torch.int16).numpy().view(np.uint16)


def _cast(self: Any, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    target = dst_type.scalar
    return TensorHandle(encode(decode(src.data, src.dtype.scalar), target), target)


def _fp_to_fp(self: Any, src: TensorHandle, dst_type: tl.dtype, rounding_mode: Any) -> TensorHandle:
    if rounding_mode == triton_interpreter._ir.ROUNDING_MODE.RTZ:
        raise NotImplementedError("fp_downcast_rounding='rtz': the repaired interpreter only rounds to nearest even")
    return _cast(self, src, dst_type)


def _packed(handle: TensorHandle) -> bool:
    return handle.dtype.scalar in PACKED


def _binary_op(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        dtype = lhs.dtype.scalar
        if _packed(lhs) or _packed(rhs):
            result = op(decode(lhs.data, dtype), decode(rhs.data, rhs.dtype.scalar))
        else:
            result = original(self, lhs, rhs, op).data
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(encode(result, dtype) if dtype in PACKED else result, dtype)

    return binary_op


def _unary_op(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def unary_op(self: Any, arg: TensorHandle, op: Any) -> TensorHandle:
        if not _packed(arg):
            return original(self, arg, op)
        dtype = arg.dtype.scalar
        return TensorHandle(encode(op(decode(arg.data, dtype)), dtype), dtype)

    return unary_op


def _dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision: Any, _: int) -> TensorHandle:
    left, right = (decode(operand.data, operand.dtype.scalar) for operand in (a, b))
    if left.dtype.kind == "i":  # sums of int8 products are exact in fp64, whose matmul is far faster
        product = np.matmul(left.astype(np.float64), right.astype(np.float64)).astype(np.int64)
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)
    if a.dtype.scalar == tl.float32 and input_precision == triton_interpreter._ir.INPUT_PRECISION.TF32:
        left, right = ((x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (left, right))
    wide = np.result_type(np.float32, left.dtype)
    total = np.matmul(left.astype(wide), right.astype(wide)) + decode(d.data, d.dtype.scalar)
    return TensorHandle(encode(total, d.dtype.scalar), d.dtype.scalar)


def _refuse(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        for arg in args:
            for each in arg if isinstance(arg, tuple) else (arg,):
                handle = getattr(each, "handle", each)
                if isinstance(handle, TensorHandle) and _packed(handle):
                    raise NotImplementedError(f"{name} on {handle.dtype}: cast to fp32 first")
        return original(self, *args, **kwargs)

    return refuse


def repair() -> None:
    """Put the repairs in place, for the whole process.

    Raises RuntimeError if this Triton's interpreter is not built as the repairs assume.
    """
    targets = {(InterpreterBuilder, name): parameters for name, parameters in REPLACED.items()} | REFUSED
    for (owner, name), parameters in targets.items():
        found = list(inspect.signature(getattr(owner, name, lambda: None)).parameters)
        if found != parameters:
            raise RuntimeError(
                f"Triton's interpreter has changed: {owner.__name__}.{name}{tuple(found)}, not {tuple(parameters)}; "
                "bring tests/triton/interpreter.py up to date"
            )
    builder = InterpreterBuilder
    for (owner, name), _ in REFUSED.items():
        setattr(owner, name, _refuse(f"{owner.__name__}.{name}", getattr(owner, name)))
    builder.binary_op, builder.unary_op = _binary_op(builder.binary_op), _unary_op(builder.unary_op)
    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = _cast, _fp_to_fp, _dot
