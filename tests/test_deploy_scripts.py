"""The scripts of `serve/deploy`: the probes of a container, and CANN's environment."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.deploy_files import DEPLOY, PROBE, ROOT, run, tool
from tests.launcher import free_port

pytestmark = pytest.mark.beside


class _Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/health" else 404)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def health() -> Iterator[ThreadingHTTPServer]:
    """A server whose /health answers with ``status``."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Health) as server:
        server.status = 200  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def probed(question: str, ready_file: Path) -> int:
    return run(PROBE, question, env={**os.environ, "READY_FILE": str(ready_file)}, timeout=20).returncode


def write_ready(file: Path, port: int) -> None:
    file.write_text(json.dumps({"base_url": f"http://127.0.0.1:{port}/v1", "model": "m", "pid": 1}) + "\n")


def test_ready_and_alive(tmp_path: Path, health: ThreadingHTTPServer) -> None:
    write_ready(tmp_path / "ready.json", health.server_port)
    assert (probed("ready", tmp_path / "ready.json"), probed("alive", tmp_path / "ready.json")) == (0, 0)


def test_a_launcher_that_starts_or_drains_is_alive_and_not_ready(tmp_path: Path) -> None:
    assert (probed("ready", tmp_path / "ready.json"), probed("alive", tmp_path / "ready.json")) == (1, 0)


def test_a_launcher_that_does_not_see_its_server_gone_is_not_alive(tmp_path: Path) -> None:
    write_ready(tmp_path / "ready.json", free_port())
    assert (probed("ready", tmp_path / "ready.json"), probed("alive", tmp_path / "ready.json")) == (0, 1)


def test_a_launcher_that_does_not_see_its_engine_dead_is_not_alive(tmp_path: Path, health: ThreadingHTTPServer) -> None:
    health.status = 503  # type: ignore[attr-defined]
    write_ready(tmp_path / "ready.json", health.server_port)
    assert probed("alive", tmp_path / "ready.json") == 1


@pytest.mark.slow
def test_a_server_that_takes_connections_and_says_nothing_is_not_alive(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        write_ready(tmp_path / "ready.json", silent.getsockname()[1])
        assert probed("alive", tmp_path / "ready.json") == 1


def test_a_probe_wants_to_know_what_for(tmp_path: Path) -> None:
    assert probed("well", tmp_path / "ready.json") == 2


def test_cann_is_loaded_before_the_launcher(tmp_path: Path) -> None:
    for name, text in {
        "ascend-toolkit/set_env.sh": 'export SEEN="toolkit($*)$UNSET_BY_THE_VENDOR"',
        "nnal/atb/set_env.sh": 'export SEEN="$SEEN atb($*)"',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text + "\n")
    environment = {"PATH": os.environ["PATH"], "ASCEND_ROOT": str(tmp_path)}
    done = run(DEPLOY / "cann.sh", "bash", "-c", 'echo "$SEEN: $*"', "-", "--device", "npu", env=environment)
    assert done.stdout == "toolkit() atb(--cxx_abi=1): --device npu\n"


def test_missing_cann_is_a_mistake(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "ASCEND_ROOT": str(tmp_path)}
    done = run(DEPLOY / "cann.sh", "echo", "started", env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "ASCEND_ROOT" in done.stderr.splitlines()[-1]


def test_shellcheck() -> None:
    done = run(
        tool("shellcheck"),
        "-x",
        PROBE,
        DEPLOY / "cann.sh",
        ROOT / "serve" / "launch.sh",
        ROOT / "serve" / "env.sh",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout


def test_deploy_ships_with_the_package() -> None:
    """Every file, and as a script what starts with `#!`."""
    for file in filter(Path.is_file, DEPLOY.rglob("*")):
        is_script = file.read_bytes().startswith(b"#!")
        assert os.access(file, os.X_OK) == is_script, file
