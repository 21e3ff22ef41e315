"""How a weight lies in a checkpoint: as one plain tensor, or as quantised values with their scales beside them.

Told from names, dtypes and shapes alone, so that it does not matter which tool wrote the directory or what its
`config.json` says of it. Letters: O outputs, I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ascend.checkpoint import TensorEntry
from ascend.errors import UserError

FP8_BLOCK = 128
PLAIN = "plain"
PLAIN_DTYPES = ("BF16", "F16", "F32")
SCALE_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class StoredFormat:
    """One way to store a matrix ``[O, I]``: the ends of its tensors' names, and what they must be.

    values: name and dtype of the values. per_value: inputs in one element of them. scale: the names a scale may have,
    and is_scale whether one of that shape is a scale for ``(O, I)``. beside: names that may come along, the values of
    which say nothing new (an offset of a symmetric format, the shape of packed values).
    """

    name: str
    values: tuple[str, str]
    scale: tuple[str, ...]
    is_scale: Callable[[tuple[int, ...], int, int], bool]
    per_value: int = 1
    beside: tuple[str, ...] = ()


def _per_block(shape: tuple[int, ...], outputs: int, inputs: int) -> bool:
    return shape == (-(-outputs // FP8_BLOCK), -(-inputs // FP8_BLOCK))


def _per_output(shape: tuple[int, ...], outputs: int, inputs: int) -> bool:
    return shape in ((outputs, 1), (outputs,))


def _per_group(shape: tuple[int, ...], outputs: int, inputs: int) -> bool:
    return len(shape) == 2 and shape[0] == outputs and shape[1] > 0 and inputs % shape[1] == 0


# In the order they are tried: a format's names and dtypes, and failing these the shape of the scale, decide.
FORMATS = (
    # DeepSeek's and this family's own, quant_method "fp8"; with weight_scale as compressed-tensors' strategy "block".
    StoredFormat("fp8", ("weight", "F8_E4M3"), ("weight_scale_inv", "weight_scale"), _per_block),
    # compressed-tensors' FP8_DYNAMIC: one scale per output.
    StoredFormat("fp8-channel", ("weight", "F8_E4M3"), ("weight_scale",), _per_output),
    # compressed-tensors' int-quantized, and with weight_offset ModelSlim's W8A8_DYNAMIC.
    StoredFormat("w8a8", ("weight", "I8"), ("weight_scale",), _per_output, beside=("weight_offset",)),
    # compressed-tensors' pack-quantized, symmetric, 4 bits: eight values to a word along the inputs.
    StoredFormat("w4a16", ("weight_packed", "I32"), ("weight_scale",), _per_group, 8, ("weight_shape",)),
)
_ENDS = sorted({end for one in FORMATS for end in (one.values[0], *one.scale, *one.beside)} - {"weight"})


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of the model as a checkpoint stores it; ``name`` is what it is called unquantised (``….weight``).

    shape: of the weight itself, whatever its values are packed into. format: a name of `FORMATS`, or "plain".
    """

    name: str
    format: str
    shape: tuple[int, ...]
    values: TensorEntry
    scale: TensorEntry | None = None
    beside: tuple[tuple[str, TensorEntry], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and what lies beside them."""
        return sum(entry.nbytes for _, entry in self.entries())

    def entries(self) -> Iterator[tuple[str, TensorEntry]]:
        """Yield all its tensors, each with the part it plays: "values", "scale", or the end of its name."""
        yield "values", self.values
        if self.scale is not None:
            yield "scale", self.scale
        yield from self.beside


def stored_weights(tensors: Mapping[str, TensorEntry]) -> dict[str, StoredWeight]:
    """Group the tensors of a checkpoint (`Checkpoint.tensors`) into weights, in the order they stand in.

    Raises `UserError` for values without a scale, a scale without values, and scales of a wrong shape or dtype.
    """
    weights: dict[str, StoredWeight] = {}
    parts: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        module, _, end = name.rpartition(".")
        if end in _ENDS:
            parts.setdefault(module, {})[end] = entry
    for name, entry in tensors.items():
        module, _, end = name.rpartition(".")
        if module in parts and (end == "weight" or (end == "weight_packed" and f"{module}.weight" not in tensors)):
            weights[f"{module}.weight"] = _quantised(f"{module}.weight", {end: entry} | parts.pop(module))
        elif end not in _ENDS:
            if entry.dtype not in PLAIN_DTYPES:
                raise UserError(f"{entry.file}: tensor {name} has dtype {entry.dtype} and no scale beside it")
            weights[name] = StoredWeight(name, PLAIN, entry.shape, entry)
    for module, ends in parts.items():
        end, entry = next(iter(ends.items()))
        raise UserError(f"{entry.file}: tensor {module}.{end} belongs to no weight: there are no values beside it")
    return weights


def _quantised(name: str, ends: Mapping[str, TensorEntry]) -> StoredWeight:
    """Find the format whose names, dtypes and scale these tensors have."""
    values = ends.get("weight") or ends["weight_packed"]
    why = ""
    for one in FORMATS:
        end, dtype = one.values
        if end not in ends or ends[end].dtype != dtype or len(values.shape) != 2:
            continue
        outputs, inputs = values.shape[0], values.shape[1] * one.per_value
        scale = next((ends[name] for name in one.scale if name in ends), None)
        extra = sorted(ends.keys() - {end, *one.scale, *one.beside})
        if scale is None:
            why = why or f"is {dtype} and has no scale ({' or '.join(one.scale)}) beside it"
        elif extra:
            why = why or f"has a {extra[0]} beside it, which is not supported"
        elif scale.dtype not in SCALE_DTYPES or not one.is_scale(scale.shape, outputs, inputs):
            of = f"{dtype} [{outputs}, {inputs}]"
            why = why or f"has a scale of {scale.dtype} {list(scale.shape)}, which does not fit its {of}"
        else:
            beside = tuple((end, ends[end]) for end in one.beside if end in ends)
            return StoredWeight(name, one.name, (outputs, inputs), values, scale, beside)
    unknown = f"has dtype {values.dtype} and shape {list(values.shape)}, which is no format known here"
    raise UserError(f"{values.file}: tensor {name} {why or unknown}")
