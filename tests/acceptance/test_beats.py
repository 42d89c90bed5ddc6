"""Two beats in processes of their own, which are killed: no due time is lost, and another takes over in time."""

from __future__ import annotations

import base64
import json
import random
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import pairwise

import pytest

from orchestrator.celery_app import EVENT_QUEUE
from orchestrator.engine import Engine
from orchestrator.ledger import keys
from orchestrator.settings import Settings
from tests.conftest import command, on_servers, wait_until, write_project

EVERY_MS = 100
FILES = {
    "tasks.py": "def a():\n    pass\n",
    "workflows/w.yaml": (
        f"workflow: w\non: [{{schedule: {{every: {EVERY_MS}ms}}}}]\nsteps: {{a: {{task: 'tasks:a'}}}}\n"
    ),
}


class Beats:
    """Processes of `orchestrator beat`, and what they have put on the bus."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        write_project(settings.project, FILES)
        self._settings = settings
        self._engine = engine
        self._log = settings.project.parent / "beats.log"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ids: list[str] = []

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.processes.append(
                subprocess.Popen(
                    command("beat", "--project", str(self._settings.project)), stdout=log, stderr=log,
                    env=on_servers(self._settings),
                )
            )  # fmt: skip

    def kill(self, number: int) -> None:
        process = self.processes.pop(number)
        process.kill()
        process.wait()

    def look(self) -> int:
        while raw := self._engine.ledger.client.rpop(EVENT_QUEUE):
            self.ids.append(json.loads(base64.b64decode(json.loads(raw)["body"]))["id"])
        return len(self.ids)

    def wait_for_more(self, more: int) -> float:
        """Wait until so many more have come; answers how long the first took."""
        began, before = time.monotonic(), self.look()
        wait_until(lambda: self.look() > before, "one more has come", 20)
        took = time.monotonic() - began
        wait_until(lambda: self.look() >= before + more, f"{more} more have come")
        return took


@pytest.fixture
def beats(settings: Settings, engine: Engine) -> Iterator[Beats]:
    made = Beats(settings, engine)
    yield made
    while made.processes:
        made.kill(0)


def test_kills_of_beats(beats: Beats, engine: Engine) -> None:
    """Now one, now the other is killed, at any point: all due times are there, and the gap is below 15 s."""
    rng = random.Random(3)
    beats.start()
    beats.start()
    beats.wait_for_more(20)
    gaps = []
    for _ in range(8):
        beats.kill(rng.randrange(2))
        gaps.append(beats.wait_for_more(rng.randint(1, 25)))
        beats.start()
    beats.wait_for_more(20)
    found = sorted({datetime.fromisoformat(one) for one in beats.ids})
    assert all(later - earlier == timedelta(milliseconds=EVERY_MS) for earlier, later in pairwise(found))
    assert max(gaps) < 15
    print(f"{len(found)} due times, {len(beats.ids) - len(found)} came twice; longest gap {max(gaps):.1f} s")


def test_a_beat_that_is_told_to_stop_hands_over_at_once(beats: Beats, engine: Engine) -> None:
    beats.start()
    beats.wait_for_more(1)
    beats.start()
    leader = beats.processes[0]
    leader.terminate()
    assert leader.wait(timeout=20) == 0
    assert engine.ledger.client.get(keys.leader_key("beat")) is None or beats.wait_for_more(1) < 3
    assert beats.wait_for_more(5) < 3
