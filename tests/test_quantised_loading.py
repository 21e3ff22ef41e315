"""Loading checkpoints that are quantised: what `quantise=` makes in memory bit for bit, and what is wrong refused.

The checkpoints are written by `tests.quantised`, not by `convert`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ascend
from ascend.checkpoint import open_checkpoint
from ascend.errors import UserError
from ascend.module_formats import module_formats
from ascend.stored import stored_weights
from tests import tiny
from tests.quantised import quantised_checkpoint

pytestmark = pytest.mark.beside

FORMATS = ("w8a8", "w4a16", "fp8")
# Widths that int4 takes, and biases.
SHAPE = {"moe_intermediate_size": 32, "use_qkv_bias": True, "use_bias": True}
IDS = torch.randint(0, tiny.SHAPE["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))
ATTENTION = "model.layers.1.attention.query_key_value"
EXPERT = "model.layers.1.mlp.experts.0.up_proj"
SHARED = "model.layers.1.mlp.shared_experts.down_proj"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are small: threads that wait for one another would take most of the time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same shape in two dtypes."""
    base = tmp_path_factory.mktemp("plain")
    return {dtype: tiny.checkpoint(base / dtype, dtype, **SHAPE) for dtype in ("bf16", "fp32")}


@pytest.fixture(scope="module")
def stored(plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The fp32 one in each format."""
    base = tmp_path_factory.mktemp("stored")
    return {to: quantised_checkpoint(plain["fp32"], base / to, to) for to in FORMATS}


@pytest.fixture(scope="module")
def in_memory(plain: dict[str, Path]) -> dict[str, Any]:
    """The fp32 one, loaded and quantised in memory."""
    return {to or "plain": ascend.load_model(plain["fp32"], quantise=to) for to in (None, *FORMATS)}


def same_parameters(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        same_bits(name, tensor, theirs[name])


def same_bits(name: str, one: Tensor, other: Tensor) -> None:
    assert (one.dtype, one.shape) == (other.dtype, other.shape), name
    assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), name


WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {to: (to, {}) for to in FORMATS}
WRITTEN["w8a8 of ModelSlim"] = ("w8a8", {"modelslim": True})


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("written", WRITTEN)
def test_a_stored_model_is_the_one_quantised_in_memory(
    written: str, dtype: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    to, how = WRITTEN[written]
    model = ascend.load_model(quantised_checkpoint(plain[dtype], tmp_path / "stored", to, **how))
    expected = ascend.load_model(plain[dtype], quantise=to)
    assert model.quantised == expected.quantised == to
    assert model.dtype == expected.dtype
    assert not any(parameter.requires_grad for parameter in model.parameters())
    same_parameters(model, expected)
    with torch.inference_mode():
        assert torch.equal(model(IDS), expected(IDS))
        assert torch.equal(model.mtp_logits(IDS)[0], expected.mtp_logits(IDS)[0])
    assert torch.equal(ascend.generate(model, IDS, 4, drafts=1), ascend.generate(expected, IDS, 4))


@pytest.mark.parametrize("to", FORMATS)
def test_it_is_allocated_once_as_it_is_stored(to: str, stored: dict[str, Path]) -> None:
    """All memory that loading asks for is that of the parameters, and no more than an expert's scales besides."""
    made: dict[int, int] = {}

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            is_new = all(one.alias_info is None for one in func._schema.returns)
            if isinstance(out, Tensor) and is_new and out.device.type == "cpu":
                made[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes()
            return out

    with Watched():
        model = ascend.load_model(stored[to])
    own = {parameter.untyped_storage().data_ptr(): parameter.nbytes for parameter in model.parameters()}
    assert {pointer: made[pointer] for pointer in own} == own
    assert max((size for pointer, size in made.items() if pointer not in own), default=0) <= 8


@pytest.mark.parametrize("to", FORMATS)
def test_from_pretrained_loads_it_too(
    to: str, stored: dict[str, Path], in_memory: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stored[to])
    assert torch.equal(model(IDS).logits, in_memory[to](IDS))
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **how), ascend.generate(in_memory[to], IDS, 3))
    assert "not quantised, can be saved" in tiny.user_error(model.save_pretrained, tmp_path / "copy")


@pytest.mark.parametrize("to", FORMATS)
def test_another_dtype_than_the_stored_one(to: str, stored: dict[str, Path]) -> None:
    """The values stay, what has the model's dtype is rounded to it."""
    model, exact = ascend.load_model(stored[to], dtype="bfloat16"), ascend.load_model(stored[to])
    for name, tensor in model.named_parameters():
        theirs = exact.get_parameter(name)
        is_float = theirs.dtype is torch.float32 and ".gate." not in name
        kept = not is_float or (to == "fp8" and name.endswith("scale"))
        assert tensor.dtype == (theirs.dtype if kept else torch.bfloat16), name
        same_bits(name, tensor, theirs.to(tensor.dtype))
    assert model(IDS).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("to", ["w8a8", "w4a16"])
def test_scales_may_be_stored_in_another_dtype_and_flat(
    to: str, dtype: torch.dtype, plain: dict[str, Path], tmp_path: Path
) -> None:
    path = quantised_checkpoint(plain["bf16"], tmp_path / "stored", to)
    tensors = tiny.read_tensors(path)
    scales = {name: one.to(dtype) for name, one in tensors.items() if name.endswith("weight_scale")}
    if to == "w8a8":
        scales = {name: one.flatten() for name, one in scales.items()}
    shapes = {name: one.int() for name, one in tensors.items() if name.endswith("weight_shape")}
    model = ascend.load_model(tiny.write_tensors(path, tensors | scales | shapes))
    scale = tensors[f"{EXPERT}.weight_scale"].to(dtype).bfloat16()
    theirs = model.model.layers[1].mlp.experts.gate_up_scale[0, 32:]
    same_bits("up_proj", theirs, scale.view_as(theirs))


def test_fp8_scales_of_compressed_tensors_have_another_name(stored: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(stored["fp8"], tmp_path / "stored")
    tensors = tiny.read_tensors(path)
    tiny.write_tensors(path, {name.replace("_scale_inv", "_scale"): one for name, one in tensors.items()})
    same_parameters(ascend.load_model(path), ascend.load_model(stored["fp8"]))


def test_every_fp8_byte_arrives_nan_and_negative_zero_too(stored: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(stored["fp8"], tmp_path / "stored")
    tensors = tiny.read_tensors(path)
    every = torch.arange(256).repeat(8).to(torch.uint8).view(32, 64)
    tiny.write_tensors(path, tensors | {f"{EXPERT}.weight": every.view(torch.float8_e4m3fn)})
    experts = ascend.load_model(path).model.layers[1].mlp.experts
    assert torch.equal(experts.gate_up[0, 32:].view(torch.uint8), every)


LEFT_OUT = {
    "shared experts": r"shared_experts",
    "routed experts": r"mlp\.experts\.\d",
    "attention": r"attention",
    "dense MLP": r"layers\.0\.mlp",
    "all but one layer's experts": r"^(?!model\.layers\.2\.mlp\.experts)",
}


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("what", LEFT_OUT)
def test_modules_may_be_left_out(
    what: str, to: str, plain: dict[str, Path], in_memory: dict[str, Any], tmp_path: Path
) -> None:
    """Each module has its own format; routed and shared experts of two formats run apart and are added."""
    path = quantised_checkpoint(plain["fp32"], tmp_path / "stored", to, [LEFT_OUT[what]])
    model, whole, quantised = ascend.load_model(path), in_memory["plain"], in_memory[to]
    formats = module_formats(whole, stored_weights(open_checkpoint(path).tensors))
    assert model.quantised == (to if formats else None)
    assert bool(formats) == ((what, to) != ("routed experts", "w4a16"))
    for name, tensor in model.named_parameters():
        of = quantised if any(name.startswith(f"{module}.") for module in formats) else whole
        same_bits(name, tensor, of.get_parameter(name))
    with torch.inference_mode():
        assert torch.cosine_similarity(model(IDS), whole(IDS), -1).median() > 0.97
        layer = model.model.layers[1].mlp
        x = torch.randn(5, tiny.SHAPE["hidden_size"], generator=torch.Generator().manual_seed(1))
        weight, expert, *_ = layer.gate(x)
        assert torch.equal(layer(x), layer.experts(x, weight, expert) + layer.shared_experts(x))


def test_two_formats_in_one_checkpoint(stored: dict[str, Path], tmp_path: Path) -> None:
    """INT4 experts beside INT8 projections: what two 910B cards would hold."""
    path = shutil.copytree(stored["w8a8"], tmp_path / "stored")
    eights, fours = tiny.read_tensors(path), tiny.read_tensors(stored["w4a16"])
    tensors = {name: one for name, one in eights.items() if ".mlp.experts." not in name}
    tiny.write_tensors(path, tensors | {name: one for name, one in fours.items() if ".mlp.experts." in name})
    model = ascend.load_model(path)
    assert model.quantised == "w4a16+w8a8"
    assert {type(module).__name__ for module in model.model.layers[1].mlp.children()} == {
        *("Gate", "ExpertsW4A16", "MLPW8A8")
    }
    exact, eight = ascend.load_model(stored["w4a16"])(IDS), ascend.load_model(stored["w8a8"])(IDS)
    assert torch.cosine_similarity(model(IDS), exact, -1).median() > 0.99
    assert not torch.equal(model(IDS), eight)


def test_int4_groups_are_those_of_the_scales(plain: dict[str, Path], tmp_path: Path) -> None:
    model = ascend.load_model(quantised_checkpoint(plain["fp32"], tmp_path / "stored", "w4a16", group=16))
    experts = model.model.layers[1].mlp.experts
    assert (experts.gate_up_scale.shape, experts.down_scale.shape) == ((8, 64, 4), (8, 64, 2))
    finer = torch.cosine_similarity(model(IDS), ascend.load_model(plain["fp32"])(IDS), -1).median()
    usual = ascend.load_model(plain["fp32"], quantise="w4a16")
    assert finer > torch.cosine_similarity(usual(IDS), ascend.load_model(plain["fp32"])(IDS), -1).median()


# What is refused

Tensors = dict[str, Tensor]


def wider(t: Tensors, name: str) -> Tensor:
    return torch.cat([t[name], t[name]], 1)


FILE = "{file}: tensor "
REFUSED: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "scale missing": (
        "w8a8",
        lambda t: t.pop(f"{EXPERT}.weight_scale"),
        FILE + f"{EXPERT}.weight has dtype I8 and no scale beside it",
    ),
    "scale missing, offset there": (
        "modelslim",
        lambda t: t.pop(f"{EXPERT}.weight_scale"),
        FILE + f"{EXPERT}.weight is I8 and has no scale (weight_scale) beside it",
    ),
    "values missing": (
        "fp8",
        lambda t: t.pop(f"{EXPERT}.weight"),
        FILE + f"{EXPERT}.weight_scale_inv belongs to no weight: there are no values beside it",
    ),
    "weight missing": (
        "w8a8",
        lambda t: [t.pop(f"{EXPERT}.{end}") for end in ("weight", "weight_scale")],
        f"{{dir}}: tensor {EXPERT}.weight is missing from all files",
    ),
    "scale of wrong shape": (
        "w8a8",
        lambda t: t.update({f"{EXPERT}.weight_scale": torch.ones(31, 1)}),
        FILE + f"{EXPERT}.weight has a scale of F32 [31, 1], which does not fit its I8 [32, 64]",
    ),
    "scale of wrong dtype": (
        "fp8",
        lambda t: t.update({f"{EXPERT}.weight_scale_inv": torch.ones(1, 1, dtype=torch.float64)}),
        FILE + f"{EXPERT}.weight has a scale of F64 [1, 1], which does not fit its F8_E4M3",
    ),
    "wrong shape": (
        "w4a16",
        lambda t: t.update({f"{EXPERT}.weight_packed": wider(t, f"{EXPERT}.weight_packed")}),
        FILE + f"{EXPERT}.weight has shape [32, 128], config.json asks for [32, 64]",
    ),
    "a weight too many": (
        "w8a8",
        lambda t: t.update({f"model.layers.9.{end}": t[f"{EXPERT}.{end}"] + 0 for end in ("weight", "weight_scale")}),
        FILE + "model.layers.9.weight has no place in the model of config.json",
    ),
    "experts partly plain": (
        "w8a8",
        lambda t: t.update({f"{EXPERT}.weight": torch.ones(32, 64), f"{EXPERT}.weight_scale": None}),
        FILE + f"{EXPERT}.weight is plain, but {EXPERT.replace('up', 'gate')}.weight is w8a8: "
        "model.layers.1.mlp.experts is computed as one, all of it must be alike; "
        "`python -m convert bf16 SRC DST` makes one that loads",
    ),
    "gate and up unlike": (
        "fp8",
        lambda t: t.update(
            {
                "model.layers.0.mlp.gate_proj.weight": t["model.layers.0.mlp.gate_proj.weight"].to(torch.int8),
                "model.layers.0.mlp.gate_proj.weight_scale": torch.ones(48, 1),
                "model.layers.0.mlp.gate_proj.weight_scale_inv": None,
            }
        ),
        FILE + "model.layers.0.mlp.up_proj.weight is fp8, but model.layers.0.mlp.gate_proj.weight is w8a8: "
        "model.layers.0.mlp is computed as one",
    ),
    **{
        f"{name} quantised": (
            "w8a8",
            lambda t, name=name: t.update(
                {f"{name}.weight": t[f"{name}.weight"].to(torch.int8)}
                | {f"{name}.weight_scale": torch.ones(len(t[f"{name}.weight"]), 1)}
            ),
            FILE + f"{name}.weight is w8a8: router, head, embedding, norms and eh_proj must be plain; "
            "`python -m convert bf16 SRC DST` makes one that loads",
        )
        for name in ("model.layers.1.mlp.gate", "lm_head", "model.word_embeddings", "model.layers.3.eh_proj")
    },
    "norm quantised": (
        "w8a8",
        lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
        FILE + "model.norm.weight has dtype I8 and no scale beside it",
    ),
    "offset not zero": (
        "modelslim",
        lambda t: t[f"{EXPERT}.weight_offset"][3].fill_(1),
        "{file}: the weight_offset of tensor " + EXPERT + ".weight is not all zeros: asymmetric formats are not",
    ),
    "offset of an odd dtype": (
        "modelslim",
        lambda t: t.update({f"{EXPERT}.weight_offset": torch.zeros(32, 1, dtype=torch.float64)}),
        "{file}: the weight_offset of tensor " + EXPERT + ".weight has dtype F64",
    ),
    "weight_shape that lies": (
        "w4a16",
        lambda t: t.update({f"{EXPERT}.weight_shape": torch.tensor([64, 32])}),
        "{file}: the weight_shape of tensor " + EXPERT + ".weight is [64, 32], but its values and scales are of",
    ),
    "groups unlike": (
        "w4a16",
        lambda t: t.update({f"{EXPERT}.weight_scale": torch.ones(32, 2)}),
        FILE + f"{EXPERT}.weight is in int4 groups of 32, but {EXPERT.replace('up', 'gate')}.weight is in int4 "
        "groups of 64: model.layers.1.mlp.experts is computed as one",
    ),
    "groups too small": (
        "w4a16",
        lambda t: t.update({f"{EXPERT}.weight_scale": torch.ones(32, 16)}),
        FILE + f"{EXPERT}.weight has int4 groups of 4 inputs, computed are multiples of 8 up to 128",
    ),
    "FP8 per channel": (
        "fp8",
        lambda t: t.update({f"{ATTENTION}.weight_scale": torch.ones(128, 1), f"{ATTENTION}.weight_scale_inv": None}),
        FILE + f"{ATTENTION}.weight is in FP8 with a scale per output, which nothing here computes in; "
        "`python -m convert fp8 SRC DST` makes one that loads, or bf16 in its place",
    ),
    "INT4 attention": (
        "w4a16",
        lambda t: t.update(
            {
                f"{ATTENTION}.weight": None,
                f"{ATTENTION}.weight_packed": torch.ones(128, 8, dtype=torch.int32),
                f"{ATTENTION}.weight_scale": torch.ones(128, 1),
            }
        ),
        FILE + f"{ATTENTION}.weight is w4a16, which routed experts alone can be; "
        "`python -m convert w8a8 SRC DST` makes one that loads, or bf16 in its place",
    ),
}


def changed(src: Path, dst: Path, change: Callable[[Tensors], Any]) -> Path:
    shutil.copytree(src, dst)
    tensors: Any = tiny.read_tensors(dst)
    change(tensors)
    save_file({name: one for name, one in tensors.items() if one is not None}, dst / "model.safetensors")
    return dst


@pytest.mark.parametrize("what", REFUSED)
def test_wrong_checkpoints_are_refused_by_name(
    what: str, plain: dict[str, Path], stored: dict[str, Path], tmp_path: Path
) -> None:
    written, change, line = REFUSED[what]
    src = stored.get(written) or quantised_checkpoint(plain["fp32"], tmp_path / "src", "w8a8", modelslim=True)
    path = changed(src, tmp_path / "stored", change)
    expected = line.format(dir=path, file=path / "model.safetensors")
    assert tiny.user_error(ascend.load_model, path).startswith(expected)


MUTATIONS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "dropped": lambda one: None,
    "one row less": lambda one: one[:-1].clone(),
    "a dimension more": lambda one: one[None].clone(),
    "flat": lambda one: one.flatten(),
    "turned": lambda one: one.mT.contiguous() if one.ndim > 1 else one,
    **{str(to): lambda one, to=to: one.float().to(to) for to in (torch.int8, torch.int32, torch.float8_e4m3fn)},
    **{str(to): lambda one, to=to: one.float().to(to) for to in (torch.bool, torch.float64, torch.float16)},
}


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), what=st.sampled_from(list(MUTATIONS)), to=st.sampled_from(FORMATS))
def test_a_changed_tensor_is_refused_in_one_line_or_does_no_harm(
    data: st.DataObject, what: str, to: str, stored: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "changed"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(stored[to], path)
    tensors = tiny.read_tensors(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    after = MUTATIONS[what](tensors.pop(name))
    tiny.write_tensors(path, tensors if after is None else tensors | {name: after})
    line = ""
    try:
        model = ascend.load_model(path)
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    if line:
        assert name.rpartition(".")[0] in line or "F16" in line
    else:
        assert model(IDS).shape == (*IDS.shape, tiny.SHAPE["vocab_size"])


DESCRIBED: dict[str, tuple[str, Callable[[Any], Any], str | None]] = {
    "another method": ("w8a8", lambda q: q.update(quant_method="gptq"), "quant_method 'gptq'"),
    "no object": ("w8a8", lambda q: "awq", "quant_method 'awq'"),
    "static FP8 activations": ("fp8", lambda q: q.update(activation_scheme="static"), "activation_scheme 'static'"),
    "blocks of 64": ("fp8", lambda q: q.update(weight_block_size=[64, 64]), "weight_block_size [64, 64]"),
    "asymmetric": (
        *("w8a8", lambda q: group(q)["weights"].update(symmetric=False)),
        "config_groups.group_0.weights.symmetric False",
    ),
    "static tokens": (
        *("w8a8", lambda q: group(q)["input_activations"].update(dynamic=False)),
        "config_groups.group_0.input_activations.dynamic False",
    ),
    "whole activations": (
        *("w8a8", lambda q: group(q).update(input_activations=None)),
        "config_groups.group_0.input_activations None",
    ),
    "reordered": (
        *("w4a16", lambda q: group(q)["weights"].update(actorder="group")),
        "config_groups.group_0.weights.actorder 'group'",
    ),
    "rotated": ("w4a16", lambda q: q.update(transform_config={"config_groups": {}}), "transform_config {"),
    "quantised cache": ("fp8", lambda q: q.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme {"),
    "order of rounding alone": ("w4a16", lambda q: group(q)["weights"].update(actorder="static"), None),
    "nothing of it": ("w8a8", lambda q: None, None),
}


def group(described: Any) -> Any:
    return described["config_groups"]["group_0"]


@pytest.mark.parametrize("what", DESCRIBED)
def test_a_scheme_that_would_be_computed_wrongly_is_refused(what: str, stored: dict[str, Path], tmp_path: Path) -> None:
    written, change, words = DESCRIBED[what]
    path = shutil.copytree(stored[written], tmp_path / "stored")
    described = tiny.read_config(path)["quantization_config"]
    answer = change(described)
    tiny.edit_config(path, quantization_config=answer if isinstance(answer, str) else described)
    if words is None:
        assert ascend.load_model(path).quantised == written
        return
    line = tiny.user_error(ascend.load_model, path)
    assert line.startswith(f"{path / 'config.json'}: quantization_config has {words}")
    assert line.endswith("or one in a format of `python -m convert`")


def test_the_tensors_decide_not_the_configuration(
    stored: dict[str, Path], plain: dict[str, Path], tmp_path: Path
) -> None:
    path = shutil.copytree(stored["w8a8"], tmp_path / "silent")
    config = tiny.read_config(path)
    described = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    same_parameters(ascend.load_model(path), ascend.load_model(stored["w8a8"]))
    loud = shutil.copytree(plain["fp32"], tmp_path / "loud")
    assert ascend.load_model(tiny.edit_config(loud, quantization_config=described)).quantised is None


def test_what_is_quantised_is_not_quantised_again(stored: dict[str, Path]) -> None:
    line = f"{stored['fp8']}: is quantised already (fp8); leave `quantise` away"
    assert tiny.user_error(ascend.load_model, stored["fp8"], quantise="w8a8") == line
