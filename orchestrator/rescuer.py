"""Rescuer: repairs what a dead process left behind.

It looks at the runs in flight once a second and publishes again, under the same ids, what

- has waited in a run's outbox for longer than any live process leaves it there;
- was begun under a lease that has run out;
- waits for a message that is lost: the run was idle, then its queue was seen empty, then the run was still as before.

It also has the broker give back messages whose consumers are gone, when no worker is there to do it.
"""

from __future__ import annotations

from orchestrator.brokers import Broker, broker_of
from orchestrator.celery_app import PRIORITIES, queue_name
from orchestrator.engine import Engine
from orchestrator.errors import NotFoundError, OrchestratorError, UnavailableError
from orchestrator.leading import LeadingService
from orchestrator.telemetry import get_logger

log = get_logger(__name__)

PERIOD_S = 1.0
_HOUSEKEEPING_ROUNDS = 600
#: Also runs that only wait for their time are looked at this often.
_WAKE_ROUNDS = 60
#: Runs looked at in one round trip.
_BATCH = 200
#: After a gap this long between two rounds leases may have run out because nobody could renew them, ...
_GAP_MS = 3_000
#: ... and the living, who renew every RENEW_S and at once after an outage, have this long to do it.
_GRACE_MS = 4_000


class Rescuer(LeadingService):
    """The rescuer of all runs; of several processes one is at work."""

    role = "rescuer"

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._broker: Broker = broker_of(engine.settings, engine.app)
        self._rounds = 0
        #: Server's time of the last round, and until when leases that have run out are left alone.
        self._seen_ms = 0
        self._grace_until_ms = 0
        #: Runs that the last round found idle, as they were then.
        self._idle: dict[str, str] = {}
        #: Of these, by the same: those that wait for a message, and those that wait for another run.
        self._queued: dict[str, str] = {}
        self._content: dict[str, str] = {}
        #: Runs that wait for time alone, by when: as long as that is as it was they are not looked at.
        self._asleep: dict[str, float] = {}

    def stop(self) -> None:
        super().stop()
        self._broker.close()

    def turn(self) -> float:
        self.round()
        return PERIOD_S

    def round(self) -> int:
        """Look once at every run in flight, if we lead, and return how many units were published again."""
        leads, now_ms = self.lead()
        if not self._seen_ms:
            self._grace_until_ms = self._engine.ledger.server_started_ms() + _GRACE_MS
        elif now_ms - self._seen_ms > _GAP_MS:
            self._grace_until_ms = now_ms + _GRACE_MS
        self._seen_ms = now_ms
        if not leads:
            self._idle = {}
            return 0
        given_back = self._broker.tend()
        if given_back:
            log.warning("messages_given_back", messages=given_back, reason="their consumers are gone")
        published = self._care(now_ms, with_leases=now_ms >= self._grace_until_ms)
        if self._rounds % _HOUSEKEEPING_ROUNDS == 0:
            self._engine.housekeep()
        self._rounds += 1
        return published

    def _care(self, now_ms: int, *, with_leases: bool) -> int:
        # In this order: idle in the last round, queue empty now, and as it was when it is looked at after that.
        empty = self._empty_queues()
        before, self._idle = self._idle, {}
        queued, self._queued = self._queued, {}
        content, self._content = self._content, {}
        published, freed = 0, []
        runs = self._awake(now_ms)
        for lo in range(0, len(runs), _BATCH):
            if self._service.stopping.is_set():
                break
            needing, idle = self._engine.ledger.look(runs[lo : lo + _BATCH])
            for run in needing:
                published += self._repair(run, with_leases=with_leases)
            self._idle |= idle
            self._content |= idle.items() & content.items()
            self._queued |= idle.items() & queued.items()
            still = {run: version for run, version in idle.items() if before.get(run) == version}
            self._classify({run: v for run, v in still.items() if run not in self._content and run not in self._queued})
            for run in still.keys() & self._queued.keys() if empty else ():
                units = self._free(run, still[run], empty)
                published += units
                freed += [run] if units else []
        if freed:
            log.error("runs_were_stuck", runs=len(freed), first=freed[:10], reason="the broker has lost their messages")
        return published

    def _awake(self, now_ms: int) -> list[str]:
        """Answer the runs in flight, but for those that sleep and of which nobody has heard since."""
        runs = self._engine.ledger.active()
        asleep, self._asleep = self._asleep, {}
        if self._rounds % _WAKE_ROUNDS:
            due = self._engine.ledger.expected([run for run in runs if run in asleep])
            self._asleep = {run: at for run, at in due.items() if at is not None and at == asleep[run] and at > now_ms}
        return [run for run in runs if run not in self._asleep]

    def _classify(self, idle: dict[str, str]) -> None:
        """Find out what runs wait for that have been idle for a round."""
        sleeping = []
        for run, (units, is_asleep) in self._engine.ledger.limbo(idle).items():
            if units:
                self._queued[run] = idle[run]
            elif is_asleep:
                sleeping.append(run)
            else:
                self._content[run] = idle[run]
        for run, at in self._engine.ledger.expected(sleeping).items():
            if at is None:
                self._content[run] = idle[run]
            else:
                self._asleep[run] = at

    def _empty_queues(self) -> set[str]:
        """Answer the queues that are empty, of those in which messages of idle runs should be."""
        pools: set[str] = set()
        for plan in {version.rpartition(":")[2] for version in self._idle.values()}:
            try:
                pools |= self._engine.plan(plan).pools
            except NotFoundError:
                continue  # `_free` ends its runs
        return self._broker.empty(queue_name(pool, priority) for pool in pools for priority in PRIORITIES)

    def _repair(self, run: str, *, with_leases: bool) -> int:
        try:
            again, lost = self._engine.repair(run, with_leases=with_leases)
        except UnavailableError:
            raise
        except NotFoundError as exc:
            self._give_up(run, exc)
            return 0
        except Exception:  # one bad run must not end the care for the others
            log.exception("run_cannot_be_repaired", run=run)
            return 0
        if again:
            log.warning("units_published_again", run=run, units=again, lost=lost)
        return again

    def _free(self, run: str, version: str, empty: set[str]) -> int:
        """Publish again what waits for a message that is in no queue."""
        try:
            waiting, _ = self._engine.ledger.limbo({run: version})[run]
            plan = self._engine.plan(version.rpartition(":")[2])
            priority = self._engine.ledger.priority_of(run)
            lost = [unit for unit in waiting if queue_name(plan.pool(unit.partition("/")[0]), priority) in empty]
            if lost:
                log.info("run_freed", run=run, units=lost[:10], count=len(lost))
                self._engine.publish(run, lost, plan=plan, priority=priority)
            return len(lost)
        except UnavailableError:
            raise
        except NotFoundError as exc:
            self._give_up(run, exc)
        except OrchestratorError as exc:
            log.error("run_cannot_be_freed", run=run, error=str(exc))
        return 0

    def _give_up(self, run: str, exc: NotFoundError) -> None:
        log.error("run_given_up", run=run, error=str(exc))
        self._engine.give_up(run, f"it cannot go on: {exc}")
