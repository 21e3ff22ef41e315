"""What compressed-tensors and llmcompressor make of the same weights: our formats read by them, our rounding compared.

compressed-tensors 0.17 is installed with vLLM. llmcompressor is not, but all that its model-free path computes is in
compressed-tensors' functions, so its tensors are made here bit for bit; `test_model_free…` holds that against the real
one, where LLMCOMPRESSOR_PYTHON names an interpreter that has it (0.14.0.1 was used).
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.demo import write_demo
from convert.engine import convert, prepare
from convert.plan import Request
from convert.targets import TARGETS, quantization_config
from ops import quantise
from tests.quantised import MATRIX
from tests.tiny import checkpoint, read_config, read_tensors
from tests.vllm_ascend_rules import modules

pytest.importorskip("compressed_tensors", reason="compressed-tensors comes with vLLM, which is not installed")

SHAPES = ((256, 384), (200, 128), (1, 64), (130, 256))
IGNORED = ("lm_head", r"re:.*mlp\.gate$", r"re:.*word_embeddings$", r"re:.*eh_proj$")


def heavy_tailed(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """BF16 weights with outliers, rows of very different size, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) ** 3 * torch.rand(shape[0], 1, generator=generator) * 0.02
    weight[shape[0] // 2] = 0 if shape[0] > 1 else weight[0]
    return weight.bfloat16()


def scheme(target: str, group: int = 128) -> Any:
    """The only scheme of our `quantization_config`, as compressed-tensors reads it."""
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    if target == "fp8":
        return preset_name_to_scheme("FP8_BLOCK", ["Linear"])
    config = QuantizationConfig.model_validate(quantization_config(TARGETS[target], ["lm_head"], group))
    (found,) = config.config_groups.values()
    return found


def decompressed(form: str, tensors: dict[str, Tensor], of: Any) -> Tensor:
    """What compressed-tensors makes of a module's tensors, named as it names them."""
    from compressed_tensors.compressors import BaseCompressor

    weight: Tensor = BaseCompressor.get_value_from_registry(form).decompress(tensors, of)["weight"]
    return weight


def model_free(weight: Tensor, of: Any) -> tuple[Tensor, Tensor]:
    """Values and scales as llmcompressor's model-free path has them, by compressed-tensors' own functions.

    `llmcompressor/observers/min_max.py`: least and largest of a row or block, in the weight's dtype.
    """
    from compressed_tensors.quantization import QuantizationStrategy
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant

    args = of.weights
    if args.strategy == QuantizationStrategy.BLOCK:
        padded = maybe_pad_tensor_for_block_quant(weight, tuple(args.block_structure))
        least, largest = (
            padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).transpose(1, 2).flatten(2).aminmax(dim=-1)
        )
    else:
        least, largest = weight.aminmax(dim=-1, keepdim=True)
    scale, zero_point = calculate_qparams(least, largest, args)
    return quantize(weight, scale, zero_point, args, dtype=args.pytorch_dtype()), scale


def relative_error(rounded: Tensor, weight: Tensor) -> float:
    """Root mean square of the error over that of the weight."""
    return float((rounded - weight.float()).norm() / weight.float().norm())


@pytest.mark.parametrize("target", ["w8a8", "w4a16"])
def test_its_parser_takes_our_config(target: str) -> None:
    found = scheme(target)
    assert found.weights.num_bits == {"w8a8": 8, "w4a16": 4}[target]
    assert found.weights.symmetric
    assert not found.weights.dynamic
    assert (found.weights.group_size or 0) == {"w8a8": 0, "w4a16": 128}[target]
    assert (found.input_activations is None) == (target == "w4a16")
    if target == "w8a8":
        assert found.input_activations.dynamic
        assert found.input_activations.strategy == "token"


@pytest.mark.parametrize("shape", SHAPES)
def test_it_reads_our_tensors_to_the_bit(shape: tuple[int, int]) -> None:
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    weight = heavy_tailed(shape)
    int8, channel = quantise.int8_weight(weight)
    ours = int8.float() * channel.float()[:, None]
    tensors = {"weight": int8, "weight_scale": channel[:, None]}
    # It multiplies in the dtype of the scales, BF16: one rounding of the product, which is exact in fp32.
    assert decompressed("int-quantized", tensors, scheme("w8a8")).equal(ours.bfloat16())
    fp32 = tensors | {"weight_scale": channel[:, None].float()}
    assert decompressed("int-quantized", fp32, scheme("w8a8")).equal(ours)

    assert relative_error(ours, weight) < 0.06

    group = min(128, shape[1])
    packed, groups = quantise.int4_weight(weight, group)
    tensors = {"weight_packed": packed, "weight_scale": groups, "weight_shape": torch.tensor(shape)}
    theirs = decompressed("pack-quantized", tensors, scheme("w4a16", group))
    assert theirs.equal(quantise.dequantised_int4(packed, groups))
    assert relative_error(theirs.float(), weight) < 0.4

    fp8, blocks = quantise.fp8_weight(weight)
    ours = quantise.dequantised_fp8(fp8, blocks)
    assert dequantize(fp8, blocks, args=scheme("fp8").weights).equal(ours)
    assert relative_error(ours, weight) < 0.04
    if shape[0] % 128 == 0 and shape[1] % 128 == 0:  # from a scale alone it takes partial blocks for smaller ones
        tensors = {"weight": fp8, "weight_scale": blocks}
        assert decompressed("float-quantized", tensors, scheme("fp8")).equal(ours)


@pytest.mark.parametrize("shape", SHAPES)
def test_where_its_rounding_differs_and_why(shape: tuple[int, int]) -> None:
    weight = heavy_tailed(shape)
    theirs, scale = model_free(weight, scheme("w8a8"))
    ours, our_scale = quantise.int8_weight(weight)
    # The scale is the largest / 127.5 and the quotient is rounded to BF16 (8 bits) before it is rounded to a whole
    # number; ours is the largest / 127 and the quotient an fp32 one.
    largest = weight.abs().amax(-1, keepdim=True)
    assert scale.equal(torch.where(largest == 0, torch.finfo(torch.bfloat16).eps, largest / 127.5))
    assert theirs.equal((weight / scale).round().clamp(-128, 127).to(torch.int8))
    assert our_scale.equal((largest[:, 0].float() / 127).bfloat16())
    assert (theirs.int() - ours.int()).abs().max() <= 1
    _, whole, their_whole = rounded_here(weight, theirs, scale, "w8a8")
    assert relative_error(whole, weight) <= relative_error(their_whole, weight)

    theirs, scale = model_free(weight, scheme("fp8"))
    ours, our_scale = quantise.fp8_weight(weight)
    # The scales are ours rounded to BF16 (that of a block of zeros is no zero), and so is the quotient.
    rounded = our_scale.bfloat16()
    assert scale.equal(torch.where(rounded == 0, torch.finfo(torch.bfloat16).eps, rounded))
    spread = quantise.fp8_scales(scale, weight.shape)
    assert theirs.view(torch.int8).equal(quantise.fp8_values(weight / spread).view(torch.int8))
    assert (theirs.view(torch.int8).int() - ours.view(torch.int8).int()).abs().max() <= 1
    _, whole, their_whole = rounded_here(weight, theirs, scale, "fp8")
    assert relative_error(whole, weight) < 1.02 * relative_error(their_whole, weight)


REQUESTS = {
    "w8a8": Request("w8a8", ignore=("*.attention.dense", "model.layers.0.mlp.*", "*.layers.2.mlp.experts.*")),
    "w4a16": Request("w4a16"),
    "fp8": Request("fp8", ignore=("*.attention.dense", "*.shared_experts.*", "*.layers.2.mlp.experts.*")),
}


@pytest.mark.slow  # it imports vLLM's layers
@pytest.mark.parametrize("target", REQUESTS)
def test_vllm_quantises_the_layers_that_are_quantised(target: str, tmp_path: Path) -> None:
    """What vLLM 0.32 asks of a config when it builds a layer, of the files we write; no kernel is needed for that."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
    from vllm.model_executor.models.bailing_moe import BailingMoeV2ForCausalLM

    convert(prepare(checkpoint(tmp_path / "plain", dtype="bf16"), tmp_path / "out", REQUESTS[target]))
    config, tensors = read_config(tmp_path / "out"), read_tensors(tmp_path / "out")
    described, fused = config["quantization_config"], BailingMoeV2ForCausalLM.packed_modules_mapping
    if target == "fp8":
        fp8 = Fp8Config.from_config(described)
        assert fp8.is_checkpoint_fp8_serialized
        assert fp8.weight_block_size == [128, 128]
    else:
        compressed = CompressedTensorsConfig.from_config(described)
        assert list(compressed.target_scheme_map) == ["Linear"]
    seen = set()
    for module in modules(config):
        (kept,) = {is_plain(part, tensors) for part in module.parts}
        seen.add(kept)
        if target == "fp8":
            assert is_layer_skipped(module.prefix, fp8.ignored_layers, fused) == kept, module.prefix
            continue
        names = [module.prefix]
        if module.kind == "moe":  # compressed_tensors_moe.py asks for the parts of the first expert
            names = [f"{module.prefix}.0.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
        assert [should_ignore_layer(name, compressed.ignore, fused) for name in names] == [kept] * len(names)
    assert seen == {True, False}


def is_plain(module: str, tensors: dict[str, Tensor]) -> bool:
    """Whether the matrix of a module is stored as it is."""
    return f"{module}.weight" in tensors and not any(name.startswith(f"{module}.weight_") for name in tensors)


def rounded_here(weight: Tensor, values: Tensor, scale: Tensor, target: str) -> tuple[Tensor, Tensor, Tensor]:
    """Our values, and the weights that ours and those of the other stand for."""
    if target == "w8a8":
        ours, our_scale = quantise.int8_weight(weight)
        return ours, ours.float() * our_scale.float()[:, None], values.float() * scale.float()
    ours, our_scale = quantise.fp8_weight(weight)
    return ours, quantise.dequantised_fp8(ours, our_scale), quantise.dequantised_fp8(values, scale.float())


@pytest.mark.slow
@pytest.mark.skipif(
    "LLMCOMPRESSOR_PYTHON" not in os.environ, reason="LLMCOMPRESSOR_PYTHON names no interpreter that has llmcompressor"
)
@pytest.mark.parametrize(("target", "preset"), [("w8a8", "W8A8"), ("fp8", "FP8_BLOCK")])
def test_model_free_quantisation_is_what_it_is_taken_for(target: str, preset: str, tmp_path: Path) -> None:
    # Whole blocks: at widths that are no multiples of 128 its FP8_BLOCK ends in "a non contiguous tensor" as it saves.
    write_demo(tmp_path / "plain", moe_intermediate_size=128)
    call = f"model_free_ptq({str(tmp_path / 'plain')!r}, {str(tmp_path / 'theirs')!r}, {preset!r}, ignore={IGNORED})"
    code = f"from llmcompressor import model_free_ptq; {call}"
    subprocess.run([os.environ["LLMCOMPRESSOR_PYTHON"], "-c", code], check=True, capture_output=True, cwd=tmp_path)
    theirs, plain = read_tensors(tmp_path / "theirs"), read_tensors(tmp_path / "plain")
    names = [name.removesuffix("_scale") for name in theirs if name.endswith(".weight_scale")]
    assert sorted(names) == sorted(name for name in plain if re.search(rf"({MATRIX})$", name))
    values = differing = 0
    errors = torch.zeros(2)  # squared: ours, theirs
    for name in names:
        expected, scale = model_free(plain[name], scheme(target))
        assert theirs[f"{name}_scale"].equal(scale)
        assert theirs[name].view(torch.int8).equal(expected.view(torch.int8))
        ours, whole, their_whole = rounded_here(plain[name], expected, scale, target)
        values += ours.numel()
        differing += int((ours.view(torch.int8) != expected.view(torch.int8)).sum())
        errors += torch.stack([(one - plain[name].float()).square().sum() for one in (whole, their_whole)])
    print(
        target, f"{differing / values:.2%} of {values} values differ; errors ours / theirs {errors[0] / errors[1]:.4f}"
    )
    assert 0 < differing < values / 5
    assert errors[0] < errors[1]
