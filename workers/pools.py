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
from heapq import heappop, heappush
from math import ceil, inf, log, sqrt
from typing import Any

from orchestrator.pools import MESSAGE_BOUNDS, STANDBY, PoolSettings, WorkerReport

#: Rates are those of about this last time: long enough for a burst not to look like a rate.
RATE_WINDOW_S = 30.0
#: What came in about this time still comes.
LATELY_S = 3.0
#: After so many seconds in which messages ended, those from before count half in what is known of their durations.
DURATION_HALF_LIFE_S = 120.0
#: Counts are late by up to a second, what was decided reaches workers up to a second later, and a worker takes longer
#: to start than a process: so much of `start_within` is gone before a process works on what waits.
REACTION_S = 2.0
#: Of `start_within`, this much is reckoned with at least, however long the oldest message has waited: what is nearly
#: done should not look as if it took a hundred processes.
LEAST_LEFT = 0.25
_LEAST_S = 0.05
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
    arrived_lately: float = 0.0
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
        """Read what `to_json` wrote. Raises what it may if it is another version's."""
        if len(body["durations"]) != len(_DURATIONS):
            raise ValueError("durations: other buckets")
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
    #: As many of them have something to do, or are to be there whatever there is to do.
    needed: int = 0
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
    needed = max(pool.minimum, min(need, pool.maximum)) if seen.pinned is None else seen.pinned
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
            needed=needed,
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
    known = {worker: row for worker, row in memory.served.items() if seen.now_s - row[0] < FORGET_WORKER_S}
    for worker, now in seen.served.items():
        before = memory.served.get(worker, (0.0, ()))[1]
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
            arrived_lately=max(0.0, memory.arrived_lately * 0.5 ** (elapsed_s / LATELY_S) + arrived),
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
    left_s = max(LEAST_LEFT * pool.start_within_s, pool.start_within_s - age_s - REACTION_S, _LEAST_S)
    each_s = _held_s(memory.durations, left_s)
    long = sum(_goes_on(memory.durations, age, left_s) for age in seen.in_work)
    to_clear = long + ceil((work - long) * each_s / left_s)
    load = (memory.arrived / max(memory.observed_s, RATE_WINDOW_S)) * _held_s(memory.durations, pool.start_within_s)
    # As many as are at work on average, and the square root of that for its ups and downs: what comes by chance
    # varies by that much.
    to_keep_up = long + ceil(load + sqrt(load))
    need = min(max(to_clear, to_keep_up, busy), work)
    if not backlog:
        return need, f"{busy} at work"
    if need == work:
        return need, f"{_waiting(backlog, busy)}: one process for each"
    each = f"about {_duration(each_s)} each"
    if need == busy:
        return need, f"{_waiting(backlog, 0)}, {each}: the {busy} at work start them within {start_within}"
    held = f", {long} held by long ones" if long else ""
    if to_keep_up > to_clear:
        rate = _rate(memory.arrived, memory) or 0.0
        return need, f"{rate:.3g} come each second, {each}: {_count(need, 'process')} keep up{held}"
    return need, f"{_waiting(backlog, 0)}, {each}: {_count(need, 'process')} start them within {start_within}{held}"


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
    half, below = sum(durations) / 2, 0.0
    if not half:
        return None
    for index, count in enumerate(durations[:-1]):
        if below + count >= half:
            # Bounds double from one bucket to the next; the messages in it are taken to be spread evenly.
            bound: float = MESSAGE_BOUNDS[index]
            return bound / 2 * (1 + (half - below) / count)
        below += count
    return _DURATIONS[-1]


def _rate(count: float, memory: Memory) -> float | None:
    return count / memory.observed_s if memory.observed_s else None


def _clears_in_s(size: int, seen: Observation, memory: Memory) -> float | None:
    """Return in how many seconds nothing will wait any more, with so many processes; None: not in sight."""
    if not seen.backlog:
        return 0.0
    if not any(memory.durations) or size <= 0:
        return None
    # A burst is not to look as if it went on, nor a pause as if nothing came any more.
    comes = min(memory.arrived / max(memory.observed_s, RATE_WINDOW_S), memory.arrived_lately * log(2) / LATELY_S)
    # A message holds a process for no longer than it takes to clear all: so the time is what it follows from.
    clears_s = inf
    for _ in range(8):
        each_s = _held_s(memory.durations, clears_s)
        free = size - sum(_goes_on(memory.durations, age, clears_s) for age in seen.in_work)
        gain = max(0, free) / each_s - comes
        if gain <= 0:
            return None
        clears_s = seen.backlog / gain
    return clears_s


def _waiting(backlog: int, busy: int) -> str:
    waits = f"{backlog} waits" if backlog == 1 else f"{backlog} wait"
    return f"{waits}, {busy} at work" if busy else waits


def _count(number: float, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number:g} {noun}{'es' if noun.endswith('s') else 's'}"


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
class _Room:
    """What a machine has for the processes of all pools, as its workers say, and how much of that is given away."""

    host: str
    memory: float = inf
    cores: float = inf
    gpus: float = inf
    memory_given: float = 0.0
    cores_given: float = 0.0
    gpus_given: int = 0

    def see(self, worker: WorkerReport) -> None:
        """Take up what a worker says of it; of containers on one machine, some may see less of it than others."""
        self.memory = _most(self.memory, worker.memory)
        self.cores = _most(self.cores, worker.cores)
        self.gpus = worker.gpus if self.gpus == inf else max(self.gpus, worker.gpus)

    def give(self, pool: PoolSettings, processes: int = 1) -> None:
        """Give processes of a pool, or take them back, whether or not there is room."""
        self.memory_given += (pool.memory or 0) * processes
        self.cores_given += (pool.cpu or 0) * processes
        self.gpus_given += pool.gpu * processes

    def lacks(self, pool: PoolSettings, processes: int = 1) -> str:
        """Say what there is too little of for more processes of a pool, or with 0 for those given; empty: nothing."""
        if pool.memory and self.memory_given + pool.memory * processes > self.memory:
            return f"{_bytes(pool.memory)}, and {self.host} has {_bytes(self.memory)} for all pools"
        if pool.cpu and self.cores_given + pool.cpu * processes > self.cores + 1e-6:
            return f"{_count(pool.cpu, 'core')}, and {self.host} has {self.cores:g} for all pools"
        if pool.gpu and self.gpus_given + pool.gpu * processes > self.gpus:
            return f"{_count(pool.gpu, 'GPU')}, and {self.host} has {self.gpus:g} for all pools"
        return ""


def _most(known: float, told: float) -> float:
    if not told:  # it does not know
        return known
    return told if known == inf else max(known, told)


def allocate(
    desired: Mapping[str, int],
    pools: Mapping[str, PoolSettings],
    workers: Sequence[WorkerReport],
    *,
    needed: Mapping[str, int] | None = None,
    before: Mapping[str, int] | None = None,
    pinned: Iterable[str] = (),
) -> Allocation:
    """Give the processes that pools are to have to the workers that live (`workers` are those of all pools).

    Who is at work keeps its processes first, then who was to have some (by `before`, the targets of the last time),
    then who has some; new ones go to whoever has the fewest. Where a host has too little memory, cores or GPUs for
    all, pools get equal shares of what they are to have: first of what is `needed`, and then of what they keep in case
    that more comes. Processes that are on their way out hold what they have until
    they are gone. `pools` has the pools of all workers.

    A worker with target 0 starts a process by itself when a message comes. That is for pools that have none: there,
    up to `max` workers may; where there is one already, or the size was set by hand (`pinned`), the others stand by,
    for one that wakes while others have nothing to do would be one too many.
    """
    needed, before, pinned = needed or desired, before or {}, frozenset(pinned)
    rooms: dict[str, _Room] = {}
    for worker in workers:
        room = rooms.setdefault(worker.host, _Room(host=worker.host))
        room.see(worker)
        if worker.is_draining:
            room.give(pools[worker.pool], worker.size)
    staying = {worker.worker: worker for worker in workers if not worker.is_draining}
    given = dict.fromkeys(sorted(staying), 0)
    sizes = dict.fromkeys(desired, 0)
    # The workers of each pool, the best place for one more process first.
    places: dict[str, list[tuple[tuple[int, int, str], str]]] = {pool: [] for pool in desired}
    for name in given:
        one = staying[name]
        if one.pool in places and one.ceiling > 0:
            heappush(places[one.pool], (_rank(one, 0, before.get(name)), name))
    held_back: dict[str, str] = {}
    while waiting := [pool for pool in desired if sizes[pool] < desired[pool] and places[pool]]:
        # The pool that has the smallest share of what it is to have is next, so that none takes a host for itself.
        pool = min(waiting, key=lambda pool: (sizes[pool] >= needed[pool], sizes[pool] / desired[pool], pool))
        _, name = heappop(places[pool])
        one = staying[name]
        lacks = rooms[one.host].lacks(pools[pool])
        if lacks:
            held_back.setdefault(pool, lacks)
            continue
        rooms[one.host].give(pools[pool])
        given[name] += 1
        sizes[pool] += 1
        if given[name] < one.ceiling:
            heappush(places[pool], (_rank(one, given[name], before.get(name)), name))
    for pool, lacks in list(held_back.items()):
        if sizes[pool] < needed[pool]:
            held_back[pool] = f"no room for {_count(needed[pool] - sizes[pool], 'more process')}, each with {lacks}"
        else:
            del held_back[pool]
    _wait_for_leavers(staying, pools, given, rooms, held_back)
    targets = dict(given)
    for pool in desired:
        wakers = 0 if pool in pinned or sizes[pool] else pools[pool].maximum
        idle = [one for one in staying.values() if one.pool == pool and not given[one.worker]]
        for one in sorted(idle, key=lambda one: (bool(one.fault), before.get(one.worker) == STANDBY, one.worker)):
            if wakers > 0 and one.ceiling > 0 and not rooms[one.host].lacks(pools[pool]):
                rooms[one.host].give(pools[pool])
                wakers -= 1
            else:
                targets[one.worker] = STANDBY
    return Allocation(targets=targets, held_back=held_back)


def _rank(worker: WorkerReport, given: int, before: int | None) -> tuple[int, int, str]:
    """Tell how well one more process is placed with a worker that was given so many; the least is the best.

    What it was to have goes before what it says that it has: that is older, and to follow it would move processes back
    and forth for as long as reports are late.
    """
    to_have = worker.size if before is None else max(0, before)
    if given < len(worker.in_work):
        return 0, 0, worker.worker
    if given < to_have and (given < worker.size or not worker.fault):
        # The largest keeps its own, so that small ones become empty.
        return 1, -to_have, worker.worker
    if given < worker.size:
        return 2, 0, worker.worker
    return (4 if worker.fault else 3), given, worker.worker


def _wait_for_leavers(
    staying: Mapping[str, WorkerReport],
    pools: Mapping[str, PoolSettings],
    given: dict[str, int],
    rooms: Mapping[str, _Room],
    held_back: dict[str, str],
) -> None:
    """Let no worker grow into what processes hold that have yet to leave."""
    for name, count in given.items():
        one = staying[name]
        if one.size > count:
            rooms[one.host].give(pools[one.pool], one.size - count)
    for name in given:
        one = staying[name]
        pool, room = pools[one.pool], rooms[one.host]
        while given[name] > one.size and room.lacks(pool, 0):
            given[name] -= 1
            room.give(pool, -1)
            held_back.setdefault(one.pool, f"waits for processes on {one.host} to end that are on their way out")


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
