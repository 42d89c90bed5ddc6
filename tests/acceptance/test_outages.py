"""The server goes away and comes back, roles are told to stop or are killed: nothing is lost, nobody has to help."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.bus import EventBus
from orchestrator.celery_app import make_app
from orchestrator.dispatcher import manual_event
from orchestrator.engine import Engine
from orchestrator.errors import NotFoundError
from orchestrator.ledger import keys
from orchestrator.ledger.queries import Queries
from orchestrator.settings import Settings
from tests.acceptance.conftest import settle
from tests.conftest import Server, command, environment, wait_until, write_project

FILES = {
    "tasks.py": """
import os, time
def note(record, name, seconds=0.0):
    descriptor = os.open(record, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, f"{name}\\n".encode())
    time.sleep(seconds)
    os.write(descriptor, f"{name} ended\\n".encode())
    os.close(descriptor)
    return name
def version():
    return 1
""",
    "workflows/files.yaml": """
workflow: files
on: [{file: {path: inbox}}]
steps:
  a: {task: "tasks:note", with: {record: "{{ event.data.watched }}/../record", name: "{{ event.data.name }}"}}
  b: {task: "tasks:note", needs: [a],
      with: {record: "{{ event.data.watched }}/../record", name: "{{ event.data.name }}-b"}}
""",
    "workflows/slow.yaml": """
workflow: slow
params: {record: string, name: string, seconds: number}
steps:
  a: {task: "tasks:note",
      with: {record: "{{ params.record }}", name: "{{ params.name }}", seconds: "{{ params.seconds }}"}}
  b: {task: "tasks:version", needs: [a]}
""",
    "inbox/.gitkeep": "",
}


class Role:
    """A role as a process, with a log of its own."""

    def __init__(self, line: list[str], env: dict[str, str], log: Path) -> None:
        self.line, self.log, self._env = line, log, env
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(command(*self.line), env=self._env, stdout=log, stderr=log)

    def restart(self) -> None:
        assert self.process.poll() is not None
        self.process = self._start()

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=timeout_s)

    def events(self) -> list[str]:
        """Return what was logged, by the names of the events."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [str(json.loads(line).get("event")) for line in lines]


class Place:
    """A project with its roles, on a server that may be stopped."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.project = root / "project"
        write_project(self.project, FILES)
        self.record = self.project / "record"
        self.server = Server(root / "server", fsync="always")
        self.server.start()
        self.env = environment(ORCHESTRATOR_BROKER_URL=self.server.url, ORCHESTRATOR_DATA_DIR=str(root / "data"))
        self.settings = Settings.load(
            self.project, environ={}, data_dir=root / "data", broker_url=self.server.url, ledger_url=self.server.url
        )
        self.engine = Engine(self.settings, app=make_app(self.settings), patience_s=30.0)
        self.bus = EventBus(self.engine.app)
        self.roles: list[Role] = []

    def role(self, *line: str) -> Role:
        made = Role([*line, "--project", str(self.project)], self.env, self.root / f"{len(self.roles)}-{line[0]}.log")
        self.roles.append(made)
        return made

    def emit(self, workflow: str, event_id: str, **given: Any) -> None:
        self.bus.publish([manual_event(workflow, given, event_id=event_id)])

    def runs(self) -> list[Any]:
        queries = Queries(self.engine.ledger, self.engine.payloads)
        return [queries.run(run) for run in self.engine.ledger.client.zrange(keys.RUNS, 0, -1)]

    def all_ended(self, count: int) -> Callable[[], bool]:
        def look() -> bool:
            try:
                runs = self.runs()
            except NotFoundError:  # it is just being written
                return False
            return len(runs) == count and all(str(run.state) == "succeeded" for run in runs)

        return look

    def names(self) -> list[str]:
        return self.record.read_text().splitlines() if self.record.exists() else []

    def close(self) -> None:
        for role in self.roles:
            if role.process.poll() is None:
                role.process.kill()
                role.process.wait()
        self.engine.close()
        self.server.stop()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.close()


def test_a_server_that_is_away_for_a_minute_is_waited_for(place: Place) -> None:
    roles = [place.role("dispatcher"), place.role("trigger"), place.role("worker", "--pool", "default")]
    inbox = place.project / "inbox"
    (inbox / "before").write_text("1")
    wait_until(place.all_ended(1), "the first run has ended", 60)
    place.emit("slow", "during", record=str(place.record), name="slow", seconds=5)
    wait_until(lambda: "slow" in place.names(), "a step is in work")
    place.server.stop()
    (inbox / "while").write_text("1")
    settle(60)
    assert all(role.process.poll() is None for role in roles)
    place.server.start()
    back = time.monotonic()
    wait_until(place.all_ended(3), "all runs have ended", 30)
    print(f"all runs had ended {time.monotonic() - back:.1f} s after the server was back")
    assert place.names().count("slow") == 1  # it went on meanwhile, and its outcome was kept
    for role in roles:
        events = role.events()
        waits = [event for event in events if event.endswith("_waits")]
        backs = [event for event in events if event.endswith("_goes_on")]
        assert waits, role.line
        assert all(waits.count(event) <= 2 for event in waits), (role.line, events)
        assert len(backs) >= 1, (role.line, events)
        assert len(events) < 40, (role.line, events)
    assert [role.stop() for role in roles] == [0, 0, 0]


@pytest.mark.parametrize("fatal", [signal.SIGTERM, signal.SIGKILL])
def test_a_dispatcher_and_a_worker_may_go_while_others_carry_on(place: Place, fatal: signal.Signals) -> None:
    """Two of each; whoever leads or is busy is stopped or killed in the middle of 120 events."""
    dispatchers = [place.role("dispatcher") for _ in range(2)]
    workers = [place.role("worker", "--pool", "default", "--concurrency", "2") for _ in range(2)]
    wait_until(lambda: place.engine.ledger.client.exists(keys.WORKFLOWS), "the definitions are in force")
    for n in range(120):
        place.emit("slow", f"e{n}", record=str(place.record), name=f"n{n}", seconds=0.05)
        if n in (40, 80):
            for role in (dispatchers[n // 80], workers[n // 80]):
                code = role.stop(fatal)
                assert code == (0 if fatal == signal.SIGTERM else -signal.SIGKILL), role.log.read_text()
                role.restart()
    wait_until(place.all_ended(120), "every event has its run, and every run has ended", 60)
    began = [name for name in place.names() if not name.endswith(" ended")]
    assert set(began) == {f"n{n}" for n in range(120)}
    if fatal == signal.SIGTERM:
        assert len(began) == 120, "a step that was told to stop nothing was run again"
        assert sum(run.steps[0].losses for run in place.runs()) == 0
    client = place.engine.ledger.client
    wait_until(lambda: client.hlen("orchestrator.unacked") == 0, "nothing is claimed any more")
    assert [key for key in client.scan_iter("orchestrator.*", _type="list") if not key.endswith(".bell")] == []
    wait_until(lambda: client.zcard(keys.ACTIVE) == 0, "no run is looked after any more")


def test_the_lead_goes_over_when_the_leader_is_killed_and_its_worker_with_it(place: Place) -> None:
    """The worst of it: who ran the step and who would have found out die together."""
    dispatchers = [place.role("dispatcher") for _ in range(2)]
    workers = [place.role("worker", "--pool", "default") for _ in range(2)]
    wait_until(lambda: place.engine.ledger.client.exists(keys.WORKFLOWS), "the definitions are in force")
    wait_until(lambda: any("rescuer_leads" in role.events() for role in dispatchers), "one leads")
    place.emit("slow", "e", record=str(place.record), name="slow", seconds=2)
    wait_until(lambda: "slow" in place.names(), "the step has begun")
    leader = next(role for role in dispatchers if "rescuer_leads" in role.events())
    (busy,) = (run.steps[0].worker for run in place.runs())
    holder = next(role for role in workers if f":{role.process.pid}/" in str(busy))
    children = subprocess.run(["pgrep", "-P", str(holder.process.pid)], capture_output=True, text=True).stdout.split()
    for pid in [holder.process.pid, *map(int, children)]:
        subprocess.run(["kill", "-9", str(pid)], check=False)
    leader.stop(signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: place.names().count("slow") == 2, "the step was begun again", 20)
    recovered = time.monotonic() - killed
    print(f"begun again after {recovered:.1f} s")
    wait_until(place.all_ended(1), "the run has ended", 20)
    assert recovered < 17, "15 s are promised"


def test_new_code_while_runs_are_in_flight_loses_nothing(place: Place) -> None:
    """As a deployment does it: new workers beside the old ones, which are told to stop."""
    place.role("dispatcher")
    old = place.role("worker", "--pool", "default", "--concurrency", "2")
    wait_until(lambda: place.engine.ledger.client.exists(keys.WORKFLOWS), "the definitions are in force")
    for n in range(40):
        place.emit("slow", f"e{n}", record=str(place.record), name=f"n{n}", seconds=0.2)
    wait_until(lambda: len(place.names()) > 10, "some have run")
    tasks = place.project / "tasks.py"
    tasks.write_text(tasks.read_text().replace("return 1", "return 2"))
    new = place.role("worker", "--pool", "default", "--concurrency", "2")
    assert old.stop() == 0
    wait_until(place.all_ended(40), "all have ended", 60)
    assert sorted(set(place.names())) == sorted(text for n in range(40) for text in (f"n{n}", f"n{n} ended"))
    assert len(place.names()) == 80
    outputs = {run.output for run in place.runs()}
    assert 2 in outputs
    assert outputs <= {1, 2}
    assert new.stop() == 0
