"""Checks for several servers: the interface between hosts, the cards' own network ports, what HCCL is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from serve.doctor import hccn_tool
from serve.doctor.finding import Finding, error, note, ok, unknown, warning
from serve.doctor.machine import Machine
from serve.doctor.npu_cards import table

# Where HCCL gathers its ranks on a host, unless HCCL_IF_BASE_PORT moves it (that page of CANN 8.3 to 9.1: 32 ports).
# 16666 is a port of the card's own network, which the host does not see.
HCCL_PORT, HCCL_PORTS = 60000, 32
# What tells each communication library which network to use, by device.
SOCKETS = {
    "npu": ("HCCL_IF_IP", "HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"),
    "cuda": ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"),
    "cpu": ("GLOO_SOCKET_IFNAME",),
}
LISTENING = "0A"  # the kernel's TCP_LISTEN, include/net/tcp_states.h


def check_interface(m: Machine) -> Iterator[Finding]:
    """Whether the interface named exists and is up."""
    name = m.asked.network_interface
    interfaces = sorted(entry.name for entry in _interfaces(m) if entry.name != "lo")
    if name is None:
        unset = [variable for variable in SOCKETS[m.asked.device] if not m.host.environ.get(variable)]
        if unset:
            why = "servers that choose different networks wait for one another until a time-out"
            remedy = f"give --network-interface, one of {', '.join(interfaces) or '(none found)'}"
            yield warning(f"no network interface is chosen, and not set: {', '.join(unset)}", why, remedy)
        return
    state = m.host.text(f"/sys/class/net/{name}/operstate").strip()
    if name not in interfaces:
        yield error(
            f"there is no network interface {name}",
            "the servers could not find one another",
            f"choose one of {', '.join(interfaces) or '(none found)'}",
        )
    elif state in ("up", "unknown"):  # a driver that does not report says unknown
        yield ok(f"network interface {name} is {'up' if state == 'up' else 'there, its state not reported'}")
    else:
        what = f"network interface {name} is {state or 'in no state'}"
        yield error(what, "nothing passes it", f"ip link set {name} up")


def _interfaces(m: Machine) -> list[Path]:
    folder = m.host.path("/sys/class/net")
    return list(folder.iterdir()) if folder.is_dir() else []


def check_hccl_port(m: Machine) -> Iterator[Finding]:
    """Whether the ports of this host that HCCL listens on are free."""
    if asked := m.host.environ.get("HCCL_HOST_SOCKET_PORT_RANGE"):
        yield note(f"HCCL_HOST_SOCKET_PORT_RANGE={asked} says where HCCL listens", "it was not looked at")
        return
    base = m.host.environ.get("HCCL_IF_BASE_PORT") or str(HCCL_PORT)
    if not (base.isdecimal() and 1024 <= int(base) <= 65520):
        yield error(f"HCCL_IF_BASE_PORT={base}", "HCCL takes a number from 1024 to 65520", "unset it")
        return
    ports = range(int(base), int(base) + HCCL_PORTS)
    shown = f"{ports[0]} to {ports[-1]}"
    tables = [m.host.text(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
    if not any(tables):
        yield unknown(f"whether ports {shown} are free", "/proc/net/tcp cannot be read")
        return
    lines = [line.split() for text in tables for line in text.splitlines()[1:]]
    held = {int(row[1].rpartition(":")[2], 16) for row in lines if len(row) > 3 and row[3] == LISTENING}
    if taken := ", ".join(str(port) for port in ports if port in held):
        why = "HCCL gathers its ranks there and stops if it cannot listen (EI0019)"
        remedy = "end what holds it (`ss -ltnp`), or set HCCL_IF_BASE_PORT on every server"
        yield error(f"of HCCL's ports, {taken} is taken", why, remedy)
    else:
        yield ok(f"ports {shown} of HCCL are free")


def check_hccn(m: Machine) -> Iterator[Finding]:
    """Link, network health, address and TLS of every card's own port."""
    npus = sorted({card.npu for card in table(m).cards})
    if not npus:
        yield unknown("the cards' network ports", "npu-smi did not tell which cards are here")
        return
    tls: set[bool | None] = set()
    for npu in npus:
        link, health, address, switch = (_ask(m, npu, what) for what in ("-link", "-net_health", "-ip", "-tls"))
        if m.run("hccn_tool", "-i", str(npu), "-link", "-g").is_missing:
            remedy = "it comes with the driver, /usr/local/Ascend/driver/tools; in a container mount it"
            yield unknown("the cards' network ports", "hccn_tool is not installed", remedy)
            return
        tls.add(hccn_tool.parse_tls(switch))
        ip = hccn_tool.parse_ip(address)
        yield from _port(npu, hccn_tool.parse_link(link), hccn_tool.parse_net_health(health), ip)
    if len(tls) > 1 or None in tls:
        if tls - {None} == {True, False}:
            why = "a card with TLS and one without do not talk (EI0006)"
            yield error("TLS is on for some cards and off for others", why, "hccn_tool -i N -tls -s enable 0, on all")
        else:
            yield unknown("whether TLS is the same on all cards", "hccn_tool does not tell of each")
    else:
        yield ok(f"TLS is {'on' if tls == {True} else 'off'} on all cards (it must be so on the other servers too)")
    yield note(
        "whether the cards of the other servers answer is not tried here",
        "their addresses are not known",
        "hccn_tool -i N -ping -g address ADDRESS, with what `hccn_tool -i N -ip -g` says there",
    )


def _ask(m: Machine, npu: int, what: str) -> str:
    return m.run("hccn_tool", "-i", str(npu), what, "-g").text


def _port(npu: int, link: str | None, health: str | None, address: str | None) -> Iterator[Finding]:
    why = "collectives between servers run over it"
    if link == "DOWN":
        yield error(f"card {npu}: its network port is DOWN", why, "check cable, module and switch")
    elif link is None:
        yield unknown(f"card {npu}: its network port", "hccn_tool does not tell")
    if address is None:
        remedy = f"hccn_tool -i {npu} -ip -s address ADDRESS netmask MASK"
        yield unknown(f"card {npu}: the address of its network port", "hccn_tool tells none", remedy)
    if health == "Init":
        remedy = f"hccn_tool -i {npu} -netdetect -s address GATEWAY"
        yield note(f"card {npu}: its network health is not watched (Init)", "no detection address is set", remedy)
    elif health not in (None, hccn_tool.HEALTHY):
        yield error(f"card {npu}: network health {health}", why, "check gateway, switch and the detection address")
    elif health is None:
        yield unknown(f"card {npu}: its network health", "hccn_tool does not tell")
    if link == "UP" and address and health in (hccn_tool.HEALTHY, "Init"):
        yield ok(f"card {npu}: network port UP, {address}")
