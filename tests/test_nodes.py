"""Several servers: flags and environment of each node, what is refused, launchers that meet and lose one another."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend.errors import UserError
from serve.args import parse
from serve.nodes import link as node_link
from serve.nodes import meeting as node_meeting
from serve.nodes import node as nodes
from serve.nodes.interfaces import Interface, interfaces, source_address
from serve.nodes.link import Line, NodeLink
from serve.nodes.meeting import fingerprint, meet
from serve.nodes.node import PORTS, check_nodes, node_address, node_settings
from serve.settings import LaunchSettings
from tests.launcher import free_port, wait_for

HERE = {
    "lo": Interface("lo", True, ("127.0.0.1",)),
    "eth0": Interface("eth0", True, ("192.168.5.4", "192.168.5.5")),
    "roce0": Interface("roce0", True, ("10.0.0.1",)),
    "roce1": Interface("roce1", False, ("10.0.1.1",)),
    "bare": Interface("bare", True, ()),
}
ROUTES = {"10.0.0.9": "10.0.0.1", "10.0.1.9": "10.0.1.1", "192.168.5.9": "192.168.5.4", "10.9.9.9": "172.16.0.1"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the interfaces of `HERE`."""
    monkeypatch.setattr(nodes, "interfaces", lambda: HERE)
    monkeypatch.setattr(nodes, "source_address", ROUTES.get)


def two(rank: int, address: str = "10.0.0.1", *more: str, count: int = 2) -> LaunchSettings:
    return parse(["--nodes", str(count), "--node-rank", str(rank), "--node-address", address, *more])


# Flags and environment


def test_one_server_adds_nothing() -> None:
    settings = parse([])
    assert check_nodes(settings, "npu") is None
    node = node_settings(settings, "npu", 8)
    assert (node.flags, node.environment, node.headless) == ({}, {}, False)
    with meet(settings, {}, 0.0) as link:
        assert link.lost() is None


@pytest.mark.usefixtures("machine")
def test_node_0_has_the_api_and_the_address() -> None:
    node = node_settings(two(0), "npu", 8)
    assert not node.headless
    assert node.flags == {
        "data-parallel-size": 2,
        "data-parallel-size-local": 1,
        "data-parallel-address": "10.0.0.1",
        "data-parallel-rpc-port": 29550,
    }
    assert node.environment == {
        "VLLM_HOST_IP": "10.0.0.1",
        "GLOO_SOCKET_IFNAME": "roce0",
        "TP_SOCKET_IFNAME": "roce0",
        "HCCL_SOCKET_IFNAME": "=roce0",
        "HCCL_IF_IP": "10.0.0.1",
    }


@pytest.mark.usefixtures("machine")
def test_the_others_are_headless_and_start_at_their_own_rank() -> None:
    settings = two(2, "192.168.5.9:7000", "--tensor-parallel-size", "2", "--network-interface", "eth0", count=3)
    node = node_settings(settings, "cuda", 8)
    assert node.headless
    assert node.flags == {
        "data-parallel-size": 12,
        "data-parallel-size-local": 4,
        "data-parallel-start-rank": 8,
        "data-parallel-address": "192.168.5.9",
        "data-parallel-rpc-port": 7000,
        "headless": True,
    }
    assert node.environment["VLLM_HOST_IP"] == "192.168.5.4"
    assert node.environment["NCCL_SOCKET_IFNAME"] == "=eth0"
    assert not any(name.startswith("HCCL") for name in node.environment)


@pytest.mark.usefixtures("machine")
@hypothesis.settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.data())
def test_the_replicas_of_all_nodes_are_counted_once(count: int, cards: int, tensor: int, data: st.DataObject) -> None:
    tensor = min(tensor, cards)
    seen: list[int] = []
    for rank in range(count):
        address = "10.0.0.9" if rank else "10.0.0.1"
        more = data.draw(st.sampled_from([[], ["--data-parallel-size", str(count * (cards // tensor))]]))
        settings = two(rank, address, "--tensor-parallel-size", str(tensor), *more, count=count)
        flags = node_settings(settings, "cpu", cards).flags
        begin, local = int(flags.get("data-parallel-start-rank", 0)), int(flags["data-parallel-size-local"])
        assert local * tensor <= cards
        seen += range(begin, begin + local)
    assert seen == list(range(int(flags["data-parallel-size"])))


# What is refused

ONE_CARD = ["--tensor-parallel-size", "1"]
MISTAKES = {
    "a name": (0, ["node0.hospital"], 8, "give node 0's IPv4 address"),
    "IPv6": (0, ["fd00::1"], 8, "give node 0's IPv4 address"),
    "a low port": (0, ["10.0.0.1:80"], 8, "'80' is not a port from 1024 to 65535"),
    "an empty port": (0, ["10.0.0.1:"], 8, "'' is not a port"),
    "loopback": (0, ["127.0.0.1"], 8, "no other server can reach 127.0.0.1"),
    "any address": (0, ["0.0.0.0"], 8, "no other server can reach 0.0.0.0"),
    "the internet": (1, ["8.8.8.8"], 8, "neither encrypted nor signed"),
    "another machine's": (0, ["10.0.0.9"], 8, "is not an address of this machine, which is to be node 0"),
    "its own": (1, ["10.0.0.1"], 8, "is this machine's own (roce0), so it is node 0, not --node-rank 1"),
    "no route": (1, ["10.8.8.8"], 8, "this machine has no route to it; it has lo 127.0.0.1, eth0 192.168.5.4"),
    "no such interface": (0, ["10.0.0.1", "--network-interface", "roce"], 8, "none of that name (did you mean 'roce"),
    "the wrong interface": (1, ["10.0.0.9", "--network-interface", "eth0"], 8, "roce0 (10.0.0.1) does: name that one"),
    "one without address": (1, ["10.0.0.9", "--network-interface", "bare"], 8, "bare (without an address)"),
    "one that is down": (0, ["10.0.0.1", "--network-interface", "roce1"], 8, "--network-interface roce1 is down"),
    "the route is down": (1, ["10.0.1.9"], 8, "roce1, which leads to --node-address 10.0.1.9, is down"),
    "a foreign source": (1, ["10.9.9.9"], 8, "leave from 172.16.0.1, which is no interface's own"),
    "over two servers": (0, ["10.0.0.1", "--tensor-parallel-size", "16"], 8, "a replica stays within a server"),
    "an odd size": (0, ["10.0.0.1", "--tensor-parallel-size", "3"], 8, "does not divide the 8 cards"),
    "uneven replicas": (
        0,
        ["10.0.0.1", *ONE_CARD, "--data-parallel-size", "3"],
        8,
        "cannot be spread over 2 nodes with room",
    ),
    "too many replicas": (0, ["10.0.0.1", "--data-parallel-size", "4"], 8, "room for 1 replicas each"),
}


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_the_flag(name: str) -> None:
    rank, flags, cards, said = MISTAKES[name]
    with pytest.raises(UserError) as raised:
        node_settings(two(rank, *flags), "npu", cards)
    message = str(raised.value)
    assert said in message
    assert "--" in message or "roce1" in message
    assert "\n" not in message


def test_a_taken_port_is_told_with_its_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "interfaces", lambda: {"lo": Interface("lo", True, ("127.0.0.1", "10.0.0.1"))})
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(nodes, "node_address", lambda _: ("127.0.0.1", port))
        with pytest.raises(UserError, match=rf"port {port} is taken by pid \d+ \(.*as in --node-address .*:{port + 1}"):
            check_nodes(two(0), "cpu")


@pytest.mark.usefixtures("machine")
def test_the_warning_names_the_ports_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_check_free", lambda *_: None)
    said = {device: check_nodes(two(0, "10.0.0.1:7000"), device) or "" for device in ("cpu", "npu")}
    first, last = nodes.PORT_RANGE.read_text().split()
    assert all(f"let nobody but the others reach the ports 7000, {first}-{last}" in line for line in said.values())
    npu_ports = [row.port for row in PORTS if row.device == "npu"]
    assert [port in said["npu"] for port in npu_ports] == [True, True]
    assert not any(port in said["cpu"] for port in npu_ports)


def test_the_interfaces_are_those_of_this_machine() -> None:
    known = interfaces()
    assert "127.0.0.1" in known["lo"].addresses
    assert known["lo"].is_up
    assert set(known) == {name for _, name in socket.if_nameindex()}
    assert source_address("127.0.0.1") == "127.0.0.1"


# The launchers meet

OWN = {"vllm": "0.32.0", "model": "abc"}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """Where node 0 waits: on this machine, which `node_address` would refuse."""
    at = ("127.0.0.1", free_port())
    monkeypatch.setattr(node_meeting, "node_address", lambda _: at)
    monkeypatch.setattr(node_meeting, "own_interface", lambda _: HERE["lo"])
    monkeypatch.setattr(node_link, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(node_meeting, "BEAT_SECONDS", 0.05)
    return at


@pytest.fixture
def links(place: tuple[str, int]) -> Iterator[list[NodeLink]]:
    """Three nodes that have met."""
    with ThreadPoolExecutor(3) as pool:
        met = list(pool.map(lambda rank: meet(two(rank, count=3), OWN, 5), (1, 0, 2)))
    met.sort(key=lambda link: -len(link._lines))  # node 0 first: it has a line to each
    yield met
    for link in met:
        link.close()


def test_three_nodes_meet_and_stay(links: list[NodeLink], place: tuple[str, int]) -> None:
    assert [len(link._lines) for link in links] == [2, 1, 1]
    with socket.create_server(place):  # the port is vLLM's now
        lines = [line for link in links for line in link._lines]
        begin = time.monotonic()
        assert wait_for(lambda: all(line.heard > begin + 0.1 for line in lines), 2)
        assert [link.lost() for link in links] == [None] * 3
        assert not any(link.is_ready() for link in links)
        links[0].tell_ready()
        assert wait_for(lambda: links[1].is_ready() and links[2].is_ready(), 2)


def test_a_node_that_ends_says_why_and_it_goes_round(links: list[NodeLink]) -> None:
    links[2].close("the engine ended: out of \x1b[31mmemory\nerror: forged")
    assert wait_for(links[0].lost, 2)
    lost = links[0].lost() or ""
    assert "has ended: the engine ended: out of  [31mmemory error: forged" in lost
    links[0].close(lost)
    assert wait_for(links[1].lost, 2)
    assert "node 0 (127.0.0.1) has ended: node " in (links[1].lost() or "")
    assert links[2].lost() is None  # it knows


def test_a_node_that_is_cut_off_or_silent_is_lost(links: list[NodeLink], monkeypatch: pytest.MonkeyPatch) -> None:
    links[1]._lines[0].socket.shutdown(socket.SHUT_RDWR)
    assert wait_for(links[0].lost, 2)
    assert "is gone: it closed the connection" in (links[0].lost() or "")
    monkeypatch.setattr(node_link, "SILENCE_SECONDS", 0.2)  # node 0 has stopped looking after its lines: it is silent
    assert wait_for(links[2].lost, 2)
    assert "node 0 (127.0.0.1) has been silent for 0 s" in (links[2].lost() or "")


@pytest.mark.usefixtures("place")
def test_who_has_not_come_is_named() -> None:
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, two(0, count=4), OWN, 0.5)
        third = pool.submit(meet, two(2, count=4), OWN, 5)
        with pytest.raises(UserError, match=r"node 1 and 3 of 4 did not come to 127.0.0.1 port .* within 0 s"):
            first.result()
        with pytest.raises(UserError, match=r"node 0 \(127.0.0.1\) refused: node 1 and 3 of 4 did not come"):
            third.result()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("other", "count", "said"),
    [
        ({**OWN, "vllm": "0.33.0"}, 2, "vllm is 0.32.0 on node 0 and 0.33.0 there; make them the same"),
        ({"vllm": "0.32.0"}, 2, "model is abc on node 0 and not given there"),
        (OWN, 3, "--nodes is 2 on node 0 and 3 there"),
    ],
)
def test_nodes_that_differ_do_not_start(other: dict[str, str], count: int, said: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(meet, two(0), OWN, 5), pool.submit(meet, two(1, count=count), other, 5)]
        for one in both:
            with pytest.raises(UserError, match=r"node 1 \(127.0.0.1\) is not like node 0") as raised:
                one.result()
            assert said in str(raised.value)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"[]\n",
        b"{" * 40000,
        b"[" * 16000 + b"\n",
        b'{"node": 1}\n',
        b'{"node": "1", "is": {}}\n',
    ],
)
def test_what_is_no_launcher_does_not_disturb(
    place: tuple[str, int], monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(node_meeting, "GREETING_SECONDS", 0.2)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, two(0), OWN, 5)
        assert wait_for(lambda: _sent(place, said), 2)
        second = pool.submit(meet, two(1), OWN, 5)
        with first.result(), second.result() as link:
            assert link.lost() is None


GREETING = json.dumps({"node": 1, "of": 3, "is": OWN}).encode() + b"\n"


@pytest.mark.parametrize("stays", [True, False])
def test_a_node_that_was_started_again_counts_once(place: tuple[str, int], stays: bool) -> None:
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(meet, two(0, count=3), OWN, 5)
        assert wait_for(lambda: _sent(place, b""), 2)
        with socket.create_connection(place) as before:
            before.sendall(GREETING)
            assert before.recv(100)  # it was taken in
            if not stays:
                before.close()
                time.sleep(0.2)
            joining = [pool.submit(meet, two(1 if stays else 2, count=3), OWN, 5)]
            time.sleep(0.2)
            joining.append(pool.submit(meet, two(2 if stays else 1, count=3), OWN, 5))
            with first.result() as link, joining[0].result(), joining[1].result():
                assert sorted(line.node for line in link._lines) == [1, 2]
                assert link.lost() is None


def test_two_servers_of_one_rank_are_named(place: tuple[str, int]) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, two(0, count=3), OWN, 5)
        assert wait_for(lambda: _sent(place, b""), 2)
        with (
            socket.create_connection(place, source_address=("127.0.0.2", 0)) as one,
            socket.create_connection(place, source_address=("127.0.0.3", 0)) as other,
        ):
            one.sendall(GREETING)
            other.sendall(GREETING)
            with pytest.raises(
                UserError, match=r"node 1 \(127.0.0.2\) and node 1 \(127.0.0.3\) are both --node-rank 1"
            ):
                first.result()


def _sent(place: tuple[str, int], data: bytes) -> bool:
    try:
        with socket.create_connection(place, 1) as intruder:
            intruder.sendall(data)
            return True
    except ConnectionRefusedError:
        return False
    except ConnectionError:  # it was thrown out before all was sent
        return True


def test_a_node_finds_a_node_0_that_comes_later_and_nothing_else(place: tuple[str, int]) -> None:
    zmq_greeting = b"\xff" + bytes(8) + b"\x7f"
    with socket.create_server(place) as engine, ThreadPoolExecutor(1) as pool:
        joining = pool.submit(meet, two(1), OWN, 5)
        connection, _ = engine.accept()
        connection.sendall(zmq_greeting + b"\n")
        connection.close()
        engine.close()
        with meet(two(0), OWN, 5) as link, joining.result() as other:
            assert link.lost() is other.lost() is None


def test_no_line_is_held_beyond_its_bound() -> None:
    here, there = socket.socketpair()
    sender = threading.Thread(target=lambda: _flood(there), daemon=True)
    sender.start()
    line = Line(here, "10.0.0.2")
    with pytest.raises(ConnectionError, match="no launcher of this project"):
        _drain(line)
    assert len(line._rest) <= 2 * node_link.LINE_BYTES
    line.close()


def test_a_message_that_did_not_fit_is_finished_later() -> None:
    here, there = socket.socketpair()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    line, other = Line(here, "10.0.0.2"), Line(there, "10.0.0.1")
    for number in range(2000):  # far more than the two buffers hold
        line.send({"number": number, "filling": "x" * 100})
    assert len(line._unsent) < 2 * node_link.LINE_BYTES
    heard = []
    for _ in range(1000):
        heard += [message["number"] for message in other.receive(0)]
        line.send({"number": -1, "filling": ""})
    assert heard[:100] == list(range(100))
    assert heard[-1] == -1  # it was not in the middle of another one
    line.close()
    other.close()


def _flood(there: socket.socket) -> None:
    with contextlib.suppress(OSError):
        there.sendall(b"x" * 2**20)


def _drain(line: Line) -> None:
    for _ in range(100):
        line.receive(1)


def test_the_fingerprint_tells_models_and_versions_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    first = fingerprint(tmp_path, ["pytest", "no-such-package"], {"max-model-len": 10})
    assert first["pytest"] == pytest.__version__
    assert first["no-such-package"] == "not installed"
    assert first["--max-model-len"] == "10"
    assert json.loads(json.dumps(first)) == first
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    second = fingerprint(tmp_path, ["pytest", "no-such-package"], {"max-model-len": 11})
    assert {key for key in first if first[key] != second[key]} == {"model", "--max-model-len"}
    (tmp_path / "manifest.json").write_text("{}")
    vouched = fingerprint(tmp_path, [], {})["model"]
    assert vouched not in (first["model"], second["model"])
    (tmp_path / "notes.txt").write_text("only here")
    assert fingerprint(tmp_path, [], {})["model"] == vouched


def test_a_private_address_is_taken_as_it_is() -> None:
    assert node_address(two(0, "172.16.3.4:6000")) == ("172.16.3.4", 6000)
