"""A queue of RabbitMQ that somebody else fills, as a source of the queue trigger.

The queue is theirs: it must be there, and is used as it is. What is not settled comes again when the connection ends,
marked as such. A message without an id of its own gets one from us, which the ledger holds until the server is known to
have its acknowledgement. One that comes again had an owner whose connection has ended: it gets the id of an equal
message whose owner lives no more. Of an owner that was killed this is known OWNER_MS later; until then it waits.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence
from typing import Any

from kombu import Connection, Consumer, Queue
from redis import RedisError

from orchestrator.celery_app import HEARTBEAT_S
from orchestrator.events import digest
from orchestrator.ledger import Ledger, keys
from orchestrator.messages import body_of, keep_bytes
from triggers.queue_envelope import plain
from triggers.queue_source import BATCH, Message

_CONNECT_S = 5.0
#: Once something has come, how long to look for more.
_MORE_S = 0.01
_TAKEN_TTL_S = 86_400
#: An owner that has not said for so long that it lives does not.
OWNER_MS = 10_000

# KEYS: ids, owners. ARGV: me, for how long I live, ms, how long to keep the keys, s. Answers the server's time, ms.
_LIVE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 1000 * ARGV[3])
for n = 1, 2 do redis.call('EXPIRE', KEYS[n], ARGV[3]) end
"""

# KEYS: ids, owners. ARGV: me, then digests. Answers for each the id of an equal message whose owner lives no more, and
# makes it mine; '' if there is none, '?' if there is one whose owner lives.
_CLAIM = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local rows, free, held = redis.call('HGETALL', KEYS[1]), {}, {}
for n = 1, #rows, 2 do
  local digest, owner = string.match(rows[n + 1], '^(.*):(.*)$')
  if owner ~= ARGV[1] then
    if tonumber(redis.call('ZSCORE', KEYS[2], owner) or 0) > now then
      held[digest] = true
    else
      free[digest] = free[digest] or {}
      table.insert(free[digest], rows[n])
    end
  end
end
local found = {}
for n = 2, #ARGV do
  local id = free[ARGV[n]] and table.remove(free[ARGV[n]])
  if id then redis.call('HSET', KEYS[1], id, ARGV[n] .. ':' .. ARGV[1]) end
  found[#found + 1] = id or (held[ARGV[n]] and '?' or '')
end
return found
"""


class AmqpSource:
    """The queue `queue` on the server at `url`; `trigger` names what the ids of its messages are held under."""

    def __init__(self, url: str, queue: str, *, trigger: str, ledger: Ledger) -> None:
        self._redis = ledger.client
        self._live = ledger.client.register_script(_LIVE)
        self._claim = ledger.client.register_script(_CLAIM)
        self._keys = keys.taken_keys(trigger)
        self._me = uuid.uuid4().hex
        self._live_at = 0.0
        self._inbox: list[Any] = []
        self._queue = queue
        self._connection = Connection(url, heartbeat=HEARTBEAT_S, connect_timeout=_CONNECT_S)
        try:
            self._connection.ensure_connection(max_retries=1, timeout=_CONNECT_S)
            self._say_alive()
            self._channel = keep_bytes(self._connection.channel())
            self._sync()
            consumer = Consumer(
                self._channel, [Queue(queue)], on_message=self._inbox.append, prefetch_count=2 * BATCH,
                auto_declare=False,
            )  # fmt: skip
            consumer.on_decode_error = lambda message, _: self._inbox.append(message)
            consumer.consume()
        except BaseException:
            self.close()
            raise

    def _sync(self) -> None:
        """Have the server answer, which says that it has what was sent before; raises if the queue is gone."""
        self._channel.queue_declare(self._queue, passive=True)

    def _say_alive(self) -> None:
        if time.monotonic() >= self._live_at:
            self._live(keys=self._keys, args=[self._me, OWNER_MS, _TAKEN_TTL_S])
            self._live_at = time.monotonic() + OWNER_MS / 5000

    def take(self, wait_s: float) -> Sequence[Message]:
        self._say_alive()
        with contextlib.suppress(TimeoutError):
            while len(self._inbox) < BATCH:
                self._connection.drain_events(timeout=_MORE_S if self._inbox else wait_s)
        self._connection.heartbeat_check()
        taken, self._inbox[:] = self._inbox[:BATCH], self._inbox[BATCH:]
        found = self._identified(taken)
        if taken and not found:
            time.sleep(wait_s)  # all of them wait for their owner's end
        return found

    def _identified(self, taken: Sequence[Any]) -> list[Message]:
        """Return the messages with their ids; those that must wait go to the end of what is to be taken next."""
        contents = {id(one): _content(one) for one in taken if not _own_id(one)}
        again = [one for one in taken if id(one) in contents and (one.delivery_info or {}).get("redelivered")]
        claimed = {}
        if again:
            answers = self._claim(keys=self._keys, args=[self._me, *(contents[id(one)] for one in again)])
            claimed = {id(one): answer for one, answer in zip(again, answers, strict=True)}
        found, given = [], {}
        for one in taken:
            own = _own_id(one) or claimed.get(id(one), "")
            if own == "?":
                self._inbox.append(one)
                continue
            if not own:
                own = f"{contents[id(one)]}-{uuid.uuid4().hex}"
                given[own] = f"{contents[id(one)]}:{self._me}"
            kind = one.content_type or ""
            found.append(Message(id=own, body=body_of(one), headers=plain(one.headers), content_type=kind, handle=one))
        if given:
            self._redis.hset(self._keys[0], mapping=given)
        return found

    def keep(self, messages: Sequence[Message]) -> None:
        self._say_alive()
        with contextlib.suppress(TimeoutError):
            self._connection.drain_events(timeout=_MORE_S)
        self._connection.heartbeat_check()

    def settle(self, messages: Sequence[Message]) -> None:
        for one in messages:
            one.handle.ack()
        self._sync()
        self._redis.hdel(self._keys[0], *(one.id for one in messages))

    def close(self, messages: Sequence[Message] = ()) -> None:
        # Not `close`, which would say goodbye to a server that may not answer any more.
        self._connection.collect(_CONNECT_S)
        with contextlib.suppress(RedisError):
            self._redis.zrem(self._keys[1], self._me)


def _own_id(message: Any) -> str:
    return str((message.properties or {}).get("message_id") or "")


def _content(message: Any) -> str:
    """Return a digest that equal messages have."""
    parts = (body_of(message).decode("latin-1"), str(sorted(plain(message.headers).items())), str(message.content_type))
    return digest(*parts)[:24]
