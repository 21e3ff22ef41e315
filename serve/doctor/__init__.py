"""`serve doctor`: every reason a launch fails on a hospital's machine, found before it.

What comes in: a device, maybe a model directory; what goes out: one line per finding, how it is, why it matters, what
to do. Read `checks.py` first, it is the table of all checks; `finding.py` says what a finding is, `machine.py` what a
check sees. `versions.py` and `holes.py` are tables of facts, `npu_smi.py`, `hccn_tool.py` and `nvidia_smi.py` read the
vendors' tools. Only the standard library and light parts of this project are imported: it works before anything is
installed.

Not looked at: whether the cards compute rightly (the canary of `serve launch` does), and whether other servers answer.
Nothing of it has been run on an Ascend 910B or an NVIDIA card yet: it is tested on recorded output of their tools.
"""

from __future__ import annotations

from pathlib import Path

from ascend.devices import Host
from serve.doctor.checks import examine
from serve.doctor.command import main
from serve.doctor.finding import Finding
from serve.doctor.holes import Hole, known_holes
from serve.doctor.machine import Asked, Machine

__all__ = ["Finding", "Hole", "findings", "known_holes", "main"]


def findings(
    device: str,
    model: Path | None = None,
    *,
    port: int | None = None,
    host: str = "127.0.0.1",
    nodes: int = 1,
    network_interface: str | None = None,
    quick: bool = False,
    machine: Host | None = None,
) -> list[Finding]:
    """Return what is found for a launch on ``device`` ("npu", "cuda", "cpu").

    quick: for the launcher. The model is taken as checked, tools of vendors have eight seconds together, and nothing is
    imported or asked that may take longer. machine: another host than this one, for tests.
    """
    asked = Asked(device, model, port, host, nodes, network_interface)
    return list(examine(Machine(asked, machine or Host(), quick)))
