"""The canary: what is recorded, what a server must give, and which faults of weights and settings it hears."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import ascend
from ascend.checkpoint import open_checkpoint
from ascend.errors import UserError
from ascend.model import BailingMoeV2ForCausalLM
from convert.canary import compute, main
from convert.canary_record import (
    CANARY,
    MAX_BYTES,
    PROMPT_LENGTHS,
    Canary,
    Noise,
    canary_prompts,
    canary_text,
    differences,
    noise_of,
    read_canary,
)
from convert.demo import write_demo
from convert.manifest import check_full, check_quick, read_manifest
from convert.manifest_command import main as write_manifest
from serve.args import parse
from serve.settings import LaunchSettings
from serve.watch.canary import CanaryError, _limits, check_canary
from serve.watch.ready import EngineError, Server
from tests.tiny import checkpoint

VOCABULARY = 2048
GOOD = Canary(VOCABULARY, "bf16", [[-1.0 - 0.01 * t for t in range(n - 1)] for n in PROMPT_LENGTHS], Noise(0.07, 0.32))


def settings(*flags: str) -> LaunchSettings:
    """The launcher's settings for a CPU."""
    return parse(["--device", "cpu", *flags])


def logprobs(model: BailingMoeV2ForCausalLM) -> list[list[float]]:
    """What a model gives the canary's tokens."""
    found = []
    for prompt in canary_prompts(model.config.vocab_size):
        with torch.inference_mode():
            said_TV = model(torch.tensor([prompt]))[0].float().log_softmax(-1)
        found.append(said_TV[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist())
    return found


class Stub:
    """A server that answers the canary with what a test says: log-probabilities, or a status and a body."""

    def __init__(self, directory: Path) -> None:
        self.rows: list[list[float]] = GOOD.logprobs
        self.answer: Callable[[dict[str, Any]], tuple[int, Any]] | None = None
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def _send(self, status: int, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self._send(200, {"version": "0.32.0"})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._send(*(stub.answer or stub.said)(asked))

            def log_message(self, *_: object) -> None:
                """Be quiet."""

        self.httpd = HTTPServer(("127.0.0.1", 0), Handler)
        self.log = directory / "engine.log"
        self.log.write_text(
            "INFO [core.py:1] Initializing a V1 LLM engine (v0.32.0) with config: dtype=torch.bfloat16, x\n"
        )
        model = directory / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"model_type": "bailing_moe", "vocab_size": VOCABULARY}))
        port = self.httpd.server_port
        self.server = Server("127.0.0.1", port, "m", model, "cpu", self.log, True, True)
        threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True).start()

    def said(self, asked: dict[str, Any]) -> tuple[int, Any]:
        """As vLLM words it, or SGLang."""
        ids = asked.get("prompt") or asked["input_ids"]
        row = self.rows[canary_prompts(VOCABULARY).index(ids)]
        if "input_ids" in asked:
            return 200, {"meta_info": {"input_token_logprobs": [[None, ids[0], None]] + [
                [value, token, None] for token, value in zip(ids[1:], row, strict=True)]}}  # fmt: skip
        assert asked["prompt_logprobs"] == 0
        assert asked["max_tokens"] == 1
        given = [{str(token): {"logprob": value}} for token, value in zip(ids[1:], row, strict=True)]
        return 200, {"choices": [{"prompt_logprobs": [None, *given]}]}

    def check(self, *flags: str) -> str:
        """Run the canary on it."""
        return check_canary(self.server, settings(*flags))

    def poll(self) -> int | None:
        """As an engine: it runs."""
        return None


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    found = Stub(tmp_path)
    yield found
    found.httpd.shutdown()
    found.httpd.server_close()


def test_prompts_are_drawn_alike_everywhere_and_miss_the_ends_of_the_vocabulary() -> None:
    for size in (VOCABULARY, 157184):
        prompts = canary_prompts(size)
        assert [len(prompt) for prompt in prompts] == list(PROMPT_LENGTHS)
        assert max(PROMPT_LENGTHS) > 128
        assert min(map(min, prompts)) >= size // 100
        assert max(map(max, prompts)) < size * 9 // 10 + size // 100
        assert len({token for prompt in prompts for token in prompt}) > 200
    # A record is of these very tokens: whoever draws others must count up the version.
    assert canary_prompts(VOCABULARY)[0][:3] == [20, 156, 1267]
    assert canary_prompts(157184)[2][-3:] == [12164, 101751, 117081]


def test_a_record_comes_back_as_it_was_written_and_anything_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / CANARY
    file.write_text(canary_text(GOOD))
    assert read_canary(file) == GOOD
    value = json.loads(canary_text(GOOD))
    rows = value["logprobs"]
    for wrong in (
        value | {"more": 1}, {k: v for k, v in value.items() if k != "noise"}, value | {"canary_version": 2},
        value | {"vocab_size": True}, value | {"vocab_size": 1}, value | {"stored": 3}, value | {"stored": "é"},
        value | {"logprobs": rows[:2]}, value | {"logprobs": [*rows[:2], rows[2][:-1]]}, value | {"logprobs": 3},
        value | {"logprobs": [*rows[:2], [math.nan] * 159]}, value | {"logprobs": [*rows[:2], [0.5] * 159]},
        value | {"logprobs": [rows[0], rows[1], ["1"] * 159]}, value | {"noise": {"median": 1}},
        value | {"noise": {"median": -1, "tenth": 1}}, value | {"noise": {"median": math.inf, "tenth": 1}}, [value],
    ):  # fmt: skip
        file.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="the file is damaged"):
            read_canary(file)
    for text in ("", "{", "[" * 10000, canary_text(GOOD) + " " * MAX_BYTES):
        file.write_text(text)
        with pytest.raises(UserError, match="the file is damaged"):
            read_canary(file)


@pytest.mark.parametrize("form", ["fp32", "bf16"])
def test_layer_by_layer_gives_what_the_whole_model_gives(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The head in many parts, as that of a large model.
    monkeypatch.setattr(
        "convert.canary.steps", lambda rows, _: ((at, min(at + 128, rows)) for at in range(0, rows, 128))
    )
    checkpoint(tmp_path / "m", dtype=form)
    canary = compute(open_checkpoint(tmp_path / "m"))
    whole = logprobs(ascend.load_model(tmp_path / "m", dtype=torch.float32))
    assert differences(canary.logprobs, whole)[-1] < 1e-4
    assert canary.stored == form
    assert canary.noise is not None
    assert 0 < canary.noise.median < canary.noise.tenth


def test_the_command_adds_the_record_to_the_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path, dtype="bf16")
    write_manifest(["manifest", str(tmp_path)])
    before = read_manifest(tmp_path)
    assert main([str(tmp_path)]) == 0
    manifest = read_manifest(tmp_path)
    assert set(manifest.files) - set(before.files) == {CANARY}
    assert manifest.command == before.command
    assert check_quick(tmp_path, manifest) == check_full(tmp_path, manifest) == []
    assert "listed in manifest.json" in capsys.readouterr().out
    first = (tmp_path / CANARY).read_bytes()
    with pytest.raises(UserError, match="--force"):
        main([str(tmp_path)])
    assert main([str(tmp_path), "--force"]) == 0
    assert (tmp_path / CANARY).read_bytes() == first
    (tmp_path / "manifest.sig").write_text("ed25519 a b")
    with pytest.raises(UserError, match="give --sign"):
        main([str(tmp_path), "--force"])


def test_a_server_that_says_what_was_recorded_is_good_and_another_is_not(stub: Stub) -> None:
    file = stub.server.model / CANARY
    file.write_text(canary_text(GOOD))
    assert "221 log-probabilities as recorded (bf16, recorded by `convert canary`)" in stub.check()
    assert "as recorded" in stub.check("--engine", "sglang", "--device", "cuda")
    stub.rows = [[value - 0.15 for value in row] for row in GOOD.logprobs]
    with pytest.raises(CanaryError, match="something else than was recorded"):
        stub.check()
    assert stub.check("--canary", "off").startswith("off")
    stub.rows = [[value + 0.002 * (t == 7) for t, value in enumerate(row)] for row in GOOD.logprobs]
    assert "as recorded" in stub.check()
    stub.log.write_text("INFO Initializing a V1 LLM engine (v0.32.0) with config: model='x', dtype=torch.float32, y\n")
    with pytest.raises(CanaryError, match=r"all within 0\.002"):
        stub.check()
    file.write_text(canary_text(replace(GOOD, vocab_size=4096)))
    with pytest.raises(EngineError, match="another vocabulary"):
        stub.check()


def test_the_first_verified_start_records_and_the_next_is_held_to_it(stub: Stub) -> None:
    assert "nothing vouches" in stub.check()
    manifest = stub.server.model / "manifest.json"
    manifest.write_text("{}")
    assert "nothing vouches" in stub.check("--verify", "off")
    assert stub.check().startswith("recorded, not compared: 221 log-probabilities in bf16")
    (file,) = (stub.log.parent / "canary").iterdir()
    assert file.stat().st_mode & 0o777 == 0o640
    assert file.name.endswith("-cpu-bf16-vllm-0.32.0.json")
    assert "recorded here by an earlier start" in stub.check()
    stub.rows = [[value - 0.2 for value in row] for row in GOOD.logprobs]
    with pytest.raises(CanaryError):
        stub.check()
    manifest.write_text("{ }")  # other weights
    assert stub.check().startswith("recorded, not compared")


def test_without_a_record_figures_must_be_numbers_that_differ(stub: Stub) -> None:
    stub.rows = [[math.nan] * len(row) for row in GOOD.logprobs]
    with pytest.raises(CanaryError, match="no numbers"):
        stub.check()
    stub.rows = [[-math.log(VOCABULARY)] * len(row) for row in GOOD.logprobs]
    with pytest.raises(CanaryError, match="equally probable"):
        stub.check()


def test_answers_that_are_none(stub: Stub) -> None:
    def short(asked: dict[str, Any]) -> tuple[int, Any]:
        too_long = {"error": {"message": "This model's maximum context length is 64 tokens"}}
        return (400, too_long) if len(asked["prompt"]) > 64 else stub.said(asked)

    stub.answer = short
    (stub.server.model / CANARY).write_text(canary_text(GOOD))
    assert stub.check().startswith("62 log-probabilities as recorded")
    (stub.server.model / CANARY).unlink()
    (stub.server.model / "manifest.json").write_text("{}")
    assert "not recorded" in stub.check()
    for status, body in ((500, {"error": 1}), (200, {}), (200, {"choices": [{"prompt_logprobs": None}]}), (200, [])):
        stub.answer = lambda _, said=(status, body): said
        with pytest.raises(CanaryError):
            stub.check()


def _change(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[BailingMoeV2ForCausalLM], None]:
    def apply(model: BailingMoeV2ForCausalLM) -> None:
        parameter = dict(model.named_parameters())[name]
        parameter.data = change(parameter.data.clone())

    return apply


def _zeroed(expert: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: weight.index_fill(0, torch.tensor([expert]), 0)


def _flipped(weight: torch.Tensor) -> torch.Tensor:
    bits = weight.bfloat16().view(torch.int16).flatten()
    bits[len(bits) // 2] ^= 1 << 14  # the highest bit of the exponent
    return bits.view(torch.bfloat16).view(weight.shape).to(weight.dtype)


def _swapped(model: BailingMoeV2ForCausalLM) -> None:
    one, other = model.model.layers[1].mlp, model.model.layers[2].mlp
    one.experts, other.experts = other.experts, one.experts


FAULTS = {
    "an expert of 16 is zero": _change("model.layers.1.mlp.experts.down", _zeroed(3)),
    "a norm is doubled": _change("model.layers.3.input_layernorm.weight", lambda weight: weight * 2),
    "a bit of attention is flipped": _change("model.layers.3.attention.query_key_value.weight", _flipped),
    "layers are swapped": _swapped,
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faults_are_heard_and_rounding_is_not(tmp_path: Path, dtype: torch.dtype) -> None:
    write_demo(tmp_path / "tiny")
    canary = compute(open_checkpoint(tmp_path / "tiny"))
    limits = _limits(canary, "fp32" if dtype == torch.float32 else "bf16", "cpu")

    def passes(change: Callable[[BailingMoeV2ForCausalLM], None] | None) -> bool:
        model = ascend.load_model(tmp_path / "tiny", dtype=dtype)
        if change:
            change(model)
        deltas = differences(logprobs(model), canary.logprobs)
        noise = noise_of(deltas)
        print(change, noise, deltas[-1], limits)
        return noise.median <= limits.median and noise.tenth <= limits.tenth and deltas[-1] <= limits.largest

    assert passes(None)
    assert [name for name, change in FAULTS.items() if passes(change)] == []
