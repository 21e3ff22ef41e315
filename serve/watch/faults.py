"""Faults of devices, by what the runtimes print: a table, and a search in lines of an engine's log.

Only lines of the engine core and the workers count, never those of the API server, and lines without a process's name
only where they begin the way a device's runtime begins them. Signed are those with the word that this start gave to
`serve.plugin.log_format`, which lets nothing of a request through: a client can have written no such line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ACTIONS = ("isolate", "stop", "restart", "ignore")
NEAR = 8  # lines of one process in which a traceback that names the fault names the card


@dataclass(frozen=True)
class Kind:
    """One row of the table. words: a regular expression; codes: numbers that CANN's runtime returns for it.

    action: isolate (no engine on this card again, until a person says so), stop, restart, ignore. repeats: a second one
    on the same card within an hour means that the card is sick.
    """

    name: str
    meaning: str
    action: str
    words: str
    source: str
    codes: tuple[int, ...] = ()
    repeats: bool = False


@dataclass(frozen=True)
class Fault:
    """A fault that was found. cards: numbers as the engine counts them, empty if no line says; line: where it stood.

    is_signed: no client can have written it.
    """

    name: str
    meaning: str
    action: str
    cards: tuple[int, ...]
    line: str
    is_signed: bool = False


_NPU = "torch_npu NPUException.h, NPUQueue.cpp, ProcessGroupHCCL.cpp"
_ACL = "CANN rt_error_codes.h"
_XID = "NVIDIA Xid catalogue"
_CUDA = "cudaGetErrorString"
_NUMBERED = r"\bXid(?: \(PCI:[\da-fA-F:.]+\))?: ?"

# The worst first: of one line the first row that fits counts. Not one of them has been seen on a card here.
TABLE = (
    Kind("HBM-ECC", "memory has lost bits that cannot be corrected", "isolate",
         r"HBM MULTI BIT ECC ERROR|reason=\[hbm Multi-bit ECC error\]", _NPU, (507054,)),
    Kind("UCE", "memory has an uncorrectable error", "isolate",
         r"\bUCE ERROR\b|reason=\[device mem error\]", _NPU, (507053,)),
    Kind("suspect-memory", "memory may be damaged, so that answers may be wrong", "isolate",
         r"SUSPECT MEM ERROR|reason=\[suspect device mem error\]", _NPU, (507055,)),
    Kind("CUDA-ECC", "memory has lost bits that cannot be corrected", "isolate",
         r"uncorrectable ECC error encountered|double.bit ECC error", _CUDA + " 214"),
    Kind("Xid-memory", "the driver reports a memory fault", "isolate",
         rf"{_NUMBERED}(?:48|64|94|95|140)\b", _XID),
    Kind("card-lost", "the card is no longer there", "isolate",
         rf"GPU has fallen off the bus|\bGPU is lost\b|{_NUMBERED}79\b", _XID),
    Kind("fabric", "NVSwitch is not set up: nvidia-fabricmanager must run, in the driver's version", "stop",
         r"system not yet initialized|cudaErrorSystemNotReady|CUDA_ERROR_SYSTEM_NOT_READY", _CUDA + " 802"),
    Kind("driver", "the driver is too old for this CUDA", "stop",
         r"CUDA driver version is insufficient for CUDA runtime version", _CUDA + " 35"),
    Kind("other-chip", "the engine was not built for this chip", "stop",
         r"no kernel image is available for execution on the device", _CUDA + " 209"),
    Kind("CANN-missing", "CANN's environment is not set: source its set_env.sh", "stop",
         r"lib(?:atb|ascendcl|hccl|opapi)\.so[.\d]*: cannot open shared object file", "vllm-ascend issues"),
    Kind("HCCS-link", "the link between cards failed", "restart",
         r"HCCS LINK ERROR|\bUB LINK ERROR\b|reason=\[link error\]", _NPU, (507056,)),
    Kind("HCCL-retry", "an exchange between cards failed, also when repeated", "restart",
         r"HCCL OP RETRY FAILED", _NPU, (507904,)),
    Kind("suspect-remote", "another card, or the way to it, failed", "restart",
         r"SUSPECT REMOTE ERROR", _NPU, (507057,)),
    Kind("aicore-timeout", "a kernel did not end", "restart",
         r"reason=\[(?:aicore|vector core) timeout\]", _ACL, (507014, 507034), repeats=True),
    Kind("aicore-exception", "a kernel failed", "restart",
         r"reason=\[(?:aicore|vector core) exception\]", _ACL, (507015, 507035)),
    Kind("aicpu", "a kernel of the card's own CPU hung or failed", "restart",
         r"reason=\[aicpu (?:exception|timeout)\]", _ACL, (507017, 507018)),
    Kind("fftsplus-timeout", "an exchange between cards, or a graph, did not end", "restart",
         r"fftsplus (?:task )?timeout", _ACL + "; vllm-ascend #2800, #16646", (507048,)),
    Kind("stream-timeout", "a stream did not end", "restart", r"reason=\[stream sync(?:hronize)? timeout\]", _ACL,
         (507046,)),
    Kind("heartbeat-lost", "the card's task scheduler does not answer", "restart", r"reason=\[lost heartbeat\]", _ACL,
         (507010,), repeats=True),
    Kind("driver-internal", "the driver failed", "restart", r"reason=\[drv internal error\]", _ACL, (507899,)),
    Kind("HCCL-connect", "a rank was missing when the cards were connected", "restart",
         r"\bEI0006\b|Getting socket times out", "HCCL EI0006"),
    Kind("collective-timeout", "a rank did not take part in an exchange: its process died or hangs", "restart",
         r"[Ww]atchdog caught collective operation timeout|collective operation timeout: Work[NH]CCL",
         "ProcessGroupNCCL.cpp, ProcessGroupHCCL.cpp"),
    Kind("NPU-memory", "the card has too little memory for this configuration", "restart",
         r"NPU out of memory", "torch_npu NPUCachingAllocator.cpp"),
    Kind("NVLink", "the link between cards failed", "restart",
         rf"uncorrectable NVLink error|{_NUMBERED}74\b", _CUDA + " 220; " + _XID),
    Kind("illegal-access", "a kernel read or wrote where it may not", "restart",
         r"an illegal memory access was encountered|CUDA error: misaligned address|"
         rf"{_NUMBERED}(?:13|31)\b", _CUDA + " 700, 716; " + _XID),
    Kind("illegal-instruction", "a kernel is damaged, or the card", "restart",
         r"CUDA error: an illegal instruction was encountered", _CUDA + " 715", repeats=True),
    Kind("device-assert", "a kernel's own check failed", "restart",
         r"device-side assert triggered", _CUDA + " 710"),
    Kind("launch-failure", "a kernel failed", "restart", r"unspecified launch failure", _CUDA + " 719"),
    Kind("launch-timeout", "a kernel did not end", "restart",
         r"the launch timed out and was terminated", _CUDA + " 702", repeats=True),
    Kind("NCCL", "an exchange between cards failed", "restart",
         r"NCCL error.{0,120}?(?:unhandled (?:system|cuda) error|remote process exited)", "ncclGetErrorString"),
    Kind("CUDA-memory", "the card has too little memory for this configuration", "restart",
         r"CUDA out of memory|CUDA error: out of memory", "CUDACachingAllocator.cpp"),
    Kind("force-stop", "work on the card was stopped on purpose", "ignore",
         r"\bFORCE STOP\b|reason=\[device task abort\]", _NPU, (107022,)),
)  # fmt: skip


def _pattern(kind: Kind) -> re.Pattern[str]:
    """Words in any case; a code only after what calls it one, for as a number alone it may be anything."""
    words = f"(?i:{kind.words})"
    if not kind.codes:
        return re.compile(words)
    codes = "|".join(map(str, kind.codes))
    called = r"(?:error code(?: is|:| =)?|runtime result =|failed:|ret(?:Code)?\s?[=:])"
    return re.compile(rf"{words}|(?i:{called}) ?(?:{codes})\b")


_PATTERNS = tuple((kind, _pattern(kind)) for kind in TABLE)
# "(Worker_TP3 pid=9) ERROR 11-23 08:00:00 [core.py:7] …" of vLLM; "[2026-11-23 08:00:00 TP3] …" of SGLang's schedulers.
_VLLM = re.compile(
    r"^\((?P<name>[^()]{1,80}?) pid=\d+\) (?:(?P<level>[A-Z]+) [\d-]+ [\d:]+ \[[^\] ]*(?: (?P<mark>\w+))?\] )?"
)
_SGLANG = re.compile(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?P<ranks>(?: [A-Z]+\d+)+)\] ")
_OTHERS = ("EngineCore", "Worker", "VllmWorker", "DPCoordinator", "Coordinator")
_RAW = re.compile(
    r"^(?:\[rank\d+\]:|\[[WEF]\d{3} |\[ERROR\] |\[Error\]: |E[A-Z]\d{4}\b|terminate called|\s+what\(\): |NVRM: Xid"
    r"|(?:torch\.)?(?:[\w.]+\.)?(?:RuntimeError|AcceleratorError|OutOfMemoryError|DistBackendError): "
    r"|ImportError: lib|OSError: lib|CUDA error: )"
)
_CARD = re.compile(r"\b(?:device[ _]?id\s?[=:]?|Device:|npu:|cuda:|NPU |GPU )\s?(\d{1,2})\b", re.IGNORECASE)
_RANK = re.compile(r"(?:^|[_ ])TP[_=]?(\d{1,2})\b")


def faults_in(lines: Iterable[str], mark: str = "") -> list[Fault]:
    """Return the faults that lines of an engine's log tell of, in their order, each with a card once.

    A fault's card is looked for in its line, in the process's name, then in the same process's lines around it; of a
    signed line in signed ones only.

    Args:
        mark: the word that signed lines have; "": none is signed.
    """
    kept = list(lines)
    sources = [_source(line, mark) for line in kept]
    found: dict[tuple[str, tuple[int, ...], bool], Fault] = {}
    for at, line in enumerate(kept):
        source = sources[at]
        if source is None:
            continue
        kind = next((kind for kind, pattern in _PATTERNS if pattern.search(line)), None)
        if kind is not None:
            near = [kept[i] for i in range(max(0, at - NEAR), min(len(kept), at + NEAR)) if sources[i] == source]
            name, is_signed = source
            cards = _cards(line, name, near)
            fault = Fault(kind.name, kind.meaning, kind.action, cards, line, is_signed)
            found.setdefault((kind.name, cards, is_signed), fault)
    return without_lesser(found.values())


def without_lesser(faults: Iterable[Fault]) -> list[Fault]:
    """Leave out what others say better: an unsigned fault that is there signed, one without a card that has one."""
    kept = list(faults)
    signed = {fault.name for fault in kept if fault.is_signed}
    kept = [fault for fault in kept if fault.is_signed or fault.name not in signed]
    with_card = {fault.name for fault in kept if fault.cards}
    return [fault for fault in kept if fault.cards or fault.name not in with_card]


def _source(line: str, mark: str) -> tuple[str, bool] | None:
    """Which process wrote a line ("": the runtime itself), and whether it is signed; None if it does not count."""
    if prefix := _VLLM.match(line):
        is_engine = prefix["name"].startswith(_OTHERS) and prefix["level"] not in ("INFO", "DEBUG")
        return (prefix["name"], bool(mark) and prefix["mark"] == mark) if is_engine else None
    if prefix := _SGLANG.match(line):
        return prefix["ranks"].strip(), False
    return ("", False) if _RAW.match(line) else None


def _cards(line: str, source: str, near: Sequence[str]) -> tuple[int, ...]:
    """Card numbers, as the engine counts the cards that it sees.

    With data parallelism each rank may see cards of its own, all of which begin at 0: then nothing is known.
    """
    if "DP" in source or "PP" in source:
        return ()
    for text in (line, *near):
        if cards := {int(number) for number in _CARD.findall(text)}:
            return tuple(sorted(cards))
        if text is line and (rank := _RANK.search(source)):
            return (int(rank[1]),)
    return ()
