"""The autoscaler: sees to it that pools are as large as they should be. One of several processes leads.

Each second, or at once when somebody has published to a pool, it reads what workers report and what waits for them,
decides for each pool (pools.py), and writes what it has decided to the ledger, with how many processes each worker is
to have: workers read that when they report. Its launcher is told how many workers there are to be.

It never takes silence for rest. A ledger that is away ends a turn, and what workers were told last holds; without the
broker everything stays as it was; and after either, workers have some seconds to be heard of before a pool shrinks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.brokers import Waiting, broker_of
from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.leading import LeadingService
from orchestrator.pools import DEFAULT_POOL, WORKER_GONE_MS, PoolSettings, PoolState, WorkerReport
from orchestrator.telemetry import Outage, get_logger
from workers import pools as rule
from workers.launchers import FaultNotes, Launcher

log = get_logger(__name__)

PERIOD_S = 1.0
#: Who rings has published the first of what may be many: one looks again after so long.
_AGAIN_S = 0.25
#: Between two turns there is this pause at least, however often somebody rings.
_LEAST_PAUSE_S = 0.1
#: A worker that was silent for so long is forgotten.
_FORGET_S = 60.0
#: After a gap in what was seen this long ...
_GAP_S = 3.0
#: ... workers have so long to be heard of again.
_SETTLE_S = 5.0
#: A pool in which messages wait, and that has had no worker for so long, has a fault.
_NO_WORKER_S = 5.0
#: How often it is looked at which pools there are, and how much of the time that may take at most.
_POOLS_EVERY_S, _POOLS_SHARE = 5.0, 0.02
#: How often what is remembered is written down for a successor.
_REMEMBER_EVERY_S = 5.0
_BROKER_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sight:
    """What is seen of a pool in one turn; `waiting` is None if the broker is away."""

    pool: str
    settings: PoolSettings
    workers: Sequence[WorkerReport]
    waiting: Waiting | None
    pinned: int | None
    faults: Sequence[str]
    now_ms: int


class Autoscaler(LeadingService):
    """The autoscaler of all pools, and what it tells its launcher."""

    role = "autoscaler"

    def __init__(self, engine: Engine, launcher: Launcher) -> None:
        super().__init__(engine)
        self._broker = broker_of(engine.settings, engine.app, timeout_s=_BROKER_TIMEOUT_S)
        self._broker_outage = Outage(log, "broker_of_autoscaler")
        self._launcher = launcher
        self._generation = ""
        self._faults = FaultNotes(self._engine.pools, launcher.place)
        #: For each worker, what it last said was the time, and when that was heard.
        self._heard: dict[str, tuple[int, float]] = {}
        self._pools: set[str] = set()
        self._used: set[str] = set()
        self._pools_at = 0.0
        #: None: what a predecessor remembered is yet to be read.
        self._memories: dict[str, rule.Memory] | None = None
        self._remember_at = 0.0
        self._states: dict[str, PoolState] = {}
        self._targets: dict[str, int] = {}
        #: When all was seen the last time, and until when pools do not shrink.
        self._seen_at = 0.0
        self._settled_at = 0.0
        self._was_rung_for = False
        #: Since when a pool has messages and no worker.
        self._deserted: dict[str, float] = {}

    def renew(self, generation: str) -> None:
        """Have workers of another generation of the user's code, if it is another and they are launched here."""
        self._generation = generation

    def stop(self) -> None:
        super().stop()
        self._launcher.close()
        self._broker.close()

    def turn(self) -> float:
        began = time.monotonic()
        if not self.round():
            return PERIOD_S
        rung = self._engine.pools.wait(_AGAIN_S if self._was_rung_for else PERIOD_S)
        self._was_rung_for = bool(rung)
        if rung - self._used:  # one that is in use of late
            self._pools_at = 0.0
        return max(0.0, began + _LEAST_PAUSE_S - time.monotonic())

    def round(self) -> bool:
        """Look once at every pool and size it, if we lead; tells whether we do."""
        self._launcher.renew(self._generation)
        launched = self._launcher.look()
        leads, now_ms = self.lead()
        if leads:
            self._faults.note(launched)
            self._size(now_ms, time.monotonic())
        elif self._memories is not None:  # whoever leads now has workers started elsewhere
            self._memories = None
            for pool in self._states:
                self._launcher.scale(pool, 0)
        return leads

    def _size(self, now_ms: int, now: float) -> None:
        if self._memories is None:
            self._take_over()
        if now - self._seen_at > _GAP_S:
            self._settled_at = now + _SETTLE_S
        records = self._engine.pools
        workers = self._living(records.reports(), now_ms, now)
        self._find_pools(now, workers)
        pins, faults = records.pins(), records.faults()
        waiting = self._look_at_queues(now_ms)
        sights = {
            pool: _Sight(
                pool=pool,
                settings=self._settings_of(pool, workers),
                workers=[one for one in workers if one.pool == pool],
                waiting=waiting.get(pool),
                pinned=pins.get(pool),
                faults=faults.get(pool, ()),
                now_ms=now_ms,
            )
            for pool in sorted(self._pools)
        }
        decisions = {pool: self._decide(sight, is_settled=now >= self._settled_at) for pool, sight in sights.items()}
        if waiting:
            self._seen_at = now
        allocation = rule.allocate(
            {pool: decision.desired for pool, decision in decisions.items()},
            {pool: sight.settings for pool, sight in sights.items()},
            workers,
            needed={pool: min(decision.needed, decision.desired) for pool, decision in decisions.items()},
            before=self._targets,
            pinned=pins,
        )
        states = {pool: self._state(sight, decisions[pool], allocation, now) for pool, sight in sights.items()}
        remembered = None
        if now >= self._remember_at and self._memories is not None:
            self._remember_at = now + _REMEMBER_EVERY_S
            remembered = {pool: memory.to_json() for pool, memory in self._memories.items()}
        records.decide(states.values(), allocation.targets, remembered)
        self._tell_changes(states)
        self._states, self._targets = states, dict(allocation.targets)
        for pool, state in states.items():
            # A worker without processes costs little, and starts one at once.
            self._launcher.scale(pool, max(int(state.is_used), state.desired_workers), state.leave)

    def _settings_of(self, pool: str, workers: Iterable[WorkerReport]) -> PoolSettings:
        """Return the settings of a pool, within whose bounds it is.

        Where somebody else starts workers, one whose size nobody has declared is as large as they let it be: who adds a
        worker wants it to work, and the cores of this machine say nothing of theirs.
        """
        settings = self._engine.settings.pool(pool)
        if self._launcher.starts_workers or pool in self._engine.settings.pools:
            return settings
        there = sum(one.ceiling for one in workers if one.pool == pool and not one.is_draining)
        return replace(settings, maximum=max(settings.maximum, there))

    def _take_over(self) -> None:
        """Go on from what a predecessor knew, if there was one."""
        self._states, self._targets = self._engine.pools.states(), self._engine.pools.targets()
        memories = {}
        for pool, body in self._engine.pools.memories().items():
            try:
                memories[pool] = rule.Memory.from_json(body)
            except (AttributeError, KeyError, TypeError, ValueError):  # another version's
                log.info("memory_not_understood", pool=pool)
        self._memories = memories
        self._seen_at = 0.0

    def _living(self, reports: Iterable[WorkerReport], now_ms: int, now: float) -> list[WorkerReport]:
        """Return the reports of those that live; rows of those that are long gone are withdrawn.

        Their clocks may be wrong: who says something new lives, whatever time it says that it is.
        """
        living, gone = [], []
        heard: dict[str, tuple[int, float]] = {}
        for report in reports:
            known = self._heard.get(report.worker)
            if known is None:
                at = now - abs(now_ms - report.seen_ms) / 1000
            elif known[0] != report.seen_ms:
                at = now
            else:
                at = known[1]
            heard[report.worker] = (report.seen_ms, at)
            # One that nobody has heard for a long time is given the chance to say something before it is forgotten.
            if now - at > _FORGET_S and known is not None:
                gone.append(report.worker)
            elif now - at < WORKER_GONE_MS / 1000:
                living.append(report)
        if gone:
            self._engine.pools.withdraw(gone)
            log.info("workers_forgotten", workers=gone)
        self._heard = {worker: row for worker, row in heard.items() if worker not in gone}
        return living

    def _find_pools(self, now: float, workers: Iterable[WorkerReport]) -> None:
        """Find out which pools there are: declared, in force, in flight, with workers."""
        if now >= self._pools_at:
            self._used = self._engine.pools_in_use()
            took_s = time.monotonic() - now
            self._pools_at = now + max(_POOLS_EVERY_S, took_s / _POOLS_SHARE)
        declared = self._engine.settings.declared_pools or {DEFAULT_POOL: PoolSettings()}
        self._pools = {*declared, *self._used, *(worker.pool for worker in workers)}
        assert self._memories is not None
        for pool in self._memories.keys() - self._pools:
            del self._memories[pool]

    def _look_at_queues(self, now_ms: int) -> dict[str, Waiting]:
        """Return what waits for each pool; nothing if the broker is away."""
        try:
            found = self._broker.waiting(sorted(self._pools), now_ms)
        except UnavailableError as exc:
            self._broker_outage.begins(exc)
            return {}
        self._broker_outage.ends()
        return found

    def _decide(self, sight: _Sight, *, is_settled: bool) -> rule.Decision:
        assert self._memories is not None
        before = self._states.get(sight.pool)
        if sight.waiting is None:
            desired = sight.settings.minimum if before is None else before.desired
            why = "as before: the broker is away, and what waits is not known"
            return rule.Decision(desired=desired, needed=desired, why=why)
        seen = rule.Observation.of(
            sight.workers,
            now_s=sight.now_ms / 1000,
            backlog=sight.waiting.backlog,
            oldest_age_s=sight.waiting.oldest_age_s,
            pinned=sight.pinned,
        )
        memory = self._memories.get(sight.pool, rule.Memory())
        decision, self._memories[sight.pool] = rule.decide(sight.settings, seen, memory)
        is_by_hand = sight.pinned is not None or (before is not None and before.pinned is not None)
        if is_settled or is_by_hand or before is None or before.desired <= decision.desired:
            return decision
        why = f"as before, until all workers had time to report; {decision.why}"
        return replace(decision, desired=before.desired, needed=before.desired, why=why)

    def _state(self, sight: _Sight, decision: rule.Decision, allocation: rule.Allocation, now: float) -> PoolState:
        before, waiting = self._states.get(sight.pool), sight.waiting
        faults = [*sight.faults, *dict.fromkeys(one.fault for one in sight.workers if one.fault)]
        if sight.pool in allocation.held_back:
            faults.append(allocation.held_back[sight.pool])
        if waiting is None:
            faults.append("the broker is away")
            waiting = Waiting(0 if before is None else before.backlog)
        elif waiting.backlog and not sight.workers:
            if now - self._deserted.setdefault(sight.pool, now) >= _NO_WORKER_S:
                faults.append(f"messages wait and no worker is there; `orchestrator worker --pool {sight.pool}` is one")
        else:
            self._deserted.pop(sight.pool, None)
        is_same = before is not None and before.desired == decision.desired
        return PoolState(
            pool=sight.pool,
            at_ms=sight.now_ms,
            backlog=waiting.backlog,
            oldest_age_s=waiting.oldest_age_s,
            size=sum(one.size for one in sight.workers),
            busy=sum(len(one.in_work) for one in sight.workers),
            workers=len(sight.workers),
            arrival_rate=decision.arrival_rate,
            service_rate=decision.service_rate,
            service_s=decision.service_s,
            clears_in_s=decision.clears_in_s,
            desired=decision.desired,
            desired_workers=rule.workers_wanted(sight.settings, decision.desired, sight.workers),
            leave=rule.first_to_leave(sight.workers, allocation.targets),
            is_used=sight.pool in self._used,
            why=decision.why,
            decided_ms=before.decided_ms if is_same and before is not None else sight.now_ms,
            pinned=sight.pinned,
            faults=faults,
        )

    def _tell_changes(self, states: Mapping[str, PoolState]) -> None:
        for pool, state in states.items():
            before = self._states.get(pool)
            if before is None or before.desired != state.desired:
                log.info("pool_sized", pool=pool, desired=state.desired, size=state.size, why=state.why)
            if state.faults and (before is None or list(before.faults) != list(state.faults)):
                log.warning("pool_has_faults", pool=pool, faults=list(state.faults))
