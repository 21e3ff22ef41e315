"""What an engine's log tells of sick devices, acted on when the engine has failed.

Never before: libraries in C++ write to the same log past every formatter, and some repeat what a client sent (xgrammar
does so with a schema's `$ref`). A fault that is real ends the engine; one that was only written ends nothing.
"""

from __future__ import annotations

import sys
import time

from ascend.errors import UserError
from serve.engine import EngineCommand
from serve.state import printable
from serve.watch.events import EventLog
from serve.watch.faults import Fault, faults_in
from serve.watch.isolation import isolate, judged
from serve.watch.progress import Tail
from serve.watch.ready import EngineError, FinalError, Server

SETTLE_SECONDS = 1.0  # from the first line of a device fault to the ones that name the card
CONTEXT_LINES = 2000  # eight workers end in up to 200 lines each


class FaultLog:
    """The device faults that the end of a failed engine's log tells of, each acted on and told once."""

    def __init__(self, server: Server, command: EngineCommand, events: EventLog) -> None:
        self._server = server
        self._command = command
        self._events = events
        self._tail = Tail(server.log)
        self._lines: list[str] = []
        self._known: dict[tuple[str, tuple[int, ...]], Fault] = {}

    def follow(self) -> None:
        """Read what is new; only the last lines are kept."""
        self._news()

    def _check(self) -> None:
        """Look at the last lines. Raises `FinalError` for a fault after which no engine must be started."""
        self._news()
        if any(fault.action != "ignore" for fault in self._unknown()):
            time.sleep(SETTLE_SECONDS)
            self._news()
        for fault in self._unknown():
            self._known[fault.name, fault.cards] = fault
            self._act(self._judged(fault))

    def explain(self, failure: EngineError) -> EngineError:
        """Return the failure with the device fault behind it: what was logged last says more than that all is over."""
        try:
            self._check()
        except FinalError as final:
            return final
        causes = [fault.name for fault in self._known.values() if fault.action == "restart"]
        return type(failure)(f"{failure} (device fault: {', '.join(causes)})") if causes else failure

    def _news(self) -> bool:
        new = self._tail.lines()
        self._lines = [*self._lines, *new][-CONTEXT_LINES:]
        return bool(new)

    def _unknown(self) -> list[Fault]:
        """What was not there before; a fault without a card is the known one with a card, whose context has gone."""
        names = {name for name, _ in self._known}
        faults = faults_in(self._lines)
        return [
            one for one in faults if (one.name, one.cards) not in self._known and (one.cards or one.name not in names)
        ]

    def _judged(self, fault: Fault) -> Fault:
        try:
            return judged(fault, self._server.log.parent)
        except UserError as error:  # what happened before is not known; what happens now is dealt with all the same
            print(f"device fault: {error}", file=sys.stderr, flush=True)
            return fault

    def _act(self, fault: Fault) -> None:
        line = printable(fault.line)[:300]
        self._events.write("fault", name=fault.name, action=fault.action, cards=list(fault.cards), line=line)
        if fault.action == "ignore":
            return
        which = f"card {', '.join(map(str, fault.cards))}" if fault.cards else "a card"
        said = f"{fault.name} on {which}: {fault.meaning}"
        print(f"device fault: {said}", file=sys.stderr, flush=True)
        if fault.action == "stop":
            raise FinalError(f"{said}; not started again")
        if fault.action == "isolate":
            raise FinalError(f"{said}; {self._isolated(fault, said)}")

    def _isolated(self, fault: Fault, said: str) -> str:
        if self._server.device == "cpu":
            return "not started again"
        device, directory = self._server.device, self._server.log.parent
        try:
            cards = isolate(fault.cards, said, device, self._command.environment, directory)
        except UserError as error:
            return f"not started again, but the card could not be isolated: {error}"
        return (
            f"{device} card {', '.join(map(str, cards))} isolated: no engine is started on it until --forget-isolated"
        )
