"""The real engine through `serve/launch.sh` and the official client, and what is left when it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import ascend
from convert.demo import write_demo
from tests.conftest import RunningServer
from tests.launcher import Launched, is_listening, listening_addresses, shared_memory, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.beside, pytest.mark.timeout(600)]

PROMPTS = ("A patient of 70 years has had a fever for three days.", "def f(x):", "头痛三天")
NEW_TOKENS = 24
TIE = 1e-3  # between the two best logits: closer than this, either token is right


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=120)


def chat(client: openai.OpenAI, server: RunningServer, text: str = PROMPTS[0], **options: Any) -> Any:
    options = {"max_tokens": NEW_TOKENS, "temperature": 0, **options}
    return client.chat.completions.create(model=server.model, messages=[{"role": "user", "content": text}], **options)


def post(server: RunningServer, body: bytes) -> tuple[int, str]:
    request = urllib.request.Request(f"{server.base_url}/chat/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_greedy_tokens_are_those_of_our_own_model(server: RunningServer, client: openai.OpenAI) -> None:
    model = ascend.load_model(server.model_path, dtype=torch.float32)
    for prompt in PROMPTS:
        done = client.completions.create(
            model=server.model,
            prompt=prompt,
            max_tokens=NEW_TOKENS,
            temperature=0,
            logprobs=1,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        ).choices[0]
        prompt_ids, token_ids = done.prompt_token_ids, done.token_ids  # type: ignore[attr-defined]
        assert len(token_ids) == NEW_TOKENS
        logits = model(torch.tensor([[*prompt_ids, *token_ids]]))[0, len(prompt_ids) - 1 : -1]
        best = logits.topk(2).values
        logprobs = logits.log_softmax(-1)[torch.arange(NEW_TOKENS), token_ids]
        for i, token in enumerate(token_ids):
            assert int(logits[i].argmax()) == token or best[i, 0] - best[i, 1] < TIE, (prompt, i)
        assert torch.tensor(done.logprobs.token_logprobs).sub(logprobs).abs().max() < 1e-3
        if (best[:, 0] - best[:, 1]).min() > TIE:
            ours = ascend.generate(model, torch.tensor([prompt_ids]), max_new_tokens=NEW_TOKENS)
            assert ours[0, len(prompt_ids) :].tolist() == token_ids


def test_chat_is_the_template_then_the_model(server: RunningServer, client: openai.OpenAI) -> None:
    answer = chat(client, server)
    prompt = "<role>HUMAN</role>" + PROMPTS[0] + "<|role_end|><role>ASSISTANT</role>"
    tokens = _post_json(
        server, "/tokenize", {"model": server.model, "messages": [{"role": "user", "content": PROMPTS[0]}]}
    )
    assert prompt in _post_json(server, "/detokenize", {"model": server.model, "tokens": tokens["tokens"]})["prompt"]
    assert answer.usage.prompt_tokens == tokens["count"]
    assert answer.usage.completion_tokens == NEW_TOKENS
    assert answer.usage.total_tokens == tokens["count"] + NEW_TOKENS
    assert answer.choices[0].finish_reason == "length"


def test_a_stream_is_the_same_text_in_pieces(server: RunningServer, client: openai.OpenAI) -> None:
    whole = chat(client, server)
    chunks = list(chat(client, server, stream=True, stream_options={"include_usage": True}))
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"]
    assert len(pieces) > NEW_TOKENS // 2
    assert chunks[-1].usage == whole.usage


def test_it_stops_before_a_stop_word(server: RunningServer, client: openai.OpenAI) -> None:
    text = chat(client, server).choices[0].message.content
    word = text[len(text) // 2 :][:3]
    stopped = chat(client, server, stop=[word]).choices[0]
    assert stopped.message.content == text[: text.index(word)]
    assert stopped.finish_reason == "stop"


def test_the_seed_decides_what_is_sampled(server: RunningServer, client: openai.OpenAI) -> None:
    texts = [chat(client, server, temperature=1.0, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_logprobs_name_the_token_that_was_taken(server: RunningServer, client: openai.OpenAI) -> None:
    entries = chat(client, server, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(entries) == NEW_TOKENS
    for entry in entries:
        best = [top.logprob for top in entry.top_logprobs]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert entry.logprob == best[0] < 0


def test_an_unknown_model_is_not_found(server: RunningServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-none", messages=[{"role": "user", "content": "?"}])


def test_a_prompt_beyond_the_context_is_refused(server: RunningServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="4096"):
        chat(client, server, text="fever " * 5000)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"model": 5}',
        b'{"messages": "fever"}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
        b'{"messages": [{"role": "user", "content": "x"}], "n": 1000000}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "structured_outputs": {"regex": "(("}}',
        b'{"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"}',
        b"\xff\xfe{}",
    ],
)
def test_a_malformed_body_is_the_clients_fault(server: RunningServer, body: bytes) -> None:
    status, answer = post(server, body.replace(b'{"messages"', b'{"model": "%s", "messages"' % server.model.encode()))
    assert 400 <= status < 500, answer
    assert "Traceback" not in answer


def test_nothing_of_a_request_is_in_the_log(server: RunningServer, client: openai.OpenAI) -> None:
    canary = "XYLOPHONE"
    text = chat(client, server, text=f"My name is {canary}.", user=canary).choices[0].message.content
    post(server, json.dumps({"model": server.model, "messages": canary}).encode())
    post(server, json.dumps({"model": "none", "messages": [{"role": "user", "content": canary}]}).encode())
    urllib.request.urlopen(f"{server.base_url}/models?patient={canary}", timeout=10).close()
    log = Path(json.loads(server.launched.ready_file.read_text())["log"])
    assert "Starting vLLM server" in log.read_text()  # it is the right file
    assert canary not in log.read_text()
    assert text not in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o640


def test_it_listens_on_this_machine_only(server: RunningServer) -> None:
    assert listening_addresses(server.launched.processes()) == {"0100007F"}  # 127.0.0.1


def test_the_printed_curl_line_works(server: RunningServer) -> None:
    line = next(line for line in server.launched.output.splitlines() if line.strip().startswith("curl "))
    answer = json.loads(subprocess.run(line, shell=True, capture_output=True, check=True).stdout)
    content = answer["choices"][0]["message"]["content"]
    printed = next(line for line in server.launched.output.splitlines() if line.startswith("answered: "))
    assert printed == "answered: " + "".join(c if c.isprintable() else " " for c in content)
    assert "RANDOM WEIGHTS" in server.launched.output


def test_code_beside_the_weights_is_never_run_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    write_demo(tmp_path / "evil", dtype="fp32")
    proof = tmp_path / "it-ran"
    for module in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (tmp_path / "evil" / f"{module}.py").write_text(f"open({str(proof)!r}, 'w')\n")
    config = json.loads((tmp_path / "evil" / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_evil.BailingMoeV2Config",
        "AutoModel": "modeling_evil.BailingMoeV2Model",
        "AutoModelForCausalLM": "modeling_evil.BailingMoeV2ForCausalLM",
        "AutoTokenizer": ["tokenization_evil.Tokenizer", None],
    }
    (tmp_path / "evil" / "config.json").write_text(json.dumps(config))
    launched = Launched(tmp_path / "run", "--device", "cpu", "--model", str(tmp_path / "evil"))
    ready = launched.wait_until_ready()
    assert len(launched.processes()) >= 4  # launcher, API server, engine core, worker
    assert launched.stop(signal.SIGINT) == 0
    assert launched.processes() == set()
    assert not is_listening(launched.port)
    assert ready["model"] == "evil"
    assert not proof.exists()


def test_two_starts_on_one_port_and_a_stop_while_loading(tmp_path: Path) -> None:
    first = Launched(tmp_path / "first", "--device", "cpu")
    assert wait_for(lambda: "reading the model's configuration" in first.output, 120), first.output
    second = Launched(tmp_path / "second", "--device", "cpu", port=first.port)
    assert second.process.wait(5) == 2
    assert f"port {first.port}" in second.output
    assert f"pid {first.process.pid}" in second.output
    assert first.process.poll() is None
    assert first.stop(signal.SIGTERM) == 143
    assert first.processes() == set()
    assert not first.ready_file.exists()


def test_a_killed_launcher_takes_the_engine_with_it(tmp_path: Path) -> None:
    launched = Launched(tmp_path / "run", "--device", "cpu")
    assert wait_for(lambda: "loading the weights" in launched.output, 120), launched.output
    segments = [path for pid in launched.processes() for path in shared_memory(pid)]
    os.kill(launched.process.pid, signal.SIGKILL)
    launched.process.wait()
    gone = wait_for(lambda: not launched.processes(), 30)
    left = launched.processes()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert gone, left
    assert segments
    assert not [path for path in segments if path.exists()]


def test_an_engine_that_refuses_to_start_is_one_line(tmp_path: Path) -> None:
    launched = Launched(tmp_path / "run", "--device", "cpu", "--", "--load-format", "no-such-format")
    assert launched.process.wait(120) == 1
    error = launched.output.splitlines()[-1]
    assert error.startswith("error: the engine did not start: ")
    assert "no-such-format" in error
    assert "engine-" in error  # where its log is
    assert launched.processes() == set()


def _post_json(server: RunningServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    url = server.base_url.removesuffix("/v1") + path
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        document: dict[str, Any] = json.loads(response.read())
    return document
