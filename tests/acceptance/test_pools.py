"""Pools that grow from nothing and shrink to it, with the real `up`, and autoscalers by themselves as in production."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.cli.access import engine_of
from orchestrator.engine import Engine
from orchestrator.operations import start_run
from orchestrator.pools import WorkerReport
from orchestrator.settings import Settings
from tests.acceptance.conftest import Broker, Up
from tests.conftest import command, environment, wait_until, write_project

TASKS = """
import os, time
def note(record, name):
    with open(record, "a") as file:
        file.write(f"{name} {time.time()}\\n")
def numbers(count):
    return list(range(count))
def short(record, name, number):
    time.sleep(0.05)
    with open(record, "a") as file:
        file.write(f"{name}/{number}\\n")
def long(record, seconds):
    note(record, "begin")
    time.sleep(seconds)
    note(record, "end")
def version():
    return 1
"""
FILES = {
    "tasks.py": TASKS,
    "inbox/.gitkeep": "",
    "workflows/arrive.yaml": """
workflow: arrive
on: [{file: {path: inbox, glob: "*.txt"}}]
steps: {note: {task: "tasks:note", with: {record: "{{ event.data.path }}.record", name: began}}}
""",
    "workflows/many.yaml": """
workflow: many
params: {record: string, name: string, count: integer}
steps:
  numbers: {task: "tasks:numbers", with: {count: "{{ params.count }}"}}
  short:
    task: "tasks:short"
    foreach: "{{ numbers }}"
    with: {record: "{{ params.record }}", name: "{{ params.name }}", number: "{{ item }}"}
""",
    "workflows/long.yaml": """
workflow: long
params: {record: string, seconds: number}
steps:
  long: {task: "tasks:long", with: {record: "{{ params.record }}", seconds: "{{ params.seconds }}"}}
""",
    "workflows/version.yaml": "workflow: version\nsteps:\n  a: {task: 'tasks:version'}\n",
}
MakeUp = Callable[[dict[str, str]], Up]


def pool(**settings: object) -> dict[str, str]:
    """Return the settings file of a project whose default pool has these settings."""
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    return {"orchestrator.toml": f"[pools.default]\n{lines}"}


def workers(up: Up) -> list[psutil.Process]:
    """Return the workers of an `up`: their parents."""
    assert up.process is not None
    found = []
    for child in psutil.Process(up.process.pid).children():
        try:
            if " worker " in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def processes(up: Up) -> int:
    """Return how many processes the pools have."""
    count = 0
    for worker in workers(up):
        try:
            count += len(worker.children())
        except psutil.Error:
            continue
    return count


def pss_mb(up: Up) -> dict[str, float]:
    """Return the memory of `up` and all below it, shared pages by halves and thirds."""
    assert up.process is not None
    me = psutil.Process(up.process.pid)
    found = {}
    for one in (me, *me.children(recursive=True)):
        text = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
        kilobytes = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
        line = one.cmdline()
        name = next((word for word in ("control", "worker", "up") if word in line), Path(line[0]).name)
        found[f"{name} {one.pid}"] = kilobytes / 1024
    return found


def shown(up: Up, name: str = "default") -> dict[str, Any]:
    items = json.loads(up.ask("pools", "list", "--json"))["items"]
    found: dict[str, Any] = next(item for item in items if item["name"] == name)
    return found


def test_nothing_runs_at_rest_and_a_file_is_taken_up_at_once(
    make_up: MakeUp, capsys: pytest.CaptureFixture[str]
) -> None:
    up = make_up(FILES | pool(max=4, concurrency=4, idle_after="2s"))
    up.start()
    up.wait_ready()
    wait_until(lambda: shown(up)["workers"] == 1, "the worker has reported")
    assert processes(up) == 0
    sizes = pss_mb(up)
    with capsys.disabled():
        print(f"\nat rest, MB of PSS: { ({name: round(size, 1) for name, size in sizes.items()}) }, ", end="")
        print(f"in all {sum(sizes.values()):.1f}")
    assert sum(sizes.values()) < 200

    inbox, took, loads = up.project / "inbox", [], []
    for n in range(3):
        loads.append(os.getloadavg()[0])
        arrived = time.time()
        (inbox / f"{n}.txt").write_text("x")
        record = inbox / f"{n}.txt.record"
        wait_until(lambda record=record: record.exists() and record.read_text(), "its step has begun")
        took.append(float(record.read_text().split()[1]) - arrived)
        wait_until(lambda: processes(up) == 0, "the pool is at zero again", 30)
    cores = os.cpu_count() or 1
    with capsys.disabled():
        print(f"from a file's arrival to its first step, s: {[round(one, 2) for one in took]}; load {loads} on {cores}")
    # As soon as that on a machine that has time for it; each that waits for a core makes it later by as much again.
    assert min(took) < 1.0 * max(1.0, min(loads) / cores)
    wait_until(lambda: shown(up)["size"] == 0 and shown(up)["desired"] == 0, "which is shown")
    assert up.stop() == 0


@pytest.mark.timeout(300)
def test_thousands_of_steps_at_once_grow_a_pool_to_its_maximum_and_run_once_each(
    make_up: MakeUp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    up = make_up(FILES | pool(max=8, concurrency=4, idle_after="3s"))
    up.start()
    up.wait_ready()
    wait_until(lambda: shown(up)["workers"] == 1, "the worker has reported")
    record = tmp_path / "record"
    began = time.monotonic()
    with engine_of(Settings.load(up.project, environ={})) as engine:
        for n in range(5):
            start_run(engine, "many", {"record": str(record), "name": f"run{n}", "count": 1000})
    wait_until(lambda: processes(up) == 8, "the pool has its maximum", 60)
    grown_s = time.monotonic() - began
    assert len(workers(up)) == 2
    most = 8

    def ended() -> bool:
        nonlocal most
        most = max(most, processes(up))
        return record.exists() and record.read_text().count("\n") >= 5000

    wait_until(ended, "all steps have run", 240)
    took_s = time.monotonic() - began
    wait_until(lambda: all(run["finished_at"] for run in up.runs()), "all runs have ended", 30)
    assert {run["state"] for run in up.runs()} == {"succeeded"}
    assert sorted(record.read_text().split()) == sorted(f"run{n}/{i}" for n in range(5) for i in range(1000))
    wait_until(lambda: processes(up) == 0 and len(workers(up)) == 1, "the pool is at rest again", 60)
    with capsys.disabled():
        print(
            f"\n5,000 steps of 50 ms: at 8 processes of 2 workers after {grown_s:.1f} s, done after {took_s:.1f} s, "
            f"at rest after {time.monotonic() - began:.1f} s; at most {most} at once; load {os.getloadavg()[0]:.1f}"
        )
    assert most == 8
    assert up.stop() == 0


@pytest.mark.timeout(300)
def test_a_long_step_outlives_whatever_happens_to_its_pool(make_up: MakeUp, tmp_path: Path) -> None:
    up = make_up(FILES | pool(max=4, concurrency=2, idle_after="2s"))
    up.start()
    up.wait_ready()
    record = tmp_path / "record"
    run = up.ask("run", "long", "--input", json.dumps({"record": str(record), "seconds": 90})).strip()
    wait_until(record.exists, "it has begun")
    [first] = workers(up)
    [child] = first.children()

    up.ask("pools", "scale", "default", "4")
    wait_until(lambda: processes(up) == 4, "the pool has grown")
    assert len(workers(up)) == 2
    up.ask("pools", "scale", "default", "0")
    wait_until(lambda: processes(up) == 1, "all have left but the one that is at work")
    assert child.is_running()

    control = up.pid_of("control")
    assert control is not None
    os.kill(control, signal.SIGKILL)
    up.ask("pools", "scale", "default", "3")
    wait_until(lambda: up.pid_of("control") not in (None, control), "the control process is back")
    wait_until(lambda: shown(up)["pinned"] == shown(up)["desired"] == 3, "it decides", 30)
    wait_until(lambda: processes(up) == 3, "the pool has grown again")

    (up.project / "tasks.py").write_text(TASKS.replace("return 1", "return 2"))
    wait_until(lambda: "new generation" in up.text(), "the changed code is deployed")
    up.ask("pools", "scale", "default", "auto")
    done = json.loads(up.ask("run", "version", "--wait", "--timeout", "60s", "--json"))
    assert done["output"] == 2, "by a worker of the new code"
    wait_until(lambda: processes(up) <= 2 and child.is_running(), "the pool is as small as it can be", 30)
    assert first.is_running(), "it drains, however long that takes"

    found = json.loads(up.ask("runs", "wait", run, "--json"))
    assert found["state"] == "succeeded"
    assert [step["attempts"] for step in found["steps"]] == [1]
    assert [line.split()[0] for line in record.read_text().splitlines()] == ["begin", "end"]
    wait_until(lambda: not first.is_running() and processes(up) == 0, "what drained is gone", 30)
    assert len(workers(up)) == 1
    assert up.stop() == 0


def test_workers_end_by_themselves_when_up_is_killed(make_up: MakeUp) -> None:
    up = make_up(FILES | pool(min=2, max=2, concurrency=1))
    up.start()
    up.wait_ready()
    wait_until(lambda: processes(up) == 2, "both have started")
    family = up.family(5)
    up.stop(signal.SIGKILL)
    wait_until(lambda: not any(one.is_running() for one in family), "all are gone", 30)


def test_workers_that_die_at_their_start_are_shown_as_a_fault_of_their_pool(make_up: MakeUp) -> None:
    dying = 'import os, sys\nif "--words-fd" in sys.argv and "bad" in sys.argv:\n    '
    files = FILES | {"workflows/bad.yaml": "workflow: bad\nsteps:\n  a: {task: 'bad:version', pool: bad}\n"}
    up = make_up(files | {"bad.py": f"{dying}raise RuntimeError('it has no licence')\ndef version():\n    return 1\n"})
    up.start()
    up.wait_ready()
    wait_until(lambda: shown(up, "bad")["faults"], "it is shown")
    [fault] = shown(up, "bad")["faults"]
    assert fault.startswith("worker bad ended (exit code 1): ")
    assert "it has no licence" in fault
    assert f"bad: {fault}" in up.ask("pools", "list")
    done = json.loads(up.ask("run", "version", "--wait", "--timeout", "60s", "--json"))
    assert done["output"] == 1, "other pools do not mind"
    (up.project / "bad.py").write_text("def version():\n    return 2\n")
    done = json.loads(up.ask("run", "bad", "--wait", "--timeout", "60s", "--json"))
    assert done["output"] == 2
    wait_until(lambda: shown(up, "bad")["faults"] == [], "it is mended", 30)
    assert up.stop() == 0


# As in production


@pytest.fixture
def project(settings: Settings) -> Path:
    write_project(settings.project, FILES | pool(max=3, concurrency=2, idle_after="1s"))
    return settings.project


@pytest.fixture
def start(project: Path, settings: Settings, broker: Broker, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start roles; all are told to stop at the end, and do."""
    started: list[subprocess.Popen[bytes]] = []
    env = environment(
        ORCHESTRATOR_BROKER_URL=broker.url,
        ORCHESTRATOR_LEDGER_URL=settings.ledger_url,
        ORCHESTRATOR_DATA_DIR=str(settings.data_dir),
    )

    def start_role(*arguments: str) -> subprocess.Popen[bytes]:
        with (tmp_path / f"role-{len(started)}.log").open("ab") as log:
            line = command(*arguments, "--project", str(project))
            started.append(subprocess.Popen(line, env=env, stdout=log, stderr=log))
        return started[-1]

    yield start_role
    for process in started:
        process.terminate()
    for process in started:
        process.wait(timeout=60)


@pytest.fixture
def on_broker(settings: Settings, broker: Broker) -> Iterator[Engine]:
    engine = Engine(settings.evolve(broker_url=broker.url), patience_s=2.0)
    yield engine
    engine.close()


def leader_log(tmp_path: Path) -> int | None:
    """Return the number of the role that has said last that it leads the autoscaler."""
    said = []
    for path in tmp_path.glob("role-*.log"):
        for line in path.read_text().splitlines():
            if '"autoscaler_leads"' in line:
                said.append((json.loads(line)["timestamp"], int(path.stem.partition("-")[2])))
    return max(said)[1] if said else None


def test_a_second_autoscaler_takes_over_from_one_that_is_killed(
    start: Callable[..., Any], on_broker: Engine, tmp_path: Path
) -> None:
    both = [start("autoscaler"), start("autoscaler")]
    records = on_broker.pools
    wait_until(records.states, "one decides", 60)
    first = wait_until(lambda: leader_log(tmp_path) is not None and [leader_log(tmp_path)], "it has said so")[0]
    records.report(WorkerReport(worker="w", pool="default", ceiling=2, seen_ms=time.time_ns() // 1_000_000))
    wait_until(lambda: records.targets() == {"w": 0}, "it is told")
    both[first].kill()
    killed = time.monotonic()
    records.pin("default", 2)

    def decided() -> bool:
        records.report(WorkerReport(worker="w", pool="default", ceiling=2, seen_ms=time.time_ns() // 1_000_000))
        return records.targets() == {"w": 2}

    wait_until(decided, "the other one decides", 15)
    print(f"the other one decided after {time.monotonic() - killed:.1f} s")
    assert leader_log(tmp_path) == 1 - first


def test_an_autoscaler_can_have_its_workers_as_processes(
    start: Callable[..., Any], on_broker: Engine, project: Path, tmp_path: Path
) -> None:
    start("dispatcher")
    scaler = start("autoscaler", "--launcher", "process")
    record = tmp_path / "record"
    wait_until(lambda: on_broker.ledger.workflows(), "the definitions are in force", 60)
    wait_until(on_broker.pools.reports, "a worker is there", 60)
    for n in range(4):
        start_run(on_broker, "many", {"record": str(record), "name": f"r{n}", "count": 100})
    wait_until(lambda: sum(one.size for one in on_broker.pools.reports()) == 3, "the pool has grown to its max", 60)
    wait_until(lambda: record.exists() and record.read_text().count("\n") == 400, "all have run", 60)
    wait_until(lambda: [one.size for one in on_broker.pools.reports()] == [0], "it is at rest again", 60)
    assert sorted(record.read_text().split()) == sorted(f"r{n}/{i}" for n in range(4) for i in range(100))
    family = psutil.Process(scaler.pid).children(recursive=True)
    assert family
    scaler.kill()
    wait_until(lambda: not any(one.is_running() for one in family), "its workers end with it", 30)


def test_a_launcher_that_there_is_not_is_refused(project: Path, settings: Settings) -> None:
    done = subprocess.run(
        command("autoscaler", "--launcher", "proces", "--project", str(project)),
        env=environment(ORCHESTRATOR_BROKER_URL=settings.broker_url, ORCHESTRATOR_LEDGER_URL=settings.ledger_url),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "error: --launcher must be one of none, process, not 'proces'; did you mean 'process'?"
    )
