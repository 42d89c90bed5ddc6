"""A worker that lives for all tests of a process, with tasks of every kind."""

from __future__ import annotations

import base64
import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.engine import Engine
from orchestrator.ledger.queries import Queries
from orchestrator.plan import Plan
from orchestrator.runs import Run
from orchestrator.settings import Settings
from orchestrator.workflows import Workflow
from tests.conftest import Server, WorkerProcess, wait_until

TASKS = '''
import concurrent.futures, dataclasses, datetime, decimal, logging, os, pathlib, sys, time, uuid

def echo(value=None, **rest):
    return value

def noop(**_):
    return None

def add(numbers):
    return sum(numbers)

def numbers(n):
    return list(range(n))

def fail(message="no"):
    raise ValueError(message)

def fail_on(item, bad):
    if item in bad:
        raise ValueError(f"bad item {item}")
    return item

def stamp(record, name, seconds=0.0, **_):
    """Write when this began and ended to a file that outlives everything."""
    began = time.time()
    time.sleep(seconds)
    with open(record, "a") as file:
        file.write(f"{name} {began} {time.time()}\\n")
    return name

def wait_for(path, **_):
    while not os.path.exists(path):
        time.sleep(0.005)
    return path

def tell(secret):
    import structlog
    logging.basicConfig(force=True, format="mine: %(message)s")
    logging.getLogger("shop").warning("opened with %s", secret, extra={"key": [secret]})
    structlog.configure(processors=[structlog.processors.JSONRenderer()])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(logging.getLogger("shop").info, "from a thread").result()
    raise RuntimeError("that is all")

def touch(path, **_):
    pathlib.Path(path).touch()
    return path

def talk(context):
    print("printed")
    print("to stderr", file=sys.stderr)
    logging.getLogger("mine").info("logged")
    context.logger.warning("by context")
    return {
        "run": context.run_id, "step": context.step_id, "attempt": context.attempt, "index": context.index,
        "event": context.event.id, "key": context.idempotency_key, "deadline": context.deadline,
    }

def spoil(values, item, event_data, context):
    """Change everything that was given, and say what it was before."""
    before = [list(values), dict(item), dict(event_data), dict(context.event.data)]
    values.clear(); item.clear(); event_data.clear(); context.event.data.clear()
    return before

def square(number):
    return number * number

def squares_in_processes(numbers):
    import multiprocessing
    with multiprocessing.Pool(2) as pool:
        return pool.map(square, numbers)

def talk_in_threads():
    import concurrent.futures
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(print, ["from", "threads"]))
    sys.stdout.buffer.write(b"bytes\\n")

def chatter(characters):
    print("x" * characters)

def whisper(secret):
    print("the secret is", secret)
    assert secret == 'hun"ter2'

    raise RuntimeError(f"leaked {secret}")

@dataclasses.dataclass
class Point:
    x: int
    when: datetime.datetime

def rich_value():
    return {
        "point": Point(1, datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)),
        "price": decimal.Decimal("1.10"), "path": pathlib.Path("/a"), "id": uuid.UUID(int=1), "pair": (1, 2),
    }

def poor_value():
    return {"rows": [1, object()]}

def big(characters):
    return "x" * characters

def length(value):
    return len(value)

def take(megabytes, cpu_s, seconds=0.0, times=1, **_):
    held = bytearray(int(megabytes * 1e6))
    held[::4096] = b"x" * len(held[::4096])
    until = time.process_time() + cpu_s
    while time.process_time() < until:
        pass
    time.sleep(seconds)

def leave():
    sys.exit(3)

def die_once(mark):
    if not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), 9)
    return "lived"

def die():
    os.kill(os.getpid(), 9)
'''


class Place:
    """A server with a project and a worker on it; starts runs and waits for their end."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self.settings = settings
        #: What the worker has written to its stderr.
        self.log = log
        self.engine = Engine(settings)
        self.queries = Queries(self.engine.ledger, self.engine.payloads)

    def start(
        self, workflow: Workflow, *, event: Mapping[str, Any] | None = None, params: Mapping[str, Any] | None = None
    ) -> str:
        plan = Plan.of(workflow)
        self.engine.ledger.put_plan(plan)
        run = uuid.uuid4().hex
        given = event or {"specversion": "1.0", "id": "e1", "source": "test", "type": "test", "data": None}
        assert self.engine.start(run, plan, event=given, params=params or {})
        return run

    def end(self, run: str, timeout_s: float = 30.0) -> Run:
        wait_until(lambda: self.queries.run(run, with_steps=False).state.is_end, f"run {run} ends", timeout_s)
        return self.queries.run(run)

    def run(self, workflow: Workflow, **given: Any) -> Run:
        return self.end(self.start(workflow, **given))


@pytest.fixture(scope="session")
def place(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The server of this test process, with a worker of two children."""
    project = tmp_path_factory.mktemp("place") / "project"
    project.mkdir()
    (project / "tasks.py").write_text(TASKS)
    (project / "secret.txt").write_text('hun"ter2\n')
    (project / "orchestrator.toml").write_text(f'[secrets]\nTOKEN = "file:{project}/secret.txt"\n')
    # A database of its own: the tests beside these empty theirs.
    url = server.url.removesuffix("/0") + "/1"
    settings = Settings.load(project, environ={}, data_dir=project.parent / "data", broker_url=url, ledger_url=url)
    worker = WorkerProcess(settings).start()
    made = Place(settings, worker.log)
    yield made
    code = worker.stop()
    made.engine.close()
    assert code == 0, worker.log.read_text()


class Monitor:
    """Sees every message that is published to a queue of steps."""

    def __init__(self, settings: Settings) -> None:
        from redis import Redis

        self._client = Redis.from_url(settings.ledger_url, socket_timeout=None)
        self._mark = Redis.from_url(settings.ledger_url)
        self.messages: list[dict[str, Any]] = []
        self.sizes: list[int] = []
        self._token = uuid.uuid4().hex
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)

    def __enter__(self) -> Monitor:
        self._thread.start()
        until = time.monotonic() + 10
        while not self._started.is_set() and time.monotonic() < until:
            self._mark.echo("begin" + self._token)
            self._started.wait(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._mark.echo("end" + self._token)
        self._thread.join(timeout=10)
        self._client.close()
        self._mark.close()

    def _watch(self) -> None:
        with self._client.monitor() as monitor:
            for seen in monitor.listen():
                words = str(seen["command"])
                if "begin" + self._token in words:
                    self._started.set()
                elif "end" + self._token in words:
                    return
                elif words.startswith("LPUSH orchestrator.") and " {" in words:
                    text = words.partition(" {")[2]
                    self.sizes.append(len(text) + 1)
                    self.messages.append(json.loads("{" + text.replace("\\\\", "\\")))

    def bodies(self) -> list[list[Any]]:
        """Return the decoded bodies: [args, kwargs, embed]."""
        return [json.loads(base64.b64decode(message["body"])) for message in self.messages]


@pytest.fixture
def monitor(place: Place) -> Iterator[Monitor]:
    with Monitor(place.settings) as watching:
        yield watching


def read_stamps(path: Path) -> dict[str, tuple[float, float]]:
    """Return name -> (began, ended); fails if a step ran twice."""
    found: dict[str, tuple[float, float]] = {}
    for line in path.read_text().splitlines():
        name, began, ended = line.split()
        assert name not in found, f"{name} ran twice"
        found[name] = (float(began), float(ended))
    return found
