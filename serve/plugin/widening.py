"""A stream of a checkpoint's tensors with every quantised weight widened to a plain one on the way.

In bounded memory: what waits for its partner is all that is held, and in safetensors files the two are neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ascend.checkpoint import TensorEntry
from ascend.errors import UserError
from ascend.stored import FORMATS, FP8_BLOCK, stored_weights
from convert.rounding import check_finite, dequantised, steps
from convert.source import TORCH_DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_VALUES = {one.values[0] for one in FORMATS}
_VALUE_DTYPES = {TORCH_DTYPES[one.values[1]] for one in FORMATS}
_SCALES = {end for one in FORMATS for end in one.scale}
_BESIDE = {end for one in FORMATS for end in one.beside}


def widened(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight plain, in fp32 rounded to ``dtype`` where it was quantised, under the name it has unquantised.

    Raises `UserError` for values without a scale and the other way round, and for asymmetric values.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        module, _, end = name.rpartition(".")
        if end in _BESIDE:
            if end == "weight_offset" and bool(tensor.any()):
                raise UserError(f"{name} is not zero: asymmetric weights are not supported")
        elif end in _SCALES or tensor.dtype in _VALUE_DTYPES:
            parts = waiting.setdefault(module, {})
            parts[end] = tensor
            if len(parts) == 2:
                yield f"{module}.weight", _weight(module, waiting.pop(module), dtype)
        else:
            yield name, tensor
    for module, parts in waiting.items():
        _weight(module, parts, dtype)  # raises: one of the two never came


def _weight(module: str, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    entries = {}
    for end, one in parts.items():
        name = _DTYPE_NAMES.get(one.dtype, str(one.dtype))
        entries[f"{module}.{end}"] = TensorEntry(Path("the checkpoint"), name, tuple(one.shape), 0, one.nbytes)
    (stored,) = stored_weights(entries).values()
    values = parts.pop(next(end for end in parts if end in _VALUES))
    (scale,) = (one.float().view(len(one), -1) for one in parts.values())
    check_finite(stored.name, values)
    whole = torch.empty(stored.shape, dtype=dtype)
    for begin, last in steps(*stored.shape):  # what is in fp32 stays in the cache
        rows = slice(begin // FP8_BLOCK, -(-last // FP8_BLOCK)) if stored.format == "fp8" else slice(begin, last)
        whole[begin:last] = dequantised(stored.format, values[begin:last], scale[rows])
    return whole
