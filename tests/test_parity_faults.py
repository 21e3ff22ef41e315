"""Faults on purpose, one at a time, in one layer that is not the first: `perf parity` names the layer and the part.

`FAULTS` serves the tests against an endpoint too. Shapes: T tokens, H hidden_size, E experts, K experts per token, G
key/value heads, D head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ascend
from ascend.model import BailingMoeV2ForCausalLM, Step
from ascend.rope import Rope, cos_sin
from ops import reference
from perf.parity.judge import all_checks, judge
from perf.parity.limits import LIMITS
from perf.parity.numbers import compare
from perf.parity.prompts import Batch, random_batches
from perf.parity.trace import trace
from tests.test_parity import SHAPE, reroute
from tests.tiny import checkpoint

Fault = Callable[[Any, BailingMoeV2ForCausalLM], None]


def swap_two_experts(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    for weight in (layer.mlp.experts.gate_up, layer.mlp.experts.down):
        weight.data[[1, 2]] = weight.data[[2, 1]]


def route(layer: Any, **changed: Any) -> None:
    """Have the layer's router computed by the reference, with other arguments."""
    gate = layer.mlp.gate
    given = {"n_group": gate.n_group, "topk_group": gate.topk_group, "bias_E": gate.expert_bias} | changed
    given |= {"top_k": gate.top_k, "normalise": gate.normalise, "scaling": gate.scaling}
    reroute(gate, lambda x_TH: reference.moe_gate(x_TH, gate.weight, **given))


def scale_2_4(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    layer.mlp.gate.scaling = 2.4


def not_normalised(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    layer.mlp.gate.normalise = False


def bias_in_the_weights(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    gate, chosen = layer.mlp.gate, layer.mlp.gate.forward

    def changed(x_TH: Tensor) -> tuple[Tensor, Tensor]:
        expert_TK = chosen(x_TH)[1]
        biased_TE = torch.sigmoid(x_TH.float() @ gate.weight.T) + gate.expert_bias
        weight_TK = biased_TE.gather(-1, expert_TK.long())
        return weight_TK / weight_TK.sum(-1, keepdim=True) * gate.scaling, expert_TK

    reroute(gate, changed)


def router_in_bf16(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    gate = layer.mlp.gate
    options = (gate.expert_bias, gate.top_k, gate.n_group, gate.topk_group, gate.normalise, gate.scaling)

    def changed(x_TH: Tensor) -> tuple[Tensor, Tensor]:
        logit_TE = (x_TH.bfloat16() @ gate.weight.T.bfloat16()).float()
        return reference.moe_gate(logit_TE, torch.eye(logit_TE.shape[-1]), *options)

    reroute(gate, changed)


def no_shared_expert(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    layer.mlp.shared_experts = None


def query_key_rows(layer: Any, model: BailingMoeV2ForCausalLM) -> Tensor:
    """Rows of all query and key heads, ``[heads, D, H]``: a view."""
    attention = layer.attention
    return attention.query_key_value.weight.data[: attention.rotated].unflatten(0, (-1, attention.head_dim))


def rotary_on_the_second_half(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    heads = query_key_rows(layer, model)
    heads.copy_(heads.roll(heads.shape[1] // 2, 1))


def rotary_on_all_dimensions(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    rope = dataclasses.replace(Rope.from_config(model.config), rotary_dim=model.config.head_dim)
    frequencies, attention, forward = rope.inverse_frequencies(), layer.attention, layer.attention.forward

    def changed(x_BTH: Tensor, step: Step) -> Tensor:
        slot_T = torch.arange(x_BTH.shape[1])
        position_BT = (step.cache.written_B[:, None] - x_BTH.shape[1] + slot_T - step.start_B[:, None]).clamp(min=0)
        cos, sin = cos_sin(frequencies, rope.attention_factor, position_BT)
        return forward(x_BTH, dataclasses.replace(step, layout=dataclasses.replace(step.layout, cos=cos, sin=sin)))

    attention.forward = changed


def no_qk_norm(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    layer.attention.query_layernorm = layer.attention.key_layernorm = None


def attention_scale(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    layer.attention.scale *= 1.25


def swap_key_heads(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    heads = query_key_rows(layer, model)
    heads[[-1, -2]] = heads[[-2, -1]]


def norm_eps(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    layer.eps = 0.1


def norm_weight(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    layer.post_attention_layernorm.weight.data *= 1.02


def swap_rows_of_the_head(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    assert model.lm_head is not None
    model.lm_head.weight.data[[7, 8]] = model.lm_head.weight.data[[8, 7]]


def mtp_inputs_swapped(layer: Any, model: BailingMoeV2ForCausalLM) -> None:
    weight: Tensor = model.model.layers[-1].eh_proj.weight.data  # type: ignore[union-attr, assignment]
    weight.copy_(weight.roll(weight.shape[1] // 2, 1))


ROUTING = "how the router chooses"
LAYER = 2  # of three
# What is done to the layer, with what the first reason of the verdict begins, and what its cause says.
FAULTS: dict[str, tuple[Fault, str, str]] = {
    "two experts' weights swapped": (swap_two_experts, "layer 2: MLP ", "the experts or the MLP"),
    "scale 2.4 instead of 2.5": (scale_2_4, "layer 2: routing weights ", "routed_scaling_factor"),
    "norm_topk_prob off": (not_normalised, "layer 2: routing weights ", "norm_topk_prob"),
    "bias ignored": (lambda layer, model: route(layer, bias_E=None), "layer 2: misrouted tokens ", ROUTING),
    "bias in the weights too": (bias_in_the_weights, "layer 2: routing weights ", "norm_topk_prob"),
    "group limit ignored": (
        lambda layer, model: route(layer, n_group=1, topk_group=1),
        "layer 2: misrouted tokens ",
        ROUTING,
    ),
    "router in bf16": (router_in_bf16, "layer 2: routing weights ", ""),
    "shared expert dropped": (no_shared_expert, "layer 2: MLP ", "the experts or the MLP"),
    "rotary on the second half": (rotary_on_the_second_half, "layer 2: attention ", "positions"),
    "rotary on all dimensions": (rotary_on_all_dimensions, "layer 2: attention ", "positions"),
    "QK-norm skipped": (no_qk_norm, "layer 2: attention ", "positions"),
    "attention scale 1.25 times as large": (attention_scale, "layer 2: attention ", "positions"),
    "two key heads swapped": (swap_key_heads, "layer 2: attention ", "positions"),
    "norm eps 0.1": (norm_eps, "layer 2: attention", "attention"),
    "one norm 2 % larger": (norm_weight, "layer 2: MLP's input", "norm after attention"),
    "two rows of the head swapped": (swap_rows_of_the_head, "head: ", "head"),
    "MTP's inputs swapped": (mtp_inputs_swapped, "MTP 0: ", ""),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("faults")
    return {dtype: checkpoint(folder / dtype, dtype=dtype, **SHAPE) for dtype in ("fp32", "bf16")}


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return random_batches(300, 1, 32, 0)


@pytest.fixture(scope="module")
def trusted(paths: dict[str, Path], batches: list[Batch]) -> dict[str, dict[str, Tensor]]:
    return {dtype: trace(ascend.load_model(path), batches, 0) for dtype, path in paths.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", FAULTS)
def test_the_layer_and_the_part_are_named(
    paths: dict[str, Path], trusted: dict[str, dict[str, Tensor]], batches: list[Batch], what: str, precision: str
) -> None:
    fault, place, cause = FAULTS[what]
    model = ascend.load_model(paths[precision])
    with torch.no_grad():
        fault(model.model.layers[LAYER], model)
    limits = LIMITS[precision]
    b = trace(model, batches, 0, trusted[precision])
    numbers = compare(trusted[precision], b, limits, model.config.n_group, model.config.topk_group)
    verdict = judge(all_checks(numbers, limits))
    assert not verdict.passed
    assert verdict.reasons[0].startswith(place), verdict.reasons
    assert cause in str(verdict.cause)
