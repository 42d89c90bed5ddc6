"""The load: events that are emitted and files that arrive, and which runs must come of them."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import redis

from orchestrator.bus import EventBus
from orchestrator.celery_app import queue_name
from orchestrator.engine import Engine
from orchestrator.events import Event
from orchestrator.ledger import keys
from orchestrator.runs import RunState, run_id
from orchestrator.settings import Settings
from orchestrator.subscriptions import file_source
from orchestrator.workflows import DEFAULT_POOL
from tests.chaos.acts import Hand, InProcess, Operator
from tests.chaos.processes import environment, server_url
from tests.chaos.record import Journal
from tests.chaos.workload import EVENT_TYPE, KINDS, Expected, Will

SOURCE = "chaos"

#: What is done with the runs of a kind, in turn.
_OF_MEND = (Will.RESUME, Will.REDRIVE, Will.REDRIVE_INPUT, Will.BOTH, Will.LEAVE)
_OF_OUTER = (Will.RESUME, Will.REDRIVE)
_OF_HANG = (Will.NOTHING, Will.CANCEL_RESUME)

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


@dataclass(slots=True)
class _File:
    path: Path
    writer: subprocess.Popen[bytes]


class Load:
    """Starts runs, by events and by files, and knows which have not come to their end. Used by one thread.

    `hand` is how it does with runs what is to be done with them meanwhile.
    """

    def __init__(self, work: Path, data_dir: Path, chance: random.Random, hand: Hand | None = None) -> None:
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

    @property
    def in_flight(self) -> int:
        return len(self.open) + len(self._files)

    def refresh(self) -> None:
        """Look which runs have ended; as it was, when the server is away."""
        self.note_files()
        idle = [run for run in self.open if not self.operator.is_busy(run)]
        try:
            with self.engine.ledger.client.pipeline(transaction=False) as pipe:
                for run in idle:
                    pipe.hget(keys.run_key(run, "run"), "state")
                states = pipe.execute()
        except redis.RedisError:
            return
        for run, state in zip(idle, states, strict=True):
            if state is not None and RunState(state).is_end and self.operator.is_done(self.open[run], state):
                del self.open[run]

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

    def run(self, limit: int) -> None:
        """Start rounds, as long as few enough runs are in flight, until told to stop."""
        number = 0
        while not self.stop.is_set():
            self.refresh()
            if self.in_flight < limit:
                self.round(number)
                number += 1
            self.stop.wait(0.3)

    def expected(self) -> list[Expected]:
        """Return every run that must be there, nested ones too."""
        return [run for root in self.roots.values() for run in self.operator.family(root)]

    def close(self) -> None:
        self.operator.close()
        self._operators.close()
        self._accepted.close()
        self.engine.close()
