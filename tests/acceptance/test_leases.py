"""The lease contract, on every broker: who runs a step, who may commit it, and when it is started again.

Real workers in real processes; the rescuer is that of a real `orchestrator dispatcher`. Steps hold until the test opens
their gate, so that nothing here depends on how fast anything is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from orchestrator.brokers.claims import CLAIM_MS
from orchestrator.celery_app import queue_name
from orchestrator.engine import Engine
from orchestrator.expressions import parse
from orchestrator.ledger.ledger import LEASE_MS
from orchestrator.ledger.queries import Queries
from orchestrator.plan import Plan
from orchestrator.runs import Run
from orchestrator.settings import Settings
from orchestrator.workflows import Step, Workflow
from tests.acceptance.conftest import Broker, settle
from tests.acceptance.proxy import Proxy
from tests.conftest import WorkerProcess, command, on_servers, wait_until, write_project

#: What G5 promises, and what a busy machine may add.
RECOVERY_S, SLACK_S = 15.0, 5.0

FILES = {
    "tasks.py": '''
import os, time

def note(record, line):
    descriptor = os.open(record, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, f"{line} {os.getpid()} {time.time()}\\n".encode())
    os.close(descriptor)

def hold(folder, run):
    """Say that it began, go on until the gate of this process opens, and answer which process that was."""
    note(f"{folder}/record", f"{run}.hold")
    while not os.path.exists(f"{folder}/open-{os.getpid()}"):
        time.sleep(0.01)
    return os.getpid()

def after(folder, run, value):
    note(f"{folder}/record", f"{run}.after")
    return value
''',
    "workflows/none.yaml": "workflow: none\nsteps: {a: {task: 'tasks:hold', with: {folder: '', run: ''}}}\n",
}


@dataclass(frozen=True)
class Call:
    """One call of a step's function, as it has written down itself."""

    pid: int
    began: float


class Worker:
    """A worker behind a proxy for the ledger and one for the broker, with the means to put it to sleep."""

    def __init__(self, settings: Settings, pool: str, concurrency: int, log: Path) -> None:
        self.ledger = Proxy(settings.ledger_url)
        # With Redis as both, there is one network to lose.
        is_one = settings.broker_url == settings.ledger_url
        self.broker = self.ledger if is_one else Proxy(settings.broker_url)
        behind = settings.evolve(ledger_url=self.ledger.url, broker_url=self.broker.url)
        self._process = WorkerProcess(behind, pool=pool, concurrency=concurrency)
        self._process.log = log
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.process is not None
        return self._process.process.pid

    def family(self) -> list[int]:
        """Return the pids of the parent and its children, the parent first."""
        try:
            return [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: int, *, children_only: bool = False) -> None:
        """Send a signal to the parent and its children."""
        for pid in self.family()[1 if children_only else 0 :]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def has_logged(self, *words: str) -> bool:
        """Tell whether there is a line in the log with all these words."""
        return any(all(word in line for word in words) for line in self._process.log.read_text().splitlines())

    def fall_asleep(self, how: str) -> None:
        """Stop renewing leases: `stopped`, its `parent` alone stopped, cut off from the `ledger`, or from `all`."""
        if how == "stopped":
            self.signal(signal.SIGSTOP)
        elif how == "parent":
            os.kill(self.pid, signal.SIGSTOP)
        else:
            self.ledger.cut()
            if how == "all":
                self.broker.cut()

    def wake(self) -> None:
        self.signal(signal.SIGCONT)
        self.ledger.mend()
        self.broker.mend()

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        assert self._process.process is not None
        self._process.process.wait()
        self.ledger.stop()
        self.broker.stop()


class Scene:
    """A project on one broker, its dispatcher, and workers for one pool that no other test has."""

    def __init__(self, settings: Settings, broker: Broker) -> None:
        self.broker = broker
        self.folder = settings.project.parent
        self._settings = settings.evolve(broker_url=broker.url)
        self._pool = f"leases-{self.folder.name}-{os.getpid()}"[:50]
        write_project(settings.project, FILES)
        self.engine = Engine(self._settings, patience_s=2.0)
        self._queries = Queries(self.engine.ledger, self.engine.payloads)
        given = {"folder": str(self.folder), "run": parse("{{ run.id }}")}
        steps = (
            Step(id="hold", task="tasks:hold", pool=self._pool, with_=given),
            Step(id="after", task="tasks:after", pool=self._pool, with_=given | {"value": parse("{{ hold }}")}),
        )
        self.plan = Plan.of(Workflow(name="w", steps=steps))
        self.quick = Plan.of(Workflow(name="q", steps=(Step(**_fields(steps[1], with_=given | {"value": 1})),)))
        for plan in (self.plan, self.quick):
            self.engine.ledger.put_plan(plan)
        self._workers: list[Worker] = []
        with (self.folder / "dispatcher.log").open("ab") as log:
            self._dispatcher = subprocess.Popen(
                command("dispatcher", "--project", str(settings.project)),
                env=on_servers(self._settings),
                stdout=log,
                stderr=log,
            )

    def worker(self, concurrency: int = 2) -> Worker:
        made = Worker(self._settings, self._pool, concurrency, self.folder / f"worker{len(self._workers)}.log")
        self._workers.append(made)
        return made

    def start(self, *runs: str) -> None:
        """Start runs whose first step holds."""
        for run in runs:
            assert self.engine.start(run, self.plan, event={}, params={})

    def calls(self, run: str, step: str = "hold") -> list[Call]:
        """Return the calls of a step's function so far."""
        record = self.folder / "record"
        lines = [line.split() for line in record.read_text().splitlines()] if record.exists() else []
        return [Call(int(pid), float(began)) for name, pid, began in lines if name == f"{run}.{step}"]

    def call(self, run: str, number: int = 1, timeout_s: float = 30.0) -> Call:
        """Wait for the nth call of a held step."""
        wait_until(lambda: len(self.calls(run)) >= number, f"{run} has begun {number} time(s)", timeout_s)
        return self.calls(run)[number - 1]

    def open(self, pid: int) -> None:
        """Let the step that a process holds return."""
        (self.folder / f"open-{pid}").touch()

    def losses(self, run: str) -> int:
        return self._queries.run(run).steps[0].losses

    def end(self, run: str, timeout_s: float = 30.0) -> Run:
        wait_until(lambda: self._queries.run(run, with_steps=False).state.is_end, f"{run} ends", timeout_s)
        return self._queries.run(run)

    def flush(self, name: str = "quick") -> None:
        """Return when what is in the queue has been taken: a run that was put behind it has ended."""
        assert self.engine.start(name, self.quick, event={}, params={})
        self.end(name)

    def wait_depth(self, ready: int, taken: int) -> None:
        """Wait until so many messages wait, and so many are taken and not acknowledged."""
        wait_until(
            lambda: self.broker.depth(queue_name(self._pool)) == (ready, taken),
            f"{ready} message(s) are ready and {taken} taken",
        )

    def check_one_outcome(self, run: str, *, by: int, calls: int, losses: int) -> None:
        """Check that a run has the outcome of that process and no other, after so many calls and losses."""
        found = self.end(run)
        assert (str(found.state), found.output) == ("succeeded", by), found
        assert [call.pid for call in self.calls(run)][calls - 1 :] == [by]
        assert (found.steps[0].attempts, found.steps[0].losses) == (1, losses)
        assert len(self.calls(run, "after")) == 1

    def close(self) -> None:
        for worker in self._workers:
            worker.end()
        self._dispatcher.terminate()
        self._dispatcher.wait()
        self.engine.close()


def _fields(step: Step, **changes: object) -> dict[str, object]:
    return {"id": step.id, "task": step.task, "pool": step.pool, **changes}


@pytest.fixture
def scene(settings: Settings, broker: Broker) -> Iterator[Scene]:
    made = Scene(settings, broker)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print a figure that was measured, past pytest's capture."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def line(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n  {request.node.name}: {text}", flush=True)

    return line


# A live lease --------------------------------------------------------------------------------------------------------


def test_a_message_that_comes_again_while_its_step_runs_is_dropped(scene: Scene) -> None:
    scene.worker()
    scene.start("r")
    holder = scene.call("r").pid
    for _ in range(3):
        scene.engine.publish("r", ["hold"], plan=scene.plan)
    scene.flush()
    scene.wait_depth(0, 1)
    assert len(scene.calls("r")) == 1
    scene.open(holder)
    scene.check_one_outcome("r", by=holder, calls=1, losses=0)
    scene.wait_depth(0, 0)


def test_a_step_goes_on_when_its_worker_loses_the_broker(scene: Scene) -> None:
    """The message comes again, to the same worker or to another."""
    worker = scene.worker()
    scene.start("r")
    holder = scene.call("r").pid
    worker.broker.break_connections()
    scene.flush()
    # What came again was dropped, and of the first delivery the broker knows no more.
    scene.wait_depth(0, 0)
    assert len(scene.calls("r")) == 1
    scene.open(holder)
    scene.check_one_outcome("r", by=holder, calls=1, losses=0)
    scene.wait_depth(0, 0)


def test_a_live_worker_keeps_its_steps_however_long_they_take(scene: Scene) -> None:
    """Longer than a lease and a message claim together; and also while a child of it sleeps."""
    worker = scene.worker()
    scene.start("long", "asleep")
    holders = {run: scene.call(run).pid for run in ("long", "asleep")}
    other = scene.worker()
    os.kill(holders["asleep"], signal.SIGSTOP)
    settle((LEASE_MS + CLAIM_MS) / 1000 + 5)
    os.kill(holders["asleep"], signal.SIGCONT)
    for run, holder in holders.items():
        scene.open(holder)
        scene.check_one_outcome(run, by=holder, calls=1, losses=0)
    assert worker.family()
    assert other.family()


# A worker that is killed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("had", ["begun", "fetched"])
def test_what_a_killed_worker_had_is_started_again(scene: Scene, tell: Callable[[str], None], had: str) -> None:
    """Steps that it had begun; or messages that it had fetched, and whose steps nobody had begun."""
    runs = ["r1", "r2"]
    first = scene.worker()
    if had == "fetched":
        scene.start("before1", "before2")  # so that it has both of its children
        for pid in [scene.call(run).pid for run in ("before1", "before2")]:
            scene.open(pid)
        scene.wait_depth(0, 0)  # and its hands free
        first.signal(signal.SIGSTOP, children_only=True)
    scene.start(*runs)
    scene.wait_depth(0, 2)
    if had == "begun":
        for run in runs:
            scene.call(run)
    second = scene.worker(concurrency=3)
    scene.flush("other")  # the second one is there, because the first has its hands full
    killed = time.time()
    first.signal(signal.SIGKILL)
    again = {run: scene.call(run, 2 if had == "begun" else 1, 60) for run in runs}
    recovered = max(call.began - killed for call in again.values())
    tell(f"{had}: {recovered:.1f} s")
    assert recovered < RECOVERY_S + SLACK_S
    assert {call.pid for call in again.values()} <= set(second.family())
    for run, call in again.items():
        scene.open(call.pid)
        scene.check_one_outcome(run, by=call.pid, calls=len(scene.calls(run)), losses=int(had == "begun"))
    scene.wait_depth(0, 0)


# A worker that sleeps past its lease ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stopped", "parent", "ledger"])
def test_a_sleeper_commits_if_nobody_took_over(scene: Scene, how: str) -> None:
    worker = scene.worker(concurrency=1)
    scene.start("r")
    holder = scene.call("r").pid
    worker.fall_asleep(how)
    wait_until(lambda: scene.losses("r") == 1, "the lease is given up")
    scene.open(holder)
    worker.wake()
    scene.check_one_outcome("r", by=holder, calls=1, losses=1)
    scene.flush()
    scene.wait_depth(0, 0)


@pytest.mark.parametrize("how", ["stopped", "parent", "all"])
def test_a_sleeper_is_refused_and_its_child_killed_if_somebody_took_over(
    scene: Scene, how: str, tell: Callable[[str], None]
) -> None:
    sleeper = scene.worker()
    scene.start("late", "going")
    slept = {run: scene.call(run).pid for run in ("late", "going")}
    other = scene.worker()
    slept_at = time.time()
    sleeper.fall_asleep(how)
    taken = {run: scene.call(run, 2, 40) for run in slept}
    tell(f"taken over after {', '.join(f'{call.began - slept_at:.1f} s' for call in taken.values())}")
    assert max(call.began for call in taken.values()) - slept_at < RECOVERY_S + SLACK_S
    holders = {run: call.pid for run, call in taken.items()}
    assert set(holders.values()) <= set(other.family())
    # One has its outcome before its parent can know, the other would go on for ever.
    scene.open(slept["late"])
    if how != "all":
        os.kill(slept["late"], signal.SIGCONT)
        # The first is how the step task tells it today.
        wait_until(
            lambda: sleeper.has_logged("refused", "late") or sleeper.has_logged("step_was_taken_over", "late"),
            "the outcome that came late is refused",
        )
    sleeper.wake()
    wait_until(lambda: not psutil.pid_exists(slept["going"]), "the child is killed")
    wait_until(lambda: sleeper.has_logged("step_was_taken_over", "going"), "it is said why")
    for run, holder in holders.items():
        scene.open(holder)
        scene.check_one_outcome(run, by=holder, calls=2, losses=1)
    scene.flush()
    scene.wait_depth(0, 0)
