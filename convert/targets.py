"""The formats this toolkit converts to: what each quantises, the tensors it writes, what `config.json` says of it.

What vLLM, vLLM-Ascend and SGLang ask of names, dtypes and `quantization_config` is in the comments, with its source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ascend.checkpoint import DTYPE_BYTES
from ascend.errors import UserError
from ascend.model_shape import ModelShape
from ascend.stored import FP8_BLOCK, PLAIN
from convert.classes import MATRICES

INT4_GROUP = 128


@dataclass(frozen=True)
class Output:
    """One tensor of the target: ``part`` is "values", "scale", "offset" or "shape", ``dtype`` as safetensors says."""

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Target:
    """A format. ``stored``: as `ascend.stored` names it; ``classes``: of tensors that it quantises."""

    name: str
    what: str
    stored: str = PLAIN
    classes: tuple[str, ...] = ()


TARGETS = {
    target.name: target
    for target in (
        Target("fp8", "FP8 e4m3 in blocks of 128 x 128, for Hopper (vLLM, SGLang)", "fp8", MATRICES),
        Target("w8a8", "INT8 per output channel, for Ascend 910B and CUDA", "w8a8", MATRICES),
        Target("w4a16", "INT4 routed experts in groups of 128, the rest as it is", "w4a16", ("routed_experts",)),
        Target("bf16", "back to BF16, from any of them"),
    )
}
LAYOUTS = ("compressed-tensors", "modelslim")  # of w8a8 files


def outputs(
    name: str, shape: tuple[int, ...], stored: str, plain_dtype: str, layout: str = LAYOUTS[0], group: int = INT4_GROUP
) -> tuple[Output, ...]:
    """Return the tensors that weight ``name`` of this shape becomes in a format of `ascend.stored`.

    plain_dtype: of the weight where it stays plain, of the scales of integers where it does not; group: of int4.
    """
    module = name.removesuffix(".weight")
    if stored == PLAIN:
        return (Output(name, "values", plain_dtype, shape),)
    rows, columns = shape
    if stored == "fp8":
        blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        return Output(name, "values", "F8_E4M3", shape), Output(f"{module}.weight_scale_inv", "scale", "F32", blocks)
    if stored == "w8a8":
        channel = (rows, 1)
        values = Output(name, "values", "I8", shape)
        if layout != "modelslim":
            return values, Output(f"{module}.weight_scale", "scale", plain_dtype, channel)
        return (  # scales of ours are numbers in the plain dtype, in which vLLM-Ascend keeps them: nothing is lost
            values,
            Output(f"{module}.weight_scale", "scale", "F32", channel),
            Output(f"{module}.weight_offset", "offset", "F32", channel),
        )
    return (
        Output(f"{module}.weight_packed", "values", "I32", (rows, columns // 8)),
        Output(f"{module}.weight_scale", "scale", plain_dtype, (rows, columns // group)),
        Output(f"{module}.weight_shape", "shape", "I64", (2,)),
    )


def int4_group(columns: Iterable[int]) -> int:
    """Inputs that share an int4 scale: 128, or what divides all widths where one of them is no multiple of that.

    One for all weights: `config.json` names one. Raises `UserError` where words of 8 values do not divide them.
    """
    group = math.gcd(INT4_GROUP, *columns)
    if group % 8:
        raise UserError(f"a width of the experts is no multiple of 8 (they share {group}), as int4 needs: use w8a8")
    return group


def quantization_config(target: Target, ignore: list[str], group: int = INT4_GROUP) -> dict[str, Any] | None:
    """Return what `config.json` says of a target, None for one that is plain.

    ignore: the modules (names without ``.weight``) with a matrix that was not quantised, by full names: vLLM compares
    them exactly (is_layer_skipped, should_ignore_layer).
    """
    # SGLang asks for the fused module of a dense or shared MLP; vLLM takes either.
    ignore = sorted({*ignore, *(name.replace(".up_proj", ".gate_up_proj") for name in ignore)})
    if target.stored == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            "modules_to_not_convert": ignore,
        }
    if target.stored == "w8a8":
        return _compressed_tensors("int-quantized", ignore, _scheme(8, "channel"), _scheme(8, "token", dynamic=True))
    if target.stored == "w4a16":
        described = _compressed_tensors("pack-quantized", ignore, _scheme(4, "group", group_size=group), None)
        # vLLM-Ascend 0.23 looks for it here, and takes 32 where it is not (quantization/methods/w4a16.py).
        return described | {"group_size": group}
    return None


def notes(target: Target, config: Mapping[str, Any]) -> list[str]:
    """Return a line for each engine that will not load this model in this format, though `ascend` does."""
    shape = ModelShape.from_config(config)
    kv_rows, width = shape.num_key_value_heads * shape.head_dim, shape.moe_intermediate_size
    # vLLM 0.32, quantization/utils/fp8_utils.py: every part of a fused projection begins on a block, so do experts.
    if target.stored == "fp8" and (kv_rows % FP8_BLOCK or width % FP8_BLOCK):
        return [
            f"vLLM will not load it: the {kv_rows} rows of the keys and the experts' width of {width} would have to be "
            f"multiples of {FP8_BLOCK}"
        ]
    return []


def _compressed_tensors(
    layout: str, ignore: list[str], weights: dict[str, Any], activations: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
            }
        },
        "kv_cache_scheme": None,
    }


def _scheme(bits: int, strategy: str, group_size: int | None = None, dynamic: bool = False) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }
