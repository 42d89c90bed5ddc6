"""What a new user does first: the demo, a new project, the examples."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.acceptance.conftest import Up
from tests.conftest import command, environment, wait_until, write_project


def test_the_demo_goes_as_it_should() -> None:
    done = subprocess.run(command("demo"), capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All as it should be" in done.stdout
    assert "malformed.csv" in done.stdout
    assert "invoices failed:" in done.stdout
    assert '"output": "Send us 3 bolts."' in " ".join(done.stdout.split())


def test_a_new_project_runs_as_it_is(make_up: Callable[[dict[str, str]], Up]) -> None:
    up = make_up({})
    up.project.rmdir()
    made = subprocess.run(command("init", str(up.project)), capture_output=True, text=True, env=environment())
    assert made.returncode == 0, made.stderr
    again = subprocess.run(command("init", str(up.project)), capture_output=True, text=True, env=environment())
    assert again.returncode == 1
    assert "not an empty directory" in again.stderr
    up.ask("validate")
    up.start()
    up.wait_ready()
    wait_until(lambda: f"file      {up.project}/inbox/*.csv for invoices" in up.text(), "it says what it watches")
    shutil.copy(up.project / "examples.csv", up.project / "inbox" / "one.csv")
    (run,) = wait_until(lambda: up.runs(state="succeeded"), "the run has succeeded")
    assert run["output"] == {"file": str(up.project / "inbox" / "one.csv"), "rows": 3, "total": 20.1}
    (event,) = json.loads(up.ask("events", "list", "--json"))["items"]
    assert event["event"]["data"]["name"] == "one.csv"
    assert event["verdicts"] == {"invoices": {"verdict": "started", "run": run["id"], "reason": None}}


def test_the_commands_of_the_examples_work() -> None:
    project = Path(__file__).resolve().parents[2] / "examples" / "shop"

    def ask(*arguments: str) -> str:
        done = subprocess.run(
            command(*arguments, "--project", str(project)), capture_output=True, text=True, env=environment()
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "no faults" in ask("validate")
    assert "amounts (foreach)" in ask("graph", "invoices")
    assert ask("graph", "invoices", "--format", "mermaid").startswith("flowchart LR")
    assert ask("graph", "invoices", "--format", "dot").startswith('digraph "invoices"')
    assert "orchestrator.step" in ask("build", "invoices")
    listed = ask("workflows", "list")
    assert "event shop.order.placed" in listed
    assert "schedule stocktaking: cron 0 6 * * MON-FRI (Europe/Paris)" in listed
    assert "webhook /hooks/returns" in listed
    assert "run invoices: failed" in listed


def test_a_project_may_lie_anywhere_and_have_files_named_as_the_standard_librarys(
    make_up: Callable[[dict[str, str]], Up], tmp_path: Path
) -> None:
    project = tmp_path / "my próject ✓"
    up = make_up({})
    up.project, up.data_dir = project, project / ".orchestrator"
    write_project(
        project,
        {
            "email.py": "raise RuntimeError('not me')\n",
            "queue.py": "raise RuntimeError('not me')\n",
            "tasks.py": "def send():\n    return 'sent'\n",
            "workflows/mail.yaml": "workflow: mail\nsteps:\n  send: {task: 'tasks:send'}\n",
        },
    )
    # As a person who has gone into the project would: its folder is the current one.
    up.start(cwd=project)
    up.wait_ready()
    assert json.loads(up.ask("run", "mail", "--wait", "--json"))["output"] == "sent"
