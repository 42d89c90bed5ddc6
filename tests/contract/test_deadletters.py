"""Dead letters on a real server: what becomes one, once; what is found of it; and what goes."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
import redis

from orchestrator.celery_app import EVENT_QUEUE
from orchestrator.deadletters import DeadLetters, Filter, letter_id
from orchestrator.engine import Engine
from orchestrator.errors import NotFoundError, UnavailableError
from orchestrator.ledger import keys
from orchestrator.ledger.ledger import How, connect
from orchestrator.plan import Plan
from orchestrator.workflows import Step, Workflow
from tests.conftest import Server, capture_logs

HOW = How('{"worker":"w"')
ERROR = {"type": "ValueError", "message": "no 7", "traceback": "Traceback...", "reason": "error", "fingerprint": "f1"}


@pytest.fixture
def letters(engine: Engine) -> DeadLetters:
    return DeadLetters(engine.ledger, engine.payloads, engine.settings)


def start(engine: Engine, run: str, *steps: Step, name: str = "w") -> None:
    engine.ledger.put_plan(plan := Plan.of(Workflow(name=name, steps=steps)))
    assert engine.ledger.start(run, plan, event='{"id":"e"}', event_id="e", run_input="{}", created_ms=1)


def fail(engine: Engine, run: str, step: str, **error: Any) -> None:
    """Let a step fail as a worker would."""
    taken = engine.ledger.begin(run, [step], HOW).taken
    assert taken is not None
    tail = f',"error":{json.dumps(ERROR | error)},"input":{{"a":1}}'
    assert engine.ledger.complete(run, taken, "failed", tail=tail, how=HOW, inline="").verdict == "ok"


def failed_run(engine: Engine, run: str, *, name: str = "w", **error: Any) -> None:
    start(engine, run, Step(id="a", task="tasks:f", pool="cpu"), name=name)
    fail(engine, run, "a", **error)


def next_episode(engine: Engine, run: str, slot: str = "a", **error: Any) -> None:
    """Write what a second episode leaves in which the step has failed again."""
    client, now = engine.ledger.client, int(time.time() * 1000) + 5000
    client.hset(keys.run_key(run, "run"), "episode", "2")
    client.hset(keys.run_key(run, "attempts"), f"{slot}#a", 1)
    record = {"worker": "w", "finished_at": now, "state": "failed", "error": ERROR | error}
    client.hset(keys.run_key(run, "attempts"), f"{slot}@2", json.dumps(record))


def aside(
    engine: Engine, raw: bytes, reason: str = "not_a_step", detail: str = "it has no id", queue: str = "q"
) -> None:
    engine.ledger.set_aside(raw, reason, int(time.time() * 1000), detail=detail, queue=queue)


# Steps ---------------------------------------------------------------------------------------------------------------


def test_a_step_that_has_failed_is_a_letter_with_all_that_is_known(engine: Engine, letters: DeadLetters) -> None:
    failed_run(engine, "r")
    client = engine.ledger.client
    client.hset(keys.run_key("r", "attempts"), mapping={"a#l": 1, "a#x": '{"at":5,"reason":"killed by SIGKILL"}'})
    assert letters.bury("r", ["a"]) == 1
    (found,), cursor = letters.list()
    assert cursor is None
    assert (found.id, found.kind, found.reason, found.fingerprint) == (letter_id("r", "a"), "step", "error", "f1")
    assert (found.workflow, found.run, found.step, found.index, found.event_id) == ("w", "r", "a", None, "e")
    assert (found.attempts, found.losses, found.episode, found.count) == (1, 1, 1, 1)
    assert (found.detail, found.queue) == ("ValueError: no 7", "orchestrator.cpu.normal")
    assert found.error == {"type": "ValueError", "message": "no 7"}
    assert 0 < client.ttl(keys.dead_letter_key(found.id)) <= letters._ttl_s
    shown = letters.show(found)
    assert [one["error"]["traceback"] for one in shown["attempt_records"]] == ["Traceback..."]
    assert (shown["input"], shown["event"], shown["state"]) == ({"a": 1}, {"id": "e"}, "failed")
    assert shown["loss_records"] == [{"at": "1970-01-01T00:00:00.005Z", "reason": "killed by SIGKILL"}]


def test_a_letter_counts_once_in_an_episode(engine: Engine, letters: DeadLetters) -> None:
    failed_run(engine, "r")
    letters.bury("r", ["a"])
    (first,), _ = letters.list()
    assert letters.bury("r", ["a"]) == 0
    assert letters.get(first.id) == first
    next_episode(engine, "r", fingerprint="f2")
    assert letters.bury("r", ["a"]) == 1
    assert letters.bury("r", ["a"]) == 0
    (again,), _ = letters.list()
    assert (again.id, again.count, again.episode, again.first_at) == (first.id, 2, 2, first.first_at)
    assert again.last_at > first.last_at
    assert (again.fingerprint, again.attempts) == ("f2", 2)


def test_what_has_not_failed_is_no_letter(engine: Engine, letters: DeadLetters) -> None:
    start(engine, "r", Step(id="a", task="tasks:f"), Step(id="b", task="tasks:f", needs=("a",)))
    fail(engine, "r", "a")
    assert letters.bury("r", ["a", "b", "nonsense"]) == 1
    assert letters.bury("gone", ["a"]) == 0


def test_ten_thousand_items_become_letters_in_seconds(engine: Engine, letters: DeadLetters) -> None:
    start(engine, "r", Step(id="f", task="tasks:f", foreach=[1]))
    client = engine.ledger.client
    slots = [f"f/{n}" for n in range(10_000)]
    record = json.dumps({"finished_at": 1_800_000_000_000, "error": ERROR})
    for lo in range(0, len(slots), 1000):
        part = slots[lo : lo + 1000]
        client.hset(keys.run_key("r", "states"), mapping=dict.fromkeys(part, "failed"))
        client.hset(keys.run_key("r", "attempts"), mapping={f"{slot}@1": record for slot in part})
    began = time.monotonic()
    assert letters.bury("r", slots) == 10_000
    assert time.monotonic() - began < 20
    found = list(letters.all())
    assert {one.index for one in found} == set(range(10_000))
    assert len(found) == 10_000  # all at the same time, and yet each once
    (group,) = letters.groups()
    assert (group.count, group.fingerprint, group.example.step) == (10_000, "f1", "f")


def test_a_cause_in_several_places_is_not_shown_as_one_step(engine: Engine, letters: DeadLetters) -> None:
    start(engine, "r", Step(id="a", task="tasks:f"), Step(id="b", task="tasks:f"))
    fail(engine, "r", "a")
    fail(engine, "r", "b")
    letters.bury("r", ["a", "b"])
    (group,) = letters.groups()
    shown = group.to_json()
    assert (shown["count"], shown["workflow"], shown["step"]) == (2, "w", None)


def test_letters_of_steps_are_to_be_reported_where_that_is_set(engine: Engine, letters: DeadLetters) -> None:
    letters._reports = True
    failed_run(engine, "r")
    letters.bury("r", ["a"])
    letters.bury("r", ["a"])
    assert engine.ledger.client.lrange(keys.UNREPORTED, 0, -1) == [letter_id("r", "a")]


# Messages and events -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [b"", b"\x80\x04\x00pickle\xff", b'{"a": 1}', b"x" * 10_000_000, bytes(range(256))])
def test_what_was_set_aside_is_a_letter_with_its_bytes(engine: Engine, letters: DeadLetters, raw: bytes) -> None:
    aside(engine, raw, detail="its body cannot be read (UnicodeDecodeError)", reason="body")
    assert letters.drain() == 1
    assert letters.drain() == 0
    (found,), _ = letters.list()
    assert (found.kind, found.reason, found.queue, found.count) == ("message", "body", "q", 1)
    assert letters.raw(found.id) == raw
    assert letters.show(found)["raw"].encode("latin-1") == raw
    client = engine.ledger.client
    assert client.llen(keys.SET_ASIDE) == 0
    assert min(client.ttl(keys.dead_letter_key(found.id)), client.ttl(keys.dead_letter_raw_key(found.id))) > 0


@pytest.mark.parametrize(
    "entry",
    [
        b"not JSON", b"\xff\xfe\x00", b"[]", b"{}", b"[" * 100_000, b"", b"9" * 5000,
        b'{"raw": "\\ud800", "reason": "x", "at": 1}', b'{"raw": 5, "reason": "body", "at": 1}',
        b'{"raw": "a", "reason": "body", "at": 1e999}', b'{"raw": "a", "reason": "body", "at": "x"}',
        b'{"raw": "a", "reason": "body", "at": 1, "queue": "\\ud800"}',
    ],
)  # fmt: skip
def test_an_entry_that_nobody_of_ours_wrote_is_a_letter_of_its_own(
    engine: Engine, letters: DeadLetters, entry: bytes
) -> None:
    engine.ledger.client.rpush(keys.SET_ASIDE, entry)
    aside(engine, b"good")
    assert letters.drain() == 2
    found = {letters.raw(one.id): one for one in letters.all()}
    assert found.keys() == {b"good", entry}
    assert (found[entry].reason, found[entry].kind) == ("envelope", "message")
    assert abs(found[entry].last_at - time.time() * 1000) < 60_000


def test_an_entry_of_an_earlier_version_keeps_its_reason_and_bytes(engine: Engine, letters: DeadLetters) -> None:
    old = {"raw": "{broken", "reason": "an event must be a JSON object", "at": 1_700_000_000_000, "queue": EVENT_QUEUE}
    odd = {"raw": "a\x1b[31m", "reason": "body", "detail": "x\n\x1b\ud800y", "at": 10**400, "queue": ""}
    engine.ledger.client.rpush(keys.SET_ASIDE, json.dumps(old), json.dumps(odd))
    assert letters.drain() == 2
    second, first = letters.list()[0]
    assert (first.detail, first.last_at, first.kind) == (old["reason"], old["at"], "event")
    assert letters.raw(first.id) == b"{broken"
    assert second.detail == r"x \x1b\ud800y"


def test_the_same_bytes_twice_are_two_letters_of_one_group(engine: Engine, letters: DeadLetters) -> None:
    for task in ("a.b", "a.b", "c.d"):
        aside(engine, b"same", "unknown_task", f"it is for the task {task}; here is only x")
    assert letters.drain() == 3
    assert [group.count for group in letters.groups()] == [2, 1]


def test_numbers_and_ids_in_a_detail_do_not_make_another_group(engine: Engine, letters: DeadLetters) -> None:
    for detail in ("byte 17 of 'abc'", "byte 5 of 'x'", "other"):
        aside(engine, b"x", "body", detail)
    letters.drain()
    assert sorted(group.count for group in letters.groups()) == [1, 2]


def test_a_kill_between_keeping_and_letting_go_doubles_nothing(engine: Engine, letters: DeadLetters) -> None:
    aside(engine, b"a")
    entries = engine.ledger.client.lrange(keys.SET_ASIDE, 0, -1)
    assert letters.drain() == 1
    engine.ledger.client.rpush(keys.SET_ASIDE, *entries)  # as if it had been killed before
    assert letters.drain() == 1
    assert len(letters.list()[0]) == 1


def test_two_that_drain_at_once_lose_and_double_nothing(engine: Engine, letters: DeadLetters) -> None:
    for n in range(2000):
        aside(engine, b"%d" % n)
    others = [letters, DeadLetters(engine.ledger, engine.payloads, engine.settings)]
    threads = [threading.Thread(target=lambda one=one: [one.drain(100) for _ in range(20)]) for one in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while letters.drain():
        pass
    assert sorted(int(letters.raw(one.id) or b"") for one in letters.all()) == list(range(2000))


def test_a_limit_bounds_what_is_drained(engine: Engine, letters: DeadLetters) -> None:
    for n in range(30):
        aside(engine, b"%d" % n)
    assert [letters.drain(20), letters.drain(20), letters.drain(20)] == [20, 10, 0]


def test_what_a_redis_broker_of_its_own_has_set_aside_is_drained_too(engine: Engine, own_server: Server) -> None:
    settings = engine.settings.evolve(broker_url=own_server.url)
    broker = connect(own_server.url)
    broker.lpush(keys.SET_ASIDE, keys.set_aside_record(b"there", "envelope", 1, detail="x"))
    letters = DeadLetters(engine.ledger, engine.payloads, settings)
    aside(engine, b"here")
    assert letters.drain() == 2
    assert {letters.raw(one.id) for one in letters.all()} == {b"here", b"there"}
    assert broker.llen(keys.SET_ASIDE) == 0
    broker.close()
    for client in letters._inlets[1:]:
        client.close()


def test_a_server_without_memory_keeps_what_was_set_aside(engine: Engine, own_server: Server) -> None:
    settings = engine.settings.evolve(broker_url=own_server.url, ledger_url=own_server.url)
    own = Engine(settings, patience_s=0.0)
    letters = DeadLetters(own.ledger, own.payloads, settings)
    aside(own, b"a")
    client = redis.Redis.from_url(own_server.url)
    client.config_set("maxmemory", "1")
    with pytest.raises(UnavailableError):
        letters.drain()
    assert client.llen(keys.SET_ASIDE) == 1
    client.config_set("maxmemory", "0")
    assert letters.drain() == 1
    client.close()
    own.close()


# Lists ---------------------------------------------------------------------------------------------------------------


def test_letters_are_found_by_what_they_are(engine: Engine, letters: DeadLetters) -> None:
    failed_run(engine, "r1")
    failed_run(engine, "r2", name="v", fingerprint="f2", reason="timeout")
    for run in ("r1", "r2"):
        letters.bury(run, ["a"])
    aside(engine, b"x", reason="not_an_event", queue=EVENT_QUEUE)
    letters.drain()

    def found(**which: Any) -> list[str]:
        return sorted(one.run or one.kind for one in letters.list(Filter(**which))[0])

    assert found() == ["event", "r1", "r2"]
    assert found(workflow="w") == ["r1"]
    assert found(step="a") == ["r1", "r2"]
    assert found(reason="timeout") == ["r2"]
    assert found(fingerprint="f") == ["r1", "r2"]
    assert found(run="r2", workflow="w") == []
    assert found(since_ms=int(time.time() * 1000) + 60_000) == []
    assert found(since_ms=int(time.time() * 1000) - 60_000) == ["event", "r1", "r2"]


def test_pages_go_on_where_the_last_one_ended_whatever_left_meanwhile(engine: Engine, letters: DeadLetters) -> None:
    pairs = {f"{n:016x}": n for n in range(1, 1201)}
    _write(engine, pairs)
    seen, cursor = [], None
    while True:
        page, following = letters.list(limit=250, after=cursor)
        seen += [one.id for one in page]
        if following is None:
            break
        letters.forget(page[-100:])  # the cursor is among them
        cursor = following
    assert seen == list(reversed(pairs))
    with pytest.raises(NotFoundError, match="no such cursor"):
        letters.list(after="ffff")


def _write(engine: Engine, ids: dict[str, int]) -> None:
    """Write letters as they are stored."""
    with engine.ledger.client.pipeline(transaction=False) as pipe:
        for letter, at in ids.items():
            record = {"id": letter, "kind": "message", "reason": "body", "detail": "x", "fingerprint": f"f{at % 7}"}
            pipe.set(keys.dead_letter_key(letter), json.dumps(record | {"first_at": at, "last_at": at}), ex=600)
            pipe.zadd(keys.DEAD_LETTERS, {letter: at})
        pipe.execute()


def test_a_hundred_thousand_letters_are_grouped_in_seconds(engine: Engine, letters: DeadLetters) -> None:
    for lo in range(1, 100_001, 10_000):
        _write(engine, {f"{n:016x}": n for n in range(lo, lo + 10_000)})
    began = time.monotonic()
    groups = letters.groups()
    assert time.monotonic() - began < 20
    assert sum(group.count for group in groups) == 100_000
    assert len(groups) == 7
    began = time.monotonic()
    assert letters.discard([one.id for one in letters.all(Filter(fingerprint="f3"))]) == groups[0].count
    assert time.monotonic() - began < 20


def test_the_beginning_of_an_id_is_enough_if_no_other_begins_so(engine: Engine, letters: DeadLetters) -> None:
    _write(engine, {"abcd000000000001": 1, "abcd100000000002": 2})
    assert letters.get("abcd1").id == "abcd100000000002"
    with pytest.raises(NotFoundError, match="2 dead letters begin with abcd"):
        letters.get("abcd")
    for unknown in ("abce", "", "*", "abc", "ABCD1", "../x"):
        with pytest.raises(NotFoundError, match="not known"):
            letters.get(unknown)


# What goes -----------------------------------------------------------------------------------------------------------


def test_a_letter_that_was_redriven_is_off_the_list_and_counts_on_when_it_comes_back(
    engine: Engine, letters: DeadLetters
) -> None:
    failed_run(engine, "r")
    letters.bury("r", ["a"])
    seen = letters.list()[0]
    assert letters.forget(seen) == 1
    assert letters.list()[0] == []
    assert letters.get(seen[0].id) == seen[0]
    with pytest.raises(NotFoundError, match="not on the list any more"):
        letters.listed([seen[0].id])
    next_episode(engine, "r")
    letters.bury("r", ["a", "b"])
    assert letters.forget(seen) == 0  # it has failed again before whoever sent it could take it off
    assert letters.listed([seen[0].id])[0].count == 2


def test_what_is_discarded_is_gone_with_its_bytes(engine: Engine, letters: DeadLetters) -> None:
    aside(engine, b"x")
    letters.drain()
    (found,), _ = letters.list()
    assert letters.discard([found.id]) == 1
    assert letters.discard([found.id]) == letters.discard([]) == 0
    assert letters.raw(found.id) is None
    assert list(engine.ledger.client.scan_iter("orchestrator:dead-letter*")) == []


def test_old_letters_are_announced_once_a_day_and_then_go(engine: Engine) -> None:
    day_ms = 86_400_000
    settings = engine.settings.evolve(dead_letters_retention_s=10 * 86400)
    letters = DeadLetters(engine.ledger, engine.payloads, settings)
    now = 1_800_000_000_000
    ages = {"old": 11, "going": 9.5, "young": 8.5}
    _write(engine, {f"{n:016x}": int(now - age * day_ms) for n, age in enumerate(ages.values())})
    with capture_logs() as logs:
        assert letters.trim(now) == 1
        assert letters.trim(now) == 0
        assert DeadLetters(engine.ledger, engine.payloads, settings).trim(now) == 0
    (warning,) = logs
    assert (warning["event"], warning["count"], warning["first_at"]) == (
        "dead_letters_will_expire", 2, "2027-01-04T08:00:00.000Z",
    )  # fmt: skip
    assert len(letters.list()[0]) == 2
    assert engine.ledger.client.ttl(keys.EXPIRY_WARNED) > 0


def test_nothing_is_announced_while_all_are_young(engine: Engine, letters: DeadLetters) -> None:
    _write(engine, {"abcd": int(time.time() * 1000)})
    with capture_logs() as logs:
        assert letters.trim(int(time.time() * 1000)) == 0
    assert logs == []
