"""The control process of a role by itself: when it puts definitions in force."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cli import control
from orchestrator.cli.control import Control
from orchestrator.engine import Engine
from orchestrator.errors import SettingsError
from orchestrator.plan import Plan
from orchestrator.settings import Settings
from orchestrator.subscriptions import OnFile
from orchestrator.workflows import Step, Workflow
from tests.conftest import capture_logs, command, on_servers, wait_until, write_project

ONE = "workflow: w\nsteps: {f: {task: 'tasks:f'}}\n"
Apply = Callable[[Workflow], threading.Thread]


def test_a_role_touches_its_health_file_as_long_as_it_works(settings: Settings, tmp_path: Path) -> None:
    health = tmp_path / "health"
    write_project(settings.project, {"tasks.py": "def f(): ...\n", "workflows/w.yaml": ONE})
    role = subprocess.Popen(
        command("beat", "--project", str(settings.project)),
        env=on_servers(settings, ORCHESTRATOR_HEALTH_FILE=str(health)),
    )
    try:
        wait_until(health.exists, "it is there")
        for _ in range(2):
            before = health.stat().st_mtime_ns
            wait_until(lambda before=before: health.stat().st_mtime_ns > before, "it is touched")
        role.terminate()
        assert role.wait(timeout=30) == 0
    finally:
        role.kill()
        role.wait()


def test_a_health_file_that_cannot_be_written_is_refused(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="health_file /nowhere/health cannot be written: No such file or directory"):
        Control(settings.evolve(health_file="/nowhere/health"), roles=("beat",))


@pytest.fixture
def one(tmp_path: Path) -> Workflow:
    return Workflow(name="one", on=(OnFile(path=str(tmp_path / "in")),), steps=(Step(id="a", task="tasks:a"),))


@pytest.fixture
def apply(settings: Settings) -> Iterator[Apply]:
    """Have the triggers follow a definition, in a thread, which ends when they do."""
    made = Control(settings, roles=("trigger",))

    def apply_(workflow: Workflow) -> threading.Thread:
        thread = threading.Thread(target=made._apply, args=([workflow], ""))
        thread.start()
        return thread

    yield apply_
    made._stop.set()
    for part in made._parts:
        part.stop()
    made._engine.close()


def test_triggers_do_not_run_ahead_of_the_dispatcher(apply: Apply, engine: Engine, one: Workflow) -> None:
    """One that has the definitions before would find that their events match nothing."""
    before = replace(one, on=())
    engine.ledger.publish_workflows([Plan.of(before)])
    thread = apply(one)
    thread.join(0.5)
    assert thread.is_alive()
    engine.ledger.publish_workflows([Plan.of(one)])
    thread.join(10)
    assert not thread.is_alive()


def test_where_no_dispatcher_has_been_yet_triggers_wait_for_none(apply: Apply, one: Workflow) -> None:
    with capture_logs() as logs:
        thread = apply(one)
        thread.join(10)
    assert not thread.is_alive()
    assert [entry["event"] for entry in logs if "dispatcher" in entry["event"]] == []


def test_a_dispatcher_that_is_gone_is_not_waited_for_for_ever(
    apply: Apply, engine: Engine, one: Workflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_DISPATCHER_S", 0.3)
    engine.ledger.publish_workflows([Plan.of(replace(one, on=()))])
    with capture_logs() as logs:
        thread = apply(one)
        thread.join(10)
    assert not thread.is_alive()
    assert "no_dispatcher_has_these_definitions" in [entry["event"] for entry in logs]
