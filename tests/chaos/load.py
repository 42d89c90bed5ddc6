"""The load: events that are emitted, files that arrive, what sources send; and which runs must come of them."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import redis

from orchestrator.bus import EventBus
from orchestrator.celery_app import queue_name
from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.events import RUNS_SOURCE, Event
from orchestrator.ledger import keys
from orchestrator.runs import RunState, run_id
from orchestrator.schedules import Schedules
from orchestrator.settings import Settings
from orchestrator.subscriptions import file_source, schedule_source
from orchestrator.workflows import DEFAULT_POOL
from tests.chaos.acts import Hand, InProcess, Operator
from tests.chaos.processes import environment, server_url
from tests.chaos.record import Journal
from tests.chaos.sources import SOURCE, Sources
from tests.chaos.workload import EVENT_TYPE, FOLLOWED, KINDS, TRIGGERED, Expected, Will

#: What is done with the runs of a kind, in turn.
_OF_MEND = (Will.RESUME, Will.REDRIVE, Will.REDRIVE_INPUT, Will.BOTH, Will.LEAVE)
_OF_OUTER = (Will.RESUME, Will.REDRIVE)
_OF_HANG = (Will.NOTHING, Will.CANCEL_RESUME)
#: What sources send in a round.
_SENT = (
    *("hooked",) * 3, "answered", "posted", *("object",) * 4, "polled", "removed", *("listed",) * 3, *("queued",) * 2,
)  # fmt: skip
#: A run may be on the list this much after its time of creation.
_LATE_MS = 60_000
#: So soon after the load has ended the schedule has emitted what was due by then, and after its pause nothing more.
_CAUGHT_UP_S, _QUIET_S = 60.0, 5.0

#: Writes N lines to a file, in three pieces with pauses in between.
_WRITER = """
import sys, time
path, lines, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
with open(path, "w") as file:
    for n in range(lines):
        file.write(f"{n}\\n")
        if n in (lines // 3, 2 * lines // 3):
            file.flush()
            time.sleep(pause)
"""


def settings_of(project: Path, data_dir: Path) -> Settings:
    """Return the settings of the project on the embedded server of a data directory."""
    url = server_url(data_dir)
    return Settings.load(project, environ={}, data_dir=data_dir, broker_url=url, ledger_url=url)


_Seen = TypeVar("_Seen")
_NEVER = datetime.min.replace(tzinfo=UTC)
#: Kinds of which the runs are found by their input.
_FOUND = ("object", "polled", "removed", "listed", "tick")


def _place(workflow: str, given: Mapping[str, Any]) -> tuple[str, str]:
    return workflow, json.dumps(given, sort_keys=True)


def _last_due(schedules: Schedules) -> datetime | None:
    last = schedules.show("tick")["last_due_at"]
    return datetime.fromisoformat(last) if last is not None else None


def _insist(look: Callable[[], _Seen]) -> _Seen | None:
    """Look until there is something, while servers may be away; None if there is nothing for too long."""
    until = time.monotonic() + _CAUGHT_UP_S
    while time.monotonic() < until:
        with contextlib.suppress(redis.RedisError, UnavailableError):
            if seen := look():
                return seen
        time.sleep(0.2)
    return None


@dataclass(slots=True)
class _File:
    path: Path
    writer: subprocess.Popen[bytes]


class Load:
    """Starts runs, by events, by files and by sources, and knows which have not come to their end. Used by one thread.

    `hand` is how it does with runs what is to be done with them meanwhile. `follows` says that the ends of runs that
    are FOLLOWED have runs, and `ticks` that the schedule is in force.
    """

    def __init__(
        self,
        work: Path,
        data_dir: Path,
        chance: random.Random,
        hand: Hand | None = None,
        sources: Sources | None = None,
        *,
        follows: bool = False,
        ticks: bool = False,
    ) -> None:
        self.project = work / "project"
        self.engine = Engine(settings_of(self.project, data_dir), patience_s=5.0)
        #: With as little patience as the command line.
        self._operators = Engine(settings_of(self.project, data_dir), patience_s=0.0)
        self.operator = Operator(
            work, self._operators, hand or InProcess(self._operators), random.Random(chance.random())
        )
        self._bus = EventBus(self.engine.app)
        self._accepted = Journal(work / "accepted.jsonl")
        self._chance = chance
        self._serial = 0
        self._files: list[_File] = []
        self._sources = sources
        self._follows = follows
        self._ticks = ticks
        #: Runs of which nobody but the ledger knows the id, by workflow and input: those that must be there, and are.
        self._awaited: dict[tuple[str, str], Expected] = {}
        self._found: dict[tuple[str, str], str] = {}
        self._looked_at: set[str] = set()
        self._looked_to_ms = 0.0
        self.wrong: list[str] = []
        #: Runs of accepted events, and those of them that have not ended, or with which something is to be done yet.
        self.roots: dict[str, Expected] = {}
        self.open: dict[str, Expected] = {}
        #: Messages that nobody can read, and how often each was sent at most.
        self.litter: dict[bytes, int] = {}
        self.refused = 0
        self.stop = threading.Event()
        #: Tells whether a run that is to be cancelled is to be now; else it is at random.
        self.ready: Callable[[Expected], bool] | None = None

    def emit(self, kind: str, will: Will = Will.NOTHING, **params: Any) -> Expected | None:
        """Publish an event until it is accepted; None if the load is stopped before."""
        self._serial += 1
        event = Event(
            id=f"{kind}-{self._serial}", source=SOURCE, type=EVENT_TYPE + kind, time="2026-01-01T00:00:00Z", data=params
        )
        while not self.stop.is_set():
            try:
                self._bus.publish([event])
            except Exception:  # noqa: BLE001 -- whatever it was: not accepted, and to be tried under the same id
                self.refused += 1
                self.stop.wait(0.2)
                continue
            run = run_id(kind, SOURCE, event.id)
            self._accepted.write({"event": event.id, "run": run, "kind": kind, "params": params, "will": will})
            return self._expect(Expected(run, KINDS[kind], params, will=will))
        return None

    def throw(self) -> None:
        """Put a message that nobody can read among those of steps."""
        self._serial += 1
        raw = f"litter {self._serial}".encode()
        self.litter[raw] = 0
        while not self.stop.is_set():
            self.litter[raw] += 1
            try:
                self.engine.ledger.client.lpush(queue_name(DEFAULT_POOL), raw)
                return
            except redis.RedisError:
                self.stop.wait(0.2)

    def _expect(self, expected: Expected) -> Expected:
        self.operator.accept(expected, ready=partial(self.ready, expected) if self.ready else None)
        self.roots[expected.run] = expected
        self.open[expected.run] = expected
        return expected

    def drop(self, lines: int, pause: float) -> None:
        """Have another process write a file to the inbox."""
        self._serial += 1
        path = self.project.resolve() / "inbox" / f"{lines}-{self._serial}.txt"
        writer = subprocess.Popen([sys.executable, "-S", "-c", _WRITER, str(path), str(lines), str(pause)],
                                  env=environment())  # fmt: skip
        self._files.append(_File(path, writer))

    def send(self, kind: str) -> None:
        """Have a source of that kind send something."""
        assert self._sources is not None
        self._sources.send(kind)

    def note_files(self) -> None:
        """Expect a run of each file that is written now."""
        for file in [file for file in self._files if file.writer.poll() is not None]:
            self._files.remove(file)
            if file.writer.returncode != 0:
                raise RuntimeError(f"the writer of {file.path} ended with {file.writer.returncode}")
            status = file.path.stat()
            identity = f"{file.path}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"
            run = run_id("take", file_source("take", str(file.path.parent)), identity)
            self._accepted.write({"event": identity, "run": run, "kind": "take", "params": {"path": str(file.path)}})
            self._expect(Expected(run, KINDS["take"], {"path": str(file.path)}))

    def collect(self) -> None:
        """Expect a run of each thing that a source has accepted."""
        for one in self._sources.collect() if self._sources is not None else ():
            self._accepted.write({"run": one.run, "kind": one.kind.name, "params": one.params})
            if one.run:
                self._expect(one)
            else:
                self._awaited[_place(one.kind.name, one.params)] = one

    def _find(self) -> bool:
        """Look for the runs of which nobody can know the id: the ledger's, by their input; True, if it could."""
        client = self.engine.ledger.client
        rows = client.zrange(keys.RUNS, self._looked_to_ms - _LATE_MS, "+inf", byscore=True, withscores=True)
        new = [run for run, _ in rows if run not in self._looked_at]
        with client.pipeline(transaction=False) as pipe:
            for run in new:
                pipe.hmget(keys.run_key(run, "run"), "workflow", "input")
            found = pipe.execute()
        for run, (workflow, given) in zip(new, found, strict=True):
            if workflow is None:  # it is being started
                continue
            self._looked_at.add(run)
            if workflow in _FOUND:
                self._found.setdefault(_place(workflow, self.engine.payloads.unpack(given)), run)
        self._looked_to_ms = max([self._looked_to_ms, *(at for _, at in rows)])
        for place in self._awaited.keys() & self._found.keys():
            self._expect(replace(self._awaited.pop(place), run=self._found[place]))
        return True

    def _follow(self, root: Expected) -> None:
        """Expect a run of each end of a run that is followed, and of those nested in it."""
        if not self._follows or not any(one.kind.name in FOLLOWED for one in root.family()):
            return
        for one in self.operator.family(root):
            if one.kind.name not in FOLLOWED:
                continue
            row = self.engine.ledger.client.hmget(keys.run_key(one.run, "run"), "state", "episode")
            ends = {number: snapshot.state for number, snapshot in self.operator.snapshots.get(one.run, {}).items()}
            if row[0] is not None and RunState(row[0]).is_end:
                ends[int(row[1])] = row[0]
            for episode, state in ends.items():
                output = one.kind.result(one.params) if state == "succeeded" else None
                run = run_id("after", RUNS_SOURCE, f"{one.run}.{episode}")
                given = {"run": one.run, "state": state, "episode": episode, "output": output}
                self._expect(Expected(run, KINDS["after"], given))

    def end_schedule(self) -> None:
        """Pause the schedule once it has emitted all until now, and expect a run of each due time."""
        if not self._ticks:
            return
        schedules, now = Schedules(self.engine), datetime.now(UTC)
        if not _insist(lambda: (_last_due(schedules) or _NEVER) >= now):
            self.wrong.append(f"the schedule has not emitted all that was due by {now}, {_CAUGHT_UP_S:g} s later")
        _insist(lambda: schedules.pause("tick"))
        time.sleep(_QUIET_S)
        _insist(self._find)
        last = _insist(lambda: _last_due(schedules))
        dues = sorted(json.loads(given)["due_at"] for workflow, given in self._found if workflow == "tick")
        if last is None or not dues:
            self.wrong.append("the schedule has emitted nothing")
            return
        due = datetime.fromisoformat(dues[0])
        while due <= last:
            moment = due.strftime("%Y-%m-%dT%H:%M:%SZ")
            self._expect(Expected(run_id("tick", schedule_source("tick"), moment), KINDS["tick"], {"due_at": moment}))
            due += timedelta(seconds=1)

    @property
    def in_flight(self) -> int:
        pending = self._sources.pending if self._sources is not None else 0
        return len(self.open) + len(self._files) + len(self._awaited) + pending

    def faults(self) -> list[str]:
        """Say what sources have answered wrongly or were not rid of, and what the schedule did not do."""
        return self.wrong + (self._sources.faults() if self._sources is not None else [])

    def refresh(self) -> None:
        """Look which runs have ended; as it was, when the server is away."""
        self.note_files()
        self.collect()
        idle = [run for run in self.open if not self.operator.is_busy(run)]
        try:
            if self._awaited:
                self._find()
            with self.engine.ledger.client.pipeline(transaction=False) as pipe:
                for run in idle:
                    pipe.hget(keys.run_key(run, "run"), "state")
                states = pipe.execute()
            for run, state in zip(idle, states, strict=True):
                if state is not None and RunState(state).is_end and self.operator.is_done(self.open[run], state):
                    self._follow(self.open[run])
                    del self.open[run]
        except (redis.RedisError, UnavailableError):
            return

    def round(self, number: int) -> None:
        """Start one mixture; each fifth with a large fan-out, each seventh with a step of 30 s.

        What is to go wrong comes in turn, so that there is as much of each.
        """
        x = self._chance.randrange(1000)
        starts = [("chain", x), ("chain", x + 1), ("diamond", x), ("diamond", x + 1), ("tangle", x), ("tangle", x + 1)]
        starts += [("fan", 200), ("nested", x)]
        if number % 5 == 1:
            starts.append(("fan", 5000))
        # More than one at a time would have all children wait, and what waits for a child is no recovery.
        if number % 7 == 2 and not any(run.kind.name == "long" for run in self.open.values()):
            starts.append(("long", x))
        self._chance.shuffle(starts)
        for kind, value in starts:
            self.emit(kind, x=value)
        self.emit("flaky", x=x, fails=number % 4)
        if number % 2:
            self.emit("crashy", x=x)
        else:
            self.emit("outer", will=_OF_OUTER[number // 2 % len(_OF_OUTER)], x=x, hook=int(number % 3 == 0))
        will = _OF_MEND[number % len(_OF_MEND)]
        # What is mended by other arguments is not mended for the hook.
        self.emit("mend", will=will, x=x, broken=1, hook=int(will in (Will.RESUME, Will.LEAVE) and number % 2 == 0))
        if number % 4 == 3:
            self.emit("mend", will=Will.RESUME, x=x, broken=0, hook=1)
        for will in (Will.CANCEL, Will.CANCEL_RESUME):
            self.emit("slow", will=will, x=x, ms=250)
        if number % 3 == 1:
            self.throw()
        if number % 3 == 2:
            self.emit("hang", will=_OF_HANG[number // 3 % len(_OF_HANG)], x=x)
        for pause in (0.0, 0.0, 0.0, self._chance.uniform(0.3, 1.5)):
            self.drop(self._chance.randrange(3, 40), pause)
        for kind in _SENT if self._sources is not None else ():
            self.send(kind)

    def run(self, limit: int) -> None:
        """Start rounds, as long as few enough runs of events and files are in flight, until told to stop."""
        number = 0
        while not self.stop.is_set():
            self.refresh()
            busy = len(self._files) + sum(1 for one in self.open.values() if one.kind.name not in TRIGGERED)
            if busy < limit:
                self.round(number)
                number += 1
            self.stop.wait(0.3)

    def expected(self) -> list[Expected]:
        """Return every run that must be there, nested ones too."""
        roots = [*self.roots.values(), *self._awaited.values()]
        return [run for root in roots for run in self.operator.family(root)]

    def close(self) -> None:
        self.operator.close()
        self._operators.close()
        self._accepted.close()
        self.engine.close()
