"""llama.cpp as an engine of `perf decode`: its logits on our GGUF files are this project's, and what it refuses.

All but the refusals need llama-cpp-python and gguf. In fp32 the largest difference of a logit was 3e-5 over all shapes
here, on logits of up to 15 (standard deviation 4), so 2e-4 is allowed. In bf16 llama.cpp computes in another order, and
a near-tie of the router then sends a token elsewhere: what is held to is the middle of all differences.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ascend
from perf.engines import ENGINES, Setting
from perf.llama_cpp import LlamaCpp
from tests.tiny import SHAPE, checkpoint, edit_config, user_error

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads wider than the model": {"head_dim": 32},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "tied": {"tie_word_embeddings": True},
    "two shared experts": {"num_shared_experts": 2},
    "two dense layers": {"first_k_dense_replace": 2},
    "all groups": {"topk_group": 4, "num_experts_per_tok": 5},
    "weights not normalised": {"norm_topk_prob": False},
    "no bias": {"moe_router_enable_expert_bias": False},
    "other numbers": {"routed_scaling_factor": 1.5, "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
}
BATCH, PROMPT, LENGTH = 3, 8, 40


def setting(model: Path, dtype: str = "float32", **changes: Any) -> Setting:
    """A setting for batches of at most `BATCH` and `LENGTH` tokens."""
    usual = {"device": "cpu", "quantise": None, "threads": 2, "max_batch": BATCH, "max_length": LENGTH}
    return Setting(**{"model": model, "dtype": dtype, "capture": False, "seed": 0} | usual | changes)


def token_ids(batch: int, length: int) -> Tensor:
    """Random tokens, the same ones each time."""
    return torch.randint(SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


def forced(engine: LlamaCpp, ids_BT: Tensor) -> Tensor:
    """Logits from the prompt's last token on, each next token given: [B, T - PROMPT + 1, V]."""
    made = [engine.prefill(ids_BT[:, :PROMPT].tolist()).copy()]
    made += [engine.step(ids_BT[:, at].numpy()).copy() for at in range(PROMPT, ids_BT.shape[1])]
    return torch.stack([torch.from_numpy(one) for one in made], 1)


@pytest.fixture(scope="module")
def installed() -> None:
    """Skips where the two packages are not."""
    for name in ("llama_cpp", "gguf"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install llama-cpp-python gguf")


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_this_projects(installed: None, shape: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, **SHAPES[shape])
    ids = token_ids(BATCH, LENGTH)
    wanted = ascend.load_model(model)(ids)[:, PROMPT - 1 :]
    found = forced(LlamaCpp(setting(model)), ids)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    assert torch.equal(found.topk(5).indices.sort().values, wanted.topk(5).indices.sort().values)


@pytest.mark.slow
def test_bf16(installed: None, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, dtype="bf16")
    ids = token_ids(BATCH, LENGTH)
    wanted = ascend.load_model(model)(ids)[:, PROMPT - 1 :]
    found = forced(LlamaCpp(setting(model, "bfloat16")), ids)
    assert (found - wanted).abs().median() < 0.1
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.95


@pytest.mark.slow
def test_generations_of_any_batch_follow_one_another(installed: None, tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    engine = LlamaCpp(setting(model))
    assert engine.version.startswith("llama-cpp-python ")
    ids = token_ids(BATCH, LENGTH)
    first = forced(engine, ids)
    assert engine.generate(ids[:1, :PROMPT].tolist(), 5) == 5
    assert engine.length == PROMPT + 4  # the last token is chosen and not decoded
    assert engine.generate(ids[:, :PROMPT].tolist(), LENGTH - PROMPT) == BATCH * (LENGTH - PROMPT)
    torch.testing.assert_close(forced(engine, ids), first, rtol=0, atol=2e-4)
    wanted = ascend.generate(ascend.load_model(model), ids[:2, :PROMPT], max_new_tokens=6)
    token_B = engine.prefill(ids[:2, :PROMPT].tolist()).argmax(-1)
    for at in range(PROMPT, PROMPT + 6):
        assert token_B.tolist() == wanted[:, at].tolist()
        token_B = engine.step(token_B).argmax(-1)


@pytest.mark.slow
def test_a_batch_of_one_fills_its_cache(installed: None, tmp_path: Path) -> None:
    engine = LlamaCpp(setting(checkpoint(tmp_path), max_batch=1, max_length=256))
    assert engine.generate(token_ids(1, PROMPT).tolist(), 256 - PROMPT) == 256 - PROMPT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_qk_norm": False}, "no QK norm"),
        ({"norm_head": True}, "normalises its lm_head"),
        ({"num_shared_experts": 0}, "no shared expert"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.0}}, "magnitude"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "truncate"),
        ({"num_hidden_layers": 5}, "tensor model.layers.4"),
    ],
)
def test_what_a_gguf_file_cannot_hold(installed: None, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = edit_config(checkpoint(tmp_path), **changes)
    assert says in user_error(LlamaCpp, setting(model))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "needs a checkpoint"),
        ({"device": "cuda"}, "on the cpu only"),
        ({"quantise": "w8a8"}, "unquantised"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    assert says in user_error(ENGINES["llama.cpp"], setting(tmp_path, **changes))


@pytest.mark.parametrize("missing", ["llama_cpp", "gguf"])
def test_not_installed(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").touch()
    for name in ("llama_cpp", "gguf"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else sys)
    error = user_error(LlamaCpp, setting(tmp_path))
    assert error == "engine llama.cpp needs: pip install llama-cpp-python gguf (compiles about 10 minutes)"
