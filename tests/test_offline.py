"""The whole launch where there is no network but loopback, and what it tries to reach: nothing beyond this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher import LAUNCH, wait_for
from tests.namespaces import Namespace, alone

pytestmark = [pytest.mark.slow, pytest.mark.beside, pytest.mark.timeout(400)]

PORT = 8012  # in a network of its own
CONNECT = re.compile(r"connect\(\d+, \{sa_family=(AF_\w+), (.*?)\}, \d+\)")
ADDRESS = re.compile(r'inet_(?:addr\(|pton\(AF_INET6, )"([^"]+)"')
NUMBER = re.compile(r"sin6?_port=htons\((\d+)\)")
DNS = 53
ASK = f"""
import json, urllib.request
body = {{"model": "antangelmed-demo", "prompt": "fever", "max_tokens": 8}}
url, kind = "http://127.0.0.1:{PORT}/v1/completions", {{"Content-Type": "application/json"}}
request = urllib.request.Request(url, json.dumps(body).encode(), kind)
print(json.load(urllib.request.urlopen(request, timeout=60))["usage"]["completion_tokens"])
"""


def beyond(trace: str) -> list[str]:
    """The connect() calls in strace's output that ask for another machine, or for a name server."""
    found = []
    for family, rest in CONNECT.findall(trace):
        if family not in ("AF_INET", "AF_INET6"):
            continue
        address = ipaddress.ip_address(ADDRESS.search(rest)[1])  # type: ignore[index]
        mapped = getattr(address, "ipv4_mapped", None) or address
        if not (mapped.is_loopback or mapped.is_unspecified) or int(NUMBER.search(rest)[1]) == DNS:  # type: ignore[index]
            found.append(f"{family}, {rest}")
    return found


def test_connections_are_told_apart() -> None:
    """The control: what `beyond` must find in lines as strace writes them, and what it must not."""
    lines = {
        'connect(9, {sa_family=AF_INET, sin_port=htons(8012), sin_addr=inet_addr("127.0.0.1")}, 16) = 0': False,
        'connect(9, {sa_family=AF_UNIX, sun_path="/run/x"}, 110) = 0': False,
        'connect(9, {sa_family=AF_INET6, sin6_port=htons(80), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, "::1", '
        "&sin6_addr), sin6_scope_id=0}, 28) = 0": False,
        'connect(9, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("127.0.0.53")}, 16) = 0': True,
        'connect(9, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("8.8.8.8")}, 16) = -1 ENETUNREACH': True,
        "connect(9, {sa_family=AF_INET6, sin6_port=htons(80), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, "
        '"2001:4860:4860::8888", &sin6_addr), sin6_scope_id=0}, 28) = -1 ENETUNREACH': True,
    }
    assert [bool(beyond(line)) for line in lines] == list(lines.values())


def test_it_starts_answers_and_stops_with_loopback_alone(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    words = [str(LAUNCH), "--device", "cpu", "--port", str(PORT), "--ready-file", str(tmp_path / "ready.json")]
    if shutil.which("strace"):
        words = ["strace", "-f", "-qq", "--seccomp-bpf", "-s", "256", "-e", "trace=connect", "-o", str(trace), *words]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    environment.pop("VLLM_HOST_IP", None)
    with _network() as network, (tmp_path / "output").open("w") as output:
        launched = subprocess.Popen(
            network.command(words), env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            ready = wait_for(lambda: (tmp_path / "ready.json").exists() or launched.poll() is not None, 300)
            assert ready
            assert launched.poll() is None, (tmp_path / "output").read_text()
            asked = subprocess.run(network.command([sys.executable, "-c", ASK]), capture_output=True, text=True)
            assert asked.stdout == "8\n", asked.stderr
            assert {address for address, _ in network.listening()} == {"127.0.0.1"}
            os.kill(json.loads((tmp_path / "ready.json").read_text())["pid"], signal.SIGTERM)
            assert launched.wait(30) == 0, (tmp_path / "output").read_text()
        finally:
            if launched.poll() is None:
                os.killpg(launched.pid, signal.SIGKILL)
                launched.wait()
    if not trace.exists():
        pytest.skip("strace is not installed: it answered without a network, but what it tried to reach was not seen")
    seen = trace.read_text()
    assert 'inet_addr("127.0.0.1")' in seen  # the launcher's own first request: it is the right trace
    assert beyond(seen) == []


@contextlib.contextmanager
def _network() -> Iterator[Namespace]:
    try:
        with alone() as network:
            yield network
    except PermissionError as error:
        pytest.skip(str(error))
