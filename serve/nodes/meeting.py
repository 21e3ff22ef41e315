"""The launchers of several servers meet before any engine starts: who does not come, or differs, is named.

TCP on the port of `--node-address`, which vLLM listens on afterwards. Node r sends {"node": r, "of": N, "is": {...}},
node 0 answers all with {"start": true} or {"refused": "why"}; meanwhile both send {}, see `serve/nodes/link.py`.
"""

from __future__ import annotations

import contextlib
import json
import platform
import select
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from ascend.errors import UserError
from convert.manifest import MANIFEST
from serve.nodes.link import BEAT_SECONDS, Line, NodeLink, words
from serve.nodes.node import node_address, own_interface
from serve.settings import LaunchSettings

GREETING_SECONDS = 3.0  # for one that has connected to say who it is


def fingerprint(model: Path | None, packages: Iterable[str], flags: Mapping[str, Any]) -> dict[str, str]:
    """Return what must be the same on all nodes, by the names that an error uses.

    The model by its manifest, which has every file's hash; without one by its config.json and the sizes of its files.
    packages: distributions, by their versions. flags: of the engine, those of the node left out.
    """
    whole = {"Python": platform.python_version().rpartition(".")[0], "machine": platform.machine()}
    for package in packages:
        try:
            whole[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            whole[package] = "not installed"
    whole |= {f"--{name}": json.dumps(value) for name, value in flags.items()}
    if model is not None:
        whole["model"] = _model(model)
    return whole


def _model(model: Path) -> str:
    manifest = model / MANIFEST
    if manifest.exists():
        return sha256(manifest.read_bytes()).hexdigest()[:16]
    sizes = sorted((one.name, one.stat().st_size) for one in model.iterdir() if one.is_file())
    return sha256((model / "config.json").read_bytes() + json.dumps(sizes).encode()).hexdigest()[:16]


def meet(settings: LaunchSettings, own: Mapping[str, str], seconds: float) -> NodeLink:
    """Wait until the launchers of all nodes are there and alike, each with its `fingerprint` as ``own``.

    Raises `UserError` that names the nodes that have not come within ``seconds``, or what is not the same.
    """
    if settings.nodes == 1:
        return NodeLink()
    deadline = time.monotonic() + seconds
    if settings.node_rank == 0:
        return NodeLink(_gather(settings, own, deadline, seconds))
    return NodeLink([_join(settings, own, deadline, seconds)])


def _gather(settings: LaunchSettings, own: Mapping[str, str], deadline: float, seconds: float) -> list[Line]:
    """Node 0: take in the others."""
    place = node_address(settings)
    lines: dict[int, Line] = {}
    missing = list(range(1, settings.nodes))
    refusal = ""
    print(f"waiting for node {_and(missing)} at {place[0]} port {place[1]}", file=sys.stderr)
    with socket.create_server(place) as server:
        while missing and not refusal:
            left = deadline - time.monotonic()
            if left <= 0:
                refusal = (
                    f"node {_and(missing)} of {settings.nodes} did not come to {place[0]} port {place[1]} within "
                    f"{seconds:.0f} s: start it with the same --node-address, and let it through the firewall"
                )
            elif select.select([server], [], [], min(left, BEAT_SECONDS))[0]:
                connection, (address, _) = server.accept()
                line, like = _greeting(Line(connection, address))
                refusal = _difference(line.name, {**own, "--nodes": str(settings.nodes)}, like) if like else ""
                if like and (before := lines.get(line.node)) and before.address != line.address and _is_there(before):
                    refusal = f"{before.name} and {line.name} are both --node-rank {line.node}: give each its own"
                if like:
                    lines[line.node] = line
            lines = {rank: line for rank, line in lines.items() if _is_there(line)}
            missing = [rank for rank in range(1, settings.nodes) if rank not in lines]
    for line in lines.values():  # after the socket is closed: vLLM listens on that port next
        with contextlib.suppress(OSError):
            line.send({"refused": refusal} if refusal else {"start": True})
    if refusal:
        raise UserError(refusal)
    return list(lines.values())


def _greeting(line: Line) -> tuple[Line, dict[str, Any] | None]:
    """Wait for who has connected to say which node it is; return that, and what it is like, None for no launcher."""
    until = time.monotonic() + GREETING_SECONDS
    with contextlib.suppress(OSError):
        while (left := until - time.monotonic()) > 0:
            for message in line.receive(left):
                rank, like = message.get("node"), message.get("is")
                if isinstance(rank, int) and isinstance(like, dict):
                    line.node = rank
                    return line, {**like, "--nodes": str(message.get("of"))}
    line.close()
    return line, None


def _difference(name: str, own: Mapping[str, str], other: Mapping[str, Any]) -> str:
    """Return what is not the same on another node, or nothing."""
    unlike = [
        f"{what} is {words(own.get(what, 'not given'))} on node 0 and {words(other.get(what, 'not given'))} there"
        for what in sorted({*own, *other})
        if own.get(what) != other.get(what)
    ]
    return f"{name} is not like node 0: {'; '.join(unlike[:4])}; make them the same" if unlike else ""


def _is_there(line: Line) -> bool:
    """Whether a launcher that waits for the others is still there; it is told that this one is."""
    try:
        line.send({})
        line.receive(0)
    except OSError:
        return False
    return not line.is_silent()


def _join(settings: LaunchSettings, own: Mapping[str, str], deadline: float, seconds: float) -> Line:
    """Any other node: find node 0, say what this one is, and wait for its word."""
    place = node_address(settings)
    source = own_interface(settings).addresses[0]
    why = "nothing answered"
    print(f"waiting for node 0 at {place[0]} port {place[1]}", file=sys.stderr)
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(place, min(left, GREETING_SECONDS), (source, 0))
        except OSError as error:
            why = error.strerror or "no answer"
            time.sleep(min(left, BEAT_SECONDS / 2))
            continue
        line = Line(connection, place[0], 0)
        why = "it is there, and waits for the other nodes"
        try:
            line.send({"node": settings.node_rank, "of": settings.nodes, "is": dict(own)})
            if _waited(line, deadline):
                return line
        except OSError as error:
            why = str(error)
            time.sleep(min(left, BEAT_SECONDS / 2))
        line.close()
    raise UserError(
        f"node 0 did not answer at {place[0]} port {place[1]} within {seconds:.0f} s ({why}): start it with the same "
        "--node-address, and let this machine through its firewall"
    )


def _waited(line: Line, deadline: float) -> bool:
    """Whether node 0 says that all are there. Raises `UserError` with its reason if it refuses."""
    while time.monotonic() < deadline and not line.is_silent():
        line.send({})
        for message in line.receive(BEAT_SECONDS):
            if message.get("start") is True:
                return True
            if "refused" in message:
                line.close()
                raise UserError(f"{line.name} refused: {words(message['refused'])}")
    return False


def _and(ranks: list[int]) -> str:
    return " and ".join(map(str, ranks))
