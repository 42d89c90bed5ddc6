"""A project with a worker whose processes come and go, and a test in the autoscaler's place."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import psutil

from orchestrator.engine import Engine
from orchestrator.expressions import parse
from orchestrator.ledger import keys
from orchestrator.ledger.queries import Queries
from orchestrator.plan import Plan
from orchestrator.pools import WorkerReport
from orchestrator.runs import Run
from orchestrator.settings import Settings
from orchestrator.workflows import Step, Workflow
from tests.conftest import WorkerProcess, wait_until

TASKS = '''
import os, pathlib, threading, time

def noop(**_):
    return None

def pid(**_):
    return os.getpid()

def began(**_):
    return time.time()

def stamp(record, name, seconds=0.0, **_):
    """Note that this was run, in one write, and by whom."""
    began = time.time()
    time.sleep(seconds)
    with open(record, "a") as file:
        file.write(f"{name} {os.getpid()} {began} {time.time()}\\n")
    return name

def wait_for(path, mark=None, **_):
    if mark:
        pathlib.Path(mark).touch()
    while not os.path.exists(path):
        time.sleep(0.01)
    return os.getpid()

def numbers(n):
    return list(range(n))

def devices():
    return os.environ.get("CUDA_VISIBLE_DEVICES")

def die():
    os.kill(os.getpid(), 9)

def talk(name, seconds=0.3):
    for _ in range(3):
        print(name, threading.get_ident(), flush=True)
        time.sleep(seconds / 3)

def leave():
    raise SystemExit(3)
'''


class Place:
    """A server with a project; starts workers and runs, and is the autoscaler if a test wants one."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine = Engine(settings)
        self.queries = Queries(self.engine.ledger, self.engine.payloads)
        self.workers: list[WorkerProcess] = []
        self.record = settings.project.parent / "record"

    def worker(self, concurrency: int = 4, **options: Any) -> WorkerProcess:
        made = WorkerProcess(self.settings, concurrency=concurrency, **options).start()
        self.workers.append(made)
        wait_until(lambda: self.report(made), "the worker reports")
        return made

    def report(self, worker: WorkerProcess) -> WorkerReport | None:
        assert worker.process is not None
        assert worker.process.poll() is None, worker.log.read_text()
        return next((one for one in self.engine.pools.reports() if one.pid == worker.process.pid), None)

    def told(self, worker: WorkerProcess) -> WorkerReport:
        found = self.report(worker)
        assert found is not None
        return found

    def target(self, *targets: tuple[WorkerProcess, int]) -> None:
        """Lead as an autoscaler does, and tell workers how many processes they are to have."""
        self.engine.ledger.client.set(keys.leader_key("autoscaler"), "a test")
        names = {self.told(worker).worker: size for worker, size in targets}
        self.engine.pools.decide([], names)

    def tell(self, *targets: tuple[WorkerProcess, int]) -> None:
        """Tell workers their targets and wait until they know: they were told with their next report."""
        self.target(*targets)
        for worker, _ in targets:
            self.let_report(worker)

    def let_report(self, worker: WorkerProcess, seconds: float = 0.0) -> None:
        """Wait until a worker has reported again, has done what it was told then, and so much time has passed."""
        for least_ms in (0, 0, int(seconds * 1000)):
            before = self.told(worker).seen_ms
            wait_until(lambda b=before, ms=least_ms: self.told(worker).seen_ms > b + ms, "the worker reports")

    def start(self, *steps: Step) -> str:
        plan = Plan.of(Workflow(name="w", steps=steps))
        self.engine.ledger.put_plan(plan)
        run = uuid.uuid4().hex
        event = {"specversion": "1.0", "id": "e", "source": "t", "type": "t", "data": None}
        assert self.engine.start(run, plan, event=event, params={})
        return run

    def end(self, run: str, timeout_s: float = 60.0) -> Run:
        wait_until(lambda: self.queries.run(run, with_steps=False).state.is_end, f"run {run} ends", timeout_s)
        found = self.queries.run(run)
        assert str(found.state) == "succeeded", found
        return found

    def run(self, *steps: Step) -> Run:
        return self.end(self.start(*steps))

    def stamps(self) -> list[tuple[str, int]]:
        """Return (name, pid) of each step that was run, in their order."""
        if not self.record.exists():
            return []
        rows = [line.split() for line in self.record.read_text().splitlines()]
        return [(row[0], int(row[1])) for row in rows]

    def close(self) -> None:
        for worker in self.workers:
            assert worker.process is not None
            if worker.process.poll() is None:
                assert worker.stop() == 0, worker.log.read_text()
        self.engine.close()


POOLS = "[pools.default]\nmax = 4\nconcurrency = 4\nidle_after = '1s'\n"


def make(settings: Settings, pools: str = POOLS, **files: str) -> Place:
    (settings.project / "tasks.py").write_text(TASKS)
    for name, text in files.items():
        (settings.project / f"{name}.py").write_text(text)
    (settings.project / "orchestrator.toml").write_text(pools)
    loaded = Settings.load(
        settings.project, environ={}, data_dir=settings.data_dir, broker_url=settings.broker_url,
        ledger_url=settings.ledger_url,
    )  # fmt: skip
    return Place(loaded)


def step(step_id: str, task: str, *needs: str, **options: Any) -> Step:
    given = {
        name: parse(value) if isinstance(value, str) else value for name, value in options.pop("with_", {}).items()
    }
    return Step(id=step_id, task=f"tasks:{task}", with_=given, needs=needs, **options)


def stamped(place: Place, step_id: str, *needs: str, seconds: float = 0.0, **options: Any) -> Step:
    return step(
        step_id, "stamp", *needs, with_={"record": str(place.record), "name": step_id, "seconds": seconds}, **options
    )


def pids(worker: WorkerProcess) -> list[int]:
    assert worker.process is not None
    return [child.pid for child in psutil.Process(worker.process.pid).children()]


def has(worker: WorkerProcess, count: int) -> Callable[[], bool]:
    return lambda: len(pids(worker)) == count


def attempts(run: Run) -> dict[str, tuple[int, int]]:
    return {one.id: (one.attempts, one.losses) for one in run.steps}
