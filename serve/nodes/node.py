"""Several servers as one engine: the flags and environment of each, and what can be told before anything starts.

One command per server, the same but for `--node-rank`. Each server runs whole replicas of the attention (data parallel)
on its own cards; experts may be spread over all of them. Node 0 has the API and hands the requests out; the others run
the engine alone (`serve/nodes/headless.py`). The launchers of all nodes stay in touch (`serve/nodes/link.py`).
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field
from pathlib import Path

from ascend.errors import UserError, suggest
from serve.nodes.interfaces import Interface, interfaces, source_address
from serve.preflight import port_holder
from serve.settings import LaunchSettings

DEFAULT_PORT = 29550  # vLLM's own for --data-parallel-rpc-port
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")  # of which the kernel gives out free ports


@dataclass(frozen=True)
class Port:
    """Where an engine over several servers listens for TCP.

    port: a number or range, or what decides it: "--port", "--node-address", "any" (a free one, see `PORT_RANGE`).
    node: "0", or "all". at: the address listened on: "--host", "own" (the one between the nodes), "every" (of that
    machine) or "card" (a card's own network port, which the host does not see). device: None for each kind.
    """

    port: str
    node: str
    at: str
    what: str
    device: str | None = None


# Seen on the CPU with vLLM 0.32 and compared there with what listens (tests/test_nodes_vllm.py). Others from the
# sources and from the documentation of CANN 8.3: HCCL_IF_BASE_PORT, and device_port of a rank table.
PORTS = (
    Port("--port", "0", "--host", "the API"),
    Port("--node-address", "0", "own", "the launchers meet here; then vLLM's handshake; closed once all have started"),
    Port("any", "0", "own", "vLLM: requests, answers and counts (ZeroMQ, msgpack)"),
    Port("any", "0", "every", "torch's store, where the ranks find one another: anyone who reaches it can write to it"),
    Port("any", "all", "own", "gloo and NCCL: tensors, and pickled objects while starting"),
    Port("60000-60031", "all", "own", "HCCL gathers its ranks", "npu"),
    Port("16666", "all", "card", "HCCL: tensors", "npu"),
)


@dataclass(frozen=True)
class NodeSettings:
    """What several servers add to one node's engine: flags without dashes, environment, and which program it is.

    headless: `python -m serve.nodes.headless` runs it, and nothing answers on its --port.
    """

    flags: dict[str, str | int | bool] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    headless: bool = False


def node_settings(settings: LaunchSettings, device: str, cards_per_node: int) -> NodeSettings:
    """Return what this node's engine needs; nothing for a single server.

    cards_per_node: on every server the same, 1 on a CPU. The sizes of tensor, pipeline and data parallel in
    ``settings`` are the plan's; without them a replica has all cards of a server.
    Raises `UserError` for sizes that do not fit the cards.
    """
    if settings.nodes == 1:
        return NodeSettings()
    address, port = node_address(settings)
    own = own_interface(settings)
    flags = _data_parallel(settings, cards_per_node) | {
        "data-parallel-address": address,
        "data-parallel-rpc-port": port,
    }
    environment = {
        "VLLM_HOST_IP": own.addresses[0],
        "GLOO_SOCKET_IFNAME": own.name,
        "TP_SOCKET_IFNAME": own.name,
    }
    if device == "cuda":
        environment["NCCL_SOCKET_IFNAME"] = f"={own.name}"  # without "=" it would be the beginning of a name
    if device == "npu":
        environment["HCCL_SOCKET_IFNAME"] = f"={own.name}"  # as for NCCL; CANN 8.0 to 9.0, "HCCL_SOCKET_IFNAME"
        environment["HCCL_IF_IP"] = own.addresses[0]
    if settings.node_rank:
        flags["headless"] = True
    return NodeSettings(flags, environment, headless=settings.node_rank > 0)


def _data_parallel(settings: LaunchSettings, cards_per_node: int) -> dict[str, str | int | bool]:
    pipeline = settings.pipeline_parallel_size or 1
    tensor = settings.tensor_parallel_size or max(1, cards_per_node // pipeline)
    replica = tensor * pipeline
    if cards_per_node % replica:
        raise UserError(
            f"--tensor-parallel-size {tensor} x --pipeline-parallel-size {pipeline} = {replica} does not divide the "
            f"{cards_per_node} cards of a node: a replica stays within a server, whose cards talk faster"
        )
    local = cards_per_node // replica
    size = settings.data_parallel_size or settings.nodes * local
    if size % settings.nodes or size > settings.nodes * local:
        raise UserError(
            f"--data-parallel-size {size} cannot be spread over {settings.nodes} nodes with room for {local} replicas "
            f"each: give a multiple of {settings.nodes} up to {settings.nodes * local}, or leave it out"
        )
    local = size // settings.nodes
    flags: dict[str, str | int | bool] = {"data-parallel-size": size, "data-parallel-size-local": local}
    if settings.node_rank:  # on node 0 this flag would mean that every node has an API server of its own
        flags["data-parallel-start-rank"] = settings.node_rank * local
    return flags


def node_address(settings: LaunchSettings) -> tuple[str, int]:
    """Return the address and port of node 0. Raises `UserError` for what no other server could reach or trust."""
    given = settings.node_address or ""
    text, _, port = given.partition(":")
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        raise UserError(
            f"--node-address {given}: give node 0's IPv4 address as in 10.0.0.1 or 10.0.0.1:{DEFAULT_PORT}; names are "
            "not looked up, and vLLM's data parallel knows no IPv6"
        ) from None
    if given.endswith(":") or (port and not (port.isdecimal() and 1024 <= int(port) <= 65535)):
        raise UserError(f"--node-address {given}: '{port}' is not a port from 1024 to 65535")
    if address.is_loopback or address.is_unspecified or address.is_multicast:
        raise UserError(f"--node-address {given}: no other server can reach {address}; give node 0's address for them")
    if address.is_global:
        raise UserError(
            f"--node-address {given}: {address} is an address of the internet, and what the servers send one another "
            "is neither encrypted nor signed: connect them by a network of their own (10.x, 172.16-31.x, 192.168.x)"
        )
    return str(address), int(port or DEFAULT_PORT)


def own_interface(settings: LaunchSettings) -> Interface:
    """Return this node's interface towards the others, with the one address of it that they see.

    Raises `UserError` if there is none, if it is down, or if another one leads there.
    """
    address, _ = node_address(settings)
    known = interfaces()
    wanted = settings.network_interface
    if wanted is not None and wanted not in known:
        raise UserError(
            f"--network-interface {wanted}: this machine has none of that name{suggest(wanted, known)}; "
            f"it has {_list(known)}"
        )
    if wanted is not None and not known[wanted].is_up:
        raise UserError(f"--network-interface {wanted} is down: check the cable, or `ip link set {wanted} up`")
    holder = next((one for one in known.values() if address in one.addresses), None)
    if settings.node_rank == 0 and holder is None:
        raise UserError(
            f"--node-address {address} is not an address of this machine, which is to be node 0: it has "
            f"{_list(known)}; give one of them, or --node-rank 1 or more"
        )
    if settings.node_rank > 0 and holder is not None:
        raise UserError(
            f"--node-address {address} is this machine's own ({holder.name}), so it is node 0, not --node-rank "
            f"{settings.node_rank}: start that one on another server"
        )
    source = address if settings.node_rank == 0 else source_address(address)
    if source is None:
        raise UserError(f"--node-address {address}: this machine has no route to it; it has {_list(known)}")
    leads = next((one for one in known.values() if source in one.addresses), None)
    if leads is None:
        raise UserError(f"--node-address {address}: packets to it leave from {source}, which is no interface's own")
    if wanted is not None and leads.name != wanted:
        raise UserError(
            f"--network-interface {wanted} ({' '.join(known[wanted].addresses) or 'without an address'}) does not lead "
            f"to --node-address {address}, {leads.name} ({source}) does: name that one, or leave the flag out"
        )
    if not leads.is_up:
        raise UserError(f"{leads.name}, which leads to --node-address {address}, is down: check the cable")
    return Interface(leads.name, True, (source,))


def check_nodes(settings: LaunchSettings, device: str) -> str | None:
    """Check this node's part; return a line to tell the user, None for a single server. Raises `UserError`."""
    if settings.nodes == 1:
        return None
    if settings.engine == "sglang":
        raise UserError("--nodes is for --engine vllm: SGLang over several servers is not built in here")
    address, port = node_address(settings)
    own_interface(settings)
    if settings.node_rank == 0:
        _check_free(address, port)
    first, last = PORT_RANGE.read_text().split()
    ports = [str(port), f"{first}-{last}", *(one.port for one in PORTS if one.device == device)]
    return (
        f"careful: what the {settings.nodes} servers send one another is neither encrypted nor signed, and partly "
        f"pickled: on each of them let nobody but the others reach the ports {', '.join(ports)}"
    )


def _check_free(address: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            raise UserError(
                f"--node-address {address}: port {port} is taken by {port_holder(port)}; stop it, or give another port "
                f"on all nodes, as in --node-address {address}:{port + 1}"
            ) from None


def _list(known: dict[str, Interface]) -> str:
    return ", ".join(f"{one.name} {' '.join(one.addresses) or 'without an address'}" for one in known.values())
