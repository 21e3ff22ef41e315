"""Draft models of the real vLLM for this architecture: MTP layers and EAGLE3 heads, fitted here, on the CPU in fp32.

The sampled ones with vLLM's newer runner take six minutes on Triton's interpreter, and are by hand:
`VLLM_USE_V2_MODEL_RUNNER=1 tests/run.sh tests/test_drafts_vllm.py -k rejection`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import ascend
from ascend.eagle3 import load_eagle3
from ascend.speculation import SpeculativeDecoder
from convert.demo import write_demo
from convert.eagle3_init import write_head
from tests.drafts import fit_eagle3, fit_mtp
from tests.launcher import ROOT
from tests.quantised import quantised_checkpoint
from tests.tiny import edit_config, read_tensors, write_tensors

NEW_TOKENS, SAMPLES, TEMPERATURE = 24, 3000, 0.7
CHI_SQUARE_BOUND = 5.0  # standard deviations of the statistic; chance gives that once in a million runs


def prompts(*lengths: int, below: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, below, (n,), generator=generator).tolist() for n in lengths]


TEXTS = prompts(5, 37, 12, 60, 3, 20, below=2000)


def run_vllm(directory: Path, cases: list[dict[str, Any]], **environment: str) -> list[dict[str, Any]]:
    (directory / "cases.json").write_text(json.dumps(cases))
    run = subprocess.run(
        [sys.executable, "-m", "tests.vllm_drafts", str(directory / "cases.json"), str(directory / "out.json")],
        cwd=ROOT,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answers: list[dict[str, Any]] = json.loads((directory / "out.json").read_text())
    return answers


@cache
def plain_text(model_path: Path) -> list[list[int]]:
    """`ascend`'s own tokens, without drafts."""
    model = ascend.load_model(model_path)
    return [ascend.generate(model, torch.tensor([ids]), NEW_TOKENS)[0, len(ids) :].tolist() for ids in TEXTS]


def steps_of_ours(model_path: Path, drafts: int, head: Path | None) -> int:
    """Verifications that `ascend` needs for the same text: as many only if it accepts the same drafts."""
    model = ascend.load_model(model_path)
    drafter, steps = load_eagle3(head, model) if head else None, 0
    with torch.inference_mode():
        for ids in TEXTS:
            decoder = SpeculativeDecoder(model, torch.tensor([ids]), None, NEW_TOKENS, drafts=drafts, drafter=drafter)
            decoder.prefill()
            while decoder.answer.left():
                decoder.run(1)
                steps += 1
    return steps


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints and heads by name, all fitted to `TEXTS` but the quantised one's layer."""
    home = tmp_path_factory.mktemp("drafting")
    paths = {name: home / name for name in ("tiny", "two", "quantised", "head", "small", "inputs")}
    write_demo(paths["tiny"], dtype="fp32")
    fit_mtp(paths["tiny"], TEXTS, NEW_TOKENS)
    write_demo(paths["two"], dtype="fp32", num_nextn_predict_layers=2)
    fit_mtp(paths["two"], TEXTS, NEW_TOKENS)
    quantised_checkpoint(paths["tiny"], paths["quantised"], "w8a8")
    for name, size in (("head", None), ("small", 700), ("inputs", None)):
        write_head(paths[name], paths["tiny"], dtype="fp32", draft_vocab_size=size)
    # The other meaning of the ids: layers 2 and up are inputs. The fit sees the same ids, so the streams must agree.
    named = {"eagle_aux_hidden_state_layer_ids": [0, 2, 3], "use_aux_hidden_state": True}
    edit_config(paths["inputs"], eagle_config=named)
    for name in ("head", "small", "inputs"):
        assert fit_eagle3(paths[name], paths["tiny"], TEXTS, NEW_TOKENS, steps=60) > 0.9
    return paths


# Model, drafts and head. vLLM's two model runners prepare what draft models get in code of their own: the newer one is
# what vLLM 0.32 takes for CUDA, the older one what the CPU and vLLM-Ascend 0.23 have; it uses one MTP layer of several.
OLDER = [("tiny", 0, ""), ("tiny", 3, ""), ("tiny", 3, "head"), ("quantised", 0, ""), ("quantised", 1, "")]
NEWER = [("two", 2, ""), ("tiny", 3, ""), ("tiny", 3, "head"), ("tiny", 3, "small"), ("tiny", 3, "inputs")]


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize(("runner", "variants"), [("0", OLDER), ("1", NEWER)], ids=["older runner", "newer runner"])
def test_greedy_text_is_that_of_plain_decoding_and_the_drafts_are_ours(
    runner: str, variants: list[tuple[str, int, str]], drafting: dict[str, Path], tmp_path: Path
) -> None:
    """Every draft model accepts exactly what `ascend`'s own accepts, in prompts of several lengths at once."""

    def speculative(drafts: int, head: str) -> dict[str, Any] | None:
        named = {"method": "eagle3", "model": str(drafting[head])} if head else {"method": "mtp"}
        return named | {"num_speculative_tokens": drafts} if drafts else None

    shared = {"prompts": TEXTS, "sampling": {"temperature": 0.0, "max_tokens": NEW_TOKENS}}
    answers = run_vllm(
        tmp_path,
        [
            {"model": str(drafting[model]), "speculative": speculative(drafts, head), **shared}
            for model, drafts, head in variants
        ],
        VLLM_USE_V2_MODEL_RUNNER=runner,
    )
    for (model, drafts, head), answer in zip(variants, answers, strict=True):
        variant = (model, drafts, head)
        if model == "quantised":  # `ascend` rounds activations there, too
            assert answer["tokens"] == answers[variants.index((model, 0, ""))]["tokens"], variant
        else:
            assert answer["tokens"] == [[one] for one in plain_text(drafting[model])], variant
        if drafts:
            assert answer["drafted"] == drafts * answer["drafts"]
            assert answer["accepted"] / answer["drafts"] > (0.05 if model == "quantised" else 0.2), variant
            if model != "quantised":
                assert answer["drafts"] == steps_of_ours(drafting[model], drafts, drafting.get(head)), variant


@pytest.mark.slow
@pytest.mark.beside
def test_rejection_sampling_keeps_the_distribution(tmp_path: Path) -> None:
    """Sampled: the second and third tokens, both drafted first, are drawn as the model alone draws them."""
    shape = {"vocab_size": 300, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    path = tmp_path / "tiny"
    write_demo(path, dtype="fp32", **shape)
    # Its next token follows from the last one alone, so that the layer can be fitted to texts that are drawn.
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if name.endswith(("attention.dense.weight", "down_proj.weight")):
            tensor.zero_()
    write_tensors(path, tensors)
    fit_mtp(path, prompts(*[40] * 10, below=280), 40)
    (prompt,) = prompts(9, below=280)
    sampling = {"temperature": TEMPERATURE, "max_tokens": 3}
    speculative = {"method": "mtp", "num_speculative_tokens": 2}
    case = {"model": str(path), "speculative": speculative, "prompts": [prompt], "sampling": sampling, "n": SAMPLES}
    (answer,) = run_vllm(tmp_path, [case])
    assert 0.1 < answer["accepted"] / answer["drafted"] < 0.9, answer  # both branches are taken
    drawn = torch.tensor(answer["tokens"][0])
    assert drawn.shape == (SAMPLES, 3)

    model = ascend.load_model(path)
    with torch.no_grad():
        first_V = sampled(model, [prompt], TEMPERATURE)[0]
        pairs = [[*prompt, token] for token in range(300)]
        second_VV = sampled(model, pairs, TEMPERATURE)
        common = int(drawn[:, 0].bincount().argmax())
        third_VV = sampled(model, [[*prompt, common, token] for token in range(300)], TEMPERATURE)
        sharper_VV = sampled(model, pairs, 0.9 * TEMPERATURE)
    marginal_V = first_V @ second_VV
    after = drawn[drawn[:, 0] == common]
    assert chi_square(drawn[:, 1], marginal_V) < CHI_SQUARE_BOUND
    assert chi_square(after[:, 2], second_VV[common] @ third_VV) < CHI_SQUARE_BOUND
    assert chi_square(drawn[:, 1], first_V @ sharper_VV) > CHI_SQUARE_BOUND  # another distribution is told apart


def sampled(model: ascend.BailingMoeV2ForCausalLM, texts: list[list[int]], temperature: float) -> torch.Tensor:
    """Probabilities of the token after each text, ``[texts, V]``."""
    return (model(torch.tensor(texts))[:, -1] / temperature).softmax(-1)


def chi_square(drawn_N: torch.Tensor, expected_V: torch.Tensor) -> float:
    """Pearson's statistic as standard deviations above its mean; tokens expected less than 5 times count as one."""
    count_V = drawn_N.bincount(minlength=len(expected_V)).double()
    wanted_V = expected_V.double() * len(drawn_N)
    rare = wanted_V < 5
    count, wanted = (torch.cat([one[~rare], one[rare].sum()[None]]) for one in (count_V, wanted_V))
    degrees = len(count) - 1
    assert degrees >= 10
    return float((((count - wanted) ** 2 / wanted).sum() - degrees) / (2 * degrees) ** 0.5)
