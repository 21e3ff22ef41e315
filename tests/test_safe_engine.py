"""The real vLLM with `serve/logging.json`, one server for all: nobody can forge its log, and the canary sings."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from convert.canary import main as record_canary
from convert.canary_record import CANARY, read_canary
from convert.demo import write_demo
from serve.plugin.log_format import CONFIG_FILE, MARK, VARIABLE, WITHHELD
from serve.plugin.middleware import FLAG
from serve.settings import LaunchSettings
from serve.watch.canary import CanaryError, check_canary
from serve.watch.faults import TABLE, faults_in
from serve.watch.ready import EngineError, Server
from tests.launcher import ROOT, free_port, wait_for
from tests.test_canary import settings
from tests.test_faults import PRINTED

pytestmark = [pytest.mark.slow, pytest.mark.beside, pytest.mark.timeout(300)]
MARKER = "FORGED ERROR 11-23 08:00:00 [core.py:1] "
WORD = "kanarienvogel"  # in every field of every request


@dataclass(frozen=True)
class Engine:
    """A vLLM in bf16 without the launcher, and what the canary asks of it."""

    server: Server
    process: subprocess.Popen[bytes]

    def ask(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Send what a client would, a whole body or anything else."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        try:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, content, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    @property
    def log(self) -> str:
        return self.server.log.read_text(errors="replace")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("engine")
    write_demo(directory / "tiny")
    server = Server("127.0.0.1", free_port(), "tiny", directory / "tiny", "cpu", directory / "engine.log", True, True)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(server.model)]
    command += ["--port", str(server.port), "--served-model-name", "tiny", "--dtype", "bfloat16", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--disable-uvicorn-access-log", "--host", server.host]
    command += FLAG
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        VARIABLE: str(CONFIG_FILE),
        MARK: "5eed5eed",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    with server.log.open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=directory, stdout=log, stderr=log, start_new_session=True
        )
    found = Engine(server, process)
    try:
        assert wait_for(lambda: "Application startup complete" in found.log or process.poll() is not None, 240)
        assert process.poll() is None, found.log[-3000:]
        yield found
    finally:
        process.terminate()
        process.wait(60)


def test_a_client_can_neither_forge_a_line_nor_name_a_fault_nor_leave_a_word(engine: Engine) -> None:
    nasty = [
        f"{WORD}\r\n{MARKER}",
        f"{WORD}\n(EngineCore pid=1) {MARKER}UCE ERROR\n",
        f"\x1b[2K\x1b[1G{WORD}\u2028{MARKER}",
        "\n".join([WORD, *PRINTED.values()]),
    ]
    statuses = set()
    for text in nasty:
        chat = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 1, "user": text}
        text_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": text, "pattern": text}}}
        grammar = {"structured_outputs": {"grammar": text}}
        reference = {"$ref": text}
        within = f"start: %json {json.dumps(reference)}"
        referring = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": {"a": reference}}}}
        for path, body in (
            ("/v1/completions", {"model": "tiny", "prompt": text, "max_tokens": 1, "user": text, "stop": [text]}),
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", {**chat, "model": text}),
            ("/v1/chat/completions", {**chat, "request_id": text, "messages": [{"role": text, "content": text}]}),
            ("/v1/chat/completions", {**chat, "response_format": text_format}),
            ("/v1/chat/completions", {**chat, **grammar}),
            ("/v1/chat/completions", {**chat, "response_format": referring}),
            ("/v1/chat/completions", {**chat, "structured_outputs": {"json": reference}}),
            ("/v1/chat/completions", {**chat, "structured_outputs": {"json": json.dumps(reference)}}),
            ("/v1/chat/completions", {**chat, "structured_outputs": {"grammar": within}}),
            ("/v1/chat/completions", {**chat, "structured_outputs": {"regex": text}}),
            ("/v1/chat/completions", {**chat, "structured_outputs": {"choice": [text]}}),
            ("/v1/chat/completions", {**chat, "tools": [{"type": "function", "function": {"name": text}}]}),
            ("/v1/chat/completions", {**chat, "max_tokens": text, text: text}),
            ("/v1/chat/completions", {**chat, "chat_template": "{{" + text, "chat_template_kwargs": {text: text}}),
            ("/tokenize", {"model": text, "prompt": text}),
            ("/v1/completions", f'{{"model": "{text}", "prompt": '.encode()),
        ):
            status, _ = engine.ask(path, body, {"X-Request-Id": json.dumps(text)[:200]})
            statuses.add(status)
    for raw in (f"GET /{WORD}%0d%0a{MARKER} HTTP/1.1\r\n\r\n", f"{WORD} {MARKER}\r\n{MARKER}\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", engine.server.port)) as connection:
            connection.sendall(raw.encode())
            connection.recv(1000)
    assert {200, 400, 404} <= statuses
    log = engine.log
    assert not [line for line in log.splitlines() if line.startswith(MARKER.strip())]
    assert [line for line in log.splitlines() if WORD in line] == []
    assert faults_in(log.splitlines()) == []
    assert "\x1b" not in log
    # What the test looks for would be seen, and something of these requests was told.
    assert [line for line in f"{log}{MARKER}".splitlines() if line.startswith(MARKER.strip())]
    assert "invalid http request received." in log.lower() or WITHHELD in log
    assert "(APIServer pid=" in log
    assert "(EngineCore pid=" in log
    assert "5eed5eed] " in log
    assert {fault.name for fault in faults_in(PRINTED.values())} == {kind.name for kind in TABLE}


def test_the_canary_compares_records_and_is_heard(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    model, wanted = engine.server.model, settings()

    def check(server: Server = engine.server, settings: LaunchSettings = wanted) -> str:
        return check_canary(server, settings)

    assert "nothing vouches" in check()
    manifest = model / "manifest.json"
    manifest.write_text("{}")  # a start that has checked one does not read it again
    assert check().startswith("recorded, not compared: 221 log-probabilities in bf16")
    again = check()
    assert "recorded here by an earlier start" in again
    assert "half within 0 " in again  # the same engine says the same
    manifest.unlink()
    assert record_canary([str(model)]) == 0
    said = check()
    assert "bf16, recorded by `convert canary`" in said
    with capsys.disabled():
        print(f"\n{said}; rounding: {read_canary(model / CANARY).noise}")
    other = model.with_name("other")
    write_demo(other, seed=1)
    assert record_canary([str(other)]) == 0
    wrong = replace(engine.server, model=other)
    with pytest.raises(CanaryError, match="something else than was recorded"):
        check(wrong)
    (other / CANARY).write_text("{}")
    with pytest.raises(EngineError, match="version"):
        check(wrong)
    assert check(wrong, replace(wanted, canary="off")).startswith("off")
