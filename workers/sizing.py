"""Sizing: how many processes a worker has at each moment, and how many messages it takes.

A worker consumes also with no process at all, and starts one when a message comes. Its *target* comes from the
autoscaler (ledger/pools.py): so many it is to have. Without one it goes by what it sees itself: it has as many as there
were messages at once within the last `idle_after_s`. Either way there are never more than its ceiling.

This is Celery's hook `worker_autoscaler`: all of it is done in the event loop. The watch, in a thread of its own, hands
over targets and reads the figures for its reports.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Protocol

from orchestrator.pools import STANDBY, PoolSettings
from orchestrator.telemetry import get_logger
from workers.slots import Slots

log = get_logger(__name__)

#: How often to look, without a message that gives occasion to.
TURN_S = 0.1
#: For so long the processes that messages have asked for stay, whatever the target says: it may be from before them.
WOKEN_S = 5.0
#: Messages may wait for so long for a process that starts or ends; then they go back, for others to take.
WAIT_S = 0.5
#: Pause after a process has died at its start: the first, doubled each time, and the longest.
_PAUSE_S = (0.5, 30.0)


class Processes(Protocol):
    """What runs the messages of a worker: children (children.py) or threads (threads.py)."""

    failed_starts: list[str]
    has_started: bool

    @property
    def size(self) -> int: ...
    @property
    def staying(self) -> int: ...
    @property
    def busy(self) -> int: ...
    @property
    def busy_leaving(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    def start_one(self) -> None: ...
    def leave(self, count: int) -> None: ...
    def keep(self, count: int) -> int: ...
    def end_leaving(self) -> None: ...
    def give_back(self, count: int) -> None: ...
    def maintain_pool(self) -> None: ...


class Peak:
    """The highest of what was seen within the last `window_s`."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, value: int, now: float) -> int:
        """Note a value, and return the highest."""
        while self._seen and self._seen[-1][1] <= value:
            self._seen.pop()
        self._seen.append((now, value))
        while self._seen[0][0] < now - self._window_s:
            self._seen.popleft()
        return self._seen[0][1]


class Sizing:
    """Sizes one worker. `ceiling`: most processes that it may have here."""

    #: Celery has `maybe_scale` called so often.
    keepalive = TURN_S

    def __init__(self, pool: PoolSettings, ceiling: int, slots: Slots) -> None:
        self.ceiling = ceiling
        #: Set by the watch: the autoscaler's word, None while there is none. Nothing is taken before the first report.
        self.target: int | None = STANDBY
        #: For the watch: processes that there are, and how many messages of theirs have not begun.
        self.size = 0
        self.unbegun = 0
        #: Whether there is something that the autoscaler should know at once.
        self.has_news = False
        #: What keeps processes from starting; empty: nothing.
        self.fault = ""
        #: Seconds for which processes have lived, added up.
        self.process_s = 0.0
        self._minimum = min(pool.minimum, ceiling)
        self._slots = slots
        self._peak = Peak(pool.idle_after_s)
        self._pool: Any = None
        self._worker: Any = None
        self._turned_at = time.monotonic()
        self._woken = Peak(WOKEN_S)
        self._waits_since: float | None = None
        self._failed = 0
        self._retry_at = 0.0

    # What Celery calls

    def attach(self, pool: Any, _maximum: int, _minimum: int, worker: Any, mutex: object = None) -> Sizing:
        """Size this worker of Celery's; in place of a class of its `worker_autoscaler`."""
        self._pool, self._worker = pool, worker
        return self

    def info(self) -> dict[str, Any]:
        return {"ceiling": self.ceiling, "target": self.target, "size": self.size}

    def maybe_scale(self, request: Any = None) -> None:
        """Look: because it is time to, or because of a message that is about to be given to the pool."""
        processes: Processes | None = self._pool.processes
        if processes is None or self._slots.is_draining:
            return
        if request is None:
            self._turn(processes, time.monotonic())
            return
        demand = processes.busy + processes.waiting + 1
        self._peak.see(demand, time.monotonic())
        if demand > processes.staying:
            self._worker.hub.call_soon(self.maybe_scale)

    # What there is to decide

    def _turn(self, processes: Processes, now: float) -> None:
        processes.maintain_pool()
        self._note_failures(processes, now)
        processes.end_leaving()
        staying = processes.staying
        wanted = self._wanted(processes, staying, now)
        if staying > wanted:
            processes.leave(staying - wanted)
        elif staying < wanted:
            staying += processes.keep(wanted - staying)
            if staying < wanted and processes.size < self.ceiling and now >= self._retry_at:
                self._start(processes, now)
                if staying + 1 < wanted:  # after what has become ready meanwhile has been given its message
                    self._worker.hub.call_soon(self.maybe_scale)
        self._take_messages(processes, wanted, now)
        self.process_s += processes.size * (now - self._turned_at)
        self._turned_at = now
        self.size = processes.size
        self.unbegun = processes.waiting

    def _wanted(self, processes: Processes, staying: int, now: float) -> int:
        """Return how many processes there are to be that do not leave."""
        busy, waiting, target = processes.busy, processes.waiting, self.target
        demand = busy + waiting
        # An autoscaler that is gone for a moment is no reason to end what it has had started.
        peak = self._peak.see(demand if target is None else max(demand, min(target, staying)), now)
        if target is None:
            self._woken.see(demand, now)
            return min(max(self._minimum, demand, min(staying, peak)), self.ceiling)
        if target == STANDBY:
            return 0
        wakes = bool(waiting and not staying and not target)
        self.has_news = self.has_news or wakes
        return min(max(target, self._woken.see(int(wakes), now)), self.ceiling)

    def _start(self, processes: Processes, now: float) -> None:
        try:
            processes.start_one()
        except OSError as exc:
            self._fail(f"no process can be started ({exc.strerror or exc})", now)

    def _note_failures(self, processes: Processes, now: float) -> None:
        failed, processes.failed_starts = processes.failed_starts, []
        if failed:
            self._fail(f"its processes die at their start ({failed[-1]})", now)
        elif processes.has_started and self._failed:
            log.info("processes_start_again")
            self._failed, self.fault, self.has_news = 0, "", True
        processes.has_started = False

    def _fail(self, fault: str, now: float) -> None:
        first, longest = _PAUSE_S
        self._failed += 1
        pause_s = min(first * 2 ** (self._failed - 1), longest)
        self._retry_at = now + pause_s
        self.fault, self.has_news = fault, True
        log.error("process_failed_to_start", fault=fault, failed=self._failed, tried_again_in_s=pause_s)

    def _take_messages(self, processes: Processes, wanted: int, now: float) -> None:
        """Take as many messages as there are processes for: what is taken beyond that waits while others are idle."""
        consumer = self._worker.consumer
        if self.target == STANDBY or (not processes.staying and now < self._retry_at):
            consumer.stand_by()
        else:
            consumer.go_on()
        by_target = min(self.ceiling, max(1, wanted) + processes.busy_leaving)
        consumer.take(self.ceiling if self.target is None else by_target)
        is_growing = processes.size < self.ceiling and now >= self._retry_at
        surplus = processes.waiting - ((wanted if is_growing else processes.staying) - processes.busy)
        if surplus <= 0:
            self._waits_since = None
        elif consumer.is_standing_by:
            processes.give_back(processes.waiting)
        elif self._waits_since is None:
            self._waits_since = now
        elif now - self._waits_since > WAIT_S:
            processes.give_back(surplus)
