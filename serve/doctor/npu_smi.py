"""What `npu-smi` prints, read: the table of `npu-smi info`, and the "name : value" lists of `npu-smi info -t …`.

A card counts as shown only if both of its rows are there to the closing bar; anything else is left out, never guessed.
Layouts known: 23.0 to 26.0 with one chip per card (910B) and with two (A3); see tests/recorded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

HEALTHY = "OK"
# Values of "Health" in Huawei's npu-smi reference, and what each means there.
HEALTH = {
    "OK": "normal",
    "Warning": "a minor alarm",
    "Alarm": "a major alarm",
    "Critical": "a critical alarm",
    "UNKNOWN": "the device does not exist or is not started",
    "Offline": "the device is offline",
}
# Fault codes of a card's own network port. MindCluster, clusterd constant.LinkDownFaultCode: "parameter plane network".
NETWORK_CODES = frozenset({"81078603"})
# What it says instead of a table: pattern, meaning, what to do.
SAYS = (
    (
        r"ret is -8020|because the device is used",
        "another container holds the cards",
        "stop that container, or give each container cards of its own",
    ),
    (
        r"ret is -8005|dcmi module initialize failed",
        "the driver does not start",
        "add this user to the group HwHiAiUser, pass the device nodes into the container, and reboot after an update "
        "of driver or firmware",
    ),
    (
        r"DrvMngGetConsoleLogLevel failed",
        "the driver does not answer",
        "check that the driver's modules are loaded and that this user may open /dev/davinci_manager",
    ),
    (
        r"error while loading shared libraries",
        "the driver's libraries are not found",
        "add /usr/local/Ascend/driver/lib64/driver and lib64/common to LD_LIBRARY_PATH, in a container mount them",
    ),
)

_NAMED = re.compile(r"(\d+)\s+([0-9A-Za-z][\w.-]*)")
_CHIP = re.compile(r"(\d+)(?:\s+(\d+))?")
_USED_OF = re.compile(r"(\d+)\s*/\s*(\d+)")
_VERSION = re.compile(r"\|\s*npu-smi\s+(\S+)\s+Version:\s*(\S+)\s*\|")
_ACCELERATOR_A2 = re.compile(r"(Ascend)?910B\d\S*")


@dataclass(frozen=True)
class Card:
    """A chip in the table: HBM in MB (None: no such column), temperature in °C."""

    npu: int
    chip: int
    name: str
    health: str
    temperature: int | None
    hbm_used: int | None
    hbm_total: int | None


@dataclass(frozen=True)
class Process:
    """A process on a card: HBM in MB. In a container its name may be empty."""

    npu: int
    chip: int
    pid: int
    name: str
    memory: int


@dataclass(frozen=True)
class Table:
    """What `npu-smi info` showed. No process of a card may also mean that the list was not there."""

    version: str | None = None
    cards: list[Card] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)


def parse_info(text: str) -> Table:
    """Read `npu-smi info`. Never raises; an empty table is one that could not be read."""
    version = _VERSION.search(text)
    table = Table(version[1] if version else None)
    has_hbm, in_processes, first = False, False, None
    for line in text.splitlines():
        line = line.strip()
        if not (line.startswith("|") and line.endswith("|") and len(line) > 1):
            continue
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        has_hbm = has_hbm or "HBM-Usage(MB)" in line
        in_processes = in_processes or "Process id" in line
        if in_processes:
            _read_process(table, cells)
        elif len(cells) == 3 and (named := _NAMED.fullmatch(cells[0])) and not _CHIP.fullmatch(cells[0]):
            first = (int(named[1]), named[2], cells[1], _temperature(cells[2]))
        elif len(cells) == 3 and first and (chip := _CHIP.fullmatch(cells[0])):
            pairs = _USED_OF.findall(cells[2])
            used, total = map(int, pairs[-1]) if has_hbm and pairs else (None, None)
            table.cards.append(Card(first[0], int(chip[1]), *first[1:], used, total))
            first = None
    return table


def _temperature(cell: str) -> int | None:
    """The second figure of "Power(W) Temp(C) Hugepages-Usage(page)"."""
    words = cell.split()
    return int(words[1]) if len(words) > 1 and words[1].isdecimal() else None


def _read_process(table: Table, cells: list[str]) -> None:
    if len(cells) >= 4 and (card := _CHIP.fullmatch(cells[0])) and cells[1].isdecimal() and cells[3].isdecimal():
        table.processes.append(Process(int(card[1]), int(card[2] or 0), int(cells[1]), cells[2], int(cells[3])))


def parse_fields(text: str) -> dict[str, str]:
    """Read the "name : value" lines of `npu-smi info -t board|health|ecc|usages -i N`; the first of a name counts.

    The last line counts only if it is a whole one.
    """
    fields: dict[str, str] = {}
    for line in text.splitlines(keepends=True):
        name, colon, value = line.partition(" : ")
        if colon and line.endswith("\n"):
            fields.setdefault(name.strip(), value.strip())
    return fields


def uncorrected_errors(fields: dict[str, str]) -> dict[str, int] | None:
    """Return the HBM's counts of double-bit errors by name from the fields of ``-t ecc``; None if there are none."""
    counts = {
        name: int(value)
        for name, value in fields.items()
        if name.startswith("HBM Double Bit") and not name.startswith("HBM Double Bit Next") and value.isdecimal()
    }
    return counts or None


def says(text: str) -> tuple[str, str] | None:
    """Return what the tool's own words mean and what to do, if it is one of the known complaints."""
    return next(((meaning, remedy) for pattern, meaning, remedy in SAYS if re.search(pattern, text)), None)


def family(name: str, chips: int = 1) -> str | None:
    """Return the kind of chip a card's name stands for, as vllm-ascend's wheels name it; None if unknown.

    "910B" without a digit, like "910ProB", is the first Ascend 910 and not a 910B.
    """
    if _ACCELERATOR_A2.fullmatch(name):
        return "A2"
    if name == "Ascend910" and chips > 1:
        return "A3"
    if name in ("910A", "910B", "910ProA", "910ProB", "910PremiumA"):
        return "the first Ascend 910"
    return "310P" if name.startswith("310P") else None
