"""The demo's random weights: every tensor drawn from its own counter-based stream, written as the hub's shards.

A tensor depends on the seed, its name and its shape only: not on the other tensors, nor on the version of torch or of
numpy (only raw Philox words are drawn, which numpy promises to keep).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import safetensors

from ascend.errors import UserError
from convert.demo_heavy import OUTLIER_GAIN, is_gain, outlier_channels, row_scales, stream_scale, student_t_quantiles
from convert.demo_tokenizer import Layout, to_json
from convert.shapes import BYTES_PER_ELEMENT, Shape, TensorShapes, count

LOGIT_STD = 4.0
KINDS = ("gaussian", "heavy")  # heavy: the shape of trained weights, see `demo_heavy`

# End of the name, mean, std; a std of None is 1/sqrt(fan-in), which keeps activations near a root mean square of one.
_INIT: tuple[tuple[str, float, float | None], ...] = (
    ("word_embeddings.weight", 0.0, 1.0),
    ("expert_bias", 0.0, 0.05),  # next to sigmoids with a std of 0.2: it changes many choices and rules none
    ("query_layernorm.weight", 1.5, 0.15),  # sharper attention than random queries would give: positions matter
    ("key_layernorm.weight", 1.5, 0.15),
    ("norm.weight", 1.0, 0.1),
    (".bias", 0.0, 0.1),
    ("", 0.0, None),
)


def random_tensor(
    name: str,
    shape: Shape,
    dtype: str,
    seed: int,
    unused_rows: Sequence[range] | None = None,
    kind: str = "gaussian",
    layers: int = 1,
) -> np.ndarray[Any, Any]:
    """Return the weights of ``name``: float32, or the bits of bfloat16 as uint16 where ``dtype`` is ``"BF16"``.

    ``unused_rows`` is given where the rows score tokens (the head, or a tied embedding) and names the ids without text:
    they are ten times smaller, so that they are practically never chosen. ``kind`` is one of `KINDS`; ``heavy``
    depends on the number of ``layers``, too.
    """
    mean, std = next((mean, std) for suffix, mean, std in _INIT if name.endswith(suffix))
    if unused_rows is not None:
        std = LOGIT_STD / math.sqrt(shape[-1])
    elif std is None:
        std = 1 / math.sqrt(shape[-1])
    is_matrix = len(shape) == 2 and name.startswith("model.layers.")
    # A 64-bit word gives four weights: 16 bits index a table of quantiles, more than bfloat16 can tell apart.
    index = _raw_words(f"{seed}:{name}", -(-math.prod(shape) // 4)).view("<u2")[: math.prod(shape)].reshape(shape)
    if kind == "gaussian" or not (is_matrix or is_gain(name)):
        weights = _quantiles(mean, std, dtype)[index]
        for rows in unused_rows or ():
            weights[rows.start : rows.stop] = _quantiles(mean, std / 10, dtype)[index[rows.start : rows.stop]]
        return weights
    if is_matrix:
        rows_index = _raw_words(f"{seed}:{name}:rows", shape[0]).view("<u2")[: shape[0]]
        scale = row_scales(rows_index, _standard_normal()) * np.float32(stream_scale(name, layers))
        values = _quantiles(mean, std, "F32", kind)[index]
        values *= scale[:, None]
    else:
        values = _quantiles(mean, std, "F32")[index]
        values[outlier_channels(_raw_words(f"{seed}:outlier channels", shape[0]))] *= OUTLIER_GAIN
    return values if dtype == "F32" else _bfloat16(values)


def write_weights(
    directory: Path,
    shapes: TensorShapes,
    seed: int,
    tokens: Layout,
    max_shard_bytes: int,
    progress: Callable[[str], None],
    kind: str = "gaussian",
    layers: int = 1,
) -> None:
    """Write the tensors of ``shapes`` to `model.safetensors`, or to shards with an index where that is too large."""
    shards = _split(shapes, max_shard_bytes)
    head = "lm_head.weight" if "lm_head.weight" in shapes else "model.word_embeddings.weight"
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        progress(f"writing {file}")
        arrays = {
            name: random_tensor(name, shape, dtype, seed, tokens.unused if name == head else None, kind, layers)
            for name, (shape, dtype) in sorted(shard.items())
        }
        _save(directory / file, arrays)
        weight_map |= dict.fromkeys(arrays, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": count(shapes)[1]}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(to_json(index), encoding="utf-8")


def _raw_words(stream: str, count: int) -> np.ndarray[Any, Any]:
    """The first ``count`` 64-bit words of the stream of that name."""
    key = np.frombuffer(hashlib.sha256(stream.encode()).digest()[:16], "<u8")
    return np.random.Philox(key=key).random_raw(count).astype("<u8", copy=False)


@cache
def _standard_normal() -> np.ndarray[Any, Any]:
    """65536 equally likely values of the normal distribution."""
    standard = NormalDist()
    return np.array([standard.inv_cdf((i + 0.5) / 65536) for i in range(65536)])


@cache
def _quantiles(mean: float, std: float, dtype: str, kind: str = "gaussian") -> np.ndarray[Any, Any]:
    """65536 equally likely values of a distribution, in the storage of ``dtype``."""
    values = _standard_normal() if kind == "gaussian" else student_t_quantiles(65536)
    fp32 = (mean + std * values).astype(np.float32)
    return fp32 if dtype == "F32" else _bfloat16(fp32)


def _bfloat16(fp32: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits of bfloat16, to the nearest, ties to even."""
    bits = fp32.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _split(shapes: TensorShapes, max_shard_bytes: int) -> list[TensorShapes]:
    """Fill shards in the model's order; a tensor larger than the limit gets a shard of its own."""
    shards: list[TensorShapes] = [{}]
    room = max_shard_bytes
    for name, (shape, dtype) in shapes.items():
        size = math.prod(shape) * BYTES_PER_ELEMENT[dtype]
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = (shape, dtype)
        room -= size
    return shards


def _save(file: Path, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    """Write one safetensors file; uint16 arrays hold bfloat16, which numpy has no name for."""
    dtypes = {name: "bfloat16" if array.dtype == np.uint16 else "float32" for name, array in arrays.items()}
    if hasattr(safetensors, "TensorSpec"):  # safetensors 0.8: the arrays' memory is written as it lies
        entries: dict[str, Any] = {
            name: safetensors.TensorSpec(
                dtype=dtypes[name], shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes
            )
            for name, array in arrays.items()
        }
    else:
        entries = {
            name: {"dtype": dtypes[name], "shape": list(array.shape), "data": array.tobytes()}
            for name, array in arrays.items()
        }
    try:
        safetensors.serialize_file(entries, str(file), {"format": "pt"})
    except safetensors.SafetensorError as error:
        raise UserError(f"cannot write {file.name}: {error}") from None
