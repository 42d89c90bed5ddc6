"""The load: events that are emitted and files that arrive, and which runs must come of them."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from orchestrator.bus import EventBus
from orchestrator.dispatcher import file_source
from orchestrator.engine import Engine
from orchestrator.events import Event
from orchestrator.ledger import keys
from orchestrator.runs import RunState, run_id
from orchestrator.settings import Settings
from tests.chaos.processes import environment, server_url
from tests.chaos.record import Journal
from tests.chaos.workload import EVENT_TYPE, KINDS, Expected

SOURCE = "chaos"

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
    """Starts runs, by events and by files, and knows which have not ended. Used by one thread."""

    def __init__(self, work: Path, data_dir: Path, chance: random.Random) -> None:
        self.project = work / "project"
        self.engine = Engine(settings_of(self.project, data_dir), patience_s=5.0)
        self._bus = EventBus(self.engine.app)
        self._accepted = Journal(work / "accepted.jsonl")
        self._chance = chance
        self._serial = 0
        self._files: list[_File] = []
        #: Runs of accepted events, and those of them that have not ended.
        self.roots: dict[str, Expected] = {}
        self.open: dict[str, Expected] = {}
        self.refused = 0
        self.stop = threading.Event()

    def emit(self, kind: str, **params: Any) -> Expected | None:
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
            self._accepted.write({"event": event.id, "run": run, "kind": kind, "params": params})
            return self._expect(Expected(run, KINDS[kind], params))
        return None

    def _expect(self, expected: Expected) -> Expected:
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
        try:
            with self.engine.ledger.client.pipeline(transaction=False) as pipe:
                for run in self.open:
                    pipe.hget(keys.run_key(run, "run"), "state")
                states = pipe.execute()
        except redis.RedisError:
            return
        for run, state in zip(list(self.open), states, strict=True):
            if state is not None and RunState(state).is_end:
                del self.open[run]

    def round(self, number: int) -> None:
        """Start one mixture; each fifth with a large fan-out, each seventh with a step of 30 s."""
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
        return [run for root in self.roots.values() for run in root.family()]

    def close(self) -> None:
        self._accepted.close()
        self.engine.close()
