"""The launcher of this machine: workers are processes, supervised here."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.pools import worker_name
from workers.launchers import Launched, Launcher, Phase
from workers.launchers.parts import STEADY_S, Part, make_words, wait_for


@dataclass(slots=True)
class _Worker:
    part: Part
    pool: str
    generation: str


class ProcessLauncher(Launcher):
    """Has workers of the current *generation* of the user's code; those of an earlier one drain when it changes.

    `command` answers the command that runs a worker of a pool, which writes why it ends to the file with a number.
    `most` answers how many workers of a pool the machine has room for. `say` is told in one line what happens.
    Not safe to share between threads.
    """

    def __init__(
        self,
        command: Callable[[str, int], Sequence[str]],
        *,
        grace_s: float,
        say: Callable[[str], None],
        most: Callable[[str], int] = lambda _: sys.maxsize,
    ) -> None:
        self.place = f"process@{socket.gethostname()}"
        self._command = command
        self._grace_s = grace_s
        self._say = say
        self._most = most
        self._generation = ""
        self._wanted: dict[str, int] = {}
        self._workers: list[_Worker] = []

    @property
    def pools(self) -> set[str]:
        """The pools that are to have workers here."""
        return {pool for pool, count in self._wanted.items() if count}

    def renew(self, generation: str) -> None:
        if generation != self._generation:
            self._generation = generation
            for pool, count in self._wanted.items():
                self.scale(pool, count)

    def scale(self, pool: str, count: int, leave: Sequence[str] = ()) -> None:
        count = self._wanted[pool] = min(count, self._most(pool))
        there = [one for one in self._workers if one.pool == pool and not one.part.is_draining]
        current = [one for one in there if one.generation == self._generation]
        # More of those that die at once would be of no use.
        while len(current) < count and not any(one.part.fault for one in current):
            current.append(self._start(pool))
        # Of those that nobody has named the youngest go: they are the least likely to have something.
        current.sort(key=lambda one: (_name(one) in leave, one.part.started), reverse=True)
        too_many = current[: max(0, len(current) - count)]
        for one in [*too_many, *(one for one in there if one.generation != self._generation)]:
            one.part.is_draining = True
            one.part.signal(signal.SIGTERM)

    def look(self) -> list[Launched]:
        now = time.monotonic()
        for one in list(self._workers):
            if one.part.is_draining:
                if not one.part.is_alive:
                    self._workers.remove(one)
                    one.part.reap()
                continue
            ended = one.part.tend(now)
            if ended:
                self._say(f"{ended}; it is started again")
        return [self._launched(one, now) for one in self._workers]

    def close(self, is_hurried: Callable[[], bool] = lambda: False) -> None:
        """Have all workers stop: what runs has `grace_s`, or until somebody is in a hurry, and then is killed."""
        self.drain()
        wait_for([one.part for one in self._workers], self._grace_s, is_hurried)
        for one in self._workers:
            if one.part.is_alive:
                self._say(f"{one.part.name} has steps that go on; they are taken up again at the next start")
        self.kill()

    def drain(self) -> None:
        """Have all workers stop; returns at once."""
        for pool in self._wanted:
            self.scale(pool, 0)

    def kill(self) -> None:
        """Kill what is still there, at once."""
        for one in self._workers:
            one.part.signal(signal.SIGKILL)
        for one in self._workers:
            one.part.reap()
        self._workers.clear()

    def _start(self, pool: str) -> _Worker:
        words = make_words()
        part = Part(f"worker {pool}", self._command(pool, words.fileno()), words=words)
        made = _Worker(part, pool, self._generation)
        self._workers.append(made)
        fault = part.try_start(time.monotonic())
        if fault:
            self._say(f"{fault}; it is tried again")
        return made

    def _launched(self, one: _Worker, now: float) -> Launched:
        part = one.part
        if part.is_draining:
            phase = Phase.DRAINING
        elif part.fault:
            phase = Phase.FAILED
        else:
            phase = Phase.RUNNING if part.is_alive and now - part.started > STEADY_S else Phase.STARTING
        return Launched(pool=one.pool, worker=_name(one), phase=phase, since=part.started, fault=part.fault)


def _name(one: _Worker) -> str:
    return "" if one.part.process is None else worker_name(one.pool, socket.gethostname(), one.part.process.pid)
