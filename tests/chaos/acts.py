"""What a person does with runs meanwhile: cancels them, and goes on with those that failed or were cancelled."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import redis

from orchestrator import resume
from orchestrator.engine import Engine
from orchestrator.errors import InFlightError, InputError, NotFoundError, UnavailableError
from orchestrator.ledger import keys
from orchestrator.redrive import Options, Redrive
from orchestrator.workflows import END
from tests.chaos.record import Journal
from tests.chaos.workload import MENDED, Expected, Will

_PAUSE_S = 0.2
#: A run that has not come to what it shall after so often is left as it is, for the checks to find.
_TRIES = 12
_THREADS = 8
#: A run is cancelled so soon after its event was accepted.
_CANCEL_S = 5.0
_MENDED_INPUT = {"broken": False}
KILLED = "killed"


@dataclass(frozen=True, slots=True)
class Act:
    """One thing that was asked for, from when to when (`time.monotonic`), and how often until it was done."""

    run: str
    what: str
    asked: float
    done: float
    calls: int
    answer: str = ""

    @property
    def is_disturbed(self) -> bool:
        """Whether it may have been done by half, and the rest later."""
        return self.calls > 1 or self.answer == KILLED


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run as its episode had ended, before the next."""

    episode: int
    state: str
    states: Mapping[str, str]
    #: slot -> attempts made, of all episodes.
    attempts: Mapping[str, int]
    #: Slots that were begun after the run was cancelled.
    late: tuple[str, ...]
    #: When somebody was about to open the next episode.
    at: float = field(default_factory=time.monotonic)


def counts_of(attempts: Mapping[str, str]) -> dict[str, int]:
    """Return how many attempts each slot has made, by the hash of the ledger."""
    found: dict[str, int] = {}
    for name in attempts:
        slot, at, number = name.rpartition("@")
        if at:
            found[slot] = max(found.get(slot, 0), int(number))
    return found


def late_of(fields: Mapping[str, str], attempts: Mapping[str, str], hooks: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the slots of a cancelled run, hooks apart, that were taken after it had been cancelled, by the ledger."""
    if fields.get("state") != "cancelled" or "cancel_requested" not in fields:
        return ()
    cancelled = int(fields["cancel_requested"])
    found = []
    for name, text in attempts.items():
        slot, at, _ = name.rpartition("@")
        if at and slot != END and slot not in hooks and json.loads(text).get("started_at", 0) > cancelled:
            found.append(slot)
    return tuple(found)


class Hand(Protocol):
    """By which way things are asked for; the answer is KILLED if whoever did it was.

    Each raises UnavailableError or RedisError if it may not have had its effect.
    """

    def cancel(self, run: str) -> str: ...
    def resume(self, run: str) -> str: ...
    def redrive(self, runs: list[str], mended: Any) -> str: ...


class InProcess:
    """As the command line does it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def cancel(self, run: str) -> str:
        return "asked" if self._engine.cancel(run) else "nothing to cancel"

    def resume(self, run: str) -> str:
        try:
            found = resume.check(self._engine, run)
            return f"episode {resume.resume(self._engine, run, episode=found.episode)}"
        except (InFlightError, InputError) as exc:
            return str(exc)

    def redrive(self, runs: list[str], mended: Any) -> str:
        letters = self._engine.dead_letters
        chosen = [letter for letter in letters.all() if letter.run in runs]
        options = Options(mended=mended, timeout_s=20.0)
        return json.dumps(Redrive(self._engine, letters, options).run(chosen).to_json())


class Operator:
    """Does with each run what its `will` says, in threads of its own, and notes it."""

    def __init__(self, work: Path, engine: Engine, hand: Hand, chance: random.Random) -> None:
        self._work = work
        self._engine = engine
        self._hand = hand
        self._chance = chance
        self._journal = Journal(work / "acts.jsonl")
        self._pool = ThreadPoolExecutor(_THREADS)
        self._busy: dict[str, Future[None]] = {}
        self._tries: Counter[str] = Counter()
        self.acts: list[Act] = []
        #: run -> episode -> how it was at its end.
        self.snapshots: dict[str, dict[int, Snapshot]] = {}

    def close(self) -> None:
        self._pool.shutdown()
        self._journal.close()

    def accept(self, expected: Expected, *, ready: Callable[[], bool] | None = None) -> None:
        """Take note of a run whose event was accepted; one that is to be cancelled is so soon, or when it is ready."""
        if expected.will.cancels:
            delay_s = self._chance.uniform(0, _CANCEL_S)
            self._busy[expected.run] = self._pool.submit(self._cancel, expected, delay_s, ready)

    def is_busy(self, run: str) -> bool:
        """Tell whether something is being done with a run. Raises what has become of it."""
        future = self._busy.get(run)
        if future is None:
            return False
        if not future.done():
            return True
        future.result()
        return False

    def is_done(self, expected: Expected, state: str) -> bool:
        """Tell whether nothing is left to do with a run that has ended so; else something is begun."""
        if state in expected.will.states or not expected.will.goes_on or self._tries[expected.run] >= _TRIES:
            return True
        self._tries[expected.run] += 1
        self._busy[expected.run] = self._pool.submit(self._go_on, expected)
        return False

    def family(self, expected: Expected) -> list[Expected]:
        """Return a run and those nested in it, as they are by the ledger."""
        return expected.family(lambda run, slot: self._engine.ledger.child_of(run, slot))

    def _cancel(self, expected: Expected, delay_s: float, ready: Callable[[], bool] | None) -> None:
        if ready is None:
            time.sleep(delay_s)
        while ready is not None and not ready():
            time.sleep(0.05)
        while not self._engine_has(expected.run):
            time.sleep(0.05)
        self._do(expected.run, "cancel", partial(self._hand.cancel, expected.run))

    def _engine_has(self, run: str) -> bool:
        try:
            return bool(self._engine.ledger.outcome(run)[0])
        except UnavailableError:
            return False

    def _go_on(self, expected: Expected) -> None:
        will, run = expected.will, expected.run
        family = self._insist(lambda: self._snap(expected))
        if will is not Will.REDRIVE_INPUT:
            for one in family:
                (self._work / MENDED / one.run).touch()
        go_on = partial(self._do, run, "resume", partial(self._hand.resume, run))
        mended = _MENDED_INPUT if will is Will.REDRIVE_INPUT else None
        runs = [one.run for one in family]
        send_back = partial(self._do, run, "redrive", partial(self._hand.redrive, runs, mended))
        if will is Will.BOTH:
            with ThreadPoolExecutor(2) as pool:
                for one in [pool.submit(go_on), pool.submit(send_back)]:
                    one.result()
        elif will in (Will.REDRIVE, Will.REDRIVE_INPUT):
            send_back()
        else:
            go_on()

    def _snap(self, expected: Expected) -> list[Expected]:
        family = self.family(expected)
        client = self._engine.ledger.client
        for one in family:
            with client.pipeline(transaction=True) as pipe:
                for name in ("run", "states", "attempts"):
                    pipe.hgetall(keys.run_key(one.run, name))
                fields, states, attempts = pipe.execute()
            if fields and fields["state"] in ("failed", "cancelled", "succeeded"):
                late = late_of(fields, attempts, one.kind.hooks)
                snapshot = Snapshot(int(fields["episode"]), fields["state"], states, counts_of(attempts), late)
                self.snapshots.setdefault(one.run, {}).setdefault(snapshot.episode, snapshot)
        return family

    def _do(self, run: str, what: str, act: Callable[[], str]) -> None:
        asked, calls = time.monotonic(), 0

        def once() -> str:
            nonlocal calls
            calls += 1
            return act()

        try:
            answer = self._insist(once)
        except NotFoundError as exc:
            answer = str(exc)
        self.acts.append(Act(run, what, asked, time.monotonic(), calls, answer))
        self._journal.write([run, what, asked, self.acts[-1].done, calls, answer])

    @staticmethod
    def _insist(act: Callable[[], Any]) -> Any:
        while True:
            try:
                return act()
            except (UnavailableError, redis.RedisError):
                time.sleep(_PAUSE_S)
