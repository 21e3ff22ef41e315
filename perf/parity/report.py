"""What a comparison ends with: the terminal's table, with ``--html`` one page, with ``--json`` one line of JSON."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from perf.parity.judge import Check, Comparison, Verdict
from perf.parity.judge_served import ServedNumbers
from perf.parity.limits import Limits
from perf.parity.side import SideInfo


@dataclass(frozen=True)
class ServerInfo:
    """The server that was judged. version: of vLLM, as `/version` says; top: how many log-probabilities it gave."""

    side: str
    model: str
    version: str | None
    top: int
    date: str


@dataclass(frozen=True)
class Report:
    """Everything that a reader may want to know of one comparison; b is a `ServerInfo` with `ServedNumbers`."""

    command: str
    a: SideInfo
    b: SideInfo | ServerInfo
    numbers: Comparison | ServedNumbers
    limits: Limits
    checks: list[Check]
    verdict: Verdict

    @property
    def result(self) -> str:
        """PASS or FAIL."""
        return "PASS" if self.verdict.passed else "FAIL"

    @property
    def precision(self) -> str:
        """In words."""
        return f"{self.a.quantise} over {self.a.dtype}" if self.a.quantise else self.a.dtype

    @property
    def emulated(self) -> bool:
        """Whether an emulated card took part."""
        return self.a.emulated or (isinstance(self.b, SideInfo) and self.b.emulated)

    @property
    def layered(self) -> bool:
        """Whether layers were seen: not of a server."""
        return not isinstance(self.numbers, ServedNumbers)

    @property
    def same_weights(self) -> bool | None:
        """Whether samples of both sides' files are the same bytes; None for a server."""
        return self.a.weights_sha256 == self.b.weights_sha256 if isinstance(self.b, SideInfo) else None

    @property
    def why(self) -> str:
        """The verdict in one sentence."""
        reasons, numbers = self.verdict.reasons, self.numbers
        if reasons:
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            return f"{reasons[0]}{more}; look at: {self.verdict.cause}"
        if isinstance(numbers, ServedNumbers):
            far = f"{numbers.middle:.2g} times as far from it as rounding takes the model"
            return f"{self.b.side} answers as {self.a.side} has recorded: the middle half of its positions is {far}"
        flips = sum(layer.flips for layer in numbers.layers)
        ties = f", {flips} tokens took other experts at a near-tie" if flips else ""
        emulated = "; an emulated card says nothing of a real one's rounding or speed" if self.emulated else ""
        layers = f"all {len(numbers.layers)} layers and the head"
        alike = isinstance(self.b, SideInfo) and (self.a.side, self.a.device_name) == (self.b.side, self.b.device_name)
        same = "; both sides ran on the same kind of device" if alike else ""
        return f"{self.b.side} computes what {self.a.side} does in {layers}{ties}{emulated}{same}"

    @property
    def not_proven(self) -> list[str]:
        """What a PASS does not say, one sentence each."""
        length = max(batch[1] for batch in self.a.batches)
        found = [
            f"Prompts are random tokens, at most {length} long: longer contexts, the tokenizer, the chat template and "
            "sampling are not covered, nor is what the answers are worth to a clinician.",
            "The limits rest on CPUs, the vLLM CPU engine and emulated cards; no real card has been measured yet.",
        ]
        if isinstance(self.numbers, ServedNumbers):
            found.append(
                "No layer can be named from a server's log-probabilities. A fault that shows at fewer than one "
                "position in ten can hide, and so can one as small as rounding. In bf16 these are known to pass: a "
                "routed_scaling_factor of 2.4 for 2.5 in one layer, a router in bf16, a norm 2 % off in one layer, two "
                "swapped rows of the head. Which weights the server has, and on what device, it does not say."
            )
        else:
            found.append(
                "One device per side: tensor, expert and data parallel are not covered. Weights are compared by what "
                "they compute; one changed element of a bf16 matrix can hide below the rounding."
            )
        if self.emulated:
            found.insert(0, "A side ran on an emulated card, in software: it says nothing of a real card.")
        return found

    def document(self) -> dict[str, Any]:
        """Return all of it as JSON has it: what is not a number or not finite is null."""
        numbers = asdict(self.numbers)
        if isinstance(self.numbers, ServedNumbers):
            numbers |= {name: getattr(self.numbers, name) for name in ("first", "middle", "tail", "decode")}
        for one, row in zip(self.numbers.divergences, numbers["divergences"], strict=True):
            row["explained"] = one.explained(self.limits)
        found = {
            "command": self.command,
            "a": asdict(self.a),
            "b": asdict(self.b),
            "verdict": self.result,
            "reasons": self.verdict.reasons,
            "cause": self.verdict.cause,
            "limits": asdict(self.limits),
            "numbers": numbers,
        }
        cleaned: dict[str, Any] = _finite(found)
        return cleaned


def publish(report: Report, args: argparse.Namespace) -> None:
    """Print it, and write the page and the JSON line that were asked for."""
    from perf.parity.terminal import show

    show(report, args.layers)
    if args.html is not None:
        from perf.parity.page import write_page

        write_page(report, args.html)
        print(f"wrote {args.html}")
    if args.json:
        print(json.dumps(report.document(), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
