"""Workers are killed at random while runs go on; every run ends, every join fires once."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from orchestrator.engine import Engine
from orchestrator.expressions import parse
from orchestrator.ledger.queries import Queries
from orchestrator.plan import Plan
from orchestrator.rescuer import Rescuer
from orchestrator.settings import Settings
from orchestrator.workflows import Step, Workflow
from tests.acceptance.conftest import settle
from tests.conftest import Server, WorkerProcess, wait_until

TASKS = """
import os, time
def note(record, name, seconds=0.0, **_):
    descriptor = os.open(record, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, f"{name} {os.getpid()}\\n".encode())
    os.close(descriptor)
    time.sleep(seconds)
    return 1
def total(numbers):
    return sum(numbers)
"""


def _workflow(record: str) -> Workflow:
    """A chain, a fork, a fan-out, and a join of all."""

    def note(step_id: str, *needs: str, **options: object) -> Step:
        given = {"record": record, "name": parse("{{ run.id }}-" + step_id), "seconds": 0.02}
        if options:
            given["name"] = parse("{{ run.id }}-" + step_id + "-{{ index }}")
        return Step(id=step_id, task="tasks:note", with_=given, needs=needs, **options)  # type: ignore[arg-type]

    return Workflow(
        name="w",
        steps=(
            *(note(f"c{n}", *([f"c{n - 1}"] if n else [])) for n in range(8)),
            note("left", "c7"),
            note("right", "c7"),
            note("fan", "c3", foreach=list(range(40))),
            note("odd", "c0", "left"),
            Step(id="sum", task="tasks:total", with_={"numbers": parse("{{ fan + [left, right, odd] }}")}),
        ),
    )


@pytest.fixture
def record(tmp_path: Path) -> Path:
    made = tmp_path / "record"
    made.touch()
    return made


def test_every_run_ends_although_workers_are_killed(
    settings: Settings, engine: Engine, start_worker: Callable[..., WorkerProcess], record: Path
) -> None:
    (settings.project / "tasks.py").write_text(TASKS)
    plan = Plan.of(_workflow(str(record)))
    engine.ledger.put_plan(plan)
    rescuer = Rescuer(engine)
    rescuer.start()
    chance = random.Random(7)
    workers = [start_worker(), start_worker()]
    event = {"specversion": "1.0", "id": "e", "source": "s", "type": "t", "data": None}
    runs = [f"run{n}" for n in range(40)]
    for run in runs:
        assert engine.start(run, plan, event=event, params={})
    queries = Queries(engine.ledger, engine.payloads)
    kills: Counter[str] = Counter()
    for _ in range(12):
        settle(chance.uniform(0.2, 0.8))
        n = chance.randrange(2)
        worker = workers[n]
        assert worker.process is not None
        children = psutil.Process(worker.process.pid).children() if worker.process.poll() is None else []
        if children and chance.random() < 0.6:
            os.kill(chance.choice(children).pid, signal.SIGKILL)
            kills["child"] += 1
        else:
            worker.process.kill()
            worker.process.wait()
            workers[n] = start_worker()
            kills["worker"] += 1
    wait_until(
        lambda: all(queries.run(run, with_steps=False).state.is_end for run in runs),
        f"all runs end, after {kills}",
        120,
    )
    for run in runs:
        found = queries.run(run)
        assert (str(found.state), found.output) == ("succeeded", 43), found
    # Every step ran, and again only where something was killed: each kill takes at most what its children ran.
    ran = Counter(line.split()[0] for line in record.read_text().splitlines())
    assert len(ran) == len(runs) * (8 + 3 + 40)
    again = sum(count - 1 for count in ran.values())
    assert again <= kills["child"] + 2 * kills["worker"], (again, kills)
    wait_until(lambda: not engine.ledger.active(), "nothing is in flight")
    rescuer.stop()
    leftover = [key for key in engine.ledger.client.scan_iter("orchestrator:{*") if engine.ledger.client.ttl(key) < 0]
    assert leftover == []


def test_a_live_step_is_not_started_again_because_the_server_was_away(tmp_path: Path) -> None:
    """Away for longer than a lease: nobody could renew it."""
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    project = tmp_path / "project"
    project.mkdir()
    (project / "tasks.py").write_text(TASKS)
    record = tmp_path / "record"
    settings = Settings.load(
        project, environ={}, data_dir=tmp_path / "data", broker_url=server.url, ledger_url=server.url
    )
    engine = Engine(settings)
    step = Step(id="long", task="tasks:note", with_={"record": str(record), "name": "long", "seconds": 30})
    plan = Plan.of(Workflow(name="w", steps=(step,)))
    engine.ledger.put_plan(plan)
    rescuer = Rescuer(engine)
    rescuer.start()
    workers = [WorkerProcess(settings).start() for _ in range(2)]
    try:
        engine.start("r", plan, event={}, params={})
        wait_until(record.exists, "the step has begun")
        settle(2.0)
        server.stop()
        settle(13.0)
        server.start()
        queries = Queries(engine.ledger, engine.payloads)
        wait_until(lambda: queries.run("r", with_steps=False).state.is_end, "the run ends", 60)
        assert len(record.read_text().splitlines()) == 1
        assert queries.run("r").steps[0].losses == 0
    finally:
        rescuer.stop()
        for worker in workers:
            worker.stop()
        engine.close()
        server.stop()
