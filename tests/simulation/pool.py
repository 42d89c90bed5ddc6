"""A pool in simulated time: a queue, workers with processes, and a clock that jumps from event to event.

What takes time in the real one takes it here: a child starts in 0.2 s and a worker in 1.5 s; a worker reports and
learns its target once a second, so what a rule sees of it is up to a second old, and what it says is done up to a
second later.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

from orchestrator.pools import MESSAGE_BOUNDS, WorkerReport

from .arrivals import Message, Pattern

CHILD_START_S = 0.2
WORKER_START_S = 1.5
REPORT_S = 1.0
NAME = "default"


@dataclass(slots=True, kw_only=True)
class Worker:
    """A parent and its processes."""

    name: str
    ceiling: int
    starting: int = 0
    idle: int = 0
    #: For each process at work, since when.
    busy: dict[int, float] = field(default_factory=dict)
    #: How many of those at work go when they have finished.
    leaving: int = 0
    served: list[int] = field(default_factory=lambda: [0] * (len(MESSAGE_BOUNDS) + 1))
    #: Starts a process when a message comes and it has none.
    wakes: bool = False
    woken_s: float = -1e9
    is_draining: bool = False

    @property
    def size(self) -> int:
        return self.starting + self.idle + len(self.busy)

    def report(self, now_s: float) -> WorkerReport:
        return WorkerReport(
            worker=self.name,
            pool=NAME,
            ceiling=self.ceiling,
            size=self.size,
            in_work=tuple(now_s - since_s for since_s in self.busy.values()),
            served=tuple(self.served),
            is_draining=self.is_draining,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What came of it."""

    waits_s: list[float]
    process_s: float
    starts: int
    changes: int
    #: (when, how many processes from then on)
    sizes: list[tuple[float, int]]
    ended_s: float
    #: For each message that has begun, when and for how long it had waited.
    begun: list[tuple[float, float]]


class Pool:
    """The queue and the workers. A rule calls `size` on workers, and `start_worker`, `drain`."""

    def __init__(self, pattern: Pattern) -> None:
        self.now_s = 0.0
        self.queue: deque[Message] = deque()
        self.workers: dict[str, Worker] = {}
        self.on_arrival: Callable[[], None] = lambda: None
        self.unfinished = len(pattern.messages)
        self._pattern = pattern
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._names = count()
        self._tasks = count()
        self._begun: list[tuple[float, float]] = []
        self._sizes: list[tuple[float, int]] = [(0.0, 0)]
        self._starts = 0
        self._changed: set[int] = set()
        self._wanted = 0

    # What rules do

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._order), act))

    def every(self, interval_s: float, act: Callable[[], object], *, first_s: float | None = None) -> None:
        def turn() -> None:
            act()
            self.after(interval_s, turn)

        self.after(interval_s if first_s is None else first_s, turn)

    def note_wanted(self, size: int) -> None:
        """Count a change of the size that is wanted; several within one second are one."""
        if size != self._wanted:
            self._wanted = size
            self._changed.add(int(self.now_s))

    def start_worker(self, ceiling: int, ready: Callable[[Worker], None], *, delay_s: float = WORKER_START_S) -> str:
        name = f"w{next(self._names):04}"

        def begin() -> None:
            self.workers[name] = worker = Worker(name=name, ceiling=ceiling)
            ready(worker)

        self.after(delay_s, begin)
        return name

    def size(self, worker: Worker, target: int) -> None:
        """Have so many processes: idle ones go at once, others when they have finished."""
        target = min(target, worker.ceiling)
        have = worker.size - worker.leaving
        if target > have:
            stay = min(worker.leaving, target - have)
            worker.leaving -= stay
            self._start(worker, target - have - stay)
        elif target < have:
            gone = min(worker.idle, have - target)
            worker.idle -= gone
            worker.leaving += min(have - target - gone, len(worker.busy) - worker.leaving)
        self._note_size()

    def drain(self, worker: Worker) -> None:
        worker.is_draining = True
        worker.wakes = False
        self.size(worker, 0)
        self._forget_drained(worker)

    def total(self) -> int:
        return sum(worker.size for worker in self.workers.values())

    def live(self) -> Iterable[Worker]:
        return [worker for worker in self.workers.values() if not worker.is_draining]

    # The clock

    def run(self) -> Figures:
        """Run until all messages are done and the horizon is reached."""
        arrivals = iter(self._pattern.messages)

        def arrive(message: Message) -> None:
            self.queue.append(message)
            self._feed()
            self.on_arrival()
            schedule()

        def schedule() -> None:
            message = next(arrivals, None)
            if message is not None:
                self.after(message[0] - self.now_s, lambda: arrive(message))

        schedule()
        while self._events and (self.unfinished or self._events[0][0] <= self._pattern.horizon_s):
            self.now_s, _, act = heapq.heappop(self._events)
            act()
        end_s = max(self.now_s, self._pattern.horizon_s)
        ends = [at_s for at_s, _ in self._sizes[1:]] + [end_s]
        return Figures(
            waits_s=sorted(wait_s for _, wait_s in self._begun),
            process_s=sum(size * (end - at_s) for (at_s, size), end in zip(self._sizes, ends, strict=True)),
            starts=self._starts,
            changes=len(self._changed),
            sizes=self._sizes,
            ended_s=end_s,
            begun=self._begun,
        )

    # Processes

    def _start(self, worker: Worker, processes: int) -> None:
        def begin() -> None:
            # It may have been told to have fewer in the meantime.
            worker.starting -= 1
            worker.idle += 1
            self._feed()
            self._note_size()

        for _ in range(processes):
            self._starts += 1
            worker.starting += 1
            self.after(CHILD_START_S, begin)

    def _feed(self) -> None:
        """Give what waits to processes that have nothing."""
        if not self.queue:
            return
        for worker in self.workers.values():
            while self.queue and worker.idle:
                self._begin(worker)
            if self.queue and worker.wakes and not worker.size:
                worker.woken_s = self.now_s
                self._start(worker, 1)
                self._note_size()
                return

    def _begin(self, worker: Worker) -> None:
        at_s, held_s = self.queue.popleft()
        self._begun.append((self.now_s, self.now_s - at_s))
        worker.idle -= 1
        task = next(self._tasks)
        worker.busy[task] = self.now_s

        def end() -> None:
            del worker.busy[task]
            worker.served[bisect_left(MESSAGE_BOUNDS, held_s)] += 1
            self.unfinished -= 1
            if worker.leaving:
                worker.leaving -= 1
                self._note_size()
                self._forget_drained(worker)
            else:
                worker.idle += 1
                self._feed()

        self.after(held_s, end)

    def _forget_drained(self, worker: Worker) -> None:
        if worker.is_draining and not worker.size:
            self.workers.pop(worker.name, None)

    def _note_size(self) -> None:
        total = self.total()
        if total != self._sizes[-1][1]:
            self._sizes.append((self.now_s, total))
