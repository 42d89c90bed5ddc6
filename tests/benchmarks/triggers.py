"""How fast events become decisions and runs: the dispatcher, files, and each trigger up to the start of its first step.

    python tests/benchmarks/triggers.py [--rounds 3] [--only dispatcher,files,...] [--json FILE]

Nothing here is a test: no figure fails. Each part starts what it needs on ports and in directories of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from rich.console import Console
from rich.table import Table

from orchestrator.celery_app import EVENT_QUEUE
from orchestrator.dispatcher import Dispatcher
from orchestrator.embedded import EmbeddedServer
from orchestrator.engine import Engine
from orchestrator.events import Event
from orchestrator.settings import Settings
from orchestrator.subscriptions import OnEvent, OnFile
from orchestrator.workflows import Step, Workflow
from tests.benchmarks.bench import process

console = Console(stderr=True, highlight=False)
EVENTS_A_ROUND = 1_000
FILES = 10_000


def percentile(values: list[float], share: float) -> float:
    """Return the value below which that share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@contextmanager
def embedded(directory: Path) -> Iterator[Settings]:
    """Run an embedded server with an empty project; gives settings for it."""
    project, data = directory / "project", directory / "data"
    project.mkdir(parents=True)
    data.mkdir()
    server = EmbeddedServer(data)
    with process(server.prepare(), directory / "server.log"):
        url = EmbeddedServer.url_of(data)
        assert url is not None
        client = redis.Redis.from_url(url)
        until = time.monotonic() + 30
        while True:
            try:
                client.ping()
                break
            except redis.RedisError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
        yield Settings.load(project, environ={}, data_dir=data, broker_url=url, ledger_url=url)


def measure_dispatcher(rounds: int, directory: Path) -> list[tuple[str, str]]:
    """Decisions a second with 1, 100 and 1,000 workflows in force, of which one, or none, asks for the event."""
    rows = []
    with embedded(directory) as settings:
        engine = Engine(settings)
        dispatcher = Dispatcher(engine)
        sizes = (1, 100, 1_000)
        seconds: dict[tuple[str, int], list[float]] = {}
        for _ in range(rounds):
            for size in sizes:
                dispatcher.apply(_workflow(n) for n in range(size))
                for kind, wanted in (("no workflow starts", -1), ("one workflow starts", 0)):
                    events = [_event(wanted) for _ in range(EVENTS_A_ROUND)]
                    began = time.perf_counter()
                    for event in events:
                        dispatcher.dispatch(event)
                    seconds.setdefault((kind, size), []).append(time.perf_counter() - began)
                engine.ledger.client.flushdb()
        for (kind, size), found in sorted(seconds.items()):
            median = statistics.median(found)
            one = statistics.median(seconds[kind, 1])
            rows.append(
                (
                    f"dispatcher, {size:,} workflow(s), {kind}",
                    f"{EVENTS_A_ROUND / median:,.0f} events/s, cost x {median / one:.2f}",
                )
            )
        engine.close()
    return rows


def _workflow(n: int) -> Workflow:
    pattern = {"type": ["shop.order.placed"], "data": {"region": [f"r{n}"], "amount": [{"numeric": [">", 100]}]}}
    return Workflow(name=f"w{n}", steps=(Step(id="a", task="tasks:noop"),), on=(OnEvent(pattern=pattern),))


def _event(region: int) -> Event:
    data = {"region": f"r{region}", "amount": 250, "order": uuid.uuid4().hex}
    return Event(id=uuid.uuid4().hex, source="shop", type="shop.order.placed", time="2026-01-01T00:00:00Z", data=data)


def measure_files(rounds: int, directory: Path) -> list[tuple[str, str]]:
    """From the first of 10,000 files to the last event on the bus, and to the last decision."""
    from triggers.files import FileTrigger, FileWatch

    emitted, decided = [], []
    for n in range(rounds):
        with embedded(directory / str(n)) as settings:
            engine = Engine(settings)
            inbox = directory / str(n) / "inbox"
            inbox.mkdir()
            watch = FileWatch(source="bench", path=inbox, glob="*.csv")
            trigger = FileTrigger(watch, marks=engine.ledger, emit=engine.bus.publish)
            trigger.start()
            began = time.perf_counter()
            for number in range(FILES):
                (inbox / f"{number}.csv").write_text("x")
            _until(lambda e=engine: e.ledger.client.llen(EVENT_QUEUE) >= FILES)
            emitted.append(FILES / (time.perf_counter() - began))
            dispatcher = Dispatcher(engine)
            dispatcher.apply([Workflow(name="w", steps=(Step(id="a", task="t:a"),), on=(OnFile(path="/x"),))])
            began = time.perf_counter()
            dispatcher.start()
            _until(lambda e=engine: e.ledger.client.llen(EVENT_QUEUE) == 0)
            dispatcher.stop()
            decided.append(FILES / (time.perf_counter() - began))
            trigger.stop()
            engine.close()
    return [
        (f"{FILES:,} files, written and on the bus", f"{statistics.median(emitted):,.0f} files/s"),
        ("the same, off the bus and decided about", f"{statistics.median(decided):,.0f} events/s"),
    ]


def _until(predicate: Callable[[], Any], timeout_s: float = 300.0) -> None:
    until = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > until:
            raise TimeoutError("nothing has come of it")
        time.sleep(0.005)


PARTS: dict[str, Callable[[int, Path], list[tuple[str, str]]]] = {
    "dispatcher": measure_dispatcher,
    "files": measure_files,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(PARTS), help="Which parts, with commas between.")
    parser.add_argument("--json", type=Path, help="Write the figures there, too.")
    options = parser.parse_args()
    rows: list[tuple[str, str]] = []
    for name in options.only.split(","):
        console.print(f"measuring {name} ({os.getloadavg()[0]:.1f} load)")
        with tempfile.TemporaryDirectory(prefix="orchestrator-bench-") as directory:
            rows += PARTS[name](options.rounds, Path(directory) / name)
    table = Table("what", "figure (median of the rounds)", box=None)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(dict(rows), indent=2))


if __name__ == "__main__":
    main()
