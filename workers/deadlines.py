"""Deadlines: how the parent stops what runs for too long, or in a run that is cancelled.

First softly: the child is told and sent a signal, at every look until it has heeded one (interrupts.py). If the same
call has not returned after `stop_grace_s`, the child is held still, so that it cannot go on to something else. If it is
in that call yet, the call is taken out of its slot, and it is killed. The parent then records the outcome in its place,
as soon as the ledger can be reached, and keeps the lease until then.

What needs no server is done in a thread of its own; the watch (watch.py), which has the rest done, may have to wait.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from orchestrator.counters import field
from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.ledger import Taken
from orchestrator.ledger.ledger import How
from orchestrator.retries import kinds_of
from orchestrator.runs import StepError
from orchestrator.service import Service
from orchestrator.signals import StepTimeout
from orchestrator.telemetry import get_logger
from workers import children, outcome
from workers.interrupts import SIGNAL, timeout_of
from workers.slots import Slots, Stop, Work
from workers.step import Identity
from workers.task_events import StepEvents, Told
from workers.usage import Usage, usage_of

log = get_logger(__name__)

#: How often to look: so late a deadline may be.
PERIOD_S = 0.25


@dataclass(slots=True)
class _Stopping:
    """What is being stopped in a slot, why, and when its child is killed: some time after the first signal."""

    number: int
    reason: Stop
    kill_at: float = float("inf")


@dataclass(frozen=True, slots=True)
class _Killed:
    work: Work
    reason: Stop
    usage: Usage


class Deadlines:
    """Stops steps. `publish` takes a run and its units that have become ready."""

    def __init__(
        self,
        engine: Engine,
        slots: Slots,
        identity: Identity,
        publish: Callable[[str, Sequence[str]], None],
        events: StepEvents | None = None,
    ) -> None:
        self._engine = engine
        self._publish = publish
        self._slots = slots
        self._identity = identity
        self._events = events
        self._grace_s = engine.settings.stop_grace_s
        self._stopping: dict[int, _Stopping] = {}
        self._lock = threading.Lock()
        self._killed: list[_Killed] = []
        self._service = Service("deadlines", self._loop)

    def start(self) -> None:
        """Begin to look; returns at once."""
        self._service.start()

    def end(self) -> None:
        """End looking."""
        self._service.stop()

    def _loop(self, stopping: threading.Event) -> None:
        while not stopping.wait(PERIOD_S):
            try:
                self.look(time.monotonic())
            except Exception:  # this loop owns the thread: deadlines must go on being kept
                log.exception("deadlines_failed")

    def stop(self, slot: int, work: Work, reason: Stop) -> None:
        """Have what runs in a slot stopped, softly and then hard, unless that is under way; idempotent."""
        with self._lock:
            stopping = self._stopping.get(slot)
            if stopping is None or stopping.number != work.sequence:
                self._stopping[slot] = _Stopping(work.sequence, reason)
                self._slots.interrupt(slot, work.sequence, reason)

    def look(self, now: float) -> None:
        """Do what is due for what runs in the slots."""
        for slot in range(self._slots.count):
            work = self._slots.read(slot)
            if work is None or not work.deadline:  # no function is called
                continue
            if now >= work.deadline:
                self.stop(slot, work, Stop.TIMEOUT)
            stopping = self._stopping.get(slot)
            if stopping is None or stopping.number != work.sequence:
                continue
            stopping.kill_at = min(stopping.kill_at, now + self._grace_s)
            if now >= stopping.kill_at:
                self._kill(slot, work, stopping.reason)
            elif not work.is_heeded:
                with suppress(ProcessLookupError):
                    os.kill(work.pid, SIGNAL)

    def _kill(self, slot: int, work: Work, reason: Stop) -> None:
        again = self._slots.read(slot) if children.hold(work.pid) else None
        if again is None or again.sequence != work.sequence or not again.deadline:
            children.let_go(work.pid)
            return
        usage = usage_of(work.pid, work.since, self._slots.base_of(slot, work.sequence))
        self._killed.append(_Killed(work, reason, usage))
        # The next child is to find nothing here: this was no loss.
        self._slots.clear(slot)
        log.warning("step_killed", pid=work.pid, run=work.run, step=work.slot, reason=reason.name.lower())
        with suppress(ProcessLookupError):
            os.kill(work.pid, signal.SIGKILL)

    def unrecorded(self) -> list[Work]:
        """Return what was killed and has no outcome yet; its leases are to be renewed."""
        return [killed.work for killed in self._killed]

    def record(self) -> None:
        """Record the outcomes of what was killed. Raises UnavailableError; the rest is for the next time then."""
        while self._killed:
            killed = self._killed.pop()
            try:
                self._record(killed)
            except UnavailableError:
                self._killed.append(killed)
                raise

    def _record(self, killed: _Killed) -> None:
        work, result = killed.work, self._outcome(killed)
        answer = self._engine.ledger.complete(
            work.run, _taken(work), result.state, tail=result.tail + killed.usage.tail(), usage=killed.usage.totals(),
            how=How(self._identity.record(work.pid)), inline="", delay_ms=result.delay_ms,
        )  # fmt: skip
        if answer.verdict == "refused":
            log.error("step_was_taken_over", run=work.run, unit=work.unit, reason="it was killed; nobody waits for it")
        if answer.verdict == "ok":
            workflow = self._engine.plan(self._engine.ledger.plan_of(work.run)).workflow.name
            self._engine.counters.add(field("steps", workflow=workflow, state=result.state))
            killed.usage.count(self._engine.counters, workflow=workflow, pool=self._identity.pool)
            if self._events is not None:
                since = time.time() - (time.monotonic() - work.since)
                told = Told(run=work.run, workflow=workflow, slot=work.slot, attempt=work.attempt, since=since)
                self._events.end(told, result.state, error=result.error, pid=work.pid)
        self._publish(work.run, answer.publish)

    def _outcome(self, killed: _Killed) -> outcome.Outcome:
        work = killed.work
        if killed.reason is Stop.CANCEL:
            return outcome.Outcome("cancelled", "", 0)
        step = self._engine.plan(self._engine.ledger.plan_of(work.run)).steps[work.step]
        error = StepError(
            type="StepTimeout",
            message=f"it ran for longer than its timeout of {timeout_of(step):g} s, and did not end within "
            f"{self._grace_s:g} s of being told; its process was killed",
            reason="timeout",
            kinds=kinds_of(StepTimeout),
        )
        return outcome.of_error(error, step, work.tries)


def _taken(work: Work) -> Taken:
    """Return what a child has taken, as far as an outcome asks for it."""
    return Taken(
        unit=work.unit, fence=work.fence, index=work.index, attempt=work.attempt, tries=work.tries, losses=0,
        postponed_ms=0, mended="", now_ms=0,
        inputs=[], meta=[], chunk=[], count=0,
    )  # fmt: skip
