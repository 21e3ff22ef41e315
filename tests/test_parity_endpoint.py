"""`perf parity check FILE URL`: the real vLLM engine passes, records of broken models fail, bad servers are named."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ascend
from ascend.model import BailingMoeV2ForCausalLM
from ops import cpu
from perf import parity
from perf.parity.endpoint import Answer, Server, api_key
from perf.parity.judge import Verdict, judge
from perf.parity.judge_served import served_checks
from perf.parity.limits import LIMITS
from perf.parity.prompts import Batch, random_batches
from perf.parity.served import _coarse_kl, ask, compare_served, near_ties
from perf.parity.side import make_side, write_side
from perf.parity.trace import trace
from tests.conftest import RunningServer
from tests.launcher import Launched
from tests.test_parity import SHAPE
from tests.test_parity_command import run
from tests.test_parity_faults import FAULTS, LAYER
from tests.tiny import checkpoint, user_error

STEPS = 4
# What log-probabilities of a model in bf16 show. The rest is as small as rounding there, or no part of the answers.
SEEN_IN_BF16 = (
    "two experts' weights swapped",
    "group limit ignored",
    "rotary on all dimensions",
    "QK-norm skipped",
    "attention scale 1.25 times as large",
    "two key heads swapped",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts(model: BailingMoeV2ForCausalLM) -> list[Batch]:
    return random_batches(model.config.vocab_size, 8, 48, 0)


def recorded(path: Path, fault: str | None = None) -> tuple[dict[str, Tensor], BailingMoeV2ForCausalLM]:
    model = ascend.load_model(path)
    if fault is not None:
        with torch.no_grad():
            FAULTS[fault][0](model.model.layers[LAYER], model)
    return trace(model, prompts(model), STEPS), model


def verdict(a: dict[str, Tensor], model: BailingMoeV2ForCausalLM, answers: list[Answer], precision: str) -> Verdict:
    limits = LIMITS[precision]
    numbers = compare_served(a, answers, limits, model.config.n_group, model.config.topk_group)
    return judge(served_checks(numbers, limits))


# Answers that this project's own model gives, with other kernels


def answers_of(side: dict[str, Tensor], top: int = 20) -> list[Answer]:
    """What a server that computes this side would answer."""
    found = []
    for row in range(side["decode.logits"].shape[0]):
        mine = side["row"] == row
        tokens, logits = side["token"][mine].tolist(), side["logits"][mine]
        steps = side["decode.logits"][row]
        prompt = [named(logit, top, given) for logit, given in zip(logits[:-1], tokens[1:], strict=True)]
        found.append(Answer(prompt, [named(logit, top) for logit in steps], steps.argmax(-1).tolist()))
    return found


def named(logit_V: Tensor, top: int, given: int | None = None) -> dict[int, float]:
    logprob_V = logit_V.double().log_softmax(-1)
    tokens = [*logprob_V.topk(top).indices.tolist(), *([] if given is None else [given])]
    return {token: float(logprob_V[token]) for token in tokens}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("served")
    shape = SHAPE | {"max_position_embeddings": 4096}
    return {dtype: checkpoint(folder / dtype, dtype=dtype, **shape) for dtype in ("fp32", "bf16")}


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_kernels_are_as_far_as_rounding_and_faults_are_further(
    paths: dict[str, Path], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, model = recorded(paths[precision])
    broken, _ = recorded(paths[precision], "two experts' weights swapped")
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setitem(cpu._table, dtype, None)
    b = trace(model, prompts(model), STEPS)
    assert not torch.equal(a["logits"], b["logits"]), "the reference ran in place of the kernels"
    assert verdict(a, model, answers_of(b), precision) == Verdict()
    assert verdict(a, model, answers_of(b, top=5), precision) == Verdict()
    numbers = compare_served(a, answers_of(b), LIMITS[precision], model.config.n_group, model.config.topk_group)
    assert 0.2 < numbers.first < 1.8  # the yardstick is of the size of what it measures
    assert 0.2 < numbers.middle < 1.5
    found = verdict(broken, model, answers_of(b), precision)
    assert found.reasons[0].startswith("prompt: ")
    assert "no layers" in str(found.cause)


def test_a_fault_of_the_decode_steps_alone_is_seen_there(paths: dict[str, Path]) -> None:
    a, model = recorded(paths["bf16"])
    other = dict(a)
    other["decode.logits"] = a["decode.logits"].roll(1, -1)
    answers = answers_of(a)
    for answer, wrong in zip(answers, answers_of(other), strict=True):
        answer.decoded[1:] = wrong.decoded[1:]
    assert [reason.partition(":")[0] for reason in verdict(a, model, answers, "bf16").reasons] == ["decode"]


def test_after_another_token_the_decode_steps_are_not_compared(paths: dict[str, Path]) -> None:
    a, model = recorded(paths["bf16"])
    answers = answers_of(a)
    answers[3].tokens[1] += 1
    numbers = compare_served(a, answers, LIMITS["bf16"], model.config.n_group, model.config.topk_group)
    assert numbers.decode_positions == 9 * (STEPS + 1) - 3
    assert (numbers.middle, numbers.tail, numbers.decode, numbers.top1) == pytest.approx((0, 0, 0, 1), abs=1e-9)
    assert numbers.divergences == []


def test_where_few_tokens_are_near_a_tie_only_those_before_one_count(paths: dict[str, Path]) -> None:
    a, model = recorded(paths["fp32"])
    wrong = dict(a)
    wrong["logits"] = a["logits"].clone()
    wrong["logits"][3 * 48 + 5 : 6 * 48] += 1.0 + torch.arange(300) % 7  # most of three of the nine rows
    answers = answers_of(wrong)
    assert not verdict(a, model, answers, "fp32").passed
    a["layer.1.scores"] = a["layer.1.scores"].clone()
    a["layer.1.scores"][[3 * 48 + 5, 4 * 48, 5 * 48]] = 0.5  # all experts tie
    assert verdict(a, model, answers, "fp32") == Verdict()


def test_the_divergence_of_the_named_tokens_is_a_lower_bound(paths: dict[str, Path]) -> None:
    a, model = recorded(paths["bf16"])
    b = {name: tensor * 1.2 if name == "logits" else tensor for name, tensor in a.items()}
    log_a, log_b = (side["logits"].double().log_softmax(-1) for side in (a, b))
    whole = float((log_a.exp() * (log_a - log_b)).sum(-1).mean())
    groups = (model.config.n_group, model.config.topk_group)
    bounds = [compare_served(a, answers_of(b, top), LIMITS["bf16"], *groups).kl_mean for top in (1, 5, 20)]
    assert 0 < bounds[0] < bounds[1] < bounds[2] < whole
    logits_V = torch.tensor([1.0, 2.0, 4.0]).log()
    exact = {token: float(logprob) for token, logprob in enumerate(torch.tensor([0.5, 0.25, 0.25]).log())}
    share = logits_V.softmax(-1)
    found = _coarse_kl(share.log().double(), torch.tensor([exact[token] for token in range(3)], dtype=torch.float64))
    assert found == pytest.approx(float((share * (share / torch.tensor([0.5, 0.25, 0.25])).log()).sum()), abs=1e-6)


def test_a_near_tie_is_a_score_or_a_group_that_could_turn() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.5, 0.2, 0.1, 0.1, 0.1]]).repeat(4, 1)
    scores[1, 3] = 0.69  # the expert that is left out in a kept group
    scores[2, 5] = 0.995  # a group that is left out, as a whole: 0.2 + 0.995 against 0.7 + 0.5
    scores[3, 6:] = 0.39  # far from both
    experts = torch.tensor([[0, 1, 2]]).repeat(4, 1)
    side = {"row": torch.zeros(4), "stream.0": scores, "stream.1": scores}
    side |= {"layer.0.scores": scores, "layer.0.experts": experts}
    assert near_ties(side, 4, 2, 0.01).tolist() == [False, True, True, False]


# Servers that are none, or not this model's


class BadServer(BaseHTTPRequestHandler):
    """Answers as `answer` says, a dictionary from the path to (status, body, headers)."""

    answer: dict[str, tuple[int, Any, dict[str, str]]]
    seen: list[tuple[str, str | None, Any]]

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.path, self.headers["Authorization"], json.loads(body) if body else None))
        status, content, headers = self.answer.get(self.path, (404, "nothing here", {}))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content.encode() if isinstance(content, str) else json.dumps(content).encode())

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


Respond = Callable[..., str]


@pytest.fixture
def respond() -> Iterator[Respond]:
    BadServer.answer, BadServer.seen = {"/v1/models": (200, {"data": [{"id": "m"}]}, {})}, []
    server = HTTPServer(("127.0.0.1", 0), BadServer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()

    def respond(path: str, content: Any, status: int = 200, **headers: str) -> str:
        BadServer.answer[path] = (status, content, headers)
        return f"http://127.0.0.1:{server.server_port}"

    yield respond
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "status", "content", "words"),
    [
        ("/v1/models", 200, "<html>", "did not answer with JSON"),
        ("/v1/models", 200, [], "did not answer with a JSON object"),
        ("/v1/models", 200, {"data": []}, "names no model"),
        ("/v1/models", 200, {"data": [{"id": "m"}, {"id": "n"}]}, "serves m, n: say which with --served-model"),
        ("/v1/models", 401, {}, "refuses the API key (401)"),
        ("/v1/models", 307, "", "redirects (307)"),
        ("/v1/completions", 403, {}, "refuses the API key (403)"),
        ("/v1/completions", 200, {"choices": []}, "without a choice"),
        ("/v1/completions", 200, {"choices": [{"text": "x"}]}, "gives no prompt_logprobs"),
        ("/v1/completions", 200, {"choices": [{"prompt_logprobs": [None, 5]}]}, "not in vLLM's form"),
        ("/v1/completions", 400, {"error": {"message": "no tool"}}, "400, no tool"),
        ("/v1/completions", 400, {"error": {"message": "Token id 9 is out of vocabulary"}}, "serves another model"),
    ],
)
def test_a_bad_server_is_one_line(respond: Respond, path: str, status: int, content: Any, words: str) -> None:
    url = respond(path, content, status, Location="http://127.0.0.1:1/elsewhere")
    assert words in user_error(lambda: Server(url, "secret-key", None, 20).answer([1, 2, 3], 1))
    assert {key for _, key, _ in BadServer.seen} == {"Bearer secret-key"}
    assert "elsewhere" not in str(BadServer.seen)


def answer_of(tokens: list[int], prompt: int, steps: int) -> dict[str, Any]:
    position = {str(token): {"logprob": -1.0, "rank": 1} for token in tokens}
    step = {f"token_id:{token}": -1.0 for token in tokens}
    logprobs = {"tokens": [f"token_id:{tokens[0]}"] * steps, "top_logprobs": [step] * steps}
    return {"choices": [{"prompt_logprobs": [None, *[position] * (prompt - 1)], "logprobs": logprobs}]}


def test_fewer_logprobs_are_taken_where_the_server_gives_fewer(respond: Respond) -> None:
    refusal = "Requested prompt logprobs of 20, which is greater than max allowed: 5"
    url = respond("/v1/completions", {"error": {"message": refusal}}, 400)
    server = Server(url, None, None, 20)
    assert "max allowed: 5" in user_error(server.answer, [1, 2, 3], 1)  # and again, with 5
    assert [body["prompt_logprobs"] for _, _, body in BadServer.seen if body] == [20, 5]
    respond("/v1/completions", answer_of([1, 2], 3, 1))
    assert server.answer([1, 2, 3], 1) == Answer([{1: -1.0, 2: -1.0}] * 2, [{1: -1.0, 2: -1.0}], [1])
    assert BadServer.seen[-1][2]["prompt_logprobs"] == 5
    assert "positions for a prompt of 4 tokens" in user_error(server.answer, [1, 2, 3, 4], 1)


def test_answers_for_other_tokens_are_another_models(paths: dict[str, Path]) -> None:
    a, model = recorded(paths["bf16"])
    for wrong in ({300: -1.0}, {1: -1.0}):
        answers = answers_of(a)
        answers[0].prompt[0] = wrong
        words = user_error(verdict, a, model, answers, "bf16")
        assert "another model" in words


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1", "cannot be reached"),
        ("http://name:word@127.0.0.1:1", "without user name"),
        ("http://[::1]:1", "cannot be reached"),
        ("http://127.0.0.1:1/v1?key=word", "without user name, path or query"),
        ("http://", "must be http(s)://HOST:PORT"),
        ("http://127.0.0.1:port", "must be http(s)://HOST:PORT"),
    ],
)
def test_an_address_that_is_none_is_one_line(url: str, words: str) -> None:
    error = user_error(Server, url, None, None, 20)
    assert words in error
    assert "word@" not in error


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert api_key(None) is None
    monkeypatch.setenv("OPENAI_API_KEY", "from-openai")
    assert api_key(None) == "from-openai"
    monkeypatch.setenv("VLLM_API_KEY", "from-vllm")
    assert api_key(None) == "from-vllm"
    (tmp_path / "key").write_text("from-file\n")
    assert api_key(tmp_path / "key") == "from-file"
    (tmp_path / "key").write_text("two words")
    assert "two words" not in user_error(api_key, tmp_path / "key")
    assert "cannot be read" in user_error(api_key, tmp_path / "none")


# The real engine


@pytest.fixture(scope="module")
def bf16_server(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    launched = Launched(tmp_path_factory.mktemp("engine"), "--device", "cpu", "--model", str(paths["bf16"]))
    launched.wait_until_ready()
    yield f"http://127.0.0.1:{launched.port}"
    launched.stop()


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.timeout(600)
def test_vllm_in_bf16_passes_and_records_of_broken_models_fail(
    paths: dict[str, Path], bf16_server: str, tmp_path: Path
) -> None:
    file, html = tmp_path / "a.safetensors", tmp_path / "report.html"
    assert run("record", "cpu", file, "--model", paths["bf16"]).returncode == 0
    done = run("check", file, bf16_server, "--model", paths["bf16"], "--html", html, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert (document["verdict"], document["b"]["side"], document["b"]["version"][:2]) == ("PASS", bf16_server, "0.")
    assert document["numbers"]["decode_positions"] >= 9
    assert 0.3 < document["numbers"]["middle"] < LIMITS["bf16"].middle
    assert "PASS" in html.read_text()

    answers = None
    for fault in SEEN_IN_BF16:
        broken, model = recorded(paths["bf16"], fault)
        answers = answers or ask(Server(bf16_server, None, None, 20), broken, STEPS)
        assert not verdict(broken, model, answers, "bf16").passed, fault

    model = ascend.load_model(paths["bf16"], dtype="float32")  # the server computes in another precision
    assert answers is not None
    assert not verdict(trace(model, prompts(model), STEPS), model, answers, "fp32").passed


@pytest.mark.slow
@pytest.mark.beside
@pytest.mark.timeout(600)
def test_vllm_in_fp32_passes_and_records_of_broken_models_fail(server: RunningServer) -> None:
    a, model = recorded(server.model_path)
    engine = Server(server.base_url, None, None, 20)
    answers = ask(engine, a, STEPS)
    assert verdict(a, model, answers, "fp32") == Verdict()
    for fault in FAULTS:
        broken, _ = recorded(server.model_path, fault)
        # An MTP layer has no part in what a server says.
        assert verdict(broken, model, answers, "fp32").passed == fault.startswith("MTP"), fault


def test_what_makes_no_sense_for_an_endpoint_is_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    a, b, few = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "few"))
    made: dict[str, Any] = {
        "device": "cpu",
        "dtype": None,
        "quantise": None,
        "prompt_length": 48,
        "seed": 0,
        "decode": 0,
    }
    for file, rows, like in ((a, 8, None), (b, None, a), (few, 1, None)):
        args = argparse.Namespace(model=paths["bf16"], rows=rows, like=like, **made)
        write_side(file, *make_side(args))

    def refusal(*arguments: object) -> str:
        return user_error(parity.main, ["check", *map(str, arguments)])

    assert "was recorded with --like" in refusal(b, "http://127.0.0.1:1")
    assert "80 tokens are too few to judge a server by" in refusal(few, "http://127.0.0.1:1")
    assert "its config.json is not the one" in refusal(a, "http://127.0.0.1:1", "--model", paths["fp32"])
    assert "http://127.0.0.1:1 cannot be reached" in refusal(a, "http://127.0.0.1:1")
    assert "is for an http(s):// endpoint" in refusal(a, "cpu", "--served-model", "m")
