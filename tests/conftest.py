"""What several test files share: one server, started once, the way a user starts it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from convert.demo import write_demo
from tests.launcher import Launched, is_listening


@dataclass(frozen=True)
class RunningServer:
    """The real engine on the CPU in fp32 with the tiny demo; ``model`` is the name to ask for."""

    base_url: str
    model: str
    model_path: Path
    launched: Launched


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("server")
    write_demo(directory / "tiny", dtype="fp32")
    launched = Launched(directory, "--device", "cpu", "--dtype", "float32", "--model", str(directory / "tiny"))
    ready = launched.wait_until_ready()
    yield RunningServer(ready["base_url"], ready["model"], directory / "tiny", launched)
    # The end of the session is the test of SIGTERM.
    assert launched.stop() == 0
    assert launched.processes() == set()
    assert not is_listening(launched.port)
    assert not launched.ready_file.exists()
