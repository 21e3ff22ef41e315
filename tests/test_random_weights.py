"""Models with random weights made on the device: the same in structure as a loaded one, one layer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ascend
from ascend import random_weights
from ascend.config import BailingMoeV2Config
from ascend.model import BailingMoeV2ForCausalLM
from ascend.random_weights import random_model
from tests import tiny
from tests.tiny import user_error

# Inputs in whole groups, as w4a16 needs them.
SHAPE: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "as the family has it": {},
    "tied, no shared expert": {"tie_word_embeddings": True, "num_shared_experts": 0},
    "biases": {"use_qkv_bias": True, "use_bias": True},
    "no MTP": {"num_nextn_predict_layers": 0},
}


def structure(model: BailingMoeV2ForCausalLM) -> dict[str, Any]:
    """Names, shapes, types and places of parameters and buffers, the modules, and what the model says of itself."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {name: (tuple(one.shape), one.dtype, str(one.device)) for name, one in tensors.items()},
        "grads": {name for name, one in model.named_parameters() if one.requires_grad},
        "modules": {name: type(module).__name__ for name, module in model.named_modules()},
        "quantised": model.quantised,
        "laid_out": model.model.laid_out,
        "plain_logits": model.plain_logits,
        "training": model.training,
        "dtype": model.dtype,
        "device": str(model.device),
    }


def config_of(path: Path) -> BailingMoeV2Config:
    return BailingMoeV2Config(**tiny.read_config(path))


@pytest.mark.parametrize(
    ("variant", "quantise", "dtype"),
    [
        *(("as the family has it", quantise, torch.bfloat16) for quantise in (None, "w8a8", "w4a16", "fp8")),
        *(pytest.param(variant, "w8a8", torch.float32, marks=pytest.mark.slow) for variant in VARIANTS),
    ],
)
def test_it_is_built_as_a_loaded_model_is(
    variant: str, quantise: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tiny.checkpoint(tmp_path / "demo", **SHAPE | VARIANTS[variant])
    loaded = ascend.load_model(path, dtype=str(dtype).removeprefix("torch."), quantise=quantise)
    made = random_model(config_of(path), "cpu", dtype, quantise=quantise)
    assert structure(made) == structure(loaded)
    assert torch.get_default_dtype() is torch.float32
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert made(ids).isfinite().all()
        assert ascend.generate(made, ids, 4).shape == (2, 13)


def test_weights_have_the_usual_spread_and_the_seed_decides(tmp_path: Path) -> None:
    config = config_of(tiny.checkpoint(tmp_path / "demo", **SHAPE))
    first, again, other = (random_model(config, "cpu", torch.float32, seed=seed) for seed in (1, 1, 2))
    for name, parameter in first.named_parameters():
        twin = dict(again.named_parameters())[name]
        assert torch.equal(parameter, twin), name
        if parameter.ndim > 1:
            assert abs(parameter.std() - config.initializer_range) < 0.1 * config.initializer_range, name
            assert not torch.equal(parameter, dict(other.named_parameters())[name]), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
    for name, buffer in first.named_buffers():
        if "expert_bias" in name:
            assert not buffer.any(), "routing is about uniform"


def test_routing_is_about_uniform(tmp_path: Path) -> None:
    """2000 tokens: no expert gets less than half or more than twice its share."""
    config = config_of(tiny.checkpoint(tmp_path / "demo", **SHAPE))
    model = random_model(config, "cpu", torch.float32)
    from ascend.expert_loads import recording

    with torch.inference_mode(), recording(model) as loads:
        model(torch.randint(0, 300, (50, 40), generator=torch.Generator().manual_seed(0)))
    for counts in loads.values():
        share = counts.float() / counts.float().mean()
        assert 0.4 < share.min() <= share.max() < 2


@pytest.mark.parametrize("quantise", ["w8a8", "w4a16", "fp8"])
def test_a_layer_is_quantised_before_the_next_is_made(
    quantise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one layer is there unquantised: the others' experts are still on meta, or rounded already."""
    config = config_of(tiny.checkpoint(tmp_path / "demo", **SHAPE))
    seen: list[list[str]] = []
    quantise_layer = random_weights.quantise_layer

    def watched(layer: Any, to: str) -> None:
        quantise_layer(layer, to)
        owner = next(one for one in models if layer in one.model.layers)
        states = []
        for one in owner.model.layers:
            parameters = [*one.parameters(), *one.buffers()]
            if all(parameter.is_meta for parameter in parameters):
                states.append("meta")
            else:
                rounded = any(
                    parameter.dtype in (torch.int8, torch.int32, torch.float8_e4m3fn) for parameter in parameters
                )
                states.append("rounded" if rounded else "plain")
        seen.append(states)

    models: list[BailingMoeV2ForCausalLM] = []
    build = random_weights.BailingMoeV2ForCausalLM

    def built(config: BailingMoeV2Config) -> BailingMoeV2ForCausalLM:
        models.append(build(config))
        return models[-1]

    monkeypatch.setattr(random_weights, "quantise_layer", watched)
    monkeypatch.setattr(random_weights, "BailingMoeV2ForCausalLM", built)
    made = random_model(config, "cpu", torch.bfloat16, quantise=quantise)
    depth = len(made.model.layers)
    dense = "plain" if quantise == "w4a16" else "rounded"  # experts alone
    done = [dense] + ["rounded"] * (depth - 1)
    assert seen == [done[: number + 1] + ["meta"] * (depth - number - 1) for number in range(depth)]


def test_formats_that_do_not_fit_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    config = config_of(tiny.checkpoint(tmp_path / "demo"))
    assert "unknown quantisation 'w4a8' (did you mean '" in user_error(
        random_model, config, "cpu", torch.float32, quantise="w4a8"
    )
    odd = config_of(tiny.checkpoint(tmp_path / "odd", hidden_size=68, head_dim=16))
    assert "hidden_size 68 does not divide into groups" in user_error(
        random_model, odd, "cpu", torch.float32, quantise="w4a16"
    )
    assert torch.get_default_dtype() is torch.float32
