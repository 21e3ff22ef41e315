"""Servers with a network of their own between them: network namespaces joined by a pair of virtual interfaces.

Made with unshare(1) and nsenter(1) of util-linux and the kernel's own netlink messages. Root, or a kernel that lets any
user make namespaces, is needed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.launcher import ROOT, wait_for

# include/uapi/linux/{netlink,rtnetlink,if_link,if_addr}.h
RTM_NEWLINK, RTM_NEWADDR = 16, 20
REQUEST, ACK, CREATE = 0x1, 0x4, 0x400
IFLA_IFNAME, IFLA_LINKINFO, IFLA_NET_NS_PID, INFO_KIND, INFO_DATA, VETH_PEER = 3, 18, 19, 1, 2, 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFF_UP = 1


@dataclass(frozen=True)
class Namespace:
    """A network of its own: what `pid` holds open, and how to run something in it."""

    pid: int
    address: str = ""
    interface: str = ""

    def command(self, words: Sequence[str]) -> list[str]:
        """The command that runs another one in it."""
        user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        return ["nsenter", "--target", str(self.pid), *user, "--net", "--", *words]

    def listening(self) -> set[tuple[str, int]]:
        """Addresses and ports listened on for TCP; every address is ``*``."""
        found = set()
        for table in ("tcp", "tcp6"):
            with open(f"/proc/{self.pid}/net/{table}") as rows:
                for row in map(str.split, list(rows)[1:]):
                    address, _, port = row[1].partition(":")
                    if row[3] == "0A":
                        found.add((_address(address), int(port, 16)))
        return found


def _address(text: str) -> str:
    if not text.strip("0"):
        return "*"
    return socket.inet_ntoa(bytes.fromhex(text[-8:])[::-1])


@contextlib.contextmanager
def alone() -> Iterator[Namespace]:
    """A network with nothing but the loopback interface, which is up."""
    with _holder(None) as pid:
        _configure(Namespace(pid), ["up", "lo"])
        yield Namespace(pid)


@contextlib.contextmanager
def joined(
    addresses: Sequence[str] = ("10.77.0.1", "10.77.0.2"), names: Sequence[str] = ("wire0", "wire1")
) -> Iterator[list[Namespace]]:
    """Two of them, with a cable between them; no other network can be reached from either."""
    with _holder(None) as first, _holder(first) as second:
        both = [Namespace(pid, *place) for pid, *place in zip((first, second), addresses, names, strict=True)]
        _configure(both[0], ["veth", names[0], names[1], str(second)])
        for one in both:
            _configure(one, ["up", "lo"], ["address", one.interface, one.address], ["up", one.interface])
        assert wait_for(lambda: all(map(_is_running, both)), 5)
        yield both


def cable(namespace: Namespace, is_in: bool) -> None:
    """Pull the cable out of this side, or put it in."""
    _configure(namespace, ["up" if is_in else "down", namespace.interface])


@contextlib.contextmanager
def _holder(within: int | None) -> Iterator[int]:
    """A process that does nothing, in a network namespace of its own; without root in the user namespace of another."""
    words = ["unshare", "--net", "--", "sh", "-c", "echo made; exec sleep 3600"]
    if os.geteuid() != 0:
        words[1:1] = ["--user", "--map-root-user"] if within is None else []
        if within is not None:
            words = ["nsenter", "--target", str(within), "--user", "--preserve-credentials", "--", *words]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    try:
        if process.stdout.readline() != "made\n":
            raise PermissionError(f"no network namespaces here: {process.stderr.read().strip()}")
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _configure(namespace: Namespace, *steps: Sequence[str]) -> None:
    for step in steps:
        subprocess.run(namespace.command([sys.executable, "-m", "tests.namespaces", *step]), check=True, cwd=ROOT)


def _attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _ask(kind: int, body: bytes) -> None:
    """Send one request to the kernel. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        flags = REQUEST | ACK | (0 if kind == RTM_NEWLINK and len(body) == 16 else CREATE)
        kernel.send(struct.pack("IHHII", 16 + len(body), kind, flags, 1, 0) + body)
        code = struct.unpack_from("i", kernel.recv(4096), 16)[0]
        if code:
            raise OSError(-code, os.strerror(-code))


def _link(name: str, flags: int) -> bytes:
    index = socket.if_nametoindex(name) if name else 0
    return struct.pack("BxHiII", socket.AF_UNSPEC, 0, index, flags, IFF_UP)


def _main(step: Sequence[str]) -> None:
    """What runs inside: ``veth NAME OTHER PID``, ``up NAME``, ``down NAME`` or ``address NAME ADDRESS``."""
    if step[0] == "veth":
        name, other, pid = step[1:]
        peer = bytes(16) + _attribute(IFLA_IFNAME, other.encode() + b"\0")
        peer += _attribute(IFLA_NET_NS_PID, struct.pack("I", int(pid)))
        info = _attribute(INFO_KIND, b"veth") + _attribute(INFO_DATA, _attribute(VETH_PEER, peer))
        _ask(RTM_NEWLINK, bytes(16) + _attribute(IFLA_IFNAME, name.encode() + b"\0") + _attribute(IFLA_LINKINFO, info))
    elif step[0] == "address":
        raw = socket.inet_aton(step[2])
        head = struct.pack("BBBBi", socket.AF_INET, 24, 0, 0, socket.if_nametoindex(step[1]))
        _ask(RTM_NEWADDR, head + _attribute(IFA_LOCAL, raw) + _attribute(IFA_ADDRESS, raw))
    else:
        _ask(RTM_NEWLINK, _link(step[1], IFF_UP if step[0] == "up" else 0))


def _is_running(namespace: Namespace) -> bool:
    """Whether the kernel has noticed the other end: it takes up to a second."""
    words = [
        sys.executable,
        "-c",
        "import sys, serve.nodes.interfaces as i; sys.exit(not i.interfaces()[sys.argv[1]].is_up)",
    ]
    return subprocess.run(namespace.command([*words, namespace.interface]), cwd=ROOT).returncode == 0


if __name__ == "__main__":
    _main(sys.argv[1:])
