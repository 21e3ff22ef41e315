"""Batches that begin again on an emulated card, and models with random weights made there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import ascend
from ascend.config import BailingMoeV2Config
from ascend.emulator import log
from ascend.generation import Decoder
from ascend.random_weights import random_model
from tests import tiny

CARD = "npu:0"
SHAPE = {"head_dim": 64, "hidden_size": 128, "moe_intermediate_size": 64}


def prompts(seed: int) -> Tensor:
    return torch.randint(0, tiny.SHAPE["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(seed))


def continued(decoder: Decoder, count: int) -> list[list[int]]:
    token_B = decoder.prefill().argmax(-1)
    made = [token_B.cpu()]
    for _ in range(count - 1):
        token_B = decoder.step(token_B).argmax(-1)
        made.append(token_B.cpu())
    return torch.stack(made, dim=1).tolist()


@pytest.mark.parametrize("capture", [False, True])
def test_a_batch_that_begins_again_gives_what_a_new_one_gives(capture: bool, tmp_path: Path) -> None:
    model = ascend.load_model(tiny.checkpoint(tmp_path, **SHAPE), CARD)
    cpu = ascend.load_model(tmp_path)
    decoder = Decoder(model, prompts(0).to(CARD), None, 8, capture)
    continued(decoder, 8)
    for seed, count in ((1, 8), (2, 5), (0, 8)):
        with log.recording() as seen:
            decoder.restart(prompts(seed).to(CARD))
            tokens = continued(decoder, count)
        assert tokens == ascend.generate(cpu, prompts(seed), count)[:, 9:].tolist()
        assert seen.ops.count("graph::replay") == (count - 1 if capture else 0), "nothing is captured anew"


@pytest.mark.parametrize("quantise", [None, "w8a8", "w4a16"])
def test_random_weights_made_on_the_card_are_laid_out_as_loaded_ones(quantise: str | None, tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, "bf16", **SHAPE)
    loaded = ascend.load_model(path, CARD, quantise=quantise)
    made = random_model(BailingMoeV2Config(**tiny.read_config(path)), CARD, torch.bfloat16, quantise=quantise)

    def structure(model: ascend.BailingMoeV2ForCausalLM) -> dict[str, tuple[object, ...]]:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: (one.shape, one.dtype, str(one.device)) for name, one in tensors.items()}

    assert structure(made) == structure(loaded)
    assert (made.model.laid_out, made.quantised) == (loaded.model.laid_out, quantise)
    assert ascend.generate(made, prompts(0).to(CARD), 4, capture=True).shape == (2, 13)
