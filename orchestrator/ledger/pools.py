"""What is known of pools: the reports of their workers, what the autoscaler has decided, and who rings for it.

All of it is a hint: losing it costs the time until it is said again. No verb blocks but for the server, except `wait`.
Raises UnavailableError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from orchestrator.ledger import keys
from orchestrator.ledger.ledger import Ledger
from orchestrator.pools import AUTOSCALER_GONE_MS, PoolState, WorkerReport
from orchestrator.telemetry import get_logger

log = get_logger(__name__)

_Record = TypeVar("_Record")

#: So many wake-ups are kept for an autoscaler that is away; it looks at every pool when it comes.
_MOST_RINGS = 256
#: Monitors that have said for so long nothing more are gone.
MONITORED_MS = 15_000


class PoolRecords:
    """The verbs on them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._client = ledger.client

    # Workers

    def report(self, report: WorkerReport) -> tuple[int | None, bool]:
        """Say how a worker is; answers its target, None while no autoscaler leads, and whether somebody monitors."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hset(keys.WORKERS, report.worker, json.dumps(report.to_json()))
            pipe.exists(keys.leader_key("autoscaler"))
            pipe.hget(keys.TARGETS, report.worker)
            pipe.exists(keys.MONITORED)
            _, is_led, target, is_monitored = self._ledger.guard(pipe.execute)
        return int(target) if is_led and target is not None else None, bool(is_monitored)

    def withdraw(self, workers: Iterable[str]) -> None:
        """Forget workers that are gone; idempotent."""
        gone = list(workers)
        if gone:
            with self._client.pipeline(transaction=False) as pipe:
                pipe.hdel(keys.WORKERS, *gone)
                pipe.hdel(keys.TARGETS, *gone)
                self._ledger.guard(pipe.execute)

    def reports(self) -> list[WorkerReport]:
        """Return the last report of each worker, by name; some may be of workers that are gone."""
        rows = self._ledger.guard(lambda: self._client.hgetall(keys.WORKERS))
        return list(_read(WorkerReport.from_json, rows).values())

    # The autoscaler

    def decide(
        self,
        states: Iterable[PoolState],
        targets: Mapping[str, int],
        memories: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Keep what was seen and decided of pools, and the targets of all workers; what is not given is forgotten.

        `memories` is what a successor is to know, by pool; None leaves what is there.
        """
        rows = {state.pool: json.dumps(state.to_json()) for state in states}
        with self._client.pipeline(transaction=True) as pipe:
            pipe.delete(keys.POOLS, keys.TARGETS)
            if rows:
                pipe.hset(keys.POOLS, mapping=rows)
            if memories is not None:
                pipe.delete(keys.POOL_MEMORIES)
                if memories:
                    kept = {pool: json.dumps(memory) for pool, memory in memories.items()}
                    pipe.hset(keys.POOL_MEMORIES, mapping=kept)
            if targets:
                pipe.hset(keys.TARGETS, mapping={worker: str(size) for worker, size in targets.items()})
            self._ledger.guard(pipe.execute)

    def states(self) -> dict[str, PoolState]:
        """Return what the autoscaler said last of each pool; it may be gone (`at_ms` tells)."""
        return _read(PoolState.from_json, self._ledger.guard(lambda: self._client.hgetall(keys.POOLS)))

    def current_states(self) -> dict[str, PoolState] | None:
        """Return what the autoscaler says of each pool; None if nothing was heard of it for AUTOSCALER_GONE_MS."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hgetall(keys.POOLS)
            pipe.time()
            rows, (seconds, micros) = self._ledger.guard(pipe.execute)
        states = _read(PoolState.from_json, rows)
        latest = max((state.at_ms for state in states.values()), default=0)
        return states if seconds * 1000 + micros // 1000 - latest < AUTOSCALER_GONE_MS else None

    def targets(self) -> dict[str, int]:
        """Return how many processes each worker was last told to have."""
        rows = self._ledger.guard(lambda: self._client.hgetall(keys.TARGETS))
        return {worker: int(target) for worker, target in rows.items()}

    def memories(self) -> dict[str, Any]:
        """Return what the autoscaler remembers of each pool."""
        return _read(dict, self._ledger.guard(lambda: self._client.hgetall(keys.POOL_MEMORIES)))

    def pin(self, pool: str, size: int | None) -> None:
        """Set the size of a pool by hand; None lets the autoscaler decide again. Idempotent."""
        if size is None:
            self._ledger.guard(lambda: self._client.hdel(keys.PINS, pool))
        else:
            self._ledger.guard(lambda: self._client.hset(keys.PINS, pool, size))
        self.ring([pool])

    def pins(self) -> dict[str, int]:
        """Return the sizes that were set by hand, by pool."""
        return {pool: int(size) for pool, size in self._ledger.guard(lambda: self._client.hgetall(keys.PINS)).items()}

    # Who rings for it

    def ring(self, pools: Iterable[str]) -> None:
        """Have the autoscaler look at pools at once; one that sleeps is woken."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.lpush(keys.WAKE, *pools)
            pipe.ltrim(keys.WAKE, 0, _MOST_RINGS - 1)
            self._ledger.guard(pipe.execute)

    def wait(self, timeout_s: float) -> set[str]:
        """Wait until somebody rings, or until the timeout; answers the pools that were rung for."""
        first = self._ledger.guard(lambda: self._client.brpop([keys.WAKE], timeout=timeout_s))
        if first is None:
            return set()
        more = self._ledger.guard(lambda: self._client.lpop(keys.WAKE, _MOST_RINGS)) or []
        return {first[1], *more}

    # Faults at the start of workers, which then cannot report

    def note_fault(self, pool: str, place: str, fault: str) -> None:
        """Say why workers of a pool do not start in a place (a launcher's name); empty: they do. Idempotent."""
        field = f"{pool}|{place}"
        if fault:
            self._ledger.guard(lambda: self._client.hset(keys.POOL_FAULTS, field, fault))
        else:
            self._ledger.guard(lambda: self._client.hdel(keys.POOL_FAULTS, field))

    def faults(self) -> dict[str, list[str]]:
        """Return what keeps workers from starting, by pool."""
        found: dict[str, list[str]] = {}
        rows = self._ledger.guard(lambda: self._client.hgetall(keys.POOL_FAULTS))
        for field in sorted(rows):
            found.setdefault(field.partition("|")[0], []).append(rows[field])
        return found

    # Monitors

    def monitor(self) -> None:
        """Say that somebody monitors: for MONITORED_MS workers send events of what they do."""
        self._ledger.guard(lambda: self._client.set(keys.MONITORED, "1", px=MONITORED_MS))


def _read(read: Callable[[Any], _Record], rows: Mapping[str, str]) -> dict[str, _Record]:
    """Read rows, by name. One that cannot be read, which another version has left, is no reason to see nothing."""
    found = {}
    for name in sorted(rows):
        try:
            found[name] = read(json.loads(rows[name]))
        except (AttributeError, TypeError, ValueError) as exc:
            log.info("row_not_understood", row=name, error=f"{type(exc).__name__}: {exc}")
    return found
