"""The model against the real vLLM CPU engine on the same checkpoints, fp32: other code, other kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ascend
from convert.demo import write_demo
from tests.launcher import ROOT
from tests.tiny import edit_config, read_tensors, write_tensors

TOLERANCE = 1e-3  # on logprobs; about 1e-5 is seen
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "as the family has it": {},
    "no groups": {"n_group": 1},
    "eight groups, three kept": {"n_group": 8, "topk_group": 3},
    "rope on the whole head": {"partial_rotary_factor": 1.0},
    "yarn beyond the original length": {"rope_scaling": YARN, "max_position_embeddings": 256},
    "three shared experts of their own width": {"num_shared_experts": 3, "moe_shared_expert_intermediate_size": 96},
    "two dense layers": {"first_k_dense_replace": 2},
    "tied head": {"tie_word_embeddings": True},
    "bias on queries, keys and values": {"use_qkv_bias": True},
    "normed head": {"norm_head": True},
    "two mtp layers, which vLLM passes over": {"num_nextn_predict_layers": 2},
}
# What a config.json of the family may leave out; both sides must then take the architecture's defaults.
OPTIONAL_KEYS = (
    "use_rmsnorm",
    "norm_topk_prob",
    "score_function",
    "router_dtype",
    "use_qk_norm",
    "first_k_dense_replace",
)


def prompt_logprobs(
    tmp_path: Path, directories: list[Path], dtype: str = "float32"
) -> tuple[list[list[int]], list[list[list[dict[str, float]]]]]:
    """Prompts, and by directory, prompt and position what the engine says of the likeliest tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 2000, (n,), generator=generator).tolist() for n in (200, 37)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    # As a module: as a file it would find tests/triton where torch looks for the real one.
    command = [sys.executable, "-m", "tests.vllm_logprobs", str(tmp_path / "prompts.json"), str(tmp_path / "out.json")]
    run = subprocess.run(
        [*command, *map(str, directories)],
        cwd=ROOT,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TESTED_DTYPE": dtype},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return prompts, json.loads((tmp_path / "out.json").read_text())


def differences(path: Path, prompts: list[list[int]], answers: list[list[dict[str, float]]]) -> list[float]:
    """How far the engine's log-probabilities are from the model's in fp32, in nats."""
    model, found = ascend.load_model(path, dtype="float32"), []
    for prompt, positions in zip(prompts, answers, strict=True):
        with torch.no_grad():
            ours = model(torch.tensor([prompt]))[0].log_softmax(-1)
        for t, logprobs in enumerate(positions[1:]):
            found += [abs(ours[t, int(token)].item() - value) for token, value in logprobs.items()]
    return found


@pytest.mark.slow
@pytest.mark.beside
def test_prompt_logprobs_equal_those_of_vllm(tmp_path: Path) -> None:
    directories = []
    for i, overrides in enumerate(VARIANTS.values()):
        write_demo(tmp_path / str(i), dtype="fp32", seed=i, **overrides)
        directories.append(tmp_path / str(i))
    write_demo(tmp_path / "bare", dtype="fp32")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    bare = {key: value for key, value in config.items() if key not in OPTIONAL_KEYS}
    (tmp_path / "bare" / "config.json").write_text(json.dumps(bare | {"auto_map": {"AutoConfig": "absent.Config"}}))
    directories.append(tmp_path / "bare")

    prompts, engine = prompt_logprobs(tmp_path, directories)
    worst = {}
    for name, directory, answers in zip([*VARIANTS, "missing keys"], directories, engine, strict=True):
        found = differences(directory, prompts, answers)
        assert len(found) >= 235 * 5
        worst[name] = max(found)
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.slow
@pytest.mark.beside
def test_experts_are_chosen_in_fp32_by_a_bf16_model(tmp_path: Path) -> None:
    """Experts whose logits differ by less than bf16 can tell: rounded, half of them would be the wrong ones."""
    path = tmp_path / "close"
    write_demo(path, dtype="fp32", n_group=1, num_experts_per_tok=2)
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):  # pairs of experts, the second ahead by a thousandth where it is positive
            tensor[1::2] = tensor[::2] * 1.001
        elif name.endswith("expert_bias"):
            tensor.zero_()
    write_tensors(path, tensors)
    edit_config(path, num_experts_per_tok=1, norm_topk_prob=False)
    prompts, (answers,) = prompt_logprobs(tmp_path, [path], "bfloat16")
    assert torch.tensor(differences(path, prompts, answers)).median() < 0.1
