"""`serve/launch.sh --device npu --emulate` as a user calls it: the real vllm-ascend, judged by `perf parity`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from convert.command import main as convert
from convert.demo import write_demo
from convert.eagle3_init import write_head
from serve import emulated
from serve.config_file import as_flags
from serve.planning.model import rope_settings
from tests.drafts import fit_eagle3, fit_mtp
from tests.launcher import LAUNCH, ROOT, Launched, free_port, wait_for
from tests.test_parity_command import run

pytestmark = pytest.mark.slow  # an engine each: most of a minute

SECONDS = 600.0  # the first start makes the environment
PROMPT = list(range(100, 130))
TOKENS = 24
WORD = "kanarienvogel"  # of a request, so it is in no file
YARN_LENGTH = 64  # beyond it positions are stretched; the prompts of `perf parity` below are longer


@contextmanager
def launched(directory: Path, model: Path, *flags: str) -> Iterator[tuple[dict[str, Any], Launched]]:
    server = Launched(directory, "--device", "npu", "--emulate", "--model", str(model), *flags)
    try:
        yield server.wait_until_ready(SECONDS), server
    finally:
        assert server.stop() == 0
    assert server.processes() == set()


def asked(ready: dict[str, Any], path: str, **body: Any) -> dict[str, Any]:
    content = json.dumps({"model": ready["model"], "temperature": 0, **body}).encode()
    request = urllib.request.Request(f"{ready['base_url']}/{path}", content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        document: dict[str, Any] = json.load(answer)
    return document


def tokens_of(ready: dict[str, Any]) -> list[int]:
    wanted = {"max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
    tokens: list[int] = asked(ready, "completions", prompt=PROMPT, **wanted)["choices"][0]["token_ids"]
    return tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-npu"
    write_demo(path, "tiny-npu", dtype="fp32")
    fit_mtp(path, [PROMPT], TOKENS)
    write_head(path.with_name("head"), path, dtype="fp32")
    assert fit_eagle3(path.with_name("head"), path, [PROMPT], TOKENS, steps=60) > 0.9
    assert convert(["bf16", str(path), str(path.with_name("bf16"))]) == 0
    return path.with_name("bf16")


def parity(record: Path, ready: dict[str, Any]) -> tuple[int, str]:
    done = run("check", record, ready["base_url"].removesuffix("/v1"), "--served-model", ready["model"])
    return done.returncode, done.stdout + done.stderr


def test_it_answers_drafts_and_is_the_cpus_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's own plan and graphs for two cards with whole experts: chat, parity, and the same text drafted."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CI", "true")  # then torch is stricter
    assert run("record", "cpu", tmp_path / "cpu.safetensors", "--model", model).returncode == 0
    flags = ("--cards", "2x910B3-64G", "--expert-parallel", "--max-num-seqs", "16")
    with launched(tmp_path / "plain", model, *flags) as (ready, server):
        assert "EMULATED" in server.output
        assert ready["device"] == "npu (emulated)"
        chat = asked(ready, "chat/completions", messages=[{"role": "user", "content": WORD}], max_tokens=8)
        assert chat["choices"][0]["message"]["content"]
        with pytest.raises(urllib.error.HTTPError, match="400"):
            asked(ready, "completions", prompt=WORD, structured_outputs={"regex": f"({WORD}"})
        assert "warming up" in server.output  # what the engine is doing is read from its log
        code, said = parity(tmp_path / "cpu.safetensors", ready)
        assert (code, "PASS" in said) == (0, True), said
        os.kill(server.titled("VLLM::Worker_TP1"), signal.SIGKILL)
        assert wait_for(lambda: "ready again after" in server.output, SECONDS), server.output
        assert "(VLLM::Worker_TP1_EP1 is gone)" in server.output
    with launched(tmp_path / "one", model, "--max-num-seqs", "16") as (ready, _):
        plain = tokens_of(ready)
    for method in ("mtp", f"eagle3:{model.with_name('head')}"):
        drafting = tmp_path / method.partition(":")[0]
        with launched(drafting, model, "--max-num-seqs", "16", "--speculative", method) as (ready, server):
            assert tokens_of(ready) == plain
        accepted = re.search(r"^drafts: (\d+) of \d+ accepted", server.output, re.MULTILINE)
        assert accepted, server.output
        assert int(accepted[1]) > 5
    assert not (tmp_path / "home" / "ascend" / "log").exists()  # vllm-ascend's own log has what ours withholds
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.name.startswith("engine-") for file in written)
    assert not [file for file in written if WORD.encode() in file.read_bytes()]


def test_a_start_that_fails_on_several_cards_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-ascend's core then waits for its workers, which wait for it, and the API server for the core."""
    monkeypatch.setenv("TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING", "1")  # its ops return what they were given …
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")  # … and only new code is looked at
    server = Launched(tmp_path, "--device", "npu", "--emulate", "--cards", "2x910B3-64G", "--max-num-seqs", "4")
    try:
        assert server.process.wait(SECONDS) == 1
        assert "error: the engine did not start: RuntimeError: vllm::maybe_" in server.output
        assert server.processes() == set()
    finally:
        for pid in server.processes():
            os.kill(pid, signal.SIGKILL)


def test_yarn_is_the_models_with_the_launchers_settings_and_not_without(tmp_path: Path) -> None:
    """vLLM-Ascend's default does not truncate YaRN's range: `perf parity` says FAIL, and that it is the positions."""
    path = tmp_path / "yarn"
    yarn = {"rope_type": "yarn", "type": "yarn", "factor": 8.0, "original_max_position_embeddings": YARN_LENGTH}
    write_demo(path, "tiny-npu", rope_scaling=yarn, max_position_embeddings=8 * YARN_LENGTH)
    record = tmp_path / "cpu.safetensors"
    assert run("record", "cpu", record, "--model", path, "--prompt-length", 200, "--rows", 4).returncode == 0
    with launched(tmp_path / "ours", path, "--max-num-seqs", "8") as (ready, _):
        code, said = parity(record, ready)
        assert (code, "PASS" in said) == (0, True), said
    # As vLLM-Ascend takes a configuration that does not say; ours says so as soon as the plugin reads it. The launcher
    # refuses it, so the engine is started as its makers' pages have it.
    rope = rope_settings(json.loads((path / "config.json").read_text())) | {"truncate": False}
    own = json.dumps({"rope_parameters": rope})
    flags = ["--device", "npu", "--emulate", "--model", str(path), "--dry-run", "--", "--hf-overrides", own]
    refused = subprocess.run([str(LAUNCH), *flags], capture_output=True, text=True, check=False)
    assert (refused.returncode, "gives other positions" in refused.stderr) == (2, True), refused.stderr
    with engine(path, tmp_path / "log", "--hf-overrides", own) as ready:
        code, said = parity(record, ready)
        assert (code, "FAIL" in said) == (1, True), said
        assert "what positions or keys decide" in said


@contextmanager
def engine(model: Path, log: Path, *flags: str) -> Iterator[dict[str, Any]]:
    """vLLM-Ascend with its own defaults, but for what an emulated card needs."""
    port, python = free_port(), str(ROOT / ".venv.npu" / "bin" / "python")
    command = [python, "-m", "ascend.emulator", "--", python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-num-seqs", "8", "--max-logprobs", "1000", "--enforce-eager"]
    command += [*as_flags(emulated.with_settings({})), *flags]
    environment = {**os.environ, **emulated.ENVIRONMENT, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        ready = wait_for(lambda: "Application startup complete" in log.read_text() or process.poll() is not None, 300)
        assert ready, log.read_text()[-3000:]
        assert process.poll() is None, log.read_text()[-3000:]
        yield {"base_url": f"http://127.0.0.1:{port}/v1", "model": "m"}
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
