"""The port of the API: free, and not open to everyone by mistake."""

from __future__ import annotations

from collections.abc import Iterator

from ascend.errors import UserError
from serve.doctor.finding import Finding, error, ok, warning
from serve.doctor.machine import Machine

EVERYWHERE = ("0.0.0.0", "::")


def check_port(m: Machine) -> Iterator[Finding]:
    """Whether the server could listen where it is to."""
    from serve import preflight

    if m.asked.port is None:
        return
    try:
        preflight.check_port(m.asked.host, m.asked.port)
    except UserError as problem:
        what, _, remedy = str(problem).partition("; ")
        yield error(what, "the server could not listen", remedy or "choose another")
    else:
        yield ok(f"port {m.asked.port} on {m.asked.host} is free")
    if m.asked.host in EVERYWHERE:
        why = "every machine in the network can ask it, without a password or TLS"
        yield warning(f"--host {m.asked.host}", why, "listen on 127.0.0.1 behind a gateway")
