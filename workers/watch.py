"""Watch: what the parent of a worker does for its children, in a thread of its own.

Four times a second it reads the slots (slots.py). It renews the leases of what they run, and has stopped what is to be
(deadlines.py); gives up, so that it is started again at once, what a child that has died was running; gives back the
items that wait in a part behind a long one, or in a child that leaves, so that idle processes can take them; ends a
child whose unit somebody else has taken over; and reports (reporting.py).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from functools import partial

from orchestrator.engine import Engine
from orchestrator.errors import OrchestratorError, UnavailableError
from orchestrator.health_file import HealthFile
from orchestrator.ledger.ledger import RENEW_S
from orchestrator.pools import PoolKind
from orchestrator.service import Service
from orchestrator.telemetry import Outage, get_logger
from workers import children
from workers.deadlines import PERIOD_S, Deadlines
from workers.reporting import Reporting
from workers.slots import Slots, Stop, Work
from workers.step import Identity
from workers.task_events import StepEvents

log = get_logger(__name__)

#: A part that has been in work for this long shares what it has not begun, in parts of about half of this.
SHARE_AFTER_S = 0.5
#: How a child has ended is known when Celery has asked, which it does at once unless it waits for the broker.
_EXIT_S = 2.0


class Watch:
    """The loop. A worker whose parent is no longer the `up` with `up_pid` is told to stop."""

    def __init__(
        self,
        engine: Engine,
        slots: Slots,
        identity: Identity,
        *,
        kind: PoolKind = PoolKind.PREFORK,
        reporting: Reporting | None = None,
        up_pid: int | None = None,
        events: StepEvents | None = None,
    ) -> None:
        self._engine = engine
        self._slots = slots
        self._identity = identity
        self._kind = kind
        self._reporting = reporting
        self._up_pid = up_pid
        self._health = HealthFile(engine.settings.health_file)
        self._service = Service("watch", self._loop)
        self._deadlines = Deadlines(engine, slots, identity, partial(_publish, engine), events)
        self.out_of_memory = children.OutOfMemory()
        self._renew_at = 0.0
        #: The child that was found dead in a slot, and when first.
        self._dead: dict[int, tuple[int, float]] = {}
        self._shared: dict[int, tuple[str, int]] = {}
        #: Pairs (pid, fence) that the last renewal found taken over.
        self._gone: set[tuple[int, int]] = set()
        self._outage = Outage(log, "watch")

    def start(self) -> None:
        """Begin; returns at once."""
        self._deadlines.start()
        self._service.start()

    def stop(self) -> None:
        """End; returns when the round in work is done."""
        self._deadlines.end()
        self._service.stop()
        if self._reporting is not None:
            self._reporting.end()

    def _loop(self, stopping: threading.Event) -> None:
        while not stopping.wait(PERIOD_S):
            self._health.touch()
            if self._up_pid is not None and os.getppid() != self._up_pid:
                log.warning("up_is_gone")
                self._up_pid = None
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                self.round(time.monotonic())
                self._outage.ends()
            except UnavailableError as exc:
                self._outage.begins(exc)
            except Exception:  # this loop owns the thread: leases must go on being renewed
                log.exception("watch_failed")

    def round(self, now: float) -> None:
        """Look once at every slot."""
        self.out_of_memory.look(now)
        found = {slot: work for slot in range(self._slots.count) if (work := self._slots.read(slot)) is not None}
        running = {slot: work for slot, work in found.items() if children.is_alive(work.pid)}
        if now >= self._renew_at:  # before what may fail
            self._renew_at = now + (PERIOD_S if self._renew(running) else RENEW_S)
        if self._reporting is not None:
            self._reporting.turn(now)
        self._deadlines.record()
        for slot, work in found.items():
            if slot not in running:
                self._give_up(slot, work, now)
                continue
            is_shared = self._shared.get(slot) == (work.run, work.fence)
            is_slow = now - work.unit_since > SHARE_AFTER_S or self._slots.is_leaving(slot, work.pid)
            if work.index >= 0 and is_slow and not is_shared:
                self._share(slot, work, now)

    def _give_up(self, slot: int, work: Work, now: float) -> None:
        exit_ = self._slots.exit_of(slot, work.pid)
        pid, since = self._dead.get(slot, (0, now))
        if pid != work.pid:
            self._dead[slot] = work.pid, now
        if exit_ is None and (pid != work.pid or now - since < _EXIT_S):
            return
        if not self._is_still(slot, work):  # it was killed for its deadline, or given up by the child that came next
            return
        give_up(self._engine, work, self._identity, children.describe(exit_))
        if self._is_still(slot, work):
            self._slots.clear(slot)

    def _is_still(self, slot: int, work: Work) -> bool:
        again = self._slots.read(slot)
        return again is not None and again.sequence == work.sequence

    def _share(self, slot: int, work: Work, now: float) -> None:
        """Give back what a part has not begun; the faster its items were, the larger the new parts."""
        first = int(work.unit.rpartition("/")[2].partition("-")[0])
        done = work.index - first
        size = max(1, int(done * SHARE_AFTER_S / 2 / (now - work.unit_since)))
        units = self._engine.ledger.give_back(work.run, work.unit, work.fence, size)
        self._shared[slot] = (work.run, work.fence)
        _publish(self._engine, work.run, units)

    def _renew(self, running: dict[int, Work]) -> bool:
        """Renew all leases; True if some were taken over and a second look is due.

        A child whose unit is not its own is ended only when the next look finds the same: what it has completed a
        moment ago is not its own either, until it has noted what it took next.
        """
        gone_before, self._gone = self._gone, set()
        gone, stopping = self._engine.ledger.renew(
            (work.run, work.unit, work.fence)
            for work in (*running.values(), *self._deadlines.unrecorded())
            if work.unit  # else it is about to take one
        )
        for slot, work in running.items():
            if (work.run, work.unit) in stopping:
                self._deadlines.stop(slot, work, Stop.CANCEL)
            again = self._slots.read(slot)
            if (work.run, work.unit) not in gone or again is None or (again.pid, again.fence) != (work.pid, work.fence):
                continue
            if (work.pid, work.fence) not in gone_before:
                self._gone.add((work.pid, work.fence))
            else:
                log.error("step_was_taken_over", pid=work.pid, run=work.run, unit=work.unit)
                if self._kind is PoolKind.PREFORK:  # a thread cannot be ended; its outcome is not kept
                    os.kill(work.pid, signal.SIGKILL)
        return bool(self._gone)


def give_up(engine: Engine, work: Work, identity: Identity, reason: str) -> None:
    """Have what a dead child ran started again; idempotent. Its parent does this, and the child that replaces it."""
    units, rows = engine.ledger.abandon(work.run, identity.record(work.pid), reason)
    if units:
        log.warning("child_lost", pid=work.pid, reason=reason, run=work.run, units=units, index=work.index)
    _publish(engine, work.run, rows)


#: Held by a thread that publishes, and by one that forks. What celery and kombu make when it is first asked for they
#: make under locks of their classes, and a child that is forked meanwhile has such a lock held for ever: it would hang
#: when it publishes first.
forking = threading.RLock()
os.register_at_fork(before=forking.acquire, after_in_parent=forking.release, after_in_child=forking.release)


def _publish(engine: Engine, run: str, units: Sequence[str]) -> None:
    if not units:
        return
    try:
        with forking:
            engine.publish(run, units)
    except OrchestratorError as exc:
        log.warning("left_to_rescuer", run=run, units=len(units), error=str(exc))
