"""What an engine's log tells of sick devices: found as it is written, acted on when the engine has failed.

Never before: a fault that is real ends the engine, one that was only written ends nothing. And a line that is not
signed (libraries in C++ write past every formatter, and some repeat what a client sent) isolates or stops nothing by
itself: then the vendor's tool is asked which card counts memory errors.
"""

from __future__ import annotations

import sys
import time

from ascend.errors import UserError
from serve.engine import EngineCommand
from serve.planning.cards import VISIBLE
from serve.plugin.log_format import MARK
from serve.state import printable
from serve.watch.events import EventLog
from serve.watch.faults import Fault, faults_in, without_lesser
from serve.watch.isolation import isolate, isolate_numbers, judged, sick_cards
from serve.watch.progress import Tail
from serve.watch.ready import EngineError, FinalError, Server

SETTLE_SECONDS = 1.0  # from the end of the engine to the last line of its processes
CONTEXT_LINES = 40  # before what is new, for the line of a fault that names the card
# What has not ended the engine for so long is not why it ends now. Faults of memory count for its whole life.
REMEMBERED_SECONDS = 900.0
MOST_FAULTS = 1000


class FaultLog:
    """The device faults of one engine's life, each acted on and told once."""

    def __init__(self, server: Server, command: EngineCommand, events: EventLog) -> None:
        self._server = server
        self._command = command
        self._events = events
        self._mark = command.environment.get(MARK, "")
        self._tail = Tail(server.log)
        self._lines: list[str] = []
        self._found: dict[tuple[str, tuple[int, ...], bool], tuple[float, Fault]] = {}

    def follow(self) -> None:
        """Read what is new, and remember the faults that it tells of."""
        while new := self._tail.lines():
            self._lines += new
            for fault in faults_in(self._lines, self._mark):
                key = fault.name, fault.cards, fault.is_signed
                is_known = key in self._found
                # The latest time: the same fault, an hour later, is why the engine ends.
                if (is_known and fault.line in new) or (not is_known and len(self._found) < MOST_FAULTS):
                    self._found[key] = time.monotonic(), fault
            self._lines = self._lines[-CONTEXT_LINES:]

    def explain(self, failure: EngineError) -> EngineError:
        """Return the failure with the device fault behind it, which has been acted on by then."""
        time.sleep(SETTLE_SECONDS)
        self.follow()
        causes = []
        final = None
        for fault in self._causes():
            acted_on, outcome = self._act(self._judged(fault))
            final = final or outcome
            if acted_on.action == "restart":
                causes.append(acted_on.name)
        if final:
            return final
        return type(failure)(f"{failure} (device fault: {', '.join(causes)})") if causes else failure

    def _causes(self) -> list[Fault]:
        """The faults that may have ended the engine, the worst first."""
        now = time.monotonic()
        kept = without_lesser(
            fault
            for at, fault in self._found.values()
            if now - at < REMEMBERED_SECONDS or (fault.action == "isolate" and fault.is_signed)
        )
        worst = ("isolate", "stop", "restart", "ignore")
        return sorted(kept, key=lambda fault: worst.index(fault.action))

    def _judged(self, fault: Fault) -> Fault:
        if not fault.is_signed:
            return fault
        try:
            return judged(fault, self._server.log.parent)
        except UserError as error:  # what happened before is not known; what happens now is dealt with all the same
            print(f"device fault: {error}", file=sys.stderr, flush=True)
            return fault

    def _act(self, fault: Fault) -> tuple[Fault, FinalError | None]:
        """Tell of a fault. Returns it as it was taken in the end, and why no engine must be started any more."""
        line = printable(fault.line)[:300]
        self._events.write(
            "fault", name=fault.name, action=fault.action, cards=list(fault.cards), signed=fault.is_signed, line=line
        )
        if fault.action == "ignore":
            return fault, None
        which = f"card {', '.join(map(str, fault.cards))}" if fault.cards else "a card"
        said = f"{fault.name} on {which}: {fault.meaning}"
        print(f"device fault: {said}", file=sys.stderr, flush=True)
        if fault.action == "stop" and fault.is_signed:
            return fault, FinalError(f"{said}; not started again")
        if fault.action == "isolate":
            outcome = self._isolated(fault, said) if fault.is_signed else self._confirmed(said)
            return fault, FinalError(outcome) if outcome else None
        return fault, None

    def _isolated(self, fault: Fault, said: str) -> str:
        if self._server.device not in VISIBLE:  # of a CPU, or emulated: there is no card to isolate
            return f"{said}; not started again"
        device, directory = self._server.device, self._server.log.parent
        try:
            cards = isolate(fault.cards, said, device, self._command.environment, directory)
        except UserError as error:
            return f"{said}; not started again, but the card could not be isolated: {error}"
        return _told(device, cards, said)

    def _confirmed(self, said: str) -> str | None:
        """Ask the vendor's tool about a line that anybody may have written. None: no card counts such an error."""
        device = self._server.device
        cards = sick_cards(device) if device in VISIBLE else ()
        if cards is None:
            return (
                f"{said}; not signed by the engine, and the vendor's tool does not tell which card counts memory "
                "errors: not started again, nothing is isolated; look at the cards (`python -m serve doctor`)"
            )
        if not cards:
            print("device fault: not signed by the engine, and no card counts such an error", file=sys.stderr)
            return None
        try:
            isolate_numbers(cards, said, device, self._server.log.parent)
        except UserError as error:
            return f"{said}; not started again, but card {cards} could not be isolated: {error}"
        return _told(device, cards, said)


def _told(device: str, cards: tuple[int, ...], said: str) -> str:
    numbers = ", ".join(map(str, cards))
    return f"{said}; {device} card {numbers} isolated: no engine is started on it until --forget-isolated"
