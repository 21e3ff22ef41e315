"""Two servers for real: the engine on the CPU in two network namespaces, which see each other and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import ascend
from convert.demo import write_demo
from serve.nodes.link import SILENCE_SECONDS
from serve.nodes.node import PORT_RANGE, PORTS
from tests.launcher import ROOT, wait_for
from tests.namespaces import Namespace, cable, joined

pytestmark = [pytest.mark.slow, pytest.mark.beside, pytest.mark.timeout(400)]

API, MEETING = 8011, 13345  # in networks of their own: nobody else is there
PROMPTS = [f"patient {i} has had a fever for {i} days" for i in range(8)]
NEW_TOKENS = 12
TIE = 1e-3  # between the two best logits: closer than this, either token is right
ASK = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.stdin.buffer.read() or None, {"Content-Type": "application/json"})
sys.stdout.write(urllib.request.urlopen(request, timeout=60).read().decode())
"""


STARTED: list[Node] = []


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    for node in STARTED:
        node.kill()


@dataclass(frozen=True)
class Node:
    """A running launcher."""

    namespace: Namespace
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """All that it has printed."""
        return self.log.read_text(errors="replace")

    @property
    def state(self) -> Path:
        """Where its logs are."""
        return self.log.with_suffix(".state")

    @property
    def engine_output(self) -> str:
        """All that its engine has printed, nothing if there is none."""
        file = self.state / "antangelmed" / f"engine-{API}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def verdict(self) -> str:
        """The line that says why it ended."""
        return next((line for line in reversed(self.output.splitlines()) if line.startswith("error: ")), "")

    def is_ready(self) -> bool:
        """Whether it says that the engine answers."""
        return "\nready after " in f"\n{self.output}"

    def kill(self) -> None:
        """Take it and its engine away at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def ends_within(self, seconds: float) -> float:
        """Wait for its end; return how long it took. What is left of its engine is killed."""
        begin = time.monotonic()
        ended = wait_for(lambda: self.process.poll() is not None, seconds)
        self.kill()
        assert ended, self.output[-2000:]
        return time.monotonic() - begin


def start(namespace: Namespace, rank: int, model: Path, log: Path, *flags: str) -> Node:
    """Start a node, with what the two have in common."""
    words = [sys.executable, "-m", "serve", "launch", "--device", "cpu", "--model", str(model), "--dtype", "float32"]
    words += ["--nodes", "2", "--node-rank", str(rank), "--node-address", f"10.77.0.1:{MEETING}", "--port", str(API)]
    words += ["--served-model-name", "tiny"]
    command = namespace.command([*words, *flags])
    environment = {**os.environ, "XDG_STATE_HOME": str(log.with_suffix(".state"))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    STARTED.append(Node(namespace, process, log))
    return STARTED[-1]


@contextlib.contextmanager
def network() -> Iterator[list[Namespace]]:
    try:
        with joined() as both:
            yield both
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nodes") / "tiny"
    write_demo(directory, dtype="fp32")
    return directory


@pytest.fixture(scope="module")
def pair(model: Path) -> Iterator[list[Node]]:
    """Two nodes that serve with the experts spread over both."""
    with network() as both:
        nodes = [
            start(one, rank, model, model.parent / f"node{rank}.log", "--expert-parallel")
            for rank, one in enumerate(both)
        ]
        ready = wait_for(lambda: all(node.is_ready() for node in nodes) or any(node.verdict for node in nodes), 300)
        assert ready, nodes[0].output[-3000:]
        assert not any(node.verdict for node in nodes), [node.output[-3000:] for node in nodes]
        yield nodes


def ask(node: Node, path: str, body: dict[str, Any] | None = None) -> str:
    words = node.namespace.command([sys.executable, "-c", ASK, f"http://127.0.0.1:{API}{path}"])
    sent = json.dumps(body).encode() if body else b""
    return subprocess.run(words, input=sent, capture_output=True, check=True).stdout.decode()


def complete(node: Node, prompt: str) -> dict[str, Any]:
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    answer: dict[str, Any] = json.loads(ask(node, "/v1/completions", {**asked, "return_token_ids": True}))["choices"][0]
    return answer


def test_both_ranks_answer_and_the_answers_are_the_models(pair: list[Node], model: Path) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: complete(pair[0], prompt), PROMPTS))
    ours = ascend.load_model(model, dtype=torch.float32)
    for answer in answers:
        ids = [*answer["prompt_token_ids"], *answer["token_ids"]]
        assert len(answer["token_ids"]) == NEW_TOKENS
        logits = ours(torch.tensor([ids]))[0, len(answer["prompt_token_ids"]) - 1 : -1]
        chosen = logits[torch.arange(NEW_TOKENS), answer["token_ids"]]
        assert (logits.amax(-1) - chosen).max() < TIE
    finished = {
        line.partition('engine="')[2][0]: float(line.split()[-1])
        for line in ask(pair[0], "/metrics").splitlines()
        if line.startswith("vllm:request_success_total") and 'finished_reason="length"' in line
    }
    assert set(finished) == {"0", "1"}
    assert min(finished.values()) >= 1
    assert sum(finished.values()) >= len(PROMPTS)
    assert "Local/global number of experts: 8/16" in pair[1].engine_output


def test_what_listens_is_what_the_table_says(pair: list[Node]) -> None:
    first, last = map(int, PORT_RANGE.read_text().split())
    rows = [row for row in PORTS if row.device is None]
    seen: dict[int, set[tuple[str, str]]] = {}
    for rank, node in enumerate(pair):
        own = node.namespace.address
        for address, port in node.namespace.listening():
            at = {"*": "every", own: "own", "127.0.0.1": "--host"}[address]
            number = {API: "--port", MEETING: "--node-address"}.get(port, "any" if first <= port <= last else str(port))
            seen.setdefault(rank, set()).add((number, at))
    for rank in (0, 1):
        allowed = {(row.port, row.at) for row in rows if row.node == "all" or rank == 0}
        assert seen[rank] <= allowed, rank
    closed_after_the_start = ("--node-address", "own")
    assert {(row.port, row.at) for row in rows} - seen[0] == {closed_after_the_start}


def test_a_pulled_cable_ends_both_with_a_line(pair: list[Node]) -> None:
    """vLLM itself waits on, with the request open and `/health` at 200."""
    words = pair[0].namespace.command([sys.executable, "-c", ASK, f"http://127.0.0.1:{API}/v1/completions"])
    body = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 3000, "ignore_eos": True}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
        assert client.stdin
        client.stdin.write(json.dumps(body).encode())
        client.stdin.close()
        time.sleep(1)
        cable(pair[1].namespace, is_in=False)
        for node, other in zip(pair, ("node 1 (10.77.0.2)", "node 0 (10.77.0.1)"), strict=True):
            node.ends_within(SILENCE_SECONDS + 8)
            assert node.verdict.startswith(f"error: {other} has been silent for 10 s"), node.output[-2000:]
    assert client.returncode == 1


@pytest.fixture(scope="module")
def wire() -> Iterator[list[Namespace]]:
    """Two machines on which nothing runs."""
    with network() as both:
        yield both


def test_a_killed_node_ends_the_other_with_a_line(wire: list[Namespace], model: Path, tmp_path: Path) -> None:
    nodes = [start(one, rank, model, tmp_path / f"{rank}.log") for rank, one in enumerate(wire)]
    assert wait_for(lambda: all(node.engine_output for node in nodes), 20), [node.output for node in nodes]
    nodes[1].kill()
    assert nodes[0].ends_within(8) < 5
    assert nodes[0].verdict.startswith("error: node 1 (10.77.0.2) is gone: ")
    nodes[1].ends_within(1)


@pytest.mark.parametrize(
    ("rank", "flags", "said"),
    [
        (0, ["--network-interface", "wire1"], "this machine has none of that name (did you mean 'wire0'?)"),
        (0, ["--network-interface", "lo"], "lo (127.0.0.1) does not lead to --node-address 10.77.0.1, wire0"),
        (0, ["--node-address", "10.77.0.9"], "10.77.0.9 is not an address of this machine, which is to be node 0"),
        (1, ["--node-address", "10.77.0.2"], "10.77.0.2 is this machine's own (wire1), so it is node 0"),
        (1, ["--node-address", "10.99.0.1"], "10.99.0.1: this machine has no route to it; it has lo 127.0.0.1, wire1"),
        (0, ["--timeout", "1"], "node 1 of 2 did not come to 10.77.0.1 port 13345 within 1 s"),
        (1, ["--timeout", "1"], "node 0 did not answer at 10.77.0.1 port 13345 within 1 s (Connection refused)"),
        (1, ["--timeout", "1", "--node-address", "10.77.0.7"], "node 0 did not answer at 10.77.0.7 port 29550"),
    ],
)
def test_a_mistake_is_told_before_an_engine_starts(
    wire: list[Namespace], model: Path, tmp_path: Path, rank: int, flags: list[str], said: str
) -> None:
    node = start(wire[rank], rank, model, tmp_path / "log", *flags)
    node.ends_within(5)
    assert said in node.verdict
    assert node.process.returncode == 2
    assert node.engine_output == ""


def test_nodes_that_differ_are_refused_on_both(wire: list[Namespace], model: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "tiny", seed=1, dtype="bf16")
    nodes = [
        start(wire[0], 0, model, tmp_path / "0.log"),
        start(wire[1], 1, tmp_path / "tiny", tmp_path / "1.log", "--dtype", "bfloat16"),
    ]
    for node in nodes:
        node.ends_within(5)
        assert "node 1 (10.77.0.2) is not like node 0: " in node.verdict
        assert '--dtype is "float32" on node 0 and "bfloat16" there; model is ' in node.verdict
