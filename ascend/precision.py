"""How weights are stored and in which dtype they are multiplied: the precisions, by the names the commands use.

A matrix ``[rows, columns]`` (outputs, inputs) takes its values plus one scale per block of it. The formats are those of
`ops.quantise` (int8 and int4, scales in bf16) and the FP8 of DeepSeek's and this family's checkpoints (blocks of 128 ×
128, `weight_scale_inv` in fp32).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ascend.errors import UserError, suggest


@dataclass(frozen=True)
class Format:
    """How one matrix is stored.

    bytes_per_weight: of a value alone. compute: dtype of the multiplication, a key of `DeviceFacts.peak`.
    scale_bytes: of one scale; block: rows and columns that share it, None for all of them.
    """

    bytes_per_weight: float
    compute: str
    scale_bytes: int = 0
    block: tuple[int | None, int | None] = (None, None)

    def nbytes(self, rows: int, columns: int) -> float:
        """Bytes of a matrix: ``rows · columns · bytes_per_weight``, plus its scales."""
        scales = math.ceil(rows / (self.block[0] or rows)) * math.ceil(columns / (self.block[1] or columns))
        return rows * columns * self.bytes_per_weight + scales * self.scale_bytes


FP32 = Format(4, "fp32")
BF16 = Format(2, "bf16")
FP8_BLOCK = Format(1, "fp8", scale_bytes=4, block=(128, 128))
INT8_CHANNEL = Format(1, "int8", scale_bytes=2, block=(1, None))
INT4_GROUP128 = Format(0.5, "bf16", scale_bytes=2, block=(1, 128))


@dataclass(frozen=True)
class Precision:
    """The formats of a checkpoint.

    experts: routed experts. matmuls: attention's and the shared experts' projections and the dense layer's MLP.
    plain: all that is never quantised: embedding, head, norms; also what attention computes in. router: None is
    the plain one, as checkpoints store it.
    """

    name: str
    label: str
    experts: Format
    matmuls: Format
    plain: Format = BF16
    router: Format | None = None

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes it multiplies in, without repetition: the peaks that a limit needs."""
        return tuple(dict.fromkeys(part.compute for part in (self.experts, self.matmuls, self.plain)))


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", "FP32", FP32, FP32, FP32),
        Precision("bf16", "BF16", BF16, BF16),
        Precision("fp8", "FP8, blocks of 128x128", FP8_BLOCK, FP8_BLOCK),
        Precision("w8a8", "INT8 per output channel, activations too", INT8_CHANNEL, INT8_CHANNEL),
        Precision("w4a16", "INT4 experts in groups of 128, rest BF16", INT4_GROUP128, BF16),
        Precision("w4a16-all", "INT4 in groups of 128, all but head and router", INT4_GROUP128, INT4_GROUP128),
    )
}

KV_DTYPES = {"fp32": 4, "bf16": 2, "fp8": 1}  # bytes of a value in the key/value cache


def precision(name: str) -> Precision:
    """Return the precision of that name, or raise `UserError` that lists them."""
    if name not in PRECISIONS:
        raise UserError(f"unknown precision '{name}'{suggest(name, PRECISIONS)}; there is {', '.join(PRECISIONS)}")
    return PRECISIONS[name]
