"""The engine's life, from its start to its end, as many times as need be.

start ─► a real answer ─► the canary ─► announce ─► watch ─┬─► told to stop: finish what runs, end every process
  ▲                                                        ├─► it died or hangs: retract, end, wait ──┐
  └────────────────────────────────────────────────────────┼──────────────────────────────────────────┘
                                                           └─► a broken card, wrong answers, a crash loop: end, code 1
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

from convert.demo_config import NOTE
from serve.demo import build_demo, demo_size
from serve.engine import EngineCommand
from serve.nodes.link import NodeLink
from serve.plugin.log_format import MARK
from serve.plugin.middleware import STOPPING_FILE, stopping_file
from serve.settings import LaunchSettings
from serve.watch.acceptance import read_acceptance
from serve.watch.canary import CanaryError, check_canary
from serve.watch.events import EventLog
from serve.watch.fault_log import FaultLog
from serve.watch.heartbeat import Heartbeat
from serve.watch.logs import keep_logs, limit_log
from serve.watch.process import GRACE_SECONDS, LOADING_GRACE_SECONDS, EngineProcess, Guard
from serve.watch.progress import COMPARING, Progress, error_line
from serve.watch.ready import (
    EngineError,
    FinalError,
    Server,
    announce,
    meanwhile,
    wait_until_it_answers,
    write_ready_file,
)
from serve.watch.restarts import Restarts
from serve.watch.stopping import Stopped, StopSignals
from serve.watch.systemd import feed_watchdog, notify

POLL_SECONDS = 0.2
# Between refusing new requests and SIGTERM: what had come before is by then with the engine, which finishes it.
ADMITTED_SECONDS = 1.0
# vLLM ends by itself after its core has failed; vLLM-Ascend's core waits for its workers, for ever.
FAILED_SECONDS = 10.0
TOLD_SECONDS = 2.0  # for the API server to tell its clients that the engine behind it is gone


class HangError(EngineError):
    """The engine runs and does nothing."""


def supervise(
    server: Server,
    command: EngineCommand,
    settings: LaunchSettings,
    started_at: float,
    meeting: Callable[[], NodeLink] = NodeLink,
) -> int:
    """Start the engine, announce it once it answers, keep it answering, and end it. Returns the exit code.

    started_at: seconds since the epoch, when the user asked for it. meeting: waits for the launchers of other nodes.
    0: stopped after it was ready; 1: the engine failed; 128 + signal: stopped before it was ready.
    """
    with Guard() as guard, meeting() as link:  # a link has a thread, and the guard is forked
        signals = StopSignals()
        return _Supervisor(server, command, settings, guard, signals, link).run(started_at)


class _Supervisor:
    def __init__(
        self,
        server: Server,
        command: EngineCommand,
        settings: LaunchSettings,
        guard: Guard,
        signals: StopSignals,
        link: NodeLink,
    ) -> None:
        self._link = link
        self._server = server
        self._stopping = stopping_file(server.log.parent, server.port)
        own = {STOPPING_FILE: str(self._stopping), MARK: secrets.token_hex(8)}
        self._command = replace(command, environment={**command.environment, **own})
        self._settings = settings
        self._guard = guard
        self._signals = signals
        self._events = EventLog(server.log.with_name(f"events-{server.port}.jsonl"))
        # Nodes start together or not at all: then whoever started them all starts them all again.
        self._restarts = Restarts(settings.restarts if settings.nodes == 1 else 0)
        self._is_ready = False
        self._was_ready = False

    def run(self, started_at: float) -> int:
        """One engine after the other, until one of them is the last."""
        try:
            if self._server.demo:
                print(f"serving a demo. {NOTE}", file=sys.stderr)
            if self._settings.model is None:
                build_demo(self._server.model, demo_size(self._settings.emulate))
            feed_watchdog()
            while True:
                failure = self._live(started_at)
                self._wait_after(failure)
                started_at = time.time()
        except (EngineError, OSError) as failure:  # OSError: the disk is full, or somebody took the directory away
            self._signals.close()
            self._events.write("end", code=1, reason=str(failure))
            self._link.close(str(failure))
            print(f"error: {failure}; its log: {self._server.log}", file=sys.stderr)
            return 1
        except Stopped as stopped:
            self._signals.close()
            code = 0 if self._was_ready else 128 + stopped.signum
            self._events.write("end", code=code, reason=f"signal {stopped.signum}")
            print("stopped, with all its processes", file=sys.stderr)
            return code
        finally:
            self._signals.close()

    def _live(self, started_at: float) -> EngineError:
        """One engine from its start to its end. Returns what it failed of, if another one may be started."""
        engine = None
        grace = LOADING_GRACE_SECONDS
        at_once = False
        self._stopping.unlink(missing_ok=True)  # of a launcher that was killed while it drained
        keep_logs(self._server.log)
        try:
            with self._signals.held():
                engine = EngineProcess(self._command, self._server.log, self._guard)
            self._events.write("start", device=self._server.device, model=self._server.name)
            log = FaultLog(self._server, self._command, self._events)
            try:
                self._make_ready(engine, log, started_at)
                self._watch(engine, log)
            except EngineError as failure:
                explained = log.explain(failure)
                at_once = isinstance(explained, HangError | FinalError)
                if not self._was_ready or isinstance(explained, FinalError | CanaryError):
                    raise explained from None
                return explained
        except Stopped:
            if engine and self._is_ready:
                self._begin_nothing_new(engine)
                grace = self._settings.drain + GRACE_SECONDS
            raise
        finally:
            with self._signals.held():
                self._retract()
                if engine:
                    engine.end(grace, lambda: at_once or self._signals.again())
                with contextlib.suppress(OSError):  # the next start removes it, or says that it cannot
                    self._stopping.unlink(missing_ok=True)

    def _make_ready(self, engine: EngineProcess, log: FaultLog, started_at: float) -> None:
        progress = Progress(self._server.log, started_at)

        def look() -> None:
            self._look_around(log)
            if engine.poll() is not None or progress.failed_for() > FAILED_SECONDS:
                raise EngineError(f"the engine did not start: {error_line(self._server.log)}")

        try:
            said = self._wait_for_node_0(look, progress) if self._settings.node_rank else self._ask(look, progress)
        finally:
            stages = progress.close()
        seconds = sum(seconds for _, seconds in stages)
        if self._settings.node_rank:
            print(f"ready after {seconds:.1f} s: node {self._settings.node_rank} serves, node 0 answers", flush=True)
        elif self._was_ready:
            print(f"ready again after {seconds:.1f} s; canary: {said[1]}", flush=True)
        else:
            announce(self._server, *said, stages, drafts=read_acceptance(self._server))
        self._is_ready = self._was_ready = True
        if self._settings.ready_file:
            write_ready_file(self._settings.ready_file, self._server, stages)
        self._events.write("ready", seconds=round(seconds, 1))
        self._link.tell_ready()
        notify("READY=1")

    def _ask(self, look: Callable[[], object], progress: Progress) -> tuple[str, str]:
        """Return the first answer, and what the canary has to say."""
        answer = wait_until_it_answers(self._server, progress, self._settings.timeout, look)
        progress.enter(COMPARING)
        return answer, meanwhile(lambda: check_canary(self._server, self._settings), look)

    def _wait_for_node_0(self, look: Callable[[], object], progress: Progress) -> tuple[str, str]:
        """On another node: nothing can be asked here."""
        deadline = time.monotonic() + self._settings.timeout
        while not self._link.is_ready():
            progress.update()
            look()
            if time.monotonic() > deadline:
                raise EngineError(f"node 0 did not answer within {self._settings.timeout:.0f} s; --timeout allows more")
            time.sleep(POLL_SECONDS)
        return "", ""

    def _look_around(self, log: FaultLog) -> None:
        log.follow()
        limit_log(self._server.log)
        if lost := self._link.lost():
            raise FinalError(f"{lost}; all nodes end with it")

    def _watch(self, engine: EngineProcess, log: FaultLog) -> NoReturn:
        """Look at a ready engine until it fails: that is the `EngineError` this ends with."""
        engine.note_parts()
        heartbeat = None
        if not self._settings.node_rank:
            heartbeat = Heartbeat(self._server, self._settings.engine, self._settings.hang)
        try:
            while (code := engine.poll()) is None:
                self._look_around(log)
                if part := engine.lost_part():
                    self._retract()
                    self._sleep(TOLD_SECONDS, until=lambda: engine.poll() is not None)
                    raise EngineError(f"the engine ended ({part} is gone): {error_line(self._server.log)}")
                if heartbeat and (silence := heartbeat.silence()):
                    self._events.write("hang", reason=silence)
                    raise HangError(silence)
                time.sleep(POLL_SECONDS)
        finally:
            if heartbeat:
                heartbeat.close()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise EngineError(f"the engine ended ({how}): {error_line(self._server.log)}")

    def _wait_after(self, failure: EngineError) -> None:
        """Wait before the next start. Raises `FinalError` if there have been too many."""
        self._events.write("death", reason=str(failure))
        seconds = self._restarts.after_death()
        if seconds is None:
            if not self._restarts.allowed:
                raise FinalError(str(failure))
            raise FinalError(
                f"crash loop, so it is not started again: {self._restarts.recent} deaths within 10 minutes, "
                f"--restarts allows {self._restarts.allowed}; the last one: {failure}"
            )
        self._events.write("restart", number=self._restarts.recent, after_seconds=round(seconds, 1))
        print(
            f"{failure}; starting it again in {seconds:.1f} s "
            f"(death {self._restarts.recent} within 10 minutes, --restarts allows {self._restarts.allowed})",
            file=sys.stderr,
            flush=True,
        )
        self._sleep(seconds)

    def _begin_nothing_new(self, engine: EngineProcess) -> None:
        """Tell everyone that this server stops: it finishes what it has, and takes nothing any more."""
        notify("STOPPING=1")
        with contextlib.suppress(OSError):  # then vLLM refuses in its own way
            self._stopping.touch(0o640)
        self._retract()  # in this order: who sees that the ready file is gone is refused
        self._events.write("drain", limit_seconds=self._settings.drain)
        print(
            f"stopping: running requests are finished, for at most {self._settings.drain:.0f} s; "
            "a second signal ends them at once",
            file=sys.stderr,
            flush=True,
        )
        if drafts := read_acceptance(self._server):
            self._events.write("drafts", steps=drafts.steps, drafted=drafts.drafted, accepted=drafts.accepted)
            print(f"drafts: {drafts}", file=sys.stderr, flush=True)
        seconds = min(ADMITTED_SECONDS, self._settings.drain)
        self._sleep(seconds, until=lambda: engine.poll() is not None or self._signals.again())

    def _sleep(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not until():
            time.sleep(min(left, POLL_SECONDS / 4))

    def _retract(self) -> None:
        self._is_ready = False
        if self._settings.ready_file and self._was_ready:
            try:
                self._settings.ready_file.unlink(missing_ok=True)
            except OSError as error:  # running requests are finished all the same
                told = f"{self._settings.ready_file}: cannot be removed ({error.strerror}), and is not true any more"
                print(told, file=sys.stderr, flush=True)
