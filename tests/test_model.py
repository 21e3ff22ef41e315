"""The model against transformers' Glm4Moe (an independent implementation of the same architecture), fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ascend
from ascend.cache import StaticCache
from ascend.generation import Decoder
from convert.demo import write_demo
from tests import glm4_moe, tiny

TOLERANCE = 2e-4  # on fp32 logits; what is seen is printed by a failing test, usually some 1e-6
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "as the family has it": {},
    "no groups": {"n_group": 1},
    "eight groups, three kept": {"n_group": 8, "topk_group": 3},
    "rope on the whole head": {"partial_rotary_factor": 1.0},
    "yarn beyond the original length": {"rope_scaling": YARN, "max_position_embeddings": 128},
    "yarn with all its parameters": {
        "rope_scaling": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.3, "mscale_all_dim": 0.7},
        "max_position_embeddings": 128,
    },
    "three shared experts": {"num_shared_experts": 3, "moe_shared_expert_intermediate_size": 64},
    "two dense layers": {"first_k_dense_replace": 2},
    "tied head": {"tie_word_embeddings": True},
    "bias on the projections": {"use_qkv_bias": True},
    "no norm on queries and keys": {"use_qk_norm": False},
    "weights not normalised": {"norm_topk_prob": False},
    "one expert per token": {"num_experts_per_tok": 1, "norm_topk_prob": False},
}


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 2048, (2, 80), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_an_independent_implementation(variant: str, ids: Tensor, tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", dtype="fp32", **VARIANTS[variant])
    oracle = glm4_moe.main_model(tmp_path / "demo", tmp_path / "glm")
    model = ascend.load_model(tmp_path / "demo")
    with torch.no_grad():
        expected = oracle(ids).logits
        logits = model(ids)
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 80, model.config.vocab_size)
    assert expected.std() > 0.1, "logits all alike would agree by accident"
    assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("layers", [1, 2])
def test_mtp_equals_an_independent_implementation(layers: int, ids: Tensor, tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", dtype="fp32", num_nextn_predict_layers=layers)
    model = ascend.load_model(tmp_path / "demo")
    oracle = glm4_moe.main_model(tmp_path / "demo", tmp_path / "glm")
    config, tensors = glm4_moe.read(tmp_path / "demo")
    with torch.no_grad():
        drafts = model.mtp_logits(ids)
        assert len(drafts) == layers
        hidden, next_ids = oracle.model(ids).last_hidden_state, ids
        for layer, draft in enumerate(drafts):
            own = f"model.layers.{config['num_hidden_layers'] + layer}."
            next_ids = torch.cat([next_ids[:, 1:], torch.zeros(2, 1, dtype=torch.int64)], dim=1)
            embedding = normed(tensors["model.word_embeddings.weight"][next_ids], tensors[own + "enorm.weight"])
            pair = torch.cat([embedding, normed(hidden, tensors[own + "hnorm.weight"])], dim=-1)
            block = glm4_moe.mtp_model(tmp_path / "demo", tmp_path / f"mtp{layer}", layer).model
            hidden = block(inputs_embeds=pair @ tensors[own + "eh_proj.weight"].T).last_hidden_state
            assert (draft - hidden @ tensors["lm_head.weight"].T).abs().max() < TOLERANCE
            # A draft is more than an echo of the main model.
            assert (draft - model(ids)).abs().max() > 0.1


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps=1e-6)


def test_a_draft_depends_on_the_next_token_and_on_none_after_it(tmp_path: Path, ids: Tensor) -> None:
    write_demo(tmp_path / "demo", dtype="fp32")
    model = ascend.load_model(tmp_path / "demo")
    changed = ids.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 2048
    with torch.no_grad():
        moved = (model.mtp_logits(ids)[0] - model.mtp_logits(changed)[0]).abs().amax(dim=(0, 2))
    assert moved[:39].max() < 1e-4
    assert moved[39] > 1e-2


def test_taps_follow_the_residual_stream(tmp_path: Path, ids: Tensor) -> None:
    write_demo(tmp_path / "demo", dtype="fp32")
    oracle = glm4_moe.main_model(tmp_path / "demo", tmp_path / "glm")
    model = ascend.load_model(tmp_path / "demo")
    with torch.no_grad():
        expected = oracle(ids, output_hidden_states=True).hidden_states
        states = model(ids, output_hidden_states=True, return_dict=True).hidden_states
    assert len(states) == len(expected) == model.config.num_hidden_layers + 1
    for ours, theirs in zip(states, expected, strict=True):
        assert (ours - theirs).abs().max() < TOLERANCE


@pytest.mark.slow
def test_bf16_stays_as_near_to_fp32_as_the_independent_implementation_does(tmp_path: Path, ids: Tensor) -> None:
    ours_kl, theirs_kl = [], []
    for seed in range(4):
        demo = tmp_path / f"demo{seed}"
        write_demo(demo, dtype="bf16", seed=seed)
        with torch.no_grad():
            exact = ascend.load_model(demo, dtype=torch.float32)(ids).log_softmax(-1)
            ours = ascend.load_model(demo)(ids)
            theirs = glm4_moe.main_model(demo, tmp_path / f"glm{seed}").bfloat16()(ids).logits.float()
        assert ours.dtype == torch.float32
        ours_kl.append(kl(exact, ours.log_softmax(-1)))
        theirs_kl.append(kl(exact, theirs.log_softmax(-1)))
    # Medians over several models: where rounding flips an expert, a random model's answer jumps, in any implementation.
    assert 0 < torch.stack(ours_kl).median() < 1.25 * torch.stack(theirs_kl).median()


def kl(exact: Tensor, other: Tensor) -> Tensor:
    return (exact.exp() * (exact - other)).sum(-1)


class Calls(TorchDispatchMode):
    """The names of our ops that are called, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ascend":
            self.names.append(func.name().removeprefix("ascend::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("quantise", "form", "experts"),
    [(None, "", ""), ("w8a8", "_w8a8", "_w8a8"), ("w4a16", "", "_w4a16"), ("fp8", "_fp8", "_fp8")],
)
@torch.inference_mode()
def test_a_layer_is_six_ops(quantise: str | None, form: str, experts: str, tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, moe_intermediate_size=32, hidden_size=128)
    model = ascend.load_model(path, quantise=quantise)
    ids = torch.randint(0, tiny.SHAPE["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model, ids, None, 2)
    decoder.prefill()
    with Calls() as seen:
        decoder.step(ids[:, 0])
    attention = [f"linear{form}", "cached_attention", f"linear{form}"]
    dense = ["rms_norm", *attention, "add_rms_norm", f"swiglu_mlp{form}"]
    sparse = ["add_rms_norm", *attention, "add_rms_norm_gate", f"moe{experts}"]
    assert seen.names == [*dense, *sparse * (model.config.num_hidden_layers - 1), "add_rms_norm", "linear"]


@torch.inference_mode()
def test_a_cache_that_is_in_place_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ascend.load_model(tiny.checkpoint(tmp_path, dtype="bf16"))
    ids = torch.randint(0, tiny.SHAPE["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0

    def logits() -> tuple[Tensor, list[str]]:
        with Calls() as seen:
            decoder = Decoder(model, ids, mask, 2)
            return torch.stack([decoder.prefill(), decoder.step(ids[:, 0]), decoder.step(ids[:, 1])]), seen.names

    at_once, names = logits()
    monkeypatch.setattr(StaticCache, "in_place", False)
    apart, others = logits()
    assert "cached_attention" in names
    assert "cached_attention" not in others
    assert torch.equal(at_once, apart)
