"""How fast the S3 trigger is, on moto (which is the slower part) and the embedded server.

    python tests/benchmarks/triggers_s3.py [--messages 300] [--keys 100000]

Prints JSON: notifications drained per second, beside what taking and deleting the same messages alone comes to on this
moto, and beside what the trigger does of it; from a put to the bus; keys of a bucket claimed and confirmed per second,
for the first time and when they are known; bytes of memory a key.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrator.engine import Engine
from orchestrator.events import Event
from orchestrator.ledger.objects import How, ObjectRecords
from orchestrator.settings import Settings
from orchestrator.sightings import Sighting
from tests.conftest import Server, wait_until
from tests.moto import CREDENTIALS, Moto
from triggers.aws import Queue
from triggers.notified import QueueTrigger, _Receiving

_PAGE = 1000


def body(n: int, bucket: str) -> str:
    """Return a notification of an object of its own."""
    entity = {"key": f"in/{n}", "size": n, "eTag": f"{n:032x}", "sequencer": f"{n:016X}"}
    told = {
        "eventSource": "aws:s3", "eventTime": "2026-01-02T03:04:05.678Z", "eventName": "ObjectCreated:Put",
        "s3": {"bucket": {"name": bucket}, "object": entity},
    }  # fmt: skip
    return json.dumps({"Records": [told]})


def fill(moto: Moto, url: str, count: int) -> None:
    """Put as many notifications on a queue, each of an object of its own."""
    client = moto.client("sqs")
    for first in range(0, count, 10):
        entries = [{"Id": str(n), "MessageBody": body(n, "bench")} for n in range(first, min(first + 10, count))]
        client.send_message_batch(QueueUrl=url, Entries=entries)


def drained_per_s(moto: Moto, engine: Engine, count: int) -> float:
    """Have a trigger drain a queue onto the bus; messages a second, from its start until the last was deleted."""
    url, told = moto.queue("bench"), set[str]()
    fill(moto, url, count)

    def emit(events: Any) -> None:
        engine.bus.publish(events)
        told.update(event.id for event in events)

    trigger = QueueTrigger(Queue(name=url), ledger=engine.ledger, emit=emit)
    began = time.perf_counter()
    trigger.start()
    wait_until(lambda: len(told) >= count and moto.depth(url) == 0, "the queue is drained", 300)
    took_s = time.perf_counter() - began
    trigger.stop()
    assert len(told) == count
    return count / took_s


def handled_per_s(engine: Engine, count: int) -> float:
    """Have what messages tell on the bus, ten at a time, without a queue that they come from."""
    handling = _Receiving(Queue(name="none"), engine.ledger, engine.bus.publish, lambda: False, time.time)
    bodies = [body(n, "handled") for n in range(count)]
    began = time.perf_counter()
    for first in range(0, count, 10):
        handling._handle(bodies[first : first + 10])
    return count / (time.perf_counter() - began)


def alone_per_s(moto: Moto, count: int) -> float:
    """Take messages and delete them, and nothing else."""
    url = moto.queue("alone")
    fill(moto, url, count)
    client, left = moto.client("sqs"), count
    began = time.perf_counter()
    while left:
        found = client.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages", [])
        entries = [{"Id": str(n), "ReceiptHandle": one["ReceiptHandle"]} for n, one in enumerate(found)]
        client.delete_message_batch(QueueUrl=url, Entries=entries)
        left -= len(found)
    return count / (time.perf_counter() - began)


def keys_per_s(engine: Engine, count: int) -> dict[str, float]:
    """Claim the keys of a bucket a page at a time, as a listing does."""
    records = ObjectRecords(engine.ledger, "orchestrator:s3/keys")

    def memory() -> int:
        return int(engine.ledger.client.info("memory")["used_memory"])

    def list_all() -> float:
        began = time.perf_counter()
        for first in range(0, count, _PAGE):
            page = [
                Sighting(key=f"in/{n}", etag=f"{n:x}", at_ms=1_700_000_060_000, modified_ms=1_700_000_000_000)
                for n in range(first, min(first + _PAGE, count))
            ]
            claims = records.claim([(one, How.CERTAIN) for one in page])
            records.confirm([claim for claim in claims if claim.event_id])
        return count / (time.perf_counter() - began)

    before = memory()
    return {
        "new_keys_per_s": round(list_all()),
        "known_keys_per_s": round(list_all()),
        "bytes_per_key": round((memory() - before) / count),
    }


def put_to_bus_ms(moto: Moto, engine: Engine, count: int = 50) -> dict[str, float]:
    """Time from a put until its event is on the bus, by notification; of single puts, one after another."""
    url = moto.queue("latency")
    moto.bucket("latency", queue=f"arn:aws:sqs:us-east-1:123456789012:{url.rpartition('/')[2]}")
    emitted: dict[str, float] = {}

    def emit(events: list[Event]) -> None:
        engine.bus.publish(events)
        emitted.update({str(event.subject): time.perf_counter() for event in events})

    trigger = QueueTrigger(Queue(name=url), ledger=engine.ledger, emit=emit)  # type: ignore[arg-type]
    trigger.start()
    s3, took = moto.client("s3"), []
    for n in range(count):
        s3.put_object(Bucket="latency", Key=f"k{n}", Body=b"x")
        began = time.perf_counter()
        wait_until(lambda key=f"k{n}": key in emitted, "it is emitted")  # type: ignore[misc]
        took.append((emitted[f"k{n}"] - began) * 1000)
    trigger.stop()
    took.sort()
    return {"p50": round(took[count // 2], 1), "p95": round(took[int(count * 0.95)], 1)}


def measure(messages: int = 300, keys: int = 100_000) -> dict[str, Any]:
    """Return all figures."""
    os.environ.update(CREDENTIALS)
    with tempfile.TemporaryDirectory(prefix="bench-s3-") as name:
        directory = Path(name)
        server, moto = Server(directory), Moto(directory)
        project = directory / "project"
        project.mkdir()
        stops: list[Callable[[], None]] = []
        try:
            server.start()
            stops.append(server.stop)
            moto.start()
            stops.append(moto.stop)
            settings = Settings.load(
                project, environ={}, data_dir=directory / "data", broker_url=server.url, ledger_url=server.url
            )
            engine = Engine(settings)
            stops.append(engine.close)
            return {
                "notifications_drained_per_s": round(drained_per_s(moto, engine, messages)),
                "taken_and_deleted_alone_per_s": round(alone_per_s(moto, messages)),
                "handled_without_queue_per_s": round(handled_per_s(engine, 5000)),
                "put_to_bus_ms": put_to_bus_ms(moto, engine),
                **keys_per_s(engine, keys),
            }
        finally:
            for stop in reversed(stops):
                stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--messages", type=int, default=300)
    parser.add_argument("--keys", type=int, default=100_000)
    options = parser.parse_args()
    print(json.dumps(measure(options.messages, options.keys), indent=2))


if __name__ == "__main__":
    main()
