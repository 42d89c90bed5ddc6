"""Kills and stops processes at random, from a seed, and notes whom."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import psutil

from orchestrator.ledger.ledger import LEASE_MS
from tests.chaos.processes import System, children, part_of_up, parts_of_up
from tests.chaos.record import Harm, Journal, Tail

#: How often each is chosen, of 100.
WEIGHTS = {
    "child": 55, "worker": 8, "control": 9, "dispatcher": 5, "trigger": 8, "beat": 3, "gateway": 3, "autoscaler": 3,
    "list": 2, "stop": 4,
}  # fmt: skip
_SPARE_LONG = 0.9
_STOPS = ("parent", "child", "family")
#: Between two kills of the server; above 30 s `up` starts it again without delay.
_SERVER_S = (25.0, 40.0)


class Targets(Protocol):
    """Where the processes are that may be struck; a pid is None while one is not there."""

    def server(self) -> int | None: ...

    def workers(self) -> list[int]:
        """Return the parents of the workers that are there."""

    def other(self, what: str) -> int | None:
        """Return the process of another name in the weights."""


class Parts:
    """The parts of `up`, and the roles that the harness keeps beside it."""

    def __init__(self, system: System) -> None:
        self._roles = system.roles

    def server(self) -> int | None:
        return part_of_up(self._roles["up"].pid, "valkey-server")

    def workers(self) -> list[int]:
        beside = self._roles["worker"].pid
        return parts_of_up(self._roles["up"].pid, "worker") + ([] if beside is None else [beside])

    def other(self, what: str) -> int | None:
        return part_of_up(self._roles["up"].pid, "control") if what == "control" else self._roles[what].pid


class Killer:
    """Strikes what it is given, as often as `weights` say; the server by the clock."""

    def __init__(
        self, targets: Targets, work: Path, chance: random.Random, weights: Mapping[str, int] = WEIGHTS
    ) -> None:
        self._targets = targets
        self._weights = weights
        self._chance = chance
        self._journal = Journal(work / "harms.jsonl")
        self._tail = Tail(work / "record")
        self._server_at = time.monotonic() + chance.uniform(10, 20)
        self._stopped: list[tuple[float, list[int]]] = []
        self.counts: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()

    @property
    def kills(self) -> int:
        return self.counts.total()

    def close(self) -> None:
        self.wake(float("inf"))
        self._journal.close()

    def wake(self, now: float) -> None:
        """Let those go on whose time has come."""
        for until, pids in [entry for entry in self._stopped if entry[0] <= now]:
            self._stopped.remove((until, pids))
            for pid in pids:
                _signal(pid, signal.SIGCONT)

    def strike(self) -> None:
        """Do one thing to one process; to the server when its time has come."""
        now = time.monotonic()
        if now >= self._server_at:
            self._server_at = now + self._chance.uniform(*_SERVER_S)
            self._kill("server", self._targets.server())
            return
        (what,) = self._chance.choices(list(self._weights), list(self._weights.values()))
        if what == "stop":
            self._stop()
        elif what == "child":
            self._kill(what, self._busy_child())
        elif what == "worker":
            parent = self._chance.choice(self._targets.workers() or [None])
            self._kill(what, parent, tuple(child.pid for child in children(parent)))
        else:
            self._kill(what, self._targets.other(what))

    def _busy_child(self) -> int | None:
        """Return a child that is in a body, or was a moment ago; else any."""
        found = [child.pid for parent in self._targets.workers() for child in children(parent)]
        busy, long = self._tail.busy()
        # A step of 30 s is the easiest to hit: mostly it is let be, or it would never end.
        spared = long if self._chance.random() < _SPARE_LONG else set()
        some = [pid for pid in found if pid in busy - spared] or found
        return self._chance.choice(some) if some else None

    def _kill(self, what: str, pid: int | None, family: tuple[int, ...] = ()) -> None:
        now = time.monotonic()
        if pid is not None and _signal(pid, signal.SIGKILL):
            self._journal.harm(Harm(now, "kill", what, pid, family))
            self.counts[what] += 1

    def _stop(self) -> None:
        """Stop a worker for longer than its lease: its parent, one child, or all of it. One at a time."""
        parents = self._targets.workers()
        if self._stopped or not parents:
            return
        what = self._chance.choice(_STOPS)
        parent = self._chance.choice(parents)
        below = tuple(child.pid for child in children(parent))
        pids = [parent] if what == "parent" else [parent, *below]
        if what == "child":
            busy = self._busy_child()
            pids = [busy] if busy is not None else []
        now = time.monotonic()
        until = now + LEASE_MS / 1000 + self._chance.uniform(1.5, 4.0)
        stopped = [pid for pid in pids if _signal(pid, signal.SIGSTOP)]
        if stopped:
            self._journal.harm(Harm(now, "stop", what, pids[0], below if what != "child" else (), until))
            self._stopped.append((until, stopped))
            self.stops[what] += 1


def _signal(pid: int, number: int) -> bool:
    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        os.kill(pid, number)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
    return True
