"""What the claims on a Redis broker promise, on the real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from orchestrator.brokers import claims as module
from orchestrator.brokers.claims import UNACKED, UNACKED_INDEX, Claims, bell, parse
from orchestrator.ledger import keys
from orchestrator.settings import Settings
from tests.conftest import wait_until

HIGH, LOW = "q.high", "q.low"


@pytest.fixture
def client(settings: Settings) -> Iterator[Any]:
    made = redis.Redis.from_url(settings.broker_url)
    yield made
    made.close()


def put(client: Any, queue: str, *bodies: str) -> None:
    for body in bodies:
        client.lpush(queue, body)


def waiting(client: Any, queue: str) -> list[str]:
    """Return what waits in a queue, the next first."""
    return [raw.decode() for raw in reversed(client.lrange(queue, 0, -1))]


def test_messages_are_taken_by_priority_and_in_order_up_to_the_limit(client: Any) -> None:
    put(client, LOW, "c", "d")
    put(client, HIGH, "a", "b")
    taken = Claims(client).fetch([HIGH, LOW], 3)
    assert [(one.queue, one.raw) for one in taken] == [(HIGH, b"a"), (HIGH, b"b"), (LOW, b"c")]
    assert waiting(client, LOW) == ["d"]
    assert client.hgetall(UNACKED) == {one.tag.encode(): one.raw for one in taken}
    assert client.zcard(UNACKED_INDEX) == 3


def test_a_bell_rings_again_for_each_queue_in_which_more_is_left(client: Any) -> None:
    put(client, HIGH, "a")
    put(client, LOW, "b")
    claims = Claims(client)
    claims.fetch([HIGH, LOW], 1)
    assert (client.llen(bell(HIGH)), client.llen(bell(LOW))) == (0, 1)
    client.delete(bell(LOW))
    claims.fetch([HIGH, LOW], 5)
    assert client.llen(bell(LOW)) == 0


def test_every_delivery_has_a_tag_of_its_own_and_a_late_ack_does_not_touch_the_next(client: Any) -> None:
    put(client, HIGH, "a")
    slow, fast = Claims(client), Claims(client)
    (first,) = slow.fetch([HIGH], 1)
    assert fast.give_back(first.tag)
    (second,) = fast.fetch([HIGH], 1)
    assert first.tag != second.tag
    slow.ack(first.tag)
    assert not slow.give_back(first.tag)
    assert client.hgetall(UNACKED) == {second.tag.encode(): b"a"}
    fast.ack(second.tag)
    assert (client.hlen(UNACKED), client.zcard(UNACKED_INDEX), client.llen(HIGH)) == (0, 0, 0)


def test_what_is_given_back_is_the_next_of_its_queue_and_wakes_somebody(client: Any) -> None:
    put(client, HIGH, "a", "b")
    claims = Claims(client)
    (first,) = claims.fetch([HIGH], 1)
    client.delete(bell(HIGH))
    assert claims.give_back(first.tag)
    assert waiting(client, HIGH) == ["a", "b"]
    assert client.llen(bell(HIGH)) == 1


def test_a_claim_that_is_not_renewed_runs_out_and_one_that_is_does_not(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLAIM_MS", 300)
    put(client, HIGH, "lost", "kept")
    dead, alive = Claims(client), Claims(client)
    dead.fetch([HIGH], 1)
    (kept,) = alive.fetch([HIGH], 1)
    wait_until(lambda: alive.tend([kept.tag]) == 1, "the other claim has run out")
    assert waiting(client, HIGH) == ["lost"]
    assert list(client.hgetall(UNACKED)) == [kept.tag.encode()]


def test_a_claim_that_was_lost_is_not_renewed_back_to_life(client: Any) -> None:
    put(client, HIGH, "a")
    claims = Claims(client)
    (one,) = claims.fetch([HIGH], 1)
    claims.give_back(one.tag)
    assert claims.tend([one.tag]) == 0
    assert (client.zcard(UNACKED_INDEX), waiting(client, HIGH)) == (0, ["a"])


def test_a_message_that_cannot_be_put_back_is_not_let_go_of(client: Any) -> None:
    """The whole verb fails, or nothing: here the queue is no list."""
    put(client, HIGH, "a")
    claims = Claims(client)
    (one,) = claims.fetch([HIGH], 1)
    client.set(HIGH, "in the way")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        claims.give_back(one.tag)


def test_what_is_set_aside_keeps_its_bytes(client: Any) -> None:
    put(client, HIGH, b"\xff\xfe{")  # type: ignore[arg-type]
    claims = Claims(client)
    (one,) = claims.fetch([HIGH], 1)
    claims.set_aside(one, "no JSON", 5)
    (record,) = [json.loads(text) for text in client.lrange(keys.SET_ASIDE, 0, -1)]
    assert record["raw"].encode("latin-1") == b"\xff\xfe{"
    assert (record["reason"], record["detail"], record["queue"], record["at"]) == ("envelope", "no JSON", HIGH, 5)
    assert client.hlen(UNACKED) == client.zcard(UNACKED_INDEX) == 0


def test_a_queue_is_empty_only_if_nothing_waits_and_nothing_is_in_work(client: Any) -> None:
    put(client, HIGH, "a")
    put(client, LOW, "b")
    claims = Claims(client)
    assert claims.empty([HIGH, LOW, "q.none"]) == {"q.none"}
    (one,) = claims.fetch([HIGH], 1)
    assert claims.empty([HIGH, LOW, "q.none"]) == {"q.none"}
    claims.ack(one.tag)
    assert claims.empty([HIGH, LOW, "q.none"]) == {HIGH, "q.none"}


def test_a_server_without_memory_lets_what_is_there_be_worked_off(client: Any) -> None:
    put(client, HIGH, "a", "b")
    claims = Claims(client)
    client.config_set("maxmemory", "1")
    try:
        first, second = claims.fetch([HIGH], 2)
        claims.ack(first.tag)
        assert claims.give_back(second.tag)
        with pytest.raises(redis.ResponseError, match="maxmemory"):
            put(client, HIGH, "c")
    finally:
        client.config_set("maxmemory", "0")
    assert waiting(client, HIGH) == ["b"]


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff", b'"text"', b"{}", b'{"properties": 1}', b"[" * 100_000])
def test_an_envelope_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="envelope"):
        parse(raw)
