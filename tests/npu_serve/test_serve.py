"""The real vllm-ascend serves over HTTP on emulated cards; its answers are held against this project's own model."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

import ascend
from convert.command import main as convert
from convert.demo import write_demo
from serve import emulated
from tests.launcher import free_port

pytestmark = pytest.mark.slow  # an engine each: most of a minute

NEW = 12
START_S = 300
FLAGS = ["--dtype", "bfloat16", "--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "256"]
# The pool is given: a card's free memory says nothing here. The fused op is a Triton kernel and has no other form.
FLAGS += ["--num-gpu-blocks-override", "32", "--no-enable-prefix-caching"]
FLAGS += ["--additional-config", json.dumps({"ascend_compilation_config": {"fuse_qknorm_rope": False}})]
EAGER = ["--enforce-eager"]
DECODE_ONLY = ["--compilation-config", json.dumps({"cudagraph_mode": "FULL_DECODE_ONLY"})]
PARALLEL = ["--tensor-parallel-size", "2", "--enable-expert-parallel"]
# A router that is near a tie chooses another expert in another rounding, and moves a logprob by up to 2 in this model:
# such prompts are why the median is judged. In bf16 it was 0.03 to 0.04 (2026-11-23), of unrelated tokens it is over 1.
NOISE = {"bf16": 0.12, "w8a8": 0.25}


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    first: float  # logprob of the first token


@cache
def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(300, 1900) for _ in range(length)] for length in (5, 9, 17, 40, 129, 140, 7, 33)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    paths = {name: home / name for name in ("bf16", "w8a8", "modelslim")}
    write_demo(paths["bf16"], size="tiny-npu")
    for name, options in (("w8a8", []), ("modelslim", ["--format", "modelslim"])):
        assert convert(["w8a8", str(paths["bf16"]), str(paths[name]), *options]) == 0
    return paths


@contextmanager
def served(model: Path, log: Path, *flags: str) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m"]
    # CI: with it torch takes some warnings for errors, and a hospital's machine may have it set, too.
    environ = {**os.environ, **emulated.ENVIRONMENT, "CI": "true", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        engine = subprocess.Popen(
            [*command, *FLAGS, *flags], stdout=out, stderr=out, env=environ, start_new_session=True
        )
    try:
        until = time.monotonic() + START_S
        while not _healthy(port):
            assert engine.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(engine.pid, signal.SIGKILL)
        engine.wait()


def _healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def asked(url: str, prompt: list[int]) -> Answer:
    body = {"model": "m", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    body |= {"logprobs": 1, "return_token_ids": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        choice = json.load(reply)["choices"][0]
    return Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"][0])


def answers(model: Path, log: Path, *flags: str) -> list[Answer]:
    with served(model, log, *flags) as url:
        return [asked(url, prompt) for prompt in prompts()]


@pytest.fixture(scope="module")
def eager(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    return answers(models["bf16"], tmp_path_factory.mktemp("eager") / "log", *EAGER)


def off_the_reference(model: Path, given: list[Answer]) -> float:
    """The median distance of the first tokens' logprobs from those of this project's model on the CPU."""
    reference = ascend.load_model(model, dtype=torch.float32)
    far = []
    with torch.inference_mode():
        for prompt, answer in zip(prompts(), given, strict=True):
            logprob = reference(torch.tensor([prompt]))[0, -1].log_softmax(-1)
            far.append(abs(float(logprob[answer.tokens[0]]) - answer.first))
    return statistics.median(far)


def test_eager_answers_are_the_models(models: dict[str, Path], eager: list[Answer]) -> None:
    """Loading, routing, attention over the paged cache and sampling are right, but for rounding."""
    assert off_the_reference(models["bf16"], eager) < NOISE["bf16"]
    assert len({tuple(answer.tokens) for answer in eager}) == len(eager)


@pytest.mark.parametrize("mode", [[], DECODE_ONLY], ids=["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_captured_graphs_give_the_tokens_of_eager_mode(
    mode: list[str], models: dict[str, Path], eager: list[Answer], tmp_path: Path
) -> None:
    """Lengths are replaced in every step, and every op of a step is on the tape."""
    log = tmp_path / "log"
    assert [one.tokens for one in answers(models["bf16"], log, *mode)] == [one.tokens for one in eager]
    assert "Replaying aclgraph" in log.read_text()


def test_both_int8_formats_give_the_same_tokens(models: dict[str, Path], tmp_path: Path) -> None:
    """Two loaders read the same integers; the kernels on them are right, but for the rounding of activations."""
    ours = answers(models["w8a8"], tmp_path / "log", *EAGER)
    slim = answers(models["modelslim"], tmp_path / "log", "--quantization", "ascend")  # in graphs
    assert [one.tokens for one in slim] == [one.tokens for one in ours]
    assert off_the_reference(models["w8a8"], ours) < NOISE["w8a8"]


@pytest.mark.parametrize("mode", [EAGER, []], ids=["eager", "graphs"])
def test_two_cards_with_their_own_experts_answer_alike(
    mode: list[str], models: dict[str, Path], tmp_path: Path
) -> None:
    """Sharded weights, all-reduce and all-gather over HCCL's calls; tokens may differ where sums round otherwise."""
    given = answers(models["bf16"], tmp_path / "log", *PARALLEL, *mode)
    assert off_the_reference(models["bf16"], given) < NOISE["bf16"]
