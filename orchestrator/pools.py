"""Pools: named sets of worker processes on queues of their own, with their limits, and what is known of them.

A *worker* is one parent (`orchestrator worker`), with up to `concurrency` *processes* (its children; threads, in a pool
of kind `threads`), each of which runs one step at a time. The size of a pool is the number of its processes, over all
its workers. What is here is data: `workers/pools.py` decides, `workers/autoscaler.py` acts, `ledger/pools.py` keeps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Self

#: The pool of steps that name none.
DEFAULT_POOL = "default"
#: Upper bounds, in seconds, of the buckets in which a worker counts how long messages took it: 1 ms to 2.3 hours.
MESSAGE_BOUNDS = tuple(0.001 * 2**k for k in range(24))
#: A worker that has not reported for this long is gone.
WORKER_GONE_MS = 10_000
#: An autoscaler that has decided nothing for this long is gone; another one takes over much sooner, if there is one.
AUTOSCALER_GONE_MS = 10_000
#: Target of a worker that is to take nothing at all, not even a message that would wake it.
STANDBY = -1


class PoolKind(StrEnum):
    """What runs the steps of a worker: processes, or threads of one process (for what waits for others)."""

    PREFORK = "prefork"
    THREADS = "threads"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """`[pools.NAME]`. `minimum` and `maximum` bound the size of the pool; `concurrency` that of one worker.

    `memory` (bytes), `cpu` (cores) and `gpu` (devices) are what one process is given; None: nothing is said of it.
    `idle_after_s`: how long a process may have nothing to do before it goes. `start_within_s`: how soon a step is to
    begin after it was published, as far as `maximum` allows.
    """

    minimum: int = 0
    maximum: int = field(default_factory=lambda: os.cpu_count() or 1)
    concurrency: int = field(default_factory=lambda: os.cpu_count() or 1)
    kind: PoolKind = PoolKind.PREFORK
    memory: int | None = None
    cpu: float | None = None
    gpu: int = 0
    max_tasks_per_process: int | None = None
    idle_after_s: float = 60.0
    start_within_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """`resources:` of a step: what a process of its pool must have at least."""

    memory: int | None = None
    cpu: float | None = None
    gpu: int = 0

    def fits(self, pool: PoolSettings) -> bool:
        """Tell whether the processes of a pool have that; one that says nothing of its memory promises none."""
        return (
            (self.memory or 0) <= (pool.memory or 0)
            and (self.cpu or 0) <= (pool.cpu or 1)
            and self.gpu <= pool.gpu
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return them as plain JSON, without what is not asked for."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Resources:
        """Read what `to_json` wrote."""
        return cls(**body)

    def __str__(self) -> str:
        """Say them as a definition does."""
        given = {"memory": size_text(self.memory or 0), "cpu": f"{self.cpu or 0:g}", "gpu": self.gpu}
        return ", ".join(f"{name}: {given[name]}" for name in self.to_json()) or "nothing"


def size_text(size: float) -> str:
    """Say a number of bytes as a definition does: 512MB, 1.5GB."""
    return f"{size / 10**9:g}GB" if size >= 10**9 else f"{size / 10**6:g}MB"


def smallest_fitting(resources: Resources, pools: Mapping[str, PoolSettings]) -> str | None:
    """Return the name of the smallest pool that fits: with the fewest GPUs, then the least memory, then cores."""
    fitting = [
        (pool.gpu, pool.memory or 0, pool.cpu or 1, name) for name, pool in pools.items() if resources.fits(pool)
    ]
    return min(fitting)[-1] if fitting else None


def worker_name(pool: str, host: str, pid: int) -> str:
    """Return the name of a worker: under it it reports, and a launcher on its machine knows it."""
    return f"{pool}@{host}:{pid}"


def pools_to_json(pools: Mapping[str, PoolSettings]) -> dict[str, Any]:
    """Return pools as plain JSON."""
    return {name: asdict(pool) for name, pool in pools.items()}


def pools_from_json(body: Mapping[str, Any]) -> dict[str, PoolSettings]:
    """Read what `pools_to_json` wrote."""
    return {name: PoolSettings(**(pool | {"kind": PoolKind(pool["kind"])})) for name, pool in body.items()}


class _Record:
    """A record that is kept as JSON. What another version wrote may have more, or less."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        known = {one.name for one in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in body.items() if name in known})


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport(_Record):
    """What a worker says of itself, about once a second. Times are ms since the epoch, by the worker's clock."""

    worker: str
    pool: str
    host: str = ""
    pid: int = 0
    version: str = ""
    #: Hash of the user's code that it has loaded.
    code: str = ""
    kind: str = PoolKind.PREFORK
    started_ms: int = 0
    seen_ms: int = 0
    #: Most processes that it may have here, by its concurrency and this machine's memory, cores and GPUs.
    ceiling: int = 0
    #: Processes that there are, also those that are leaving or starting.
    size: int = 0
    #: For each process that is at work, for how long it has been with its message, in seconds.
    in_work: Sequence[float] = ()
    #: How many messages have ended in each bucket of MESSAGE_BOUNDS (and one beyond), since the worker has started.
    served: Sequence[int] = ()
    #: Seconds for which processes have lived and messages were in work, added up since the worker has started.
    process_s: float = 0.0
    busy_s: float = 0.0
    #: Of this machine: cores, and memory in bytes.
    cores: int = 0
    memory: int = 0
    memory_available: int = 0
    gpus: int = 0
    #: It has been told to stop, and finishes what it has.
    is_draining: bool = False
    #: What keeps it from its work, in one line; empty: nothing.
    fault: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState(_Record):
    """What the leading autoscaler has seen of a pool, and what it has decided; written every second or so."""

    pool: str
    at_ms: int = 0
    #: Messages that wait; seconds for which the oldest has, if the broker tells.
    backlog: int = 0
    oldest_age_s: float | None = None
    #: Processes that there are and that are at work; workers that there are.
    size: int = 0
    busy: int = 0
    workers: int = 0
    #: Messages a second that come and that are done; how long one takes; None: not known yet.
    arrival_rate: float | None = None
    service_rate: float | None = None
    service_s: float | None = None
    #: In how many seconds the backlog will be gone as things are; None: not in sight, or not known.
    clears_in_s: float | None = None
    #: How many processes and workers it is to have, why, and since when.
    desired: int = 0
    desired_workers: int = 0
    why: str = ""
    decided_ms: int = 0
    #: Workers that are to go first when there are more than `desired_workers`.
    leave: Sequence[str] = ()
    #: Whether a workflow in force, or a run in flight, has steps for it.
    is_used: bool = True
    #: A size that somebody has set by hand; None: the autoscaler decides.
    pinned: int | None = None
    #: What keeps workers of the pool from starting or working, in one line each.
    faults: Sequence[str] = ()
