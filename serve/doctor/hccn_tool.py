"""What `hccn_tool -i N …` prints, read: the card's own network port, over which several servers talk (RoCE).

Formats as in Huawei's HCCN tool reference and the logs in tests/recorded. What is not exactly known is None.
"""

from __future__ import annotations

import re

LINK = ("UP", "DOWN")
HEALTHY = "Success"
# Values of `-net_health -g`, from the fault tables of Huawei's log tools.
NET_HEALTH = (
    "Success",
    "Socket fail",
    "Receive timeout",
    "Unreachable",
    "Time exceeded",
    "Fault",
    "Init",
    "Thread error",
    "Detect ip set",
)


def parse_link(text: str) -> str | None:
    """Read `-link -g`: UP or DOWN."""
    return _among(LINK, re.search(r"link status:[ \t]*([A-Za-z]+)", text))


def parse_net_health(text: str) -> str | None:
    """Read `-net_health -g`: one of `NET_HEALTH`. "Init" is a detection address that was never set."""
    return _among(NET_HEALTH, re.search(r"net health status:[ \t]*([A-Za-z][A-Za-z ]*)", text))


def parse_ip(text: str) -> str | None:
    """Read `-ip -g`: the port's address. A line that is cut off could be the beginning of another address."""
    found = re.search(r"ipaddr:[ \t]*(\d+\.\d+\.\d+\.\d+|[\da-fA-F:]+:[\da-fA-F:]*)[ \t]*\r?\n", text)
    return found[1] if found else None


def parse_tls(text: str) -> bool | None:
    """Read `-tls -g`: whether TLS is on. It must be the same on all cards of all servers."""
    found = re.search(r"tls switch\[([01])\]", text)
    return found[1] == "1" if found else None


def _among(known: tuple[str, ...], found: re.Match[str] | None) -> str | None:
    value = found[1].strip() if found else ""
    return next((name for name in known if name.casefold() == value.casefold()), None)
