"""Webhooks against processes that are killed: what was answered 202 becomes exactly one run."""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.cli.addresses import addresses
from orchestrator.engine import Engine
from orchestrator.ledger.queries import Queries
from orchestrator.runs import run_id
from orchestrator.settings import Settings
from tests.conftest import command, environment, on_servers, wait_until, write_project

PROJECT = {
    "tasks.py": """
def note(record, key):
    with open(record, "a") as file:
        file.write(f"{key}\\n")
""",
    "workflows/noted.yaml": """
workflow: noted
on:
  - webhook: {path: noted, verify: {github: env:HOOK_SECRET}}
  - webhook: {path: open}
params:
  key: {default: "{{ event.id }}"}
steps:
  note: {task: "tasks:note", with: {record: RECORD, key: "{{ params.key }}"}}
""",
}


class Role:
    """A process of one role, that is killed and started again."""

    def __init__(self, settings: Settings, *arguments: str) -> None:
        self._command = command(*arguments, "--project", str(settings.project))
        self._env = on_servers(settings, HOOK_SECRET="s")
        self._log = settings.project.parent / f"{arguments[0]}.log"
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, env=self._env, stdout=log, stderr=log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.process = self._start()


@pytest.fixture
def roles(settings: Settings) -> Iterator[dict[str, Role]]:
    record = settings.project.parent / "record"
    record.touch()
    write_project(settings.project, {name: text.replace("RECORD", str(record)) for name, text in PROJECT.items()})
    started = {name: Role(settings, name) for name in ("gateway", "dispatcher", "worker")}
    yield started
    for role in started.values():
        role.kill()


def _is_open(url: str) -> bool:
    try:
        return httpx.get(f"{url}/hooks/noted", timeout=5).status_code == 405
    except httpx.HTTPError:
        return False


class Client:
    """One that delivers until it has the answer, as senders do."""

    def __init__(self, name: str, url: Callable[[], str], stop: threading.Event) -> None:
        self._name = name
        self._url = url
        self._stop = stop
        self.accepted: list[tuple[str, str]] = []
        self.tries = 0
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        n = 0
        while not self._stop.is_set():
            n += 1
            self._deliver("noted", {"Idempotency-Key": f"{self._name}-{n}"})
            self._deliver("open", {})

    def _deliver(self, path: str, headers: dict[str, str]) -> None:
        body = json.dumps({"n": path}).encode()
        headers = headers | {"X-Hub-Signature-256": "sha256=" + hmac.new(b"s", body, hashlib.sha256).hexdigest()}
        with httpx.Client(timeout=20) as http:
            while True:
                self.tries += 1
                try:
                    answer = http.post(f"{self._url()}/hooks/{path}", content=body, headers=headers)
                except httpx.HTTPError:
                    time.sleep(0.02)  # a sender that comes again
                    continue
                if answer.status_code == 202:
                    self.accepted.append((path, answer.json()["id"]))
                    return
                assert answer.status_code == 503, answer.text


@pytest.mark.timeout(240)
def test_what_was_answered_202_becomes_exactly_one_run(
    roles: dict[str, Role], settings: Settings, engine: Engine
) -> None:
    """While gateway and dispatcher are killed at random."""

    def url() -> str:
        return addresses(settings.data_dir).get("url", "http://127.0.0.1:1")

    wait_until(lambda: _is_open(url()), "the gateway answers", 60)
    first = url()
    stop = threading.Event()
    clients = [Client(f"c{number}", url, stop) for number in range(6)]
    chance = random.Random(5)
    for _ in range(8):
        time.sleep(chance.uniform(0.2, 1.0))  # under load, at a moment that nobody has chosen
        roles[chance.choice(["gateway", "gateway", "dispatcher"])].restart()
        wait_until(lambda: _is_open(url()), "the gateway answers again", 60)
    assert url() == first
    stop.set()
    for client in clients:
        client.thread.join(timeout=60)
        assert not client.thread.is_alive()
    accepted = {entry for client in clients for entry in client.accepted}
    assert len(accepted) == sum(len(client.accepted) for client in clients) > 50
    queries = Queries(engine.ledger, engine.payloads)
    runs = {run_id("noted", f"orchestrator:webhook/{path}", key): key for path, key in accepted}

    def ended() -> bool:
        found: dict[str, Any] = {run: engine.ledger.outcome(run)[0] for run in runs}
        return set(found.values()) == {"succeeded"}

    wait_until(ended, "every accepted delivery's run has ended", 120)
    listed, _ = queries.runs(limit=100_000)
    identified = {key for path, key in accepted if path == "noted"}
    noted = [run for run in listed if run.input["key"] in identified]
    assert len(noted) == len(identified)  # a delivery with an id, however often it came, is one run
    # Without an id one that was published and not answered came again as another.
    assert len(listed) - len(runs) <= sum(client.tries - len(client.accepted) for client in clients)
    wait_until(lambda: all(run.state.is_end for run in queries.runs(limit=100_000)[0]), "all have ended")
    written = (settings.project.parent / "record").read_text().split()
    assert sorted(written) == sorted(run.input["key"] for run in listed)


def _has_line(path: Path, line: str) -> bool:
    return path.exists() and line in path.read_text().split()


def test_up_tells_where_the_gateway_is(settings: Settings) -> None:
    """And takes deliveries there, and again after a restart."""
    record = settings.project.parent / "record"
    write_project(settings.project, {name: text.replace("RECORD", str(record)) for name, text in PROJECT.items()})
    data_dir = settings.project.parent / "up-data"
    seen = set()
    for number in range(2):
        log = settings.project.parent / f"up-{number}.log"
        arguments = command("up", "--project", str(settings.project), "--data-dir", str(data_dir))
        with log.open("ab") as out:
            up = subprocess.Popen(arguments, env=environment(HOOK_SECRET="s"), stdout=out, stderr=out)
        try:
            wait_until(lambda: _is_open(addresses(data_dir).get("url", "http://127.0.0.1:1")), "it answers", 60)
            url = addresses(data_dir)["url"]
            assert f"gateway   {url} (health " in log.read_text()
            seen.add(url)
            assert httpx.get(f"{addresses(data_dir)['health_url']}/healthz").status_code == 200
            assert [one["name"] for one in httpx.get(f"{url}/api/v1/workflows").json()["items"]] == ["noted"]
            key = {"Idempotency-Key": f"k{number}"}
            assert httpx.post(f"{url}/hooks/open", json={}, headers=key).status_code == 202
            wait_until(partial(_has_line, record, f"k{number}"), "the step has run", 60)
        finally:
            up.terminate()
            up.wait(timeout=60)
    assert len(seen) == 1


def test_up_refuses_a_port_in_use(settings: Settings) -> None:
    write_project(settings.project, PROJECT)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        arguments = command("up", "--project", str(settings.project), "--port", str(port))
        env = environment(HOOK_SECRET="s", ORCHESTRATOR_DATA_DIR=str(settings.data_dir))
        up = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=60)
    assert up.returncode != 0
    assert f"port {port} on 127.0.0.1 is in use" in up.stderr
    assert "Traceback" not in up.stderr


@pytest.mark.parametrize("role", ["gateway", "up"])
def test_an_address_for_others_needs_a_token(settings: Settings, role: str) -> None:
    """And nothing listens before there is one."""
    write_project(settings.project, PROJECT)
    arguments = command(role, "--project", str(settings.project), "--host", "0.0.0.0")
    ended = subprocess.run(
        arguments, env=on_servers(settings, HOOK_SECRET="s"), capture_output=True, text=True, timeout=60
    )
    assert ended.returncode != 0
    assert "orchestrator tokens create" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert addresses(settings.data_dir) == {}


def test_faults_of_webhooks_are_told_all_at_once(settings: Settings) -> None:
    other = "workflow: v\non:\n  - webhook: {path: open, schema: {type: 1}}\nsteps:\n  s: {task: 'tasks:note'}\n"
    write_project(settings.project, PROJECT | {"workflows/other.yaml": other})
    arguments = command("validate", "--project", str(settings.project))
    ended = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    told = ended.stdout.splitlines()
    assert any("noted.yaml:4: on.0.webhook.verify.github: secret env:HOOK_SECRET" in line for line in told)
    assert any("on.0.webhook.schema.type: is no JSON Schema" in line for line in told)
    assert any("the path 'open' is used twice" in line for line in told)
