"""Who sizes the pool: this project's rule, a fixed size, Celery's rule, and KEDA's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import ceil

from orchestrator.pools import STANDBY, PoolSettings, WorkerReport
from workers.pools import Memory, Observation, allocate, decide, first_to_leave, workers_wanted

from .arrivals import Pattern
from .pool import NAME, REPORT_S, Pool, Worker

TURN_S = 1.0
#: Who rings has published the first of what may be many: one looks again.
AGAIN_S = 0.25
#: A process that a message has woken stays at least so long, whatever was decided before.
WOKEN_S = 5.0


class Ours:
    """`decide` and `allocate`, as the autoscaler, the workers and the process launcher of `up` carry them out."""

    def __init__(self, pool: Pool, settings: PoolSettings, *, knows_age: bool = True) -> None:
        self._pool = pool
        self._settings = settings
        self._knows_age = knows_age
        self._memory = Memory()
        self._reports: dict[str, WorkerReport] = {}
        self._targets: dict[str, int] = {}
        self._wanted = 1
        self._launched = 0
        self._rung_s = -1e9
        self.whys: list[tuple[float, int, str]] = []
        self._launch()
        pool.every(TURN_S, self._turn)
        pool.every(TURN_S, self._launch, first_s=0.7)
        pool.on_arrival = self._ring

    def _ring(self) -> None:
        if self._pool.now_s - self._rung_s >= 1.0:
            self._rung_s = self._pool.now_s
            self._turn()
            self._pool.after(AGAIN_S, self._turn)

    def _turn(self) -> None:
        queue = self._pool.queue
        # A message that has woken a process is taken: it waits no longer in the queue.
        waking = sum(1 for one in self._pool.live() if one.starting and one.woken_s >= self._pool.now_s - 0.2)
        age_s = self._pool.now_s - queue[0][0] if queue else 0.0
        reports = [self._reports[name] for name in sorted(self._reports)]
        seen = Observation.of(
            reports,
            now_s=self._pool.now_s,
            backlog=max(0, len(queue) - waking),
            oldest_age_s=age_s if self._knows_age else None,
        )
        decision, self._memory = decide(self._settings, seen, self._memory)
        if not self.whys or self.whys[-1][1:] != (decision.desired, decision.why):
            self.whys.append((self._pool.now_s, decision.desired, decision.why))
        self._pool.note_wanted(decision.desired)
        staying = [report for report in reports if not report.is_draining]
        self._targets = dict(
            allocate({NAME: decision.desired}, {NAME: self._settings}, staying, before=self._targets).targets
        )
        self._wanted = max(1, workers_wanted(self._settings, decision.desired, staying))

    def _launch(self) -> None:
        live = list(self._pool.live())
        while self._launched < self._wanted:
            self._launched += 1
            self._pool.start_worker(self._settings.concurrency, self._ready, delay_s=1.5 if self._pool.now_s else 0.0)
        reports = [one.report(self._pool.now_s) for one in live]
        for name in first_to_leave(reports, self._targets)[: max(0, self._launched - self._wanted)]:
            if len(live) > 1:
                self._launched -= 1
                self._pool.drain(self._pool.workers[name])

    def _ready(self, worker: Worker) -> None:
        worker.wakes = True

        def report() -> None:
            if worker.name not in self._pool.workers:
                self._reports.pop(worker.name, None)
                return
            self._reports[worker.name] = worker.report(self._pool.now_s)
            target = self._targets.get(worker.name)
            if target is None and not worker.is_draining:
                # It goes by what it sees itself: a process for each message that it can take.
                self._pool.size(worker, max(worker.size, min(worker.ceiling, len(self._pool.queue))))
            elif target is not None and not worker.is_draining:
                worker.wakes = target != STANDBY
                if target >= worker.size or self._pool.now_s - worker.woken_s > WOKEN_S:
                    self._pool.size(worker, max(0, target))
            self._pool.after(REPORT_S, report)

        report()


class Fixed:
    """As many processes as somebody has thought right, from the beginning to the end."""

    def __init__(self, pool: Pool, size: int) -> None:
        pool.start_worker(size, lambda worker: pool.size(worker, size), delay_s=0.0)


class CeleryRule:
    """`celery worker --autoscale=MAX,0` (celery/worker/autoscale.py), with a prefetch of one message a process.

    It grows when a message is received, to what is reserved. It shrinks to that once nothing was received, and
    nothing was grown, for `keepalive` seconds. All processes are of one worker: it cannot add machines.
    """

    KEEPALIVE_S = 30.0

    def __init__(self, pool: Pool, maximum: int) -> None:
        self._pool = pool
        self._maximum = maximum
        self._last_s = -1e9
        self._worker: Worker | None = None
        pool.start_worker(maximum, self._ready, delay_s=0.0)
        pool.on_arrival = self._grow

    def _ready(self, worker: Worker) -> None:
        self._worker = worker
        self._pool.every(1.0, self._shrink)

    def _reserved(self) -> int:
        assert self._worker is not None
        return min(len(self._worker.busy) + len(self._pool.queue), self._maximum)

    def _grow(self) -> None:
        if self._worker is None:
            return
        self._last_s = self._pool.now_s
        if self._reserved() > self._worker.size:
            self._pool.size(self._worker, self._reserved())
            self._pool.note_wanted(self._worker.size)

    def _shrink(self) -> None:
        assert self._worker is not None
        if self._pool.queue:
            # What is behind the prefetch is received as soon as something ends.
            self._last_s = self._pool.now_s
        if self._reserved() < self._worker.size and self._pool.now_s - self._last_s > self.KEEPALIVE_S:
            self._pool.size(self._worker, self._reserved())
            self._pool.note_wanted(self._worker.size)


class Keda:
    """KEDA's Redis list scaler over replicas of `concurrency` processes, with everything at its default.

    From none to one replica at the poll of 30 s; from one on, the HPA's rule each 15 s: length / `listLength`, not
    within its tolerance of 10 %, at most twice as many (or four more) in 15 s, and down to the most of the last 300 s;
    to none when the list was empty at all polls of 300 s. What is in work is not in the list.
    """

    POLL_S = 30.0
    COOLDOWN_S = 300.0
    SYNC_S = 15.0
    TOLERANCE = 0.1
    STABILIZATION_S = 300.0
    LIST_LENGTH = 5

    def __init__(self, pool: Pool, maximum: int, concurrency: int) -> None:
        self._pool = pool
        self._most = max(1, maximum // concurrency)
        self._concurrency = concurrency
        self._replicas = 0
        self._active_s = -1e9
        self._wished: deque[tuple[float, int]] = deque()
        pool.every(self.POLL_S, self._poll)
        pool.every(self.SYNC_S, self._sync)

    def _poll(self) -> None:
        if self._pool.queue:
            self._active_s = self._pool.now_s
            if not self._replicas:
                self._scale(1)
        elif self._replicas and self._pool.now_s - self._active_s >= self.COOLDOWN_S:
            self._wished.clear()
            self._scale(0)

    def _sync(self) -> None:
        if not self._replicas:
            return
        now_s, length = self._pool.now_s, len(self._pool.queue)
        ratio = length / (self.LIST_LENGTH * self._replicas)
        wish = self._replicas if abs(ratio - 1) <= self.TOLERANCE else ceil(length / self.LIST_LENGTH)
        wish = max(1, min(wish, self._most))
        self._wished.append((now_s, wish))
        while self._wished[0][0] <= now_s - self.STABILIZATION_S:
            self._wished.popleft()
        if wish > self._replicas:
            self._scale(min(wish, max(2 * self._replicas, self._replicas + 4)))
        elif wish < self._replicas:
            self._scale(min(self._replicas, max(each for _, each in self._wished)))

    def _scale(self, replicas: int) -> None:
        self._pool.note_wanted(replicas)
        for _ in range(replicas - self._replicas):
            self._pool.start_worker(self._concurrency, self._ready)
        live = sorted(self._pool.live(), key=lambda one: len(one.busy))
        for worker in live[: max(0, self._replicas - replicas)]:
            self._pool.drain(worker)
        self._replicas = replicas

    def _ready(self, worker: Worker) -> None:
        self._pool.size(worker, self._concurrency)


def rules(pattern: Pattern, settings: PoolSettings) -> dict[str, Callable[[Pool], object]]:
    """Return each rule by the name that it has in the table."""
    mean = min(settings.maximum, max(1, ceil(pattern.mean_load)))
    return {
        "Orchestrator": lambda pool: Ours(pool, settings),
        f"fixed at max ({settings.maximum})": lambda pool: Fixed(pool, settings.maximum),
        f"fixed at mean load ({mean})": lambda pool: Fixed(pool, mean),
        "Celery --autoscale": lambda pool: CeleryRule(pool, settings.maximum),
        "KEDA": lambda pool: Keda(pool, settings.maximum, settings.concurrency),
    }
