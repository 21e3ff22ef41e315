"""Checks of Ascend cards, by `npu-smi`: are they all there, healthy, free, and of a kind we know."""

from __future__ import annotations

import re
from collections.abc import Iterator

from serve.doctor import npu_smi
from serve.doctor.finding import Finding, error, note, ok, unknown, warning
from serve.doctor.machine import Machine
from serve.doctor.npu_smi import Card, Table

# What the system itself holds of an idle card: 2.8 to 3.6 GB in every recorded table of a 910B.
IDLE_MB = 4500
VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
NODE = r"v?davinci\d+"
HOT_CELSIUS = 85  # idle cards in the recorded tables: 27 to 57
WHERE = "npu-smi lies in /usr/local/bin or /usr/local/sbin; in a container mount it and /usr/local/Ascend/driver"


def table(m: Machine) -> Table:
    """Return what `npu-smi info` shows; empty where it shows nothing."""
    return npu_smi.parse_info(m.run("npu-smi", "info").text)


def used(m: Machine) -> list[Card]:
    """Return the cards this launch may use: those that ASCEND_RT_VISIBLE_DEVICES leaves, counted as they are shown."""
    cards = table(m).cards
    visible = m.host.environ.get(VISIBLE)
    if visible is None or len(cards) < len(m.host.nodes(NODE)):  # with a card missing, nobody knows how they count
        return cards
    left = {int(index) for index in re.findall(r"\d+", visible)}
    return [card for index, card in enumerate(cards) if index in left]


def chip_family(m: Machine) -> str | None:
    """Return which kind of chip the cards are ("A2" for 910B), None if npu-smi does not tell."""
    cards = table(m).cards
    if not cards:
        return None
    return npu_smi.family(cards[0].name, len({card.chip for card in cards}))


def check_npu_smi(m: Machine) -> Iterator[Finding]:
    """Whether npu-smi answers, and shows as many cards as there are device nodes."""
    answer = m.run("npu-smi", "info")
    if answer.is_missing:
        yield unknown("health and free memory of the cards", "npu-smi is not installed", WHERE)
        return
    if said := npu_smi.says(answer.text):
        yield error(f"npu-smi shows no cards: {said[0]}", "torch_npu would find none either", said[1])
        return
    shown = table(m)
    if answer.problem:
        yield unknown("health and free memory of the cards", f"npu-smi {answer.problem}", "run `npu-smi info` by hand")
    elif not shown.cards:
        yield unknown("health and free memory of the cards", "npu-smi's table is of a layout we do not know")
    if not shown.cards:
        return
    nodes = m.host.nodes(NODE)
    names = sorted({card.name for card in shown.cards})
    if nodes and len(shown.cards) < len(nodes):
        why = f"npu-smi shows {len(shown.cards)} and /dev has {len(nodes)}: a card that is not shown counts as broken"
        make = error if m.host.environ.get(VISIBLE) is None else warning
        yield make("not every card is shown", why, "run `npu-smi info`, look at dmesg; reboot, then have it looked at")
    else:
        yield ok(f"npu-smi {shown.version or '(version unknown)'} shows {len(shown.cards)} x {', '.join(names)}")
    if len(names) > 1:
        yield warning("the cards are of different kinds", "the smallest sets the pace", "use those of one kind")


def check_chip(m: Machine) -> Iterator[Finding]:
    """Whether the cards are 910B, which everything here is written for."""
    cards = table(m).cards
    kind = chip_family(m)
    if not cards:
        return
    if kind == "A2":
        yield ok(f"{cards[0].name} is an Ascend 910B")
    elif kind is None:
        yield unknown(f"what kind of chip {cards[0].name} is", "it is not in our table")
    else:
        yield error(
            f"{cards[0].name} is {kind}, not an Ascend 910B",
            "vllm-ascend and this project's plans are for 910B here",
            "use a server with 910B1 to 910B4; A3 needs vllm-ascend's image for A3",
        )


def check_health(m: Machine) -> Iterator[Finding]:
    """Health, temperature and, where something is wrong, the error codes of each card."""
    cards = used(m)
    for card in cards:
        where = f"card {card.npu}" if card.chip == 0 else f"card {card.npu} chip {card.chip}"
        if card.health not in npu_smi.HEALTH:
            yield unknown(f"the health of {where}", f"npu-smi says '{card.health}'", "run `npu-smi info` by hand")
        elif card.health != npu_smi.HEALTHY:
            yield _sick(m, where, card.npu, card.health)
        if card.temperature is None:
            yield unknown(f"{where}: its temperature", "npu-smi shows none")
        elif card.temperature >= HOT_CELSIUS:
            why = "it will be slowed down or switched off"
            yield warning(f"{where} has {card.temperature} °C", why, "check fans, air flow and the room")
    if cards and all(card.health == npu_smi.HEALTHY for card in cards):
        yield ok(f"npu-smi says of all {len(cards)} cards that they are healthy")


def _sick(m: Machine, where: str, npu: int, health: str) -> Finding:
    fields = npu_smi.parse_fields(m.run("npu-smi", "info", "-t", "health", "-i", str(npu)).text)
    told = [fields.get(name, "NA") for name in ("Error Code", "Error Information")]
    detail = ", ".join(text for text in told if text != "NA")
    codes = re.findall(r"\b(?:0x)?([\dA-F]{8})\b", told[0], re.IGNORECASE)
    shown = f"{health}: {detail}" if detail else health
    if codes and m.asked.nodes == 1 and {code.upper() for code in codes} <= npu_smi.NETWORK_CODES:
        why = "the network of the cards between servers, which one server does not use"
        return warning(f"{where} has health {shown}", why, f"hccn_tool -i {npu} -link -g")
    remedy = f"`npu-smi info -t health -i {npu}` shows the codes; leave the card out, have it looked at"
    make = warning if health == "Warning" else error
    return make(f"{where} has health {shown}", f"{npu_smi.HEALTH[health]}; answers may be wrong", remedy)


def check_memory(m: Machine) -> Iterator[Finding]:
    """HBM that something else holds, and the processes that hold it."""
    cards = used(m)
    npus = {card.npu for card in cards}
    processes = [process for process in table(m).processes if process.npu in npus]
    for process in processes:
        yield warning(
            f"card {process.npu}: pid {process.pid} ({process.name or 'name not shown'}) holds {process.memory} MB",
            "the engine takes a share of all the memory and fails if it is not free",
            f"end it, or leave the card out by {VISIBLE}; kill {process.pid} if it was left behind",
        )
    busy = {process.npu for process in processes}
    free = 0
    for card in cards:
        if card.hbm_used is None or card.hbm_total is None:
            yield unknown(f"card {card.npu}: its free memory", "npu-smi shows none")
            continue
        free += 1 if card.hbm_used <= IDLE_MB else 0
        if card.hbm_used > IDLE_MB and card.npu not in busy:
            yield warning(
                f"card {card.npu}: {card.hbm_used} of {card.hbm_total} MB are in use, and no process is shown",
                "it is held in another container or by a process that hangs; the engine fails if it is not free",
                "look on the host itself: `npu-smi info`, `fuser -v /dev/davinci*`",
            )
    if cards and free == len(cards):
        yield ok(f"the memory of all {free} cards is free")


def check_ecc(m: Machine) -> Iterator[Finding]:
    """Uncorrectable errors of the HBM that the cards remember."""
    npus = sorted({card.npu for card in used(m)})
    clean = []
    for npu in npus:
        answer = m.run("npu-smi", "info", "-t", "ecc", "-i", str(npu))
        counts = npu_smi.uncorrected_errors(npu_smi.parse_fields(answer.text))
        if answer.problem or counts is None:
            yield unknown(f"card {npu}: errors of its memory", f"npu-smi {answer.problem or 'shows no counts'}")
        elif any(counts.values()):
            named = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
            is_now = counts.get("HBM Double Bit Error Count", 0) > 0
            make = error if is_now else warning
            yield make(
                f"card {npu}: {named}",
                "these bits could not be corrected: what lay there was wrong",
                "leave the card out and have it looked at" if is_now else "watch it; a growing count is a dying card",
            )
        else:
            clean.append(npu)
    if clean and clean == npus:
        yield ok("no card remembers uncorrectable memory errors")


def check_firmware(m: Machine) -> Iterator[Finding]:
    """The first card's own verdict on driver and firmware."""
    cards = table(m).cards
    if not cards:
        return
    answer = m.run("npu-smi", "info", "-t", "board", "-i", str(cards[0].npu))
    fields = npu_smi.parse_fields(answer.text)
    versions = f"driver {fields.get('Software Version', '?')}, firmware {fields.get('Firmware Version', '?')}"
    verdict = fields.get("Compatibility")
    if answer.problem or verdict is None:
        yield unknown("whether driver and firmware fit together", f"npu-smi {answer.problem or 'does not say'}")
    elif verdict.upper() == "OK":
        yield ok(f"npu-smi says that {versions} fit together")
    else:
        yield error(
            f"npu-smi says '{verdict}' of {versions}",
            "parts of the runtime fail with a pair that does not fit",
            "install driver and firmware of one release, then reboot",
        )


def check_visible(m: Machine) -> Iterator[Finding]:
    """ASCEND_RT_VISIBLE_DEVICES that names cards by the host's numbers inside a container (vllm-ascend #2557)."""
    visible = m.host.environ.get(VISIBLE)
    cards = len(m.host.nodes(NODE))
    if visible is None or not cards:
        return
    beyond = [index for index in re.findall(r"\d+", visible) if int(index) >= cards]
    if beyond:
        yield error(
            f"{VISIBLE}={visible} names card {beyond[0]}, and {cards} are there",
            "inside a container cards count from 0, whatever their numbers on the host",
            f"unset it, or list indices from 0 to {cards - 1}",
        )
    else:
        yield note(f"{VISIBLE}={visible}", "only these cards are used, and looked at here")
