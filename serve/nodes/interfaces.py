"""The network interfaces of this machine and their IPv4 addresses, asked of the kernel.

By system calls, not from ``/sys/class/net``: in a container that is often the host's. Linux only.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import socket
import struct
from dataclasses import dataclass

# include/uapi/linux/sockios.h and if.h; an entry is 16 bytes of name and a union, 40 bytes on 64 bits.
SIOCGIFCONF, SIOCGIFFLAGS = 0x8912, 0x8913
IFF_UP, IFF_RUNNING = 0x1, 0x40
_ENTRY = 40
_MOST = 1024


@dataclass(frozen=True)
class Interface:
    """An interface: is_up, it was brought up and has a link; addresses: its IPv4 addresses, maybe none."""

    name: str
    is_up: bool
    addresses: tuple[str, ...]


def interfaces() -> dict[str, Interface]:
    """Return every interface by its name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        room = array.array("B", bytes(_ENTRY * _MOST))
        begin, length = room.buffer_info()
        answer = fcntl.ioctl(asking, SIOCGIFCONF, struct.pack("iP", length, begin))
        filled, _ = struct.unpack("iP", answer)
        found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
        for at in range(0, filled, _ENTRY):
            entry = room[at : at + _ENTRY].tobytes()
            name = entry[:16].partition(b"\0")[0].decode().partition(":")[0]  # "eth0:1" is a second address of eth0
            found.setdefault(name, []).append(socket.inet_ntoa(entry[20:24]))
        return {name: Interface(name, _is_up(asking, name), tuple(addresses)) for name, addresses in found.items()}


def _is_up(asking: socket.socket, name: str) -> bool:
    with contextlib.suppress(OSError):
        answer = fcntl.ioctl(asking, SIOCGIFFLAGS, struct.pack("16sh22x", name.encode(), 0))
        flags = struct.unpack_from("H", answer, 16)[0]
        return flags & (IFF_UP | IFF_RUNNING) == IFF_UP | IFF_RUNNING
    return False


def source_address(to: str) -> str | None:
    """Return the address of this machine from which packets to an IPv4 address leave, None without a route.

    Nothing is sent.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect((to, 9))
        except OSError:
            return None
        return str(asking.getsockname()[0])
