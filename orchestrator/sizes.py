"""Sizes: what people see of pools, and the sizes that they set by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.brokers import Waiting, broker_of
from orchestrator.engine import Engine
from orchestrator.errors import InputError, NotFoundError, UnavailableError, unknown
from orchestrator.pools import AUTOSCALER_GONE_MS, DEFAULT_POOL, WORKER_GONE_MS, PoolState, WorkerReport
from orchestrator.runs import rfc3339

#: No pool is larger.
MAXIMUM = 100_000
_TIMEOUT_S = 2.0

#: What lists answer.
Rows = list[dict[str, Any]]


class Sizes:
    """The pools on the servers of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._broker = broker_of(engine.settings, engine.app, timeout_s=_TIMEOUT_S)

    def list(self) -> tuple[Rows, dict[str, Any]]:
        """Return all pools by name, and of the autoscaler since when it is silent. Raises UnavailableError."""
        engine = self._engine
        states, reports, faults = engine.pools.states(), engine.pools.reports(), engine.pools.faults()
        pins, now_ms = engine.pools.pins(), engine.ledger.now_ms()
        said_ms = max((state.at_ms for state in states.values()), default=0)
        fault = _silence(said_ms, now_ms)
        # An autoscaler that is alive has looked itself.
        used = engine.pools_in_use() if fault else set()
        names = sorted({DEFAULT_POOL, *engine.settings.pools, *states, *(one.pool for one in reports), *used})
        try:
            waiting = self._broker.waiting(names, now_ms)
        except UnavailableError:
            waiting = {}
        shown = [
            self._shown(
                name,
                states.get(name, PoolState(pool=name)),
                [one for one in reports if one.pool == name and now_ms - one.seen_ms < WORKER_GONE_MS],
                waiting.get(name),
                faults.get(name, ()),
                pins.get(name),
                is_alive=not fault,
            )
            for name in names
        ]
        autoscaler = {"reported_at": rfc3339(said_ms) if said_ms else None, "fault": fault}
        return shown, autoscaler

    def page(self, limit: int, after: str | None = None) -> tuple[Rows, str | None, dict[str, Any]]:
        """Return up to `limit` of the list, those after a cursor; the cursor of the next page; and as `list`."""
        pools, autoscaler = self.list()
        rows = [row for row in pools if after is None or row["name"] > after]
        return rows[:limit], rows[limit - 1]["name"] if len(rows) > limit else None, autoscaler

    def show(self, name: str) -> dict[str, Any]:
        """Return a pool with its workers. Raises NotFoundError."""
        pools, _ = self.list()
        found = next((pool for pool in pools if pool["name"] == name), None)
        if found is None:
            names = [pool["name"] for pool in pools]
            raise NotFoundError(f"{unknown('pool', name, names)} (there are: {', '.join(names)})")
        targets = self._engine.pools.targets()
        workers, now_ms = self._engine.pools.reports(), self._engine.ledger.now_ms()
        return found | {
            "members": [_shown_worker(one, targets.get(one.worker), now_ms) for one in workers if one.pool == name]
        }

    def scale(self, name: str, size: int | None) -> dict[str, Any]:
        """Set the size of a pool by hand, or, with None, have the autoscaler decide again; idempotent.

        By hand is by hand: it holds whatever `min` and `max` are. Raises NotFoundError, InputError.
        """
        if size is not None and not 0 <= size <= MAXIMUM:
            raise InputError(f"a pool has 0 to {MAXIMUM} processes, not {size}")
        self.show(name)
        self._engine.pools.pin(name, size)
        return self.show(name)

    def close(self) -> None:
        """Close connections."""
        self._broker.close()

    @staticmethod
    def _shown(
        name: str,
        state: PoolState,
        workers: Sequence[WorkerReport],
        waiting: Waiting | None,
        faults: Sequence[str],
        pinned: int | None,
        *,
        is_alive: bool,
    ) -> dict[str, Any]:
        """Return a pool: what is there as it is now, what was decided as it was when the autoscaler spoke last."""
        found = list(state.faults) if is_alive else [*faults, *dict.fromkeys(one.fault for one in workers if one.fault)]
        if waiting is None and not is_alive:
            found.append("the broker is away: what waits is as it was when the autoscaler looked last")
        if waiting is not None and waiting.backlog and not workers and not is_alive:
            found.append("messages wait and there is no worker")
        return {
            "name": name,
            "size": state.size if is_alive else sum(one.size for one in workers),
            "busy": state.busy if is_alive else sum(len(one.in_work) for one in workers),
            "workers": state.workers if is_alive else len(workers),
            "backlog": state.backlog if waiting is None else waiting.backlog,
            "oldest_age_s": state.oldest_age_s if waiting is None else _rounded(waiting.oldest_age_s),
            "arrival_rate": _rounded(state.arrival_rate),
            "service_rate": _rounded(state.service_rate),
            "service_s": _rounded(state.service_s),
            "clears_in_s": _rounded(state.clears_in_s),
            "desired": state.desired if state.at_ms else None,
            "desired_workers": state.desired_workers if state.at_ms else None,
            "pinned": pinned,
            "why": state.why,
            "decided_at": rfc3339(state.decided_ms) if state.decided_ms else None,
            "reported_at": rfc3339(state.at_ms) if state.at_ms else None,
            "faults": found,
        }


def _shown_worker(report: WorkerReport, target: int | None, now_ms: int) -> dict[str, Any]:
    silent_ms = now_ms - report.seen_ms
    silence = f"not heard of for {silent_ms // 1000} s" if silent_ms >= WORKER_GONE_MS else ""
    return {
        "worker": report.worker,
        "host": report.host,
        "pid": report.pid,
        "kind": str(report.kind),
        "version": report.version,
        "code": report.code,
        "size": report.size,
        "busy": len(report.in_work),
        "ceiling": report.ceiling,
        "target": target,
        "is_draining": report.is_draining,
        "started_at": rfc3339(report.started_ms) if report.started_ms else None,
        "seen_at": rfc3339(report.seen_ms) if report.seen_ms else None,
        "fault": silence or report.fault,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _silence(said_ms: int, now_ms: int) -> str:
    """Say since when the autoscaler is silent; empty: it is not."""
    if now_ms - said_ms < AUTOSCALER_GONE_MS:
        return ""
    if not said_ms:
        return "no autoscaler has ever reported; workers size themselves"
    silent_s = (now_ms - said_ms) // 1000
    since = f"{silent_s} s" if silent_s < 600 else f"{silent_s // 60} min"
    return f"no autoscaler has reported for {since}; workers size themselves"
