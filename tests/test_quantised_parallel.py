"""Ranks that load their part of a quantised checkpoint: what they would quantise themselves, or a line why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ascend
from ascend.parallel import Parallel
from ascend.quantisation import check_computes
from tests import tiny
from tests.quantised import quantised_checkpoint
from tests.ranks import Ranks
from tests.test_parallel import Imagined
from tests.test_quantised_loading import FORMATS, IDS, _one_thread, same_bits  # noqa: F401 - a fixture for all here

# Heads and widths of whole blocks of 128, for two ranks each.
BLOCKS = {
    "hidden_size": 256,
    "head_dim": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "use_bias": True,
    "use_qkv_bias": True,
}


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("blocks")
    plain = tiny.checkpoint(base / "plain", "bf16", **BLOCKS)
    return {"plain": plain} | {to: quantised_checkpoint(plain, base / to, to) for to in FORMATS}


def rank_of(rank: int, tensor: int, experts: int, ranks: int = 2) -> Parallel:
    return Parallel.mesh(Imagined(rank, ranks), tensor, experts)


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize(("tensor", "experts"), [(2, 2), (2, 1)])
@pytest.mark.parametrize("to", FORMATS)
def test_a_ranks_part_is_what_it_would_quantise_itself(
    to: str, tensor: int, experts: int, blocks: dict[str, Path]
) -> None:
    """But for int8 matrices whose columns are divided: there the scale of a row is that of the whole row."""
    whole = ascend.load_model(blocks[to])
    for rank in (0, 1):
        model = ascend.load_model(blocks[to], parallel=rank_of(rank, tensor, experts))
        expected = ascend.load_model(blocks["plain"], quantise=to, parallel=rank_of(rank, tensor, experts))
        for name, ours in model.named_parameters():
            theirs, full = expected.get_parameter(name), whole.get_parameter(name)
            by_column = name.endswith((".dense.weight", ".dense.scale", ".down", ".down_scale"))
            if to == "w8a8" and by_column and ours.dtype is torch.int8 and ours.shape != full.shape:
                if ours.shape[-1] != full.shape[-1]:
                    theirs = full.chunk(2, -1)[rank]
            elif to == "w8a8" and by_column:
                theirs = full.chunk(len(full) // len(ours))[rank] if len(full) != len(ours) else full
            same_bits(name, ours, theirs)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def _logits(group: Any, path: Path, tensor: int, experts: int, quantise: str | None) -> Tensor:
    parallel = Parallel.mesh(group, tensor, experts)
    return ascend.load_model(path, quantise=quantise, parallel=parallel)(IDS)


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize(("tensor", "experts"), [(2, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("to", FORMATS)
def test_two_ranks_compute_what_one_does(
    to: str, tensor: int, experts: int, two: Ranks, blocks: dict[str, Path]
) -> None:
    whole = ascend.load_model(blocks[to])(IDS)
    answers = two.call(_logits, blocks[to], tensor, experts, None)
    if to != "w8a8" or tensor == 1:  # those have the same weights, bit for bit
        expected = two.call(_logits, blocks["plain"], tensor, experts, to)
        assert all(torch.equal(*pair) for pair in zip(answers, expected, strict=True))
    for logits in answers:
        assert torch.cosine_similarity(logits, whole, -1).median() > 0.99


CUT: dict[str, tuple[str, dict[str, int], tuple[int, int], str]] = {
    "FP8 experts": (
        *("fp8", {"moe_intermediate_size": 128, "num_shared_experts": 2}, (2, 1)),
        "model.layers.1.mlp.experts.0.gate_proj.weight is fp8 in 128 rows at a time, which this rank's 64 to 128 of "
        "128 would cut; it divides among so many ranks: 1",
    ),
    "FP8 heads": (
        *("fp8", {"head_dim": 64}, (2, 2)),
        "model.layers.0.attention.query_key_value.weight is fp8 in 128 rows at a time, which this rank's 320 to 384 "
        "of 512 would cut; it divides among so many ranks: 1, 2, 4",
    ),
    "int4 groups": (
        *("w4a16", {"moe_intermediate_size": 128, "num_shared_experts": 2}, (2, 1)),
        "model.layers.1.mlp.experts.0.down_proj.weight is w4a16 in 128 columns at a time, which this rank's 64 to 128 "
        "of 128 would cut; it divides among so many ranks: 1",
    ),
}


@pytest.mark.parametrize("what", CUT)
def test_ranks_that_would_cut_a_block_are_refused(what: str, tmp_path: Path) -> None:
    to, shape, (tensor, experts), words = CUT[what]
    plain = tiny.checkpoint(tmp_path / "plain", "bf16", **BLOCKS | shape | {"num_nextn_predict_layers": 0})
    path = quantised_checkpoint(plain, tmp_path / "stored", to)
    assert words.partition(" which this")[0] in tiny.user_error(
        ascend.load_model, path, parallel=rank_of(0, tensor, experts)
    )
    line = tiny.user_error(ascend.load_model, path, parallel=rank_of(1, tensor, experts))
    assert line == f"{path / 'model.safetensors'}: tensor {words}"
    ascend.load_model(path, parallel=rank_of(1, 1, 2))


def test_mc2_takes_plain_experts_alone() -> None:
    what = (check_computes, torch.device("cpu"), torch.float32, "w8a8")
    assert "mc2 runs whole experts alone, not w8a8" in tiny.user_error(*what, 32, Parallel(strategy="mc2"))
    check_computes(*what[1:], None, Parallel(strategy="mc2"))
