"""Bad-input mode: malformed messages in every queue while real runs go on.

Nobody may die of one, none may hold up a queue, and of each there must be a dead letter with its bytes.
"""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import amqp
import kombu
import psutil

from orchestrator.brokers.claims import UNACKED, ring
from orchestrator.bus import EventBus
from orchestrator.celery_app import EVENT_QUEUE, PRIORITIES, queue_name
from orchestrator.deadletters import DeadLetters
from orchestrator.dispatcher import manual_event
from orchestrator.engine import Engine
from orchestrator.ledger import keys
from orchestrator.runs import run_id
from orchestrator.settings import Settings
from tests.chaos.bad_messages import Bad, letters_of, messages
from tests.chaos.processes import Role, System, children, orchestrator, part_of_up, server_url, wait_for
from tests.chaos.report import console

QUEUES = (*(queue_name("default", priority) for priority in PRIORITIES), EVENT_QUEUE)
_BATCH = 200
#: Pushed and not yet taken, at most: the server is to hold the letters and not the queues as well.
_WAITING = 2000
_RUNS = 40
Batch = list[tuple[str, Bad]]
_WORKFLOW = """
workflow: good
params: {n: integer}
steps:
  a: {task: "tasks:echo", with: {value: "{{ params.n }}"}}
  b: {task: "tasks:echo", with: {value: "{{ a + 1 }}"}}
  c: {task: "tasks:echo", with: {value: "{{ b + 1 }}"}, retry: {maximum_attempts: 2}}
  f: {task: "tasks:echo", needs: [a], foreach: [1, 2, 3, 4, 5], with: {value: "{{ item }}"}}
output: "{{ [c, f | sum] }}"
"""
_SETTINGS = "[pools.default]\nconcurrency = 2\n"


@dataclass(slots=True)
class Report:
    """One run of the mode; memory is in MB, resident."""

    messages: int
    seed: int
    broker: str = "redis"
    seconds: float = 0.0
    letters: int = 0
    by_reason: dict[str, int] = field(default_factory=dict)
    fingerprints: int = 0
    runs: int = 0
    memory: dict[str, tuple[float, float]] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    logs: str = ""

    @property
    def ok(self) -> bool:
        return not any(self.faults.values())

    def write(self, path: Path) -> None:
        body = {name: getattr(self, name) for name in self.__slots__}
        path.write_text(json.dumps(body | {"ok": self.ok}, indent=1))

    def show(self) -> None:
        console.print(f"bad input on {self.broker}, seed {self.seed}: {self.messages} messages in {self.seconds:.0f} s")
        console.print(f"letters: {self.letters} of {self.fingerprints} causes: {self.by_reason}")
        for name, (before, after) in self.memory.items():
            console.print(f"memory of {name}: {before:.0f} MB before, {after:.0f} MB after")
        console.print(f"good runs meanwhile: {self.runs}")
        for name, faults in self.faults.items():
            for fault in faults[:20]:
                console.print(f"{name}: {fault}", style="red", markup=False)
        console.print("every check holds" if self.ok else f"logs: {self.logs}", style="green" if self.ok else "red")


@dataclass(frozen=True, slots=True)
class Servers:
    """Servers to run on instead of the embedded one. `depth` says of a queue: (ready, taken)."""

    broker_url: str
    ledger_url: str
    depth: Callable[[str], tuple[int, int]]


def run(*, messages: int, seed: int, servers: Servers | None = None) -> Report:
    """Push so many messages in all queues, with runs in between; wait until all are gone; check."""
    work = Path(tempfile.mkdtemp(prefix="orchestrator-bad-input-"))
    report = Report(messages, seed, logs=str(work))
    console.print(f"seed {seed}, logs in {work}", style="dim")
    project, data_dir = work / "project", work / "data"
    (project / "workflows").mkdir(parents=True)
    (project / "tasks.py").write_text("def echo(value):\n    return value\n")
    (project / "workflows" / "good.yaml").write_text(_WORKFLOW)
    (project / "orchestrator.toml").write_text(_SETTINGS)
    env = {}
    if servers is not None:
        report.broker = servers.broker_url.partition(":")[0]
        env = {"ORCHESTRATOR_BROKER_URL": servers.broker_url, "ORCHESTRATOR_LEDGER_URL": servers.ledger_url}
    system = System(work)
    place = ("--project", str(project), "--data-dir", str(data_dir))
    up = Role("up", orchestrator("up", *place), env)
    system.start(up)
    began = time.monotonic()
    try:
        _Input(report, work, project, data_dir, up, servers).run()
    finally:
        codes = system.stop()
    if codes["up"] != 0:
        report.faults["stop"] = [f"`up` ended with exit code {codes['up']}"]
    report.seconds = report.seconds or time.monotonic() - began
    if report.ok:
        shutil.rmtree(data_dir, ignore_errors=True)
    return report


class _Input:
    """One run of the mode on a system that has been started."""

    def __init__(
        self, report: Report, work: Path, project: Path, data_dir: Path, up: Role, servers: Servers | None
    ) -> None:
        self._report = report
        self._up = up
        self._servers = servers
        self._mark = work / "unpickled"
        url = wait_for(lambda: server_url(data_dir), "the server is there") if servers is None else ""
        broker_url, ledger_url = (servers.broker_url, servers.ledger_url) if servers else (url, url)
        settings = Settings.load(project, environ={}, data_dir=data_dir, broker_url=broker_url, ledger_url=ledger_url)
        self._engine = Engine(settings, patience_s=60.0)
        self._client = self._engine.ledger.client
        self._letters = DeadLetters(self._engine.ledger, self._engine.payloads, settings)
        self._events = [manual_event("good", {"n": n}, event_id=f"good-{n}") for n in range(_RUNS)]
        self._ids = [run_id("good", event.source, event.id) for event in self._events]
        #: What the broker did not take.
        self.refused = 0
        #: Which letter, of kind and bytes, may stand for a message, the likeliest first; and how often.
        self._kept: Counter[tuple[tuple[str, bytes], ...]] = Counter()
        self._optional: Counter[tuple[tuple[str, bytes], ...]] = Counter()

    def run(self) -> None:
        wait_for(lambda: self._client.exists(keys.WORKFLOWS), "definitions are in force")
        pids = self._wait_for_family()
        memory = self._memory()
        bus = EventBus(self._engine.app)
        began = time.monotonic()
        bad = messages(
            self._report.messages, self._report.seed, str(self._mark), QUEUES, self._ids[:2], for_amqp=self._is_amqp
        )
        pushed = 0
        every = max(_BATCH, self._report.messages // _RUNS)
        waiting = list(reversed(self._events))
        with self._publisher() as publish:
            for batch in _batches(bad, _BATCH):
                publish(pushed, batch)
                pushed += len(batch)
                while waiting and (pushed // every > len(self._events) - len(waiting) or pushed < _BATCH * 2):
                    bus.publish([waiting.pop()])
                    if len(self._events) - len(waiting) >= 3:
                        break
                wait_for(lambda: self._depth() < _WAITING, "the queues are worked off", 300)
            bus.publish(waiting)
        wait_for(self._all_ended, "the good runs have ended", 300)
        wait_for(lambda: not self._depth(exactly=True), "the queues are empty", 300)
        wait_for(lambda: not self._client.llen(keys.SET_ASIDE), "what was set aside has become letters", 300)
        self._report.seconds = time.monotonic() - began
        self._report.messages = pushed - self.refused
        for name, after in self._memory().items():
            self._report.memory[name] = (memory.get(name, 0.0), after)
        self._judge(pids)
        self._engine.close()

    @property
    def _is_amqp(self) -> bool:
        return self._servers is not None

    def _wait_for_family(self) -> set[int]:
        """Return the pids of the parts of `up`: (the server,) control and the worker, whose children come and go."""
        count = 2 if self._is_amqp else 3
        return wait_for(lambda: one if len(one := self._parts()) >= count else None, "all have started")

    def _parts(self) -> set[int]:
        return {process.pid for process in psutil.Process(self._up.pid).children()}

    def _memory(self) -> dict[str, float]:
        found = {}
        for name in ("valkey-server", "control", "worker"):
            pid = part_of_up(self._up.pid, name)
            if pid is not None:
                found[name] = psutil.Process(pid).memory_info().rss / 1e6
                below = [child.memory_info().rss / 1e6 for child in children(pid)]
                if below:
                    found[f"{name}'s largest child"] = max(below)
        return found

    # Pushing

    def _publisher(self) -> Any:
        return _Amqp(self) if self._is_amqp else _Redis(self)

    def expect(self, queue: str, bad: Bad, letters: Iterable[bytes]) -> None:
        """Note what must come of a message that was pushed."""
        kind = "event" if queue == EVENT_QUEUE else "message"
        # On the bus what is no step may be an event that nobody asked for.
        counter = self._optional if bad.odd and kind == "message" else self._kept
        counter[tuple((kind, letter) for letter in letters)] += 1

    # Watching

    def _depth(self, *, exactly: bool = False) -> int:
        """Return how many messages wait; `exactly` with those that are taken, which may take a second."""
        if self._servers is not None:
            if exactly:
                return sum(sum(self._servers.depth(queue)) for queue in QUEUES)
            with kombu.Connection(self._servers.broker_url) as connection:
                channel = connection.channel()
                return sum(kombu.Queue(queue).bind(channel).queue_declare(passive=True)[1] for queue in QUEUES)
        with self._client.pipeline(transaction=False) as pipe:
            for queue in QUEUES:
                pipe.llen(queue)
            pipe.hlen(UNACKED)
            return sum(pipe.execute())

    def _all_ended(self) -> bool:
        return all(self._engine.ledger.outcome(one)[0] in ("succeeded", "failed", "cancelled") for one in self._ids)

    # Judging

    def _judge(self, pids: set[int]) -> None:
        report, faults = self._report, self._report.faults
        now = self._parts()
        if now != pids:
            faults["processes"] = [f"died: {sorted(pids - now)}, new: {sorted(now - pids)}"]
        lost = [line for line in (Path(report.logs) / "up.log").read_text().splitlines() if '"child_lost"' in line]
        faults["children"] = lost
        report.runs = len(self._ids)
        outcomes = {one: self._engine.ledger.outcome(one) for one in self._ids}
        faults["runs"] = [
            f"run {one}: {state} {output} {error}"
            for n, (one, (state, output, error)) in enumerate(outcomes.items())
            if state != "succeeded" or json.loads(output) != [n + 2, 15]
        ]
        found = list(self._letters.all())
        report.letters = len(found)
        report.by_reason = dict(Counter(one.reason for one in found))
        report.fingerprints = len({one.fingerprint for one in found})
        steps = [one for one in found if one.kind == "step"]
        faults["letters of steps"] = [f"{one.slot} of run {one.run}: {one.detail}" for one in steps]
        letters: Counter[tuple[str, bytes]] = Counter()
        for one in found:
            if one.kind != "step":
                letters[one.kind, self._parts_of(one.kind, self._letters.raw(one.id) or b"")] += 1
        faults["lost"] = [_short(one) for one in _missing(letters, self._kept)]
        _missing(letters, self._optional)
        faults["not ours"] = [_short(one) for one in letters.elements()]
        if self._mark.exists():
            faults["unpickled"] = ["a pickle was loaded"]

    def _parts_of(self, kind: str, raw: bytes) -> bytes:
        """Return what of a letter is compared: on AMQP a message is kept by its parts."""
        if not self._is_amqp:
            return raw
        try:
            envelope = json.loads(raw)
            body = base64.b64decode(envelope["body"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return raw  # of an event the body alone
        return body if kind == "event" else parts(body, envelope["content-type"], envelope["headers"])


def parts(body: bytes, content_type: Any, headers: Mapping[str, Any]) -> bytes:
    """Return the parts of a message that a letter has, in one; of the headers those that JSON has a word for."""
    plain = {name: value for name, value in headers.items() if isinstance(value, str | int | None)}
    # kombu's word for none.
    kind = content_type or "application/data"
    return json.dumps([base64.b64encode(body).decode(), kind, plain], sort_keys=True).encode()


class _Redis:
    """Pushes bytes as they are; every other batch with nobody told."""

    def __init__(self, mode: _Input) -> None:
        self._mode = mode

    def __enter__(self) -> Callable[[int, Batch], None]:
        return self._publish

    def __exit__(self, *_: object) -> None:
        pass

    def _publish(self, number: int, batch: Batch) -> None:
        with self._mode._client.pipeline(transaction=False) as pipe:
            for queue, bad in batch:
                envelope = bad.envelope()
                pipe.lpush(queue, envelope)
                self._mode.expect(queue, bad, letters_of(envelope) if queue == EVENT_QUEUE else [envelope])
            if number // _BATCH % 2:
                for queue in QUEUES:
                    ring(pipe, queue)
            pipe.execute()


class _Amqp:
    """Publishes parts; what the server does not take, which then closes the connection, was never a message."""

    def __init__(self, mode: _Input) -> None:
        assert mode._servers is not None
        self._mode = mode
        self._connection = kombu.Connection(mode._servers.broker_url, transport_options={"confirm_publish": True})

    def __enter__(self) -> Callable[[int, Batch], None]:
        self._producer = self._connection.Producer()
        return self._publish

    def __exit__(self, *_: object) -> None:
        self._connection.release()

    def _publish(self, number: int, batch: Batch) -> None:
        for queue, bad in batch:
            try:
                self._producer.publish(
                    bad.body, exchange="", routing_key=queue, declare=[kombu.Queue(queue, routing_key=queue)],
                    headers=dict(bad.headers), content_type=bad.content_type or "",
                    content_encoding=bad.content_encoding or "",
                )  # fmt: skip
            except amqp.AMQPError:
                self._mode.refused += 1
                self._connection.close()
                self._producer = self._connection.Producer()
                continue
            kept = bad.body if queue == EVENT_QUEUE else parts(bad.body, bad.content_type, bad.headers)
            self._mode.expect(queue, bad, [kept])


def _batches(bad: Iterable[tuple[str, Bad]], size: int) -> Iterable[Batch]:
    """Yield lists of that many, or fewer that are large."""
    batch: Batch = []
    room = 0
    for queue, one in bad:
        batch.append((queue, one))
        room += len(one.raw or one.body)
        if len(batch) == size or room > 20_000_000:
            yield batch
            batch, room = [], 0
    yield batch


def _missing(
    letters: Counter[tuple[str, bytes]], expected: Counter[tuple[tuple[str, bytes], ...]]
) -> list[tuple[str, bytes]]:
    """Take what was expected out of the letters; answers what is not there."""
    missing = []
    for allowed, count in expected.items():
        for _ in range(count):
            one = next((one for one in allowed if letters[one] > 0), None)
            if one is None:
                missing.append(allowed[0])
            else:
                letters[one] -= 1
    return missing


def _short(one: tuple[str, bytes]) -> str:
    return f"{one[0]} of {len(one[1])} bytes: {one[1][:300]!r}"
