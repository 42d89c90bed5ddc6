"""Sources that runs are started from by triggers: deliveries, a bucket and queues; all that outlives the system.

Each sender goes on until its source has accepted what it sends, so that nothing is in doubt; a thing that is sent again
is the same thing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import redis

from orchestrator.cli.addresses import addresses
from orchestrator.embedded import EmbeddedServer
from orchestrator.ledger import keys
from orchestrator.runs import run_id
from orchestrator.subscriptions import OnQueue, queue_source
from tests.acceptance.proxy import Proxy
from tests.chaos.processes import Role, System
from tests.chaos.workload import BUCKET, EVENT_TYPE, KINDS, NOTIFICATIONS, POLLED_BUCKET, TOLD, Expected
from tests.moto import CREDENTIALS, Moto, arn

_SECRET = "chaos"
_THREADS = 6
_PAUSE_S = 0.2
#: So long a source may refuse one thing; afterwards the harness says so and ends.
_INSIST_S = 180.0
#: A message that was in the hands of somebody killed comes back within a minute, from SQS.
_DRAIN_S = 100.0
#: Of deliveries, so many come again after they were accepted.
_AGAIN = 0.3
_BUCKETS = {"object": BUCKET, "polled": POLLED_BUCKET, "removed": BUCKET}
#: Source of the events that are of nobody else.
SOURCE = "chaos"
_NOWHERE = "http://127.0.0.1:1"
#: Pushes a message once, however often it is tried.
_PUSH = "if redis.call('SADD', KEYS[1], ARGV[1]) == 1 then redis.call('LPUSH', KEYS[2], ARGV[2]) end"


class Sources:
    """What `kinds` are started by, with what sends to it. `env` tells the system under test where it all is.

    Each kind's things are numbered; the number is the parameter of the run.
    """

    def __init__(self, work: Path, kinds: Collection[str]) -> None:
        self._work = work
        self._kinds = kinds
        self._pool = ThreadPoolExecutor(_THREADS)
        self._futures: list[Future[Expected]] = []
        self._numbers: Counter[str] = Counter()
        self._gateways = (work / "data", work / "gateway")
        self._list_dir = work / "list"
        self._moto: Moto | None = None
        self._proxy: Proxy | None = None
        self._senders: dict[str, Callable[[str, int], Expected]] = {
            "hooked": self._deliver, "answered": self._deliver, "posted": self._deliver,
            "object": self._put, "polled": self._put, "removed": self._remove,
            "listed": self._push, "queued": self._queue,
        }  # fmt: skip
        self.wrong: list[str] = []
        self.cuts = 0
        self.env = {"CHAOS_SECRET": _SECRET}
        if {*_BUCKETS, "queued"} & set(kinds):
            self._start_moto()

    def _start_moto(self) -> None:
        """Start a store; it is not killed, for what it has is in its memory, but connections to it are cut."""
        self._moto = Moto(self._work)
        self._moto.start()
        self._queues = {"queued": self._moto.queue("queued")}
        self._s3, self._sqs = self._moto.client("s3"), self._moto.client("sqs")
        for bucket in {_BUCKETS[kind] for kind in self._kinds if kind in _BUCKETS}:
            self._s3.create_bucket(Bucket=bucket)
        if {"object", "removed"} & set(self._kinds):
            self._queues[NOTIFICATIONS] = self._moto.queue(NOTIFICATIONS)
            told = {"Key": {"FilterRules": [{"Name": "suffix", "Value": TOLD}]}}
            how = {
                "QueueArn": arn(NOTIFICATIONS),
                "Events": ["s3:ObjectCreated:*", "s3:ObjectRemoved:*"],
                "Filter": told,
            }
            self._s3.put_bucket_notification_configuration(
                Bucket=BUCKET, NotificationConfiguration={"QueueConfigurations": [how]}
            )
        self._proxy = Proxy(self._moto.url)
        self.env |= CREDENTIALS | {"AWS_ENDPOINT_URL": self._proxy.url}
        self.env["CHAOS_SQS_URL"] = self._proxy.url.replace("http://", "sqs://") + "?region=us-east-1"

    def join(self, system: System) -> None:
        """Have the server of the list kept alive by a system."""
        if "listed" in self._kinds:
            system.start(Role("list", EmbeddedServer(self._list_dir, fsync="always").prepare()))
            url = EmbeddedServer.url_of(self._list_dir)
            assert url is not None
            self.env["CHAOS_LIST_URL"] = url
            self._list = redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=2)

    def close(self) -> None:
        self._pool.shutdown()
        if self._proxy is not None:
            self._proxy.stop()
        if self._moto is not None:
            self._moto.stop()

    def cut(self, silent_s: float) -> None:
        """Cut all connections to the store; or let nothing through for so long."""
        assert self._proxy is not None
        self.cuts += 1
        if silent_s > 0:
            self._proxy.cut()
            threading.Timer(silent_s, self._proxy.mend).start()
        else:
            self._proxy.break_connections()

    def send(self, kind: str) -> None:
        """Have the next thing of a kind sent, by another thread."""
        number = self._numbers[kind]
        self._numbers[kind] += 1
        self._futures.append(self._pool.submit(self._senders[kind], kind, number))

    @property
    def pending(self) -> int:
        """How many things are being sent, or were and are not collected yet."""
        return len(self._futures)

    def collect(self) -> list[Expected]:
        """Return the runs of what was accepted since; without an id if nobody can know it. Raises what went wrong."""
        done = [future for future in self._futures if future.done()]
        self._futures = [future for future in self._futures if future not in done]
        return [future.result() for future in done]

    def faults(self) -> list[str]:
        """Say what was answered wrongly, and what sources still have, when all should be taken; waits for that."""
        until = time.monotonic() + _DRAIN_S
        while (left := self._left()) and time.monotonic() < until:
            time.sleep(0.5)
        return self.wrong + left

    def _left(self) -> list[str]:
        found = {}
        if self._moto is not None:
            found = {f"the queue {name}": self._moto.depth(url) for name, url in self._queues.items()}
        if "listed" in self._kinds:
            arrived, taken, until = keys.queue_keys("listed")
            sizes = (
                self._list.llen("listed"),
                self._list.llen(arrived),
                self._list.hlen(taken),
                self._list.zcard(until),
            )
            found["the list"] = sum(int(size) for size in sizes)
        return [f"{name} still has {size} messages" for name, size in found.items() if size]

    # The senders

    def _put(self, kind: str, number: int) -> Expected:
        """Put an object of so many bytes. Of four that notify, one does not; of the others two are of one name."""
        is_told = kind == "object" and number % 4 != 3
        name = f"ü {number // 2}+{TOLD}" if is_told else f"{number}.csv"
        self._s3.put_object(Bucket=_BUCKETS[kind], Key=f"in/{name}", Body=b"x" * number)
        return Expected("", KINDS[kind], {"size": number})

    def _remove(self, kind: str, number: int) -> Expected:
        """Put an object, which starts nothing, and remove it."""
        key = f"gone/{number}{TOLD}"
        self._s3.put_object(Bucket=BUCKET, Key=key, Body=b"")
        self._s3.delete_object(Bucket=BUCKET, Key=key)
        return Expected("", KINDS[kind], {"key": key})

    def _queue(self, kind: str, number: int) -> Expected:
        sent = self._sqs.send_message(QueueUrl=self._queues[kind], MessageBody=json.dumps({"x": number}))
        source = queue_source(OnQueue(**(KINDS[kind].on or {})["queue"]))
        return Expected(run_id(kind, source, sent["MessageId"]), KINDS[kind], {"x": number})

    def _push(self, kind: str, number: int) -> Expected:
        until = time.monotonic() + _INSIST_S
        while True:
            try:
                self._list.eval(_PUSH, 2, "sent", kind, str(number), json.dumps({"x": number}))
                return Expected("", KINDS[kind], {"x": number})
            except redis.RedisError:
                if time.monotonic() > until:
                    raise
                time.sleep(_PAUSE_S)

    def _deliver(self, kind: str, number: int) -> Expected:
        """Deliver, or post to the API, until that is accepted, now to one gateway, now to the other; some again."""
        chance, key = random.Random(f"{kind} {number}"), f"{kind}-{number}"
        path, source = f"/hooks/{kind}", f"orchestrator:webhook/{kind}"
        value: dict[str, object] = {"x": number}
        if kind == "posted":
            path, source = "/api/v1/events", SOURCE
            value = {"id": key, "source": source, "type": EVENT_TYPE + kind, "data": value}
        expected = Expected(run_id(kind, source, key), KINDS[kind], {"x": number})
        body = json.dumps(value).encode()
        accepted, wanted = 0, 2 if chance.random() < _AGAIN else 1
        until = time.monotonic() + _INSIST_S
        while accepted < wanted:
            url = addresses(chance.choice(self._gateways)).get("url", _NOWHERE)
            try:
                answer = httpx.post(f"{url}{path}", content=body, headers=_signed(body, key), timeout=30)
            except httpx.HTTPError:
                answer = None
            if answer is not None and answer.status_code in (200, 202):
                accepted += 1
                self._look_at(answer, expected, key)
                continue
            if answer is not None and answer.status_code != 503:
                self.wrong.append(f"the delivery {key} was answered {answer.status_code}: {answer.text[:200]}")
            if time.monotonic() > until:
                raise TimeoutError(f"no gateway has accepted {key} for {_INSIST_S:g} s")
            time.sleep(_PAUSE_S)
        return expected

    def _look_at(self, answer: httpx.Response, expected: Expected, key: str) -> None:
        told = answer.json()
        wanted: dict[str, object] = {"id": key}
        if answer.status_code == 200:
            output = expected.kind.result(expected.params)
            wanted = {"run": expected.run, "state": "succeeded", "output": output}
        elif "run" in told:
            wanted["run"] = expected.run
        if any(told.get(name) != value for name, value in wanted.items()):
            self.wrong.append(f"the delivery {key} was answered {told}, not {wanted}")


def _signed(body: bytes, key: str) -> dict[str, str]:
    moment = str(int(time.time()))
    digest = hmac.new(_SECRET.encode(), f"{moment}.".encode() + body, hashlib.sha256).hexdigest()
    return {
        "Content-Type": "application/json", "Idempotency-Key": key, "X-Time": moment, "X-Signature": f"v1={digest}",
    }  # fmt: skip
