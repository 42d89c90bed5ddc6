"""The roles by themselves, on a server that somebody else runs, as in production."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.settings import Settings
from tests.acceptance.conftest import Broker
from tests.conftest import command, environment, wait_until, write_project

FILES = {
    "tasks.py": "def size(path):\n    return len(open(path).read())\n",
    "workflows/one.yaml": """
workflow: one
on: [{file: {path: inbox, glob: "*.txt"}}]
steps: {size: {task: "tasks:size", with: {path: "{{ event.data.path }}"}}}
""",
    "workflows/two.yaml": """
workflow: two
on: [{file: {path: inbox, settle: 500ms}}]
steps: {size: {task: "tasks:size", pool: other, with: {path: "{{ event.data.path }}"}}}
""",
    "inbox/.gitkeep": "",
}


@pytest.fixture
def project(settings: Settings) -> Path:
    write_project(settings.project, FILES)
    return settings.project


@pytest.fixture
def roles(project: Path, settings: Settings, broker: Broker, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Two of each but the triggers, which nobody leads yet."""
    env = environment(
        ORCHESTRATOR_BROKER_URL=broker.url,
        ORCHESTRATOR_LEDGER_URL=settings.ledger_url,
        ORCHESTRATOR_DATA_DIR=str(settings.data_dir),
    )
    lines = [["dispatcher"], ["dispatcher"], ["trigger"], *([["worker", "--pool", p] for p in ("default", "other")])]
    log = (tmp_path / "roles.log").open("ab")
    started = [
        subprocess.Popen(command(*line, "--project", str(project)), env=env, stdout=log, stderr=log) for line in lines
    ]
    yield env
    for process in started:
        process.terminate()
    codes = [process.wait(timeout=60) for process in started]
    log.close()
    assert codes == [0] * len(started), (tmp_path / "roles.log").read_text()


def test_a_file_starts_each_workflow_that_watches_its_folder_once(project: Path, roles: dict[str, str]) -> None:
    for n in range(20):
        (project / "inbox" / f"{n}.txt").write_text("x" * n)

    def runs() -> list[dict[str, object]]:
        done = subprocess.run(
            command("runs", "list", "--project", str(project), "--json"), capture_output=True, text=True, env=roles
        )
        return json.loads(done.stdout)["items"] if done.returncode == 0 else []

    def ended() -> list[dict[str, object]]:
        found = runs()
        return found if len(found) == 40 and all(run["finished_at"] for run in found) else []

    found = wait_until(ended, "all runs have ended", 60)
    for name in ("one", "two"):
        assert sorted(run["output"] for run in found if run["workflow"] == name) == list(range(20))


def test_doctor_finds_both_servers(project: Path, settings: Settings, broker: Broker) -> None:
    env = environment(ORCHESTRATOR_BROKER_URL=broker.url, ORCHESTRATOR_LEDGER_URL=settings.ledger_url)
    line = command("doctor", "--project", str(project), "--json")
    report = json.loads(subprocess.run(line, capture_output=True, text=True, env=env, check=True).stdout)
    assert [check["name"] for check in report["checks"] if check["ok"]][1:3] == ["ledger", "broker"]
    assert report["ok"]
    assert ":***@" in report["broker_url"]
