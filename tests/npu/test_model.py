"""The whole model on an emulated card against the same model on the CPU: prefill, decode, MTP, quantised, captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ascend
from ascend.cache import StaticCache
from ascend.emulator import log
from ascend.generation import Decoder
from ops.quantise import FP8
from tests import tiny
from tests.quantised import quantised_checkpoint

CARD = "npu:0"
# Heads that are rotated by one op, and widths in 64s, which the quantised experts need.
SHAPE = {"head_dim": 64, "hidden_size": 128, "moe_intermediate_size": 64}
FP32_TOLERANCE = 2e-4
VARIANTS: dict[str, dict[str, Any]] = {
    "as the family has it": {},
    "heads of 128": {"head_dim": 128, "num_attention_heads": 2},
    "heads of 32": {"head_dim": 32},
    "no QK norm, biases": {"use_qk_norm": False, "use_qkv_bias": True, "use_bias": True},
    "a whole head rotated": {"partial_rotary_factor": 1.0},
    "a quarter rotated": {"partial_rotary_factor": 0.25},
    "no groups": {"n_group": 1, "topk_group": 1},
    "weights not normalised": {"norm_topk_prob": False},
    "no shared expert": {"num_shared_experts": 0},
    "tied head": {"tie_word_embeddings": True},
    "two MTP layers": {"num_nextn_predict_layers": 2},
}


def ids(rows: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, tiny.SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_logits_are_those_of_the_cpu(variant: str, tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, **SHAPE | VARIANTS[variant])
    cpu, card = ascend.load_model(path), ascend.load_model(path, CARD)
    expected = cpu(ids())
    assert expected.std() > 1
    assert (card(ids().to(CARD)).cpu() - expected).abs().max() < FP32_TOLERANCE
    for ours, theirs in zip(card.mtp_logits(ids().to(CARD)), cpu.mtp_logits(ids()), strict=True):
        assert (ours.cpu() - theirs).abs().max() < FP32_TOLERANCE


def test_yarn_reaches_beyond_the_original_length(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, yarn=4.0, **SHAPE)
    tokens = ids(1, 200)
    difference = ascend.load_model(path, CARD)(tokens.to(CARD)).cpu() - ascend.load_model(path)(tokens)
    assert difference.abs().max() < FP32_TOLERANCE


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("capture", [False, True])
def test_greedy_tokens_in_fp32_are_those_of_the_cpu(capture: bool, padded: bool, tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, **SHAPE)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    how: dict[str, Any] = {"attention_mask": mask} if padded else {}
    expected = ascend.generate(ascend.load_model(path), ids(2, 9), 12, **how)
    there = {key: value.to(CARD) for key, value in how.items()}
    with log.recording() as seen:
        tokens = ascend.generate(ascend.load_model(path, CARD), ids(2, 9).to(CARD), 12, capture=capture, **there)
    assert torch.equal(tokens.cpu(), expected)
    assert seen.ops.count("graph::replay") == (11 if capture else 0)


def test_another_card_than_the_current_one_captures_and_samples(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, **SHAPE)
    model = ascend.load_model(path, "npu:1")
    assert torch.npu.current_device() == 0
    expected = ascend.generate(ascend.load_model(path), ids(2, 9), 6)
    assert torch.equal(ascend.generate(model, ids(2, 9).to("npu:1"), 6, capture=True).cpu(), expected)
    drawn = [ascend.generate(model, ids(2, 9).to("npu:1"), 6, temperature=1.5, seed=seed).cpu() for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_mask_without_padding_costs_nothing(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, dtype="bf16", **SHAPE)
    model, prompt = ascend.load_model(path, CARD), ids(2, 9).to(CARD)
    with log.recording() as seen:
        with_mask = model(prompt, attention_mask=torch.ones_like(prompt))
    assert torch.equal(with_mask, model(prompt))
    assert "aten::masked_fill.Scalar" not in seen.ops


def rounding(path: Path, dtype: str, quantise: str | None, device: str) -> Tensor:
    """How far each token's logits lie from the exact ones, as a share of their size."""
    exact = ascend.load_model(path, dtype="float32")(ids())
    logits = ascend.load_model(path, device, dtype, quantise=quantise)(ids().to(device)).cpu()
    return (logits - exact).norm(dim=-1) / exact.norm(dim=-1)


@pytest.mark.parametrize("quantise", [None, "w8a8", "w4a16"])
def test_bf16_and_quantised_logits_are_as_near_as_the_cpus(quantise: str | None, tmp_path: Path) -> None:
    """Rounding moves some tokens to other experts, here and there others: so it is the middle token that is judged."""
    path = tiny.checkpoint(tmp_path, **SHAPE)
    ours, theirs = rounding(path, "bfloat16", quantise, CARD), rounding(path, "bfloat16", quantise, "cpu")
    assert ours.median() <= 1.25 * theirs.median() + 2.0**-8
    # And where neither took another expert, they agree with one another far better than with the exact model.
    card, cpu = (ascend.load_model(path, where, "bfloat16", quantise=quantise) for where in (CARD, "cpu"))
    apart = (card(ids().to(CARD)).cpu() - cpu(ids())).norm(dim=-1) / cpu(ids()).norm(dim=-1)
    assert apart.median() < 0.06


def test_the_model_counts_on_the_same_ops_in_the_same_order(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, dtype="bf16", **SHAPE, num_hidden_layers=2, num_nextn_predict_layers=0)
    decoder = Decoder(ascend.load_model(path, CARD), ids(2, 5).to(CARD), None, 8)
    decoder.prefill()
    token = torch.ones(2, dtype=torch.int64, device=CARD)
    with log.recording() as seen:
        decoder.step(token)
    attention = [
        *("npu_rms_norm", "npu_rms_norm", "npu_apply_rotary_pos_emb"),
        *("npu_scatter_pa_kv_cache", "npu_fused_infer_attention_score", "npu_add_rms_norm"),
    ]
    experts = [
        *("npu_moe_gating_top_k", "npu_swiglu", "npu_moe_init_routing_v2", "npu_grouped_matmul"),
        *("npu_swiglu", "npu_grouped_matmul", "npu_moe_token_unpermute"),
    ]
    dense, last = ["npu_swiglu"], ["npu_add_rms_norm"]
    assert seen.of("npu") == ["npu_rms_norm", *attention, *dense, "npu_add_rms_norm", *attention, *experts, *last]


@pytest.mark.parametrize("quantise", [None, "w8a8", "w4a16"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_decode_step_never_waits(quantise: str | None, padded: bool, tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, dtype="bf16", **SHAPE)
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[0, 0] = 0
    model = ascend.load_model(path, CARD, quantise=quantise)
    decoder = Decoder(model, ids(2, 5).to(CARD), mask.to(CARD) if padded else None, 8)
    decoder.prefill()
    token = torch.ones(2, dtype=torch.int64, device=CARD)
    with log.recording() as seen:
        for _ in range(3):
            decoder.step(token)
    assert seen.syncs == []
    assert seen.of("npu").count("npu_fused_infer_attention_score") == 9


def test_expert_weights_lie_in_the_cubes_format(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, dtype="bf16", **SHAPE)
    experts = ascend.load_model(path, CARD).model.layers[1].mlp.experts
    assert torch.ops.npu.get_npu_format(experts.gate_up) == torch.ops.npu.get_npu_format(experts.down) == 29
    assert experts.gate_up.shape == (8, 128, 128)


@pytest.mark.parametrize(
    ("dtype", "width", "words"),
    [
        ("float32", 64, "bf16 or fp16 alone; give dtype='bfloat16'"),
        ("bfloat16", 96, "whole 64s, not 96 wide on a rank"),
    ],
)
def test_what_the_card_cannot_quantise_is_refused(dtype: str, width: int, words: str, tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, **SHAPE | {"moe_intermediate_size": width})
    assert words in tiny.user_error(ascend.load_model, path, CARD, dtype, quantise="w8a8")


def test_fp8_is_refused(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, **SHAPE)
    assert "npu:0 does not compute in fp8; use w8a8" in tiny.user_error(
        ascend.load_model, path, CARD, "bfloat16", quantise="fp8"
    )
    no_cache = tiny.user_error(StaticCache, 1, 1, 1, 8, 64, FP8, torch.device(CARD))
    assert "npu:0 has no FP8; leave the key/value cache in the model's dtype" in no_cache


@pytest.mark.parametrize("quantise", ["w8a8", "w4a16"])
def test_a_quantised_checkpoint_is_the_model_quantised_in_memory(quantise: str, tmp_path: Path) -> None:
    plain = tiny.checkpoint(tmp_path / "plain", dtype="bf16", **SHAPE)
    path = quantised_checkpoint(plain, tmp_path / "stored", quantise)
    stored, expected = ascend.load_model(path, CARD), ascend.load_model(plain, CARD, quantise=quantise)
    assert stored.quantised == quantise
    assert torch.equal(stored(ids().to(CARD)).cpu(), expected(ids().to(CARD)).cpu())
    drafts = [model.mtp_logits(ids().to(CARD))[0].cpu() for model in (stored, expected)]
    assert torch.equal(*drafts)
    tokens = [ascend.generate(model, ids(2, 9).to(CARD), 4, drafts=1).cpu() for model in (stored, expected)]
    assert torch.equal(*tokens)


def test_experts_and_shared_experts_of_two_formats_run_apart(tmp_path: Path) -> None:
    plain = tiny.checkpoint(tmp_path / "plain", dtype="bf16", **SHAPE)
    path = quantised_checkpoint(plain, tmp_path / "stored", "w8a8", ["shared_experts"])
    card, cpu = (ascend.load_model(path, where) for where in (CARD, "cpu"))
    apart = (card(ids().to(CARD)).cpu() - cpu(ids())).norm(dim=-1) / cpu(ids()).norm(dim=-1)
    assert apart.median() < 0.06


def test_stored_formats_that_the_card_lacks_are_refused(tmp_path: Path) -> None:
    plain = tiny.checkpoint(tmp_path / "plain", dtype="bf16", **SHAPE | {"moe_intermediate_size": 96})
    for to, words in (
        ("fp8", f"{CARD} does not compute in fp8; `python -m convert w8a8 SRC DST` makes one that loads"),
        ("w8a8", "whole 64s, not 96 wide on a rank; `python -m convert w4a16 SRC DST` makes one that loads"),
    ):
        path = quantised_checkpoint(plain, tmp_path / to, to)
        assert tiny.user_error(ascend.load_model, path, CARD).endswith(words)
    # Nothing hinders those experts where they are plain.
    path = quantised_checkpoint(plain, tmp_path / "attention", "w8a8", [r"\.experts\."])
    assert ascend.load_model(path, CARD)(ids().to(CARD)).isfinite().all()


def test_a_model_that_was_moved_there_is_refused(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, **SHAPE)
    moved = ascend.load_model(path).to(CARD)
    assert "load the model there" in tiny.user_error(moved, ids().to(CARD))
    assert "can be saved" in tiny.user_error(ascend.load_model(path, CARD).save_pretrained, tmp_path / "copy")


def test_transformers_generates_on_the_card(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny.checkpoint(tmp_path, **SHAPE)
    prompt = ids(1, 7)
    cpu = AutoModelForCausalLM.from_pretrained(path)
    card = AutoModelForCausalLM.from_pretrained(path, device_map=CARD)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(card.generate(prompt.to(CARD), **how).cpu(), cpu.generate(prompt, **how))
