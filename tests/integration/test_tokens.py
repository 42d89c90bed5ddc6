"""Tokens and the audit log by the command line, and a gateway process that keeps to them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.settings import Settings
from tests.conftest import command, on_servers, wait_until, write_project
from tests.integration.test_api import bearer, is_problem

Cli = Callable[..., subprocess.CompletedProcess[str]]
WORKFLOW = "workflow: w\nsteps:\n  a: {task: tasks:noop}\n"


@pytest.fixture
def cli(settings: Settings) -> Cli:
    """Run a command on the test's own servers."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments, "--project", str(settings.project)),
            env=on_servers(settings), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def start_gateway(settings: Settings) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    write_project(settings.project, {"tasks.py": "def noop(): pass\n", "workflows/w.yaml": WORKFLOW})

    def start(**env: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command("gateway", "--project", str(settings.project)),
            env=on_servers(settings, **env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_gateway_for_others_starts_with_a_token_alone_and_asks_for_it(
    settings: Settings, cli: Cli, start_gateway: Callable[..., subprocess.Popen[str]]
) -> None:
    refused = start_gateway(ORCHESTRATOR_HOST="0.0.0.0")
    said, _ = refused.communicate(timeout=60)
    assert refused.returncode == 1, said
    assert "orchestrator tokens create" in said
    token = cli("tokens", "create", "ops", "--scope", "admin").stdout.strip()
    assert token.startswith("orc.ops.")
    gateway = start_gateway(ORCHESTRATOR_HOST="0.0.0.0")
    state = settings.data_dir / "gateway.json"

    def is_ready() -> Any:
        assert gateway.poll() is None, gateway.communicate()[0]
        try:
            return state.exists() and httpx.get(json.loads(state.read_text())["health_url"] + "/readyz").is_success
        except httpx.TransportError:
            return False

    wait_until(is_ready, "the gateway is ready")
    url = json.loads(state.read_text())["url"] + "/api/v1"
    is_problem(httpx.get(f"{url}/runs"), 401)
    assert httpx.get(f"{url}/runs", headers=bearer(token)).json() == {"items": [], "next": None}
    assert httpx.post(f"{url}/events", json={"type": "t"}, headers=bearer(token)).status_code == 202
    assert "that was the last one" in cli("tokens", "revoke", "ops").stdout
    is_problem(httpx.get(f"{url}/runs", headers=bearer(token)), 401)
    gateway.terminate()
    assert gateway.wait(timeout=30) == 0
    entries = json.loads(cli("audit", "--json").stdout)["items"]
    assert [(one["action"], one["target"], one["status"]) for one in entries] == [
        ("revoke_token", "ops", 200), ("emit_events", None, 202), ("create_token", "ops", 200)
    ]  # fmt: skip
    assert entries[1]["who"] == "ops"
    assert token not in json.dumps(entries)


def test_a_token_in_a_file_is_made_once_and_replaced_when_it_is_worthless(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "token"
    arguments = ("tokens", "create", "first", "--scope", "admin", "--file", str(file))
    assert cli(*arguments).stdout == f"made token first; it is in {file}\n"
    token = file.read_text().strip()
    assert (file.stat().st_mode & 0o777, token.startswith("orc.first.")) == (0o600, True)
    again = cli(*arguments)
    assert (again.stdout, again.returncode, file.read_text().strip()) == (
        f"a good token first is in {file}\n",
        0,
        token,
    )
    for spoil in (file.unlink, lambda: file.write_text("orc.first.other"), lambda: cli("tokens", "revoke", "first")):
        spoil()
        assert "made token first" in cli(*arguments).stdout
        assert file.read_text().strip() != token
        token = file.read_text().strip()
    (listed,) = json.loads(cli("tokens", "list", "--json").stdout)["items"]
    assert listed["name"] == "first"
    assert "good token" in cli(*arguments).stdout


def test_a_file_that_cannot_hold_a_token_is_refused(cli: Cli, tmp_path: Path) -> None:
    for file, why in ((tmp_path, "cannot be read"), (tmp_path / "no" / "token", "cannot be written")):
        refused = cli("tokens", "create", "first", "--file", str(file))
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
        assert why in refused.stderr


def test_tokens_are_listed_without_themselves_and_odd_ones_are_refused(cli: Cli) -> None:
    made = json.loads(cli("tokens", "create", "ci", "--scope", "run", "--expires", "90d", "--json").stdout)
    (listed,) = json.loads(cli("tokens", "list", "--json").stdout)["items"]
    assert (listed["name"], listed["scope"]) == ("ci", "run")
    assert listed["expires_at"] > listed["created_at"]
    assert made["token"] not in cli("tokens", "list").stdout
    for arguments, why in {
        ("tokens", "create", "ci"): "there is a token 'ci'",
        ("tokens", "create", "a b"): "a token's name is of letters",
        ("tokens", "create", "x", "--expires", "soon"): "--expires",
        ("tokens", "create", "x", "--expires", "0s"): "--expires",
        ("tokens", "revoke", "other"): "token 'other' is not known",
        ("audit", "--after", "x"): "no such cursor",
    }.items():
        refused = cli(*arguments)
        assert refused.returncode == 1
        assert why in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert [one["status"] for one in json.loads(cli("audit", "--json").stdout)["items"]] == [404, 422, 422, 200]
