"""How fast events become decisions and runs: the dispatcher, files, and each trigger up to the start of its first step.

    python tests/benchmarks/triggers.py [--rounds 3] [--only dispatcher,files,...] [--json FILE]

Nothing here is a test: no figure fails. Each part starts what it needs on ports and in directories of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import redis
from rich.console import Console
from rich.table import Table

from orchestrator.celery_app import EVENT_QUEUE
from orchestrator.cli.addresses import addresses
from orchestrator.dispatcher import Dispatcher
from orchestrator.embedded import EmbeddedServer
from orchestrator.engine import Engine
from orchestrator.events import Event
from orchestrator.ledger import keys
from orchestrator.ledger.queries import Queries
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


LATENCY_PROJECT = """
workflow: {name}
on:
  - {entry}
steps:
  a: {{task: "tasks:noop"}}
"""


def measure_latency(rounds: int, directory: Path) -> list[tuple[str, str]]:
    """From what happens (a file closed, a webhook posted, a due time, ...) to the start of the first step."""
    from tests.moto import CREDENTIALS, Moto

    directory.mkdir(parents=True)
    moto = Moto(directory)
    moto.start()
    project = directory / "project"
    (project / "workflows").mkdir(parents=True)
    (project / "inbox").mkdir()
    (project / "tasks.py").write_text("def noop():\n    pass\n")
    with embedded(directory / "other") as other:
        entries = {
            "file": "file: {path: inbox}",
            "webhook": "webhook: {path: bench}",
            "schedule": "schedule: {every: 1s}",
            "queue": "queue: {url: env:BENCH_QUEUE, queue: bench}",
            "s3": f"s3: {{bucket: bench, queue: bench, endpoint_url: '{moto.url}'}}",
            "run": "run: {workflow: webhook}",
            "event": "event: {type: [bench]}",
        }
        for name, entry in entries.items():
            (project / "workflows" / f"{name}.yaml").write_text(LATENCY_PROJECT.format(name=name, entry=entry))
        bucket = _bucket(moto)
        up = [sys.executable, "-P", "-m", "orchestrator", "up", "--project", str(project)]
        with process(up, directory / "up.log", BENCH_QUEUE=other.broker_url, **CREDENTIALS):
            data_dir = project / ".orchestrator"
            _until(lambda: addresses(data_dir).get("url") and _is_up(data_dir))
            url = EmbeddedServer.url_of(data_dir)
            settings = Settings.load(project, environ={}, data_dir=data_dir, broker_url=url, ledger_url=url)
            engine = Engine(settings)
            hook = f"{addresses(data_dir)['url']}/hooks/bench"
            client = redis.Redis.from_url(other.broker_url)

            def post(n: int) -> None:
                request = urllib.request.Request(hook, data=b"{}", headers={"Idempotency-Key": f"k{n}"}, method="POST")
                with urllib.request.urlopen(request, timeout=30):
                    pass

            def emit(n: int) -> None:
                engine.bus.publish([Event(id=f"e{n}", source="bench", type="bench", time="2026-01-01T00:00:00Z")])

            acts: dict[str, Callable[[int], Any]] = {
                "file": lambda n: (project / "inbox" / f"{n}.csv").write_text("x"),
                "webhook": post,
                "queue": lambda n: client.lpush("bench", json.dumps({"n": n})),
                "s3": lambda n: bucket.put_object(Bucket="bench", Key=f"{n}.csv", Body=b"x"),
                "event": emit,
            }
            post(0)
            _until(lambda: _ended(engine, "run", 1))
            found = {name: _latencies(engine, name, act, 40 * rounds) for name, act in acts.items()}
            found["schedule"] = _late(engine)
            found["run"] = _after(engine)
            engine.close()
    moto.stop()
    what = {
        "file": "a file closed", "webhook": "a webhook posted", "queue": "a message pushed (Redis list)",
        "s3": "an object put (moto, SQS)", "event": "an event emitted", "schedule": "a due time", "run": "a run's end",
    }  # fmt: skip
    return [
        (f"{what[name]}, to its first step", f"p50 {percentile(ms, 0.5):.1f} ms, p95 {percentile(ms, 0.95):.1f} ms")
        for name, ms in found.items()
    ]


def _bucket(moto: Any) -> Any:
    store, queues = moto.client("s3"), moto.client("sqs")
    store.create_bucket(Bucket="bench")
    url = queues.create_queue(QueueName="bench")["QueueUrl"]
    arn = queues.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    told = {"QueueConfigurations": [{"QueueArn": arn, "Events": ["s3:ObjectCreated:*"]}]}
    store.put_bucket_notification_configuration(Bucket="bench", NotificationConfiguration=told)
    return store


def _is_up(data_dir: Path) -> bool:
    url = EmbeddedServer.url_of(data_dir)
    try:
        with redis.Redis.from_url(str(url)) as client:
            return bool(client.exists(keys.WORKFLOWS))
    except redis.RedisError:
        return False


def _runs(engine: Engine, workflow: str) -> list[Any]:
    return Queries(engine.ledger, engine.payloads).runs(limit=1000, workflow=workflow, state="succeeded")[0]


def _ended(engine: Engine, workflow: str, count: int) -> bool:
    return len(_runs(engine, workflow)) >= count


def _ms(text: str | None) -> float:
    return datetime.fromisoformat(str(text)).timestamp() * 1000


def _latencies(engine: Engine, workflow: str, act: Callable[[int], Any], count: int) -> list[float]:
    found = []
    for n in range(1, count + 1):
        known = {run.id for run in _runs(engine, workflow)}
        began = time.time() * 1000
        act(n)
        (new,) = _until(lambda known=known: [run for run in _runs(engine, workflow) if run.id not in known])
        found.append(_ms(new.started_at) - began)
        time.sleep(0.02)
    return found


def _late(engine: Engine) -> list[float]:
    """How long after its due time the step of each tick began."""
    return [
        _ms(run.started_at) - _ms(_event_of(engine, run)["data"]["due_at"]) for run in _runs(engine, "schedule")[:-1]
    ]


def _after(engine: Engine) -> list[float]:
    """How long after the end of a run the step of the one that follows it began."""
    ends = {run.id: _ms(run.finished_at) for run in _runs(engine, "webhook")}
    return [_ms(run.started_at) - ends[_event_of(engine, run)["data"]["run"]] for run in _runs(engine, "run")]


def _event_of(engine: Engine, run: Any) -> dict[str, Any]:
    return dict(engine.payloads.unpack(engine.ledger.ending(run.id)["event"]))


def measure_webhooks(rounds: int, directory: Path) -> list[tuple[str, str]]:
    """32 clients, each with signed deliveries of 1 kB one after the other."""
    from tests.benchmarks.triggers_webhook import measure

    found = [measure(seconds=5.0) for _ in range(rounds)]
    middle = sorted(found, key=lambda one: one["accepted_per_s"])[len(found) // 2]
    return [(
        "webhooks accepted, 32 clients",
        f"{middle['accepted_per_s']:,.0f} /s, p50 {middle['p50_ms']:.1f} ms, p99 {middle['p99_ms']:.1f} ms to the 202",
    )]  # fmt: skip


def measure_s3(rounds: int, directory: Path) -> list[tuple[str, str]]:
    """Notifications drained from an SQS queue of moto, which answers about as fast as it can be asked."""
    from tests.benchmarks.triggers_s3 import measure

    return [(f"s3: {name}", json.dumps(value)) for name, value in measure().items()]


def _until(predicate: Callable[[], Any], timeout_s: float = 300.0) -> Any:
    until = time.monotonic() + timeout_s
    while not (found := predicate()):
        if time.monotonic() > until:
            raise TimeoutError("nothing has come of it")
        time.sleep(0.005)
    return found


PARTS: dict[str, Callable[[int, Path], list[tuple[str, str]]]] = {
    "dispatcher": measure_dispatcher,
    "files": measure_files,
    "latency": measure_latency,
    "webhooks": measure_webhooks,
    "s3": measure_s3,
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
