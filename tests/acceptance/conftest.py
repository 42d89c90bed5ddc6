"""`orchestrator up` as a person runs it (a process, a project, a terminal to read), and brokers to run on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from orchestrator.brokers.claims import UNACKED
from orchestrator.embedded import EmbeddedServer
from tests.acceptance.rabbitmq import RabbitMQ, is_missing, is_required
from tests.chaos.processes import is_ready
from tests.conftest import Server, command, environment, wait_until, write_project


class Up:
    """One `orchestrator up`."""

    def __init__(self, project: Path) -> None:
        self.project = project
        self.data_dir = project / ".orchestrator"
        self.log = project.parent / "up.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str, cwd: Path | None = None, **env: str) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command("up", "--project", str(self.project), *arguments),
                stdout=log,
                stderr=log,
                env=environment(**env),
                cwd=cwd,
            )

    def wait_ready(self) -> None:
        """Wait until the definitions are in force and the servers answer."""
        wait_until(lambda: self.is_ready(), "`up` is ready: " + self.text()[-2000:], 60)

    def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.text()
        return is_ready(self.data_dir)

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def pid_of(self, part: str) -> int | None:
        """Return the pid of the server, the control process or the worker (its parent); None if it is not there."""
        sign = {"server": "valkey-server", "control": " control ", "worker": " worker "}[part]
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children():
            try:
                if sign in " ".join(child.cmdline()):
                    return child.pid
            except psutil.Error:
                continue
        return None

    def family(self, least: int) -> list[psutil.Process]:
        """Return all processes below `up`; none while there are fewer than `least`."""
        assert self.process is not None
        found = psutil.Process(self.process.pid).children(recursive=True)
        return found if len(found) >= least else []

    def ask(self, *arguments: str, code: int | None = 0) -> str:
        """Run a command on the project and return its stdout."""
        done = subprocess.run(
            command(*arguments, "--project", str(self.project)), capture_output=True, text=True, env=environment()
        )
        assert code is None or done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done.stdout

    def runs(self, **filters: str) -> list[dict[str, Any]]:
        """Return every run."""
        found: list[dict[str, Any]] = []
        arguments = [part for name, value in filters.items() for part in (f"--{name}", value)]
        cursor: list[str] = []
        while True:
            page = json.loads(self.ask("runs", "list", "--json", "--limit", "1000", *arguments, *cursor))
            found += page["items"]
            if page["next"] is None:
                return found
            cursor = ["--after", page["next"]]

    def client(self) -> redis.Redis:
        url = EmbeddedServer.url_of(self.data_dir)
        assert url is not None
        return redis.Redis.from_url(url, decode_responses=True)


@pytest.fixture
def make_up(tmp_path: Path) -> Iterator[Callable[[dict[str, str]], Up]]:
    """Make a project and an `up` for it; whatever still runs at the end is killed."""
    made: list[Up] = []

    def make(files: dict[str, str]) -> Up:
        project = tmp_path / "project"
        project.mkdir(exist_ok=True)
        write_project(project, files)
        up = Up(project)
        made.append(up)
        return up

    yield make
    for up in made:
        if up.process is not None and up.process.poll() is None:
            family = [*psutil.Process(up.process.pid).children(recursive=True), psutil.Process(up.process.pid)]
            for process in family:
                try:
                    os.kill(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            up.process.wait()


def settle(seconds: float) -> None:
    """Let time pass where that time itself is what is tested (a pause of a writer, a stop in the middle)."""
    time.sleep(seconds)


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """The RabbitMQ of this test process. Where there is none, tests are skipped, but never where it must be there."""
    if is_missing():
        why = "rabbitmq-server is not installed: apt-get install rabbitmq-server"
        if is_required():
            pytest.fail(f"{why}; CI and REQUIRE_RABBITMQ do not let these tests be skipped")
        pytest.skip(f"NOTHING WAS TESTED ON RABBITMQ: {why}")
    running = RabbitMQ(tmp_path_factory.mktemp("rabbitmq"))
    try:
        running.start()
        yield running
    finally:
        running.stop()


@dataclass(frozen=True)
class Broker:
    """A broker that runs. `depth` answers how many messages of a queue are ready, and how many taken."""

    name: str
    url: str
    depth: Callable[[str], tuple[int, int]]


@pytest.fixture(scope="session", params=["redis", "rabbitmq"])
def broker(request: pytest.FixtureRequest, server: Server) -> Iterator[Broker]:
    """Each broker in turn. The ledger is on the embedded server with both."""
    if request.param == "rabbitmq":
        running: RabbitMQ = request.getfixturevalue("rabbitmq")
        yield Broker("rabbitmq", running.url, running.depth)
        return
    client = redis.Redis.from_url(server.url)
    yield Broker("redis", server.url, lambda queue: (client.llen(queue), client.hlen(UNACKED)))
    client.close()
