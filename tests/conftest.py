"""Fixtures: the real embedded server, real workers, real projects; each test process has its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import redis
import structlog

from orchestrator import telemetry
from orchestrator.embedded import EmbeddedServer
from orchestrator.engine import Engine
from orchestrator.settings import Settings

ROOT = Path(__file__).resolve().parents[1]

# How long an example takes is no property: the machine may be busy.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# The settings of whoever runs the tests are not those of the tests.
for _name in [name for name in os.environ if name.startswith("ORCHESTRATOR_")]:
    del os.environ[_name]


def wait_until(predicate: Callable[[], Any], description: str, timeout_s: float = 30.0) -> Any:
    """Wait until `predicate` gives something true and return it; fail with the description otherwise."""
    until = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > until:
            pytest.fail(f"waited {timeout_s:g} s in vain until {description}")
        time.sleep(0.01)


@contextmanager
def capture_logs() -> Iterator[list[structlog.typing.EventDict]]:
    """Collect what our own loggers say, instead of having it written."""
    capture = structlog.testing.LogCapture()
    before = telemetry.processors[:]
    telemetry.processors[:] = [capture]
    try:
        yield capture.entries
    finally:
        telemetry.processors[:] = before


class Server:
    """A running embedded server."""

    def __init__(self, data_dir: Path, fsync: str = "everysec") -> None:
        self.data_dir = data_dir
        self._server = EmbeddedServer(data_dir, fsync=fsync)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        url = EmbeddedServer.url_of(self.data_dir)
        assert url is not None
        return url

    def start(self) -> None:
        command = self._server.prepare()
        with (self.data_dir / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        client = redis.Redis.from_url(self.url)
        wait_until(lambda: _answers(client), "the embedded server answers")
        client.close()

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded server of this test process."""
    running = Server(tmp_path_factory.mktemp("server"))
    running.start()
    yield running
    running.stop()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server of the test's own, which it may stop or make refuse."""
    directory = tmp_path / "own-server"
    directory.mkdir()
    made = Server(directory)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def settings(server: Server, tmp_path: Path) -> Settings:
    """Settings on an empty server, with a project directory of the test's own."""
    client = redis.Redis.from_url(server.url)
    client.flushall()
    client.close()
    project = tmp_path / "project"
    project.mkdir()
    return Settings.load(project, environ={}, data_dir=tmp_path / "data", broker_url=server.url, ledger_url=server.url)


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    """An engine on those settings."""
    made = Engine(settings, patience_s=2.0)
    yield made
    made.close()


def environment(**extra: str) -> dict[str, str]:
    """Return the environment for processes that a test starts: without settings of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ORCHESTRATOR_")}
    return kept | {"PYTHONPATH": str(ROOT)} | extra


def command(*arguments: str) -> list[str]:
    """Return the command line of `orchestrator ...`."""
    return [sys.executable, "-P", "-m", "orchestrator", *arguments]


def on_servers(settings: Settings, **extra: str) -> dict[str, str]:
    """Return the environment for a role on the servers of `settings`."""
    return environment(
        ORCHESTRATOR_BROKER_URL=settings.broker_url,
        ORCHESTRATOR_LEDGER_URL=settings.ledger_url,
        ORCHESTRATOR_DATA_DIR=str(settings.data_dir),
        **extra,
    )


class WorkerProcess:
    """A real worker process for a project, on the settings' servers."""

    def __init__(self, settings: Settings, *, pool: str = "default", concurrency: int = 2, **env: str) -> None:
        self._settings = settings
        self._env = env
        self._arguments = ["--pool", pool, "--concurrency", str(concurrency)]
        self.log = settings.project.parent / f"worker-{pool}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> WorkerProcess:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command("worker", "--project", str(self._settings.project), *self._arguments),
                env=on_servers(self._settings, **self._env),
                stdout=log,
                stderr=log,
            )
        return self

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture
def start_worker(settings: Settings) -> Iterator[Callable[..., WorkerProcess]]:
    """Start worker processes that end with the test."""
    started: list[WorkerProcess] = []

    def start(**options: Any) -> WorkerProcess:
        worker = WorkerProcess(settings, **options).start()
        started.append(worker)
        return worker

    yield start
    for worker in started:
        assert worker.process is not None
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()


def write_project(root: Path, files: dict[str, str]) -> None:
    """Write the files of a project."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
