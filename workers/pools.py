"""How many processes a pool is to have, and which of its workers are to have them. Pure: no clock, no I/O.

`decide` looks at one pool. What is needed at a moment is the greatest of three numbers:

- *to clear*: processes that long messages hold, and as many as start what waits within the time that `start_within`
  leaves to the oldest message;
- *to keep up*: processes that long messages hold, and as many as do what comes, with room for its ups and downs;
- *at work*: processes that have a message now.

It is never more than the messages there are. The pool grows to that at once, and shrinks to the most that was needed
at any moment of the last `idle_after`.

How long messages take is kept as a histogram, and a message counts with the time for which it would hold a process
*within the time that is looked at*: a step of two hours counts as 5 s where 5 s are left. So one such step among
thousands of short ones changes nothing, and while it runs it is a process that is not to be had, no more. A guess that
is wrong all the same (a pool whose messages become long of a sudden) shows as messages that wait too long: then there
is one process for each.

`allocate` gives the processes of all pools to the workers that live, because pools share the memory, cores and GPUs
of hosts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, sqrt
from typing import Any

from orchestrator.pools import MESSAGE_BOUNDS, STANDBY, PoolSettings, WorkerReport

#: Rates are those of about this last time: long enough for a burst not to look like a rate.
RATE_WINDOW_S = 30.0
#: After so many seconds in which messages ended, those from before count half in what is known of their durations.
DURATION_HALF_LIFE_S = 120.0
#: Of `start_within`, this much is reckoned with at least, however long the oldest message has waited: counts are late
#: by a second or two, and what is nearly done should not look as if it took a hundred processes.
LEAST_LEFT = 0.25
#: A worker that has been silent for this long does not come back.
FORGET_WORKER_S = 120.0

#: What a message in each bucket took: the middle of the bucket, and for the last, which has no end, twice its bound.
_DURATIONS: tuple[float, ...] = (
    *(0.75 * bound for bound in MESSAGE_BOUNDS),
    2 * MESSAGE_BOUNDS[-1],
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What is seen of a pool at a moment."""

    #: Seconds, by a clock that also a successor reads.
    now_s: float
    #: Messages that wait.
    backlog: int = 0
    #: For how long the oldest of them has; None: the broker does not tell.
    oldest_age_s: float | None = None
    #: Processes that there are, also those that are starting.
    size: int = 0
    #: For each message in work, for how long it has been.
    in_work: Sequence[float] = ()
    #: For each worker, how many messages have ended in each bucket of MESSAGE_BOUNDS, since it has started.
    served: Mapping[str, Sequence[int]] = field(default_factory=dict)
    #: Size that was set by hand.
    pinned: int | None = None

    @classmethod
    def of(
        cls,
        workers: Iterable[WorkerReport],
        *,
        now_s: float,
        backlog: int,
        oldest_age_s: float | None = None,
        pinned: int | None = None,
    ) -> Observation:
        """See a pool through the reports of its workers that live. One that drains is no longer part of it."""
        workers = list(workers)
        staying = [worker for worker in workers if not worker.is_draining]
        return cls(
            now_s=now_s,
            backlog=backlog,
            oldest_age_s=oldest_age_s,
            size=sum(worker.size for worker in staying),
            in_work=tuple(age for worker in staying for age in worker.in_work),
            served={worker.worker: tuple(worker.served) for worker in workers},
            pinned=pinned,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What `decide` remembers from one moment to the next. Plain data: a successor may go on with it."""

    at_s: float | None = None
    backlog: int = 0
    busy: int = 0
    #: When nothing waited the last time, and how many have come since.
    clear_s: float | None = None
    arrived_since_clear: float = 0.0
    #: For each worker, when it was seen and what it had served.
    served: Mapping[str, tuple[float, tuple[int, ...]]] = field(default_factory=dict)
    #: Messages by duration; the older, the less they count.
    durations: tuple[float, ...] = (0.0,) * len(_DURATIONS)
    #: Messages that came and that ended, and the seconds in which they did; the older, the less they count.
    arrived: float = 0.0
    ended: float = 0.0
    observed_s: float = 0.0
    #: (when, how many were needed), of the last `idle_after`; each is more than those that follow, so the first is
    #: the most.
    needs: tuple[tuple[float, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Memory:
        """Read what `to_json` wrote."""
        return cls(
            **{
                **body,
                "served": {worker: (at_s, tuple(counts)) for worker, (at_s, counts) in body["served"].items()},
                "durations": tuple(body["durations"]),
                "needs": tuple((at_s, need) for at_s, need in body["needs"]),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How many processes a pool is to have, why, and what was found out on the way (as in PoolState)."""

    desired: int
    why: str
    arrival_rate: float | None = None
    service_rate: float | None = None
    #: How long a message takes: half of them take less.
    service_s: float | None = None
    clears_in_s: float | None = None


def decide(pool: PoolSettings, seen: Observation, memory: Memory) -> tuple[Decision, Memory]:
    """Decide how many processes a pool is to have; answers also what to remember for the next time.

    It may be asked as often as one likes, at any distance. Never below what is at work, except for `max` or a size
    that was set by hand.
    """
    memory, is_active = _remember(seen, memory)
    need, reason = _need(pool, seen, memory, is_active=is_active)
    since = seen.now_s - pool.idle_after_s
    kept = tuple((at_s, most) for at_s, most in memory.needs if most > need and since < at_s <= seen.now_s)
    memory = replace(memory, needs=(*kept, (seen.now_s, need)))
    most_at_s, most = memory.needs[0]
    desired = max(pool.minimum, min(most, pool.maximum))
    if seen.pinned is not None:
        why = f"set to {seen.pinned} by hand"
        if desired != seen.pinned:
            why += f"; by itself it would be {desired}: {reason}"
        desired = seen.pinned
    elif most > need and desired > max(need, pool.minimum):
        ago = _duration(seen.now_s - most_at_s)
        why = f"{reason}; keeps the {desired} needed {ago} ago until {_duration(pool.idle_after_s)} have passed"
    elif need > pool.maximum:
        why = f"{reason}; but max is {pool.maximum}"
    elif most < pool.minimum:
        why = f"{reason}; min is {pool.minimum}"
    else:
        why = reason
    return (
        Decision(
            desired=desired,
            why=why,
            arrival_rate=_rate(memory.arrived, memory),
            service_rate=_rate(memory.ended, memory),
            service_s=_median(memory.durations),
            clears_in_s=_clears_in_s(desired, seen, memory),
        ),
        memory,
    )


def _remember(seen: Observation, memory: Memory) -> tuple[Memory, bool]:
    """Add a moment to the memory; tell whether a message has come or ended since the last."""
    is_first = memory.at_s is None
    elapsed_s = 0.0 if memory.at_s is None else max(0.0, seen.now_s - memory.at_s)
    durations = [0.0] * len(_DURATIONS)
    known = {}
    for worker, (at_s, counts) in memory.served.items():
        if seen.now_s - at_s < FORGET_WORKER_S:
            known[worker] = (at_s, counts)
    for worker, now in seen.served.items():
        before = known.get(worker, (0.0, ()))[1]
        for index, count in enumerate(now[: len(durations)]):
            durations[index] += max(0, count - (before[index] if index < len(before) else 0))
        known[worker] = (seen.now_s, tuple(now))
    # What workers had done before anybody looked tells how long messages take, and nothing of how many come now.
    ended = 0.0 if is_first else sum(durations)
    busy = len(seen.in_work)
    arrived = 0.0 if is_first else ended + seen.backlog - memory.backlog + busy - memory.busy
    fading = 0.5 ** (elapsed_s / RATE_WINDOW_S)
    half = 0.5 ** (elapsed_s / DURATION_HALF_LIFE_S) if ended else 1.0
    return (
        Memory(
            at_s=seen.now_s,
            backlog=seen.backlog,
            busy=busy,
            clear_s=memory.clear_s if seen.backlog else seen.now_s,
            arrived_since_clear=memory.arrived_since_clear + arrived if seen.backlog else 0.0,
            served=known,
            durations=tuple(old * half + new for old, new in zip(memory.durations, durations, strict=True)),
            # What leaves the queue is in work a report later, so one moment may look as if less than nothing had come.
            arrived=max(0.0, memory.arrived * fading + arrived),
            ended=memory.ended * fading + ended,
            observed_s=memory.observed_s * fading + elapsed_s,
            needs=memory.needs,
        ),
        ended > 0 or arrived > 0,
    )


def _need(pool: PoolSettings, seen: Observation, memory: Memory, *, is_active: bool) -> tuple[int, str]:
    """Return how many processes are needed now, and why, whatever the bounds of the pool are."""
    backlog, busy = seen.backlog, len(seen.in_work)
    work = busy + backlog
    if not work:
        return (1, "messages come and are done at once") if is_active else (0, "nothing to do")
    age_s = _oldest_age_s(seen, memory)
    start_within = _duration(pool.start_within_s)
    if not any(memory.durations):
        if not backlog:
            return busy, f"{busy} at work"
        return work, f"{_waiting(backlog, busy)}, and it is not known yet how long they take: one process for each"
    if backlog and age_s > pool.start_within_s:
        return work, f"{_waiting(backlog, busy)}, the oldest for {_duration(age_s)}: one process for each"
    left_s = max(LEAST_LEFT * pool.start_within_s, pool.start_within_s - age_s)
    each_s = _held_s(memory.durations, left_s)
    long = sum(_goes_on(memory.durations, age, left_s) for age in seen.in_work)
    to_clear = long + ceil((work - long) * each_s / left_s)
    load = (memory.arrived / max(memory.observed_s, RATE_WINDOW_S)) * _held_s(memory.durations, pool.start_within_s)
    # As many as are at work on average, and the square root of that for its ups and downs: what comes by chance
    # varies by that much.
    to_keep_up = long + ceil(load + sqrt(load))
    need = min(max(to_clear, to_keep_up, busy), work)
    if need == busy or not backlog:
        return need, f"{busy} at work" + (f", {backlog} wait" if backlog else "")
    if need == work:
        return need, f"{_waiting(backlog, busy)}: one process for each"
    each = f"about {_duration(each_s)} each"
    held = f", {long} held by long ones" if long else ""
    if to_keep_up > to_clear:
        rate = _rate(memory.arrived, memory) or 0.0
        return need, f"{rate:.3g} come each second, {each}: {_processes(need)} keep up{held}"
    return need, f"{_waiting(backlog, 0)}, {each}: {_processes(need)} start them within {start_within}{held}"


def _oldest_age_s(seen: Observation, memory: Memory) -> float:
    """Return for how long the oldest message has waited, as far as can be told.

    Not longer than something has waited at all: publishers' clocks may be wrong, and a message that comes back from a
    lost worker is as old as ever. Where the broker does not tell, what waits has come last of what has come since
    nothing waited.
    """
    if not seen.backlog:
        return 0.0
    if memory.clear_s is None:
        return max(0.0, seen.oldest_age_s or 0.0)
    waited_s = seen.now_s - memory.clear_s
    if seen.oldest_age_s is not None:
        return max(0.0, min(seen.oldest_age_s, waited_s))
    return waited_s * seen.backlog / max(seen.backlog, memory.arrived_since_clear)


def _held_s(durations: Sequence[float], within_s: float) -> float:
    """Return for how long a message holds a process on average, within a time; all of it when nothing is known."""
    total = sum(durations)
    if not total:
        return within_s
    held_s: float = sum(n * min(took_s, within_s) for n, took_s in zip(durations, _DURATIONS, strict=True))
    return held_s / total


def _goes_on(durations: Sequence[float], age_s: float, within_s: float) -> bool:
    """Tell whether a message that has been in work for `age_s` will probably be so beyond a time.

    By those that took longer than that; where none did, it is expected to take as long again.
    """
    longer = [(took_s, count) for took_s, count in zip(_DURATIONS, durations, strict=True) if took_s > age_s and count]
    if not longer:
        return age_s >= within_s
    return sum(count for took_s, count in longer if took_s > age_s + within_s) * 2 >= sum(n for _, n in longer)


def _median(durations: Sequence[float]) -> float | None:
    total, below = sum(durations), 0.0
    if not total:
        return None
    for count, took_s in zip(durations, _DURATIONS, strict=True):
        below += count
        if below * 2 >= total:
            return took_s
    return _DURATIONS[-1]


def _rate(count: float, memory: Memory) -> float | None:
    return count / memory.observed_s if memory.observed_s else None


def _clears_in_s(size: int, seen: Observation, memory: Memory) -> float | None:
    """Return in how many seconds nothing will wait any more, with so many processes; None: not in sight."""
    if not seen.backlog:
        return 0.0
    if not any(memory.durations) or size <= 0:
        return None
    # A message holds a process for no longer than it takes to clear all: so the time is what it follows from.
    clears_s = float("inf")
    for _ in range(8):
        each_s = _held_s(memory.durations, clears_s)
        free = size - sum(_goes_on(memory.durations, age, clears_s) for age in seen.in_work)
        gain = max(0, free) / each_s - memory.arrived / max(memory.observed_s, RATE_WINDOW_S)
        if gain <= 0:
            return None
        clears_s = seen.backlog / gain
    return clears_s


def _waiting(backlog: int, busy: int) -> str:
    waits = f"{backlog} waits" if backlog == 1 else f"{backlog} wait"
    return f"{waits}, {busy} at work" if busy else waits


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _duration(seconds: float) -> str:
    """Return a duration as one says it: `0.05 s`, `12 s`, `5 min`, `2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"


# Which workers are to have them


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What each worker is to have (STANDBY: it takes nothing), and why a pool gets less than it is to have."""

    targets: Mapping[str, int]
    held_back: Mapping[str, str]


@dataclass(slots=True, kw_only=True)
class _Host:
    """What a machine has, as its workers say, less what was given."""

    name: str
    memory: float
    cores: float
    gpus: float
    memory_left: float
    cores_left: float
    gpus_left: float

    def lacks(self, pool: PoolSettings) -> str:
        """Return what there is too little of for one more process; empty: it has room."""
        if (pool.memory or 0) > self.memory_left:
            return f"{_bytes(pool.memory or 0)}, and {self.name} has {_bytes(self.memory)} for all pools"
        if (pool.cpu or 0) > self.cores_left:
            return f"{pool.cpu:g} cores, and {self.name} has {self.cores:g} for all pools"
        if pool.gpu > self.gpus_left:
            return f"{pool.gpu} GPUs, and {self.name} has {self.gpus:g} for all pools"
        return ""

    def take(self, pool: PoolSettings) -> None:
        self.memory_left -= pool.memory or 0
        self.cores_left -= pool.cpu or 0
        self.gpus_left -= pool.gpu


def allocate(
    desired: Mapping[str, int],
    pools: Mapping[str, PoolSettings],
    workers: Sequence[WorkerReport],
    *,
    before: Mapping[str, int] | None = None,
    pinned: Mapping[str, int] | None = None,
) -> Allocation:
    """Give the processes that pools are to have to the workers that live (`workers` are those of all pools).

    Who is at work keeps its processes first, then who has some (or was to have, by `before`, the targets of the last
    time); new ones go to whoever has the fewest. Where a host has too little memory, cores or GPUs for all, pools get
    equal parts of what they are to have. Processes that are on their way out hold what they have.

    A worker with target 0 wakes when a message comes; there are no more of these than the pool may grow by, and
    the others are told to stand by. No worker of a pool whose size was set by hand wakes by itself.
    """
    before, pinned = before or {}, pinned or {}
    hosts = _hosts(workers, pools)
    staying = sorted((worker for worker in workers if not worker.is_draining), key=lambda worker: worker.worker)
    for worker in workers:
        if worker.is_draining:
            for _ in range(worker.size):
                hosts[worker.host].take(pools[worker.pool])
    given = {worker.worker: 0 for worker in staying}
    sizes = dict.fromkeys(desired, 0)
    held_back: dict[str, str] = {}
    full: set[str] = set()
    while waiting := [pool for pool in desired if pool not in full and sizes[pool] < desired[pool]]:
        # The pool that has the least part of what it is to have is next, so that none takes a host for itself.
        pool = min(waiting, key=lambda name: (sizes[name] / desired[name], name))
        able = [one for one in staying if one.pool == pool and given[one.worker] < one.ceiling]
        roomy = [one for one in able if not hosts[one.host].lacks(pools[pool])]
        if not roomy:
            full.add(pool)
            lacks = sorted({hosts[one.host].lacks(pools[pool]) for one in staying if one.pool == pool} - {""})
            if lacks:
                missing = desired[pool] - sizes[pool]
                held_back[pool] = f"no room for {missing} more, each with {'; '.join(lacks)}"
            continue
        chosen = min(roomy, key=lambda one: _rank(one, given[one.worker], before.get(one.worker, 0)))
        hosts[chosen.host].take(pools[pool])
        given[chosen.worker] += 1
        sizes[pool] += 1
    _wait_for_leavers(staying, pools, given, hosts)
    targets = dict(given)
    for pool in desired:
        spare = max(pools[pool].maximum, desired[pool]) - sizes[pool] if pool not in pinned else 0
        idle = [one for one in staying if one.pool == pool and given[one.worker] == 0]
        for one in sorted(idle, key=lambda one: (bool(one.fault), before.get(one.worker, 0) < 0, one.worker)):
            if spare > 0 and one.ceiling > 0 and not hosts[one.host].lacks(pools[pool]):
                hosts[one.host].take(pools[pool])
                spare -= 1
            else:
                targets[one.worker] = STANDBY
    return Allocation(targets=targets, held_back=held_back)


def _rank(worker: WorkerReport, given: int, before: int) -> tuple[int, int, str]:
    """Tell how well one more process is placed with a worker that was given so many; the least is the best."""
    if given < len(worker.in_work):
        return 0, 0, worker.worker
    if given < worker.size:
        # The largest keeps its own, so that small ones become empty.
        return 1, -worker.size, worker.worker
    if given < before and not worker.fault:
        return 2, 0, worker.worker
    return (4 if worker.fault else 3), given, worker.worker


def _wait_for_leavers(
    staying: Sequence[WorkerReport],
    pools: Mapping[str, PoolSettings],
    given: dict[str, int],
    hosts: Mapping[str, _Host],
) -> None:
    """Let no worker grow into what processes hold that have yet to leave."""
    for worker in staying:
        for _ in range(worker.size - given[worker.worker]):
            hosts[worker.host].take(pools[worker.pool])
    for worker in sorted(staying, key=lambda one: (one.size - given[one.worker], one.worker)):
        host, pool = hosts[worker.host], pools[worker.pool]
        while given[worker.worker] > worker.size and (
            (host.memory_left < 0 and pool.memory)
            or (host.cores_left < 0 and pool.cpu)
            or (host.gpus_left < 0 and pool.gpu)
        ):
            given[worker.worker] -= 1
            host.memory_left += pool.memory or 0
            host.cores_left += pool.cpu or 0
            host.gpus_left += pool.gpu


def _hosts(workers: Iterable[WorkerReport], pools: Mapping[str, PoolSettings]) -> dict[str, _Host]:
    hosts: dict[str, _Host] = {}
    for one in workers:
        # Workers in containers on one machine may see less of it than others do.
        was = hosts.get(one.host)
        memory = max(one.memory, was.memory if was else 0)
        cores = max(one.cores, was.cores if was else 0)
        gpus = max(one.gpus, was.gpus if was else 0)
        hosts[one.host] = _Host(
            name=one.host,
            memory=memory,
            cores=cores,
            gpus=gpus,
            memory_left=memory,
            cores_left=cores,
            gpus_left=gpus,
        )
    return hosts


def workers_wanted(pool: PoolSettings, desired: int, workers: Iterable[WorkerReport]) -> int:
    """Return how many workers are to live for a pool to have so many processes; 0 for none.

    Those that live count with what they can hold, and those to come with the pool's `concurrency`.
    """
    wanted = 0
    for ceiling in sorted((one.ceiling for one in workers if not one.is_draining), reverse=True):
        if desired <= 0:
            return wanted
        if ceiling > 0:
            wanted += 1
            desired -= ceiling
    return wanted + max(0, ceil(desired / pool.concurrency))


def first_to_leave(workers: Iterable[WorkerReport], targets: Mapping[str, int]) -> list[str]:
    """Return the names of a pool's workers in the order in which they should go when there are too many."""
    return [
        one.worker
        for one in sorted(
            (one for one in workers if not one.is_draining),
            key=lambda one: (not one.fault, len(one.in_work), targets.get(one.worker, 0), one.size, one.worker),
        )
    ]


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TB"
