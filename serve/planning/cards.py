"""The cards of a plan: named (``8x910B3-64G``), or those found on this machine, told from files and the vendors' tools.

Light: torch is not imported, no card is opened.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace

from ascend.devices.base import TOOL_SECONDS, Host
from ascend.devices.cpu import CpuDevice
from ascend.devices.facts import TABLE, DeviceFacts, GiB, lookup
from ascend.errors import UserError, suggest

# What a process gets of the memory that is installed. 910B: the runtime hands out about 61 of 64 GiB (see
# `ascend.devices.facts`). NVIDIA: torch reports 79.1 of an H100's 79.6 GiB and 139.8 of an H200's 140.4.
NPU_SHARE = 61 / 64
CUDA_KEPT = 0.6 * GiB
SHORT = {
    "H20": "H20-96G",
    "H20-3E": "H20-3e-141G",
    "H20-141G": "H20-3e-141G",
    "H100": "H100-80G",
    "H200": "H200-141G",
    "H800": "H800-80G",
    "A800": "A800-80G",
    "L20": "L20-48G",
}
# Names that npu-smi and people give to Atlas A3: two dies a card, other operators, other images.
A3 = re.compile(r"(?:Ascend)?910(?:C|_?93\w*)?", re.IGNORECASE)
NOT_A3 = "Atlas A3 (910C) is not supported: plans, versions and limits here are those of the 910B (Atlas A2)"
VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}


@dataclass(frozen=True)
class Cards:
    """Cards of one kind in one server or several.

    device: "npu", "cuda" or "cpu". count: in each of ``nodes`` servers. indices: of those that may be used, None where
    they were only named. memory: bytes of one, as installed (of a CPU: what this process may use). confirmed: False
    where cards are here, but no tool said that they are what they were named.
    """

    device: str
    facts: DeviceFacts
    count: int
    memory: float
    nodes: int = 1
    indices: tuple[int, ...] | None = None
    confirmed: bool = True

    @property
    def total(self) -> int:
        """Cards in all servers together."""
        return self.count * self.nodes

    @property
    def all_linked(self) -> bool:
        """Whether each is linked with each: one server, and one group of cards in it."""
        return self.nodes == 1 and self.count <= self.facts.linked

    @property
    def usable(self) -> float:
        """Bytes of one that a process can get."""
        if self.device == "cpu":
            return self.memory
        return self.memory * NPU_SHARE if self.device == "npu" else self.memory - CUDA_KEPT

    def __str__(self) -> str:
        if self.device == "cpu":
            return "cpu"
        has_size = re.search(r"-\d+G$", self.facts.name)
        return f"{self.total}x{self.facts.name}" + ("" if has_size else f"-{self.memory / GiB:.0f}G")


def parse_cards(text: str, nodes: int = 1) -> Cards:
    """Read "8x910B3-64G", "4xH20" or "cpu"; the number counts all servers' cards. Raises `UserError`."""
    if match := re.fullmatch(r"cpu(?:-(\d+)g)?", text.strip(), re.IGNORECASE):
        return _cpu(int(match[1]) * GiB if match[1] else None)
    match = re.fullmatch(r"(?:(\d{1,4})\s*x\s*)?(\S.*)", text.strip(), re.IGNORECASE)
    if not match or int(match[1] or 1) < 1:
        raise UserError(f"--cards '{text}': write a number and a card, such as 8x910B3-64G")
    total = int(match[1] or 1)
    if total % nodes:
        raise UserError(f"--cards {text}: {total} cards do not divide into {nodes} servers; count those of all")
    facts = _named(match[2])
    memory = facts.memory.value or 0.0
    if total // nodes > (most := facts.per_server):
        servers = -(-total // most)
        raise UserError(f"--cards {text}: one server holds {most} cards; say --nodes {servers} for {servers}")
    return Cards(_device(facts), facts, total // nodes, memory, nodes)


def found_cards(nodes: int = 1, host: Host | None = None, named: Cards | None = None) -> Cards:
    """Return this machine's NPUs, else its CUDA cards, else its CPU; other servers are taken to have the same.

    named: what the user says they are: only cards of that device are looked for, and it is believed where the vendor's
    tool is missing, slow or silent. Raises `UserError` where there are cards, but nothing tells which.
    """
    host = host or Host()
    for device, pattern, tool in (
        ("npu", r"davinci\d+", ("npu-smi", "info")),
        ("cuda", r"nvidia\d+", ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")),
    ):
        if named and named.device != device:
            continue
        present = len(host.nodes(pattern))
        if not present:
            if device == "npu" and (virtual := host.nodes(r"vdavinci\d+")):
                raise UserError(
                    f"/dev/{virtual[0]} is a virtual NPU, a part of a card: nothing is known of its memory; "
                    "pass whole cards (/dev/davinci0, …) to this machine or container"
                )
            continue
        indices = visible_cards(host.environ.get(VISIBLE[device]), device, present)
        names = _names(device, _output(tool))
        if named and not names:
            return replace(named, count=len(indices), nodes=nodes, indices=indices, confirmed=False)
        if len(names) != 1:
            what = f"of several kinds ({', '.join(sorted(names))})" if names else f"that {tool[0]} does not name"
            raise UserError(f"{present} {device} cards are here, {what}: say which, such as --cards 8x910B3-64G")
        facts = lookup(names.pop())
        if facts.memory.value is None:
            if device == "npu" and A3.fullmatch(facts.name):
                raise UserError(f"the cards here are called {facts.name}: {NOT_A3}")
            raise UserError(f"the cards here, {facts.name}, are not in the table; there is {_known()}")
        return Cards(device, facts, len(indices), facts.memory.value, nodes, indices)
    return _cpu(None)


def visible_cards(listed: str | None, device: str, present: int) -> tuple[int, ...]:
    """The cards that the environment leaves visible, by number. Raises `UserError` for what does not tell."""
    if listed is None:
        return tuple(range(present))
    words = [word.strip() for word in listed.split(",")]
    if not all(map(str.isdecimal, words)) and any(words):
        raise UserError(
            f"{VISIBLE[device]}={listed}: cards are planned by number: list some of 0 to {present - 1}, or unset it"
        )
    indices = tuple(dict.fromkeys(int(word) for word in words if word and int(word) < present))
    if not indices:
        raise UserError(f"{VISIBLE[device]}={listed} hides every card; unset it, or list some of 0 to {present - 1}")
    return indices


def _cpu(memory: float | None) -> Cards:
    facts = TABLE["CPU"]
    return Cards("cpu", facts, 1, memory if memory is not None else CpuDevice().memory().total)


def _named(text: str) -> DeviceFacts:
    """The card of a name as the table, the drivers or people write it; a size after it must be the card's."""
    plain = re.sub(r"(\d+)GB$", r"\1G", text.upper().removeprefix("NVIDIA ").strip())
    name = SHORT.get(plain, plain if plain in TABLE else text)
    facts = lookup(name)
    size = re.fullmatch(r"(.+?)-(\d+)GB?", name, re.IGNORECASE)
    if facts.name not in TABLE and size:
        facts = lookup(size[1])
        memory = facts.memory.value
        if facts.name in TABLE and memory and round(memory / GiB) != int(size[2]):
            raise UserError(f"--cards: a {facts.name} has {memory / GiB:.0f} GiB, not {size[2]}; nothing else is known")
    if facts.name not in TABLE or facts.name == "CPU":
        if A3.fullmatch(name) and not name.endswith("910"):
            raise UserError(f"--cards {text}: {NOT_A3}")
        known = [row for row in TABLE if row != "CPU"]
        hint = " (910B1, 910B2, 910B3 or 910B4? npu-smi info tells)" if re.search("910B?$", name.upper()) else ""
        raise UserError(f"--cards: unknown card '{text}'{hint or suggest(name.upper(), known)}; there is {_known()}")
    return facts


def _known() -> str:
    return ", ".join(row for row in TABLE if row != "CPU")


def _device(facts: DeviceFacts) -> str:
    return "npu" if facts.name.startswith("910") else "cuda"


def _output(command: tuple[str, ...]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _names(device: str, text: str) -> set[str]:
    """The kinds of card that a vendor's tool lists, as the table calls them where it does, in whatever case."""
    if device == "npu":
        found = re.findall(r"\|\s*\d+\s+(?:Ascend)?(910[\w-]*)", text, re.IGNORECASE)
    else:
        found = [line.strip() for line in text.splitlines() if line.strip()]
    return {lookup(name).name for name in found}
