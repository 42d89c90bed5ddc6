"""`orchestrator up`: what it starts, restarts, refuses and leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from orchestrator.cli import up as supervisor
from orchestrator.cli.access import engine_of
from orchestrator.embedded import EmbeddedServer
from orchestrator.operations import start_run
from orchestrator.settings import Settings
from tests.acceptance.conftest import Up
from tests.conftest import Server, command, environment, wait_until

TASKS = """
import os, time
def stamp(record, name="x"):
    with open(record, "a") as file:
        file.write(f"{name}\\n")
    return name
def slow(record, seconds):
    with open(record, "a") as file: file.write("begin\\n")
    time.sleep(seconds)
    with open(record, "a") as file: file.write("end\\n")
    return "slept"
def version():
    return 1
"""
FILES = {
    "tasks.py": TASKS,
    "workflows/stamp.yaml": """
workflow: stamp
params: {record: string, name: {type: string, default: x}}
steps:
  a: {task: "tasks:stamp", with: {record: "{{ params.record }}", name: "{{ params.name }}"}}
""",
    "workflows/slow.yaml": """
workflow: slow
params: {record: string, seconds: number}
steps:
  a: {task: "tasks:slow", with: {record: "{{ params.record }}", seconds: "{{ params.seconds }}"}}
  b: {task: "tasks:stamp", needs: [a], with: {record: "{{ params.record }}", name: after}}
""",
    "workflows/version.yaml": "workflow: version\nsteps:\n  a: {task: 'tasks:version'}\n",
}
MakeUp = Callable[[dict[str, str]], Up]


@pytest.fixture
def up(make_up: MakeUp) -> Up:
    made = make_up(FILES)
    made.start()
    made.wait_ready()
    return made


def run(up: Up, workflow: str, /, *, code: int | None = 0, **given: Any) -> dict[str, Any]:
    text = up.ask("run", workflow, "--input", json.dumps(given), "--wait", "--timeout", "60s", "--json", code=code)
    found: dict[str, Any] = json.loads(text)
    return found


def test_run_wait_json_prints_the_run_and_exits_by_its_state(up: Up, tmp_path: Path) -> None:
    found = run(up, "stamp", record=str(tmp_path / "record"), name="hello")
    assert (found["state"], found["output"], found["workflow"]) == ("succeeded", "hello", "stamp")
    assert [step["id"] for step in found["steps"]] == ["a"]
    failed = run(up, "stamp", code=1, record="/nowhere/at/all")
    assert (failed["state"], failed["error"]["type"]) == ("failed", "FileNotFoundError")
    assert "tasks.py" in up.ask("runs", "logs", failed["id"])
    assert found["id"] in up.ask("runs", "list")


def test_the_same_key_starts_a_workflow_once(up: Up, tmp_path: Path) -> None:
    ids = {
        up.ask("run", "stamp", "--key", "k", "--input", json.dumps({"record": str(tmp_path / "record")})).strip()
        for _ in range(3)
    }
    assert len(ids) == 1
    up.ask("runs", "wait", ids.pop())
    assert (tmp_path / "record").read_text() == "x\n"


def test_wrong_requests_are_one_line_and_exit_with_1(up: Up) -> None:
    cases = [
        (["run", "stmap"], "unknown workflow 'stmap'; did you mean 'stamp'?"),
        (["run", "stamp"], "input of workflow 'stamp': record: is required"),
        (["run", "stamp", "--input", '{"record": 3}'], "record: Input should be a valid string (got 3)"),
        (["run", "stamp", "--input", '{"record": "r", "nmae": "n"}'], "unknown parameter 'nmae'; did you mean 'name'?"),
        (["run", "stamp", "--input", "{"], "--input is not JSON"),
        (["run", "stamp", "--input", "[]"], "--input must be a JSON object"),
        (["run", "stamp", "--input", "@/not/there"], "No such file"),
        (["runs", "show", "nope"], "run 'nope' is not known"),
        (["runs", "wait", "nope"], "run nope is not known"),
        (["runs", "list", "--state", "runing"], "did you mean 'running'?"),
        (["events", "show", "nope"], "event 'nope' is not known"),
        (["graph", "stmap"], "unknown workflow 'stmap'; did you mean 'stamp'?"),
    ]
    for arguments, message in cases:
        done = subprocess.run(
            command(*arguments, "--project", str(up.project)), capture_output=True, text=True, env=environment()
        )
        assert done.returncode == 1, (arguments, done)
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "Traceback" not in done.stderr


def test_a_second_up_on_the_same_data_is_refused(up: Up) -> None:
    done = subprocess.run(
        command("up", "--project", str(up.project)), capture_output=True, text=True, env=environment(), timeout=60
    )
    assert done.returncode == 1
    assert "is in use by `orchestrator up`" in done.stderr
    assert str(up.process.pid if up.process else "?") in done.stderr


def test_a_port_in_use_is_refused(make_up: MakeUp) -> None:
    made = make_up(FILES)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            command("up", "--project", str(made.project), "--port", str(port)),
            capture_output=True, text=True, env=environment(), timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().startswith(f"error: port {port} on 127.0.0.1 is in use")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("pool", "fault"),
    [
        ('memory = "900GB"', "pool default: memory: each process wants 900GB, and this machine has "),
        ("gpu = 1000", "pool default: gpu: each process wants 1000 GPUs, and this machine has "),
        ("cpu = 5000", "pool default: cpu: each process wants 5000 cores, and this machine has "),
        ("min = 3\nmax = 2", "orchestrator.toml: pools.default.min: 3 is above max 2"),
    ],
)
def test_a_pool_that_cannot_be_is_refused_in_one_line(make_up: MakeUp, pool: str, fault: str) -> None:
    """Only of pools that steps use: another machine may have room for the others."""
    made = make_up(FILES | {"orchestrator.toml": f"[pools.default]\n{pool}\n[pools.other]\n{pool}\n"})
    done = subprocess.run(
        command("up", "--project", str(made.project)), capture_output=True, text=True, env=environment(), timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {fault}")
    assert len(done.stderr.splitlines()) == 1
    assert "pool other" not in done.stderr


def test_a_broker_that_is_not_there_is_named_without_its_password(make_up: MakeUp) -> None:
    made = make_up(FILES)
    url = "redis://:hunter2@127.0.0.1:1/0"
    for arguments in (["up"], ["run", "stamp", "--input", '{"record": "r"}']):
        done = subprocess.run(
            command(*arguments, "--project", str(made.project)),
            capture_output=True, text=True, env=environment(ORCHESTRATOR_BROKER_URL=url), timeout=60,
        )  # fmt: skip
        assert done.returncode == 1
        assert "127.0.0.1:1" in done.stderr
        assert "hunter2" not in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_broken_definitions_stop_up_before_anything_starts(make_up: MakeUp) -> None:
    made = make_up(FILES | {"workflows/bad.yaml": "workflow: bad\nsteps:\n  a: {tsak: 'x:y'}\n  b: {task: 'no:no'}\n"})
    done = subprocess.run(
        command("up", "--project", str(made.project)), capture_output=True, text=True, env=environment(), timeout=60
    )
    assert done.returncode == 1
    assert "workflows/bad.yaml:3: steps.a.tsak: unknown key 'tsak'; did you mean 'task'?" in done.stderr
    assert "workflows/bad.yaml:4: steps.b.task" in done.stderr
    assert not made.data_dir.exists()


def test_commands_without_up_say_what_to_do(make_up: MakeUp) -> None:
    made = make_up(FILES)
    done = subprocess.run(
        command("runs", "list", "--project", str(made.project)), capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 1
    assert "run `orchestrator up" in done.stderr


def test_state_is_found_again_after_a_restart(up: Up, tmp_path: Path) -> None:
    before = run(up, "stamp", record=str(tmp_path / "record"))
    assert up.stop() == 0
    up.start()
    up.wait_ready()
    assert [one["id"] for one in up.runs()] == [before["id"]]


def test_sigterm_lets_a_step_finish_and_the_run_goes_on_at_the_next_start(up: Up, tmp_path: Path) -> None:
    record = tmp_path / "record"
    started = up.ask("run", "slow", "--input", json.dumps({"record": str(record), "seconds": 3})).strip()
    wait_until(record.exists, "the step has begun")
    assert up.stop() == 0
    assert record.read_text().split() == ["begin", "end"]
    up.start()
    up.wait_ready()
    assert json.loads(up.ask("runs", "wait", started, "--json"))["state"] == "succeeded"
    assert record.read_text().split() == ["begin", "end", "after"]


def test_what_was_taken_and_not_begun_is_given_back_on_sigterm(up: Up, tmp_path: Path) -> None:
    records = [tmp_path / f"record{n}" for n in range(5)]
    with engine_of(Settings.load(up.project, environ={})) as engine:  # all at once
        runs = [start_run(engine, "slow", {"record": str(record), "seconds": 6})[0] for record in records]

    def begun() -> list[Path]:
        return [record for record in records if record.exists()]

    wait_until(lambda: len(begun()) == 2, "two steps have begun")  # and the worker has taken the others too
    assert up.stop() == 0
    assert len(begun()) == 2
    assert all(record.read_text().split() == ["begin", "end"] for record in begun())
    up.start()
    up.wait_ready()
    for run_id, record in zip(runs, records, strict=True):
        assert json.loads(up.ask("runs", "wait", run_id, "--json"))["state"] == "succeeded"
        assert record.read_text().split() == ["begin", "end", "after"]


def test_a_step_that_outlasts_the_grace_period_is_taken_up_again(make_up: MakeUp, tmp_path: Path) -> None:
    record = tmp_path / "record"
    up = make_up(FILES | {"orchestrator.toml": "[settings]\ngrace_s = 1\n"})
    up.start()
    up.wait_ready()
    started = up.ask("run", "slow", "--input", json.dumps({"record": str(record), "seconds": 5})).strip()
    wait_until(record.exists, "the step has begun")
    assert up.stop() == 0
    assert record.read_text().split() == ["begin"]
    up.start()
    up.wait_ready()
    assert json.loads(up.ask("runs", "wait", started, "--json"))["state"] == "succeeded"
    assert record.read_text().split() == ["begin", "begin", "end", "after"]


@pytest.mark.parametrize("part", ["control", "worker", "server"])
def test_a_part_that_is_killed_is_started_again_and_the_run_ends(up: Up, tmp_path: Path, part: str) -> None:
    record = tmp_path / "record"
    started = up.ask("run", "slow", "--input", json.dumps({"record": str(record), "seconds": 2})).strip()
    wait_until(record.exists, "the step has begun")
    before = wait_until(lambda: up.pid_of(part), f"{part} has started")
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: up.pid_of(part) not in (None, before), f"{part} is back")
    wait_until(up.is_ready, "the server answers", 60)
    assert json.loads(up.ask("runs", "wait", started, "--timeout", "60s", "--json"))["state"] == "succeeded"
    assert f"{part}" in up.text()
    lines = record.read_text().split()
    assert lines[-2:] == ["end", "after"]
    # Only the death of the worker itself makes the step begin again.
    assert lines.count("begin") == (2 if part == "worker" else 1), lines


def test_nothing_is_left_running(up: Up) -> None:
    assert up.process is not None
    # The server, the control process, the worker, which has no processes at rest.
    family = wait_until(lambda: up.family(3), "all processes have started")
    assert up.stop(signal.SIGINT) == 0
    assert [process for process in family if process.is_running() and process.status() != "zombie"] == []


def test_the_parts_end_when_up_itself_is_killed_and_the_next_up_goes_on(up: Up, tmp_path: Path) -> None:
    assert up.process is not None
    family = psutil.Process(up.process.pid).children(recursive=True)
    up.process.kill()
    up.process.wait()
    up.start()
    up.wait_ready()
    wait_until(
        lambda: not [p for p in family if p.is_running() and p.status() != "zombie"], "the old parts have ended", 60
    )
    assert run(up, "stamp", record=str(tmp_path / "record"))["state"] == "succeeded"


def test_a_server_that_was_left_and_does_not_answer_gets_no_second_one_beside_it(up: Up, tmp_path: Path) -> None:
    """Two servers on one append-only file would spoil it."""
    assert up.process is not None
    server = psutil.Process(up.pid_of("server"))
    before = EmbeddedServer.url_of(up.data_dir)
    server.suspend()
    up.process.kill()
    up.process.wait()
    up.start()
    assert up.process.wait(timeout=60) == 1
    assert "does not stop; stop it by hand" in up.text()
    server.kill()
    up.start()
    up.wait_ready()
    assert EmbeddedServer.url_of(up.data_dir) == before
    assert run(up, "stamp", record=str(tmp_path / "record"))["state"] == "succeeded"


def test_changed_code_is_a_new_generation_and_changed_definitions_are_put_in_force(up: Up, tmp_path: Path) -> None:
    first = run(up, "version")
    assert first["output"] == 1
    record = tmp_path / "record"
    slow = up.ask("run", "slow", "--input", json.dumps({"record": str(record), "seconds": 4})).strip()
    wait_until(record.exists, "the slow step has begun")
    (up.project / "tasks.py").write_text(TASKS.replace("return 1", "return 2"))
    wait_until(lambda: run(up, "version")["output"] == 2, "the new code runs", 60)
    second = run(up, "version")
    assert second["steps"][0]["code"] != first["steps"][0]["code"]
    # The step that was running with the old code was not disturbed.
    assert json.loads(up.ask("runs", "wait", slow, "--json"))["state"] == "succeeded"
    assert record.read_text().split() == ["begin", "end", "after"]

    (up.project / "workflows/version.yaml").write_text("workflow: version\nsteps:\n  a: {task: 'tasks:nope'}\n")
    wait_until(lambda: "workflows/version.yaml:3: steps.a.task" in up.text(), "the fault is shown")
    assert run(up, "version")["output"] == 2
    (up.project / "workflows/version.yaml").write_text(
        "workflow: version\nsteps:\n  a: {task: 'tasks:version'}\noutput: '{{ a + 10 }}'\n"
    )
    wait_until(lambda: run(up, "version")["output"] == 12, "the mended definition is in force", 60)


def test_a_run_in_flight_keeps_the_pools_of_its_plan(up: Up, tmp_path: Path) -> None:
    """The definition moves a step to another pool while a run of the one before has not come to it."""
    record = tmp_path / "record"
    flow = FILES["workflows/slow.yaml"]
    path = up.project / "workflows" / "slow.yaml"
    path.write_text(flow.replace("needs: [a]", "pool: other, needs: [a]"))
    wait_until(lambda: "definitions changed" in up.text(), "the definition is in force")
    up.ask("run", "slow", "--input", json.dumps({"record": str(record), "seconds": 6}))
    wait_until(lambda: record.exists(), "the step has begun")
    path.write_text(flow)
    wait_until(lambda: up.text().count("definitions changed") == 2, "the definition is in force")
    wait_until(lambda: [one["state"] for one in up.runs()] == ["succeeded"], "the run ends")


def test_a_server_that_reads_its_data_is_waited_for(make_up: MakeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes, and not only as long as a server may take to answer at all."""
    project = make_up(FILES).project
    server = Server(project / ".orchestrator")
    (project / ".orchestrator").mkdir()
    server.start()
    client = redis.Redis.from_url(server.url)
    client.mset({f"key{n}": "x" * 200 for n in range(3000)})
    client.bgrewriteaof()
    wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"], "the file is written")
    client.close()
    server.stop()
    plain = EmbeddedServer._configuration
    slow = "key-load-delay 1000\nloading-process-events-interval-bytes 1024\n"
    monkeypatch.setattr(EmbeddedServer, "_configuration", lambda self, *given: plain(self, *given) + slow)
    monkeypatch.setattr(supervisor, "_SERVER_START_S", 1.0)
    up = supervisor.Up(Settings.load(project, environ={}))
    up._start_server()
    part = up._server
    assert part is not None
    assert part.process is not None
    took = time.monotonic() - part.started
    part.process.kill()
    part.process.wait()
    assert part.output is not None
    assert part.shares is not None
    part.output.close()
    part.shares.close()
    assert took > 1.5


def test_doctor_says_where_everything_is(up: Up) -> None:
    report = json.loads(up.ask("doctor", "--json"))
    assert report["ok"]
    assert report["broker_url"].startswith("redis://:***@127.0.0.1:")
    assert "orchestrator.default.normal" in report["queues"]
    (gateway,) = [check for check in report["checks"] if check["name"] == "gateway"]
    assert gateway["detail"].startswith("answers at http://127.0.0.1:")
    assert "***" not in json.loads(up.ask("doctor", "--json", "--secrets"))["broker_url"]
