"""A Redis list that somebody else fills, as a source of the queue trigger.

A list has no acknowledgement. Taking moves a message, in one script, into a hash of ours beside the list, under an id
that it gets there, and notes until when it is taken; one that was not settled by then is taken again under its id.
To wait for a message means to move it (BLMOVE), into a list of ours that the script empties first.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence

import redis

from orchestrator.brokers.claims import parse
from orchestrator.ledger import keys
from orchestrator.ledger.ledger import connect
from triggers.queue_envelope import opened
from triggers.queue_source import BATCH, Message

#: How long a message is taken for.
TAKEN_MS = 10_000

# KEYS: the list, arrived, taken, until. ARGV: for how long, ms, how many, the beginning of their ids.
_TAKE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local found, ids = {}, redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now, 'LIMIT', 0, ARGV[2])
for _, id in ipairs(ids) do
  local raw = redis.call('HGET', KEYS[3], id)
  if raw then
    redis.call('ZADD', KEYS[4], now + ARGV[1], id)
    found[#found + 1] = id
    found[#found + 1] = raw
  else
    redis.call('ZREM', KEYS[4], id)
  end
end
for n = #ids + 1, tonumber(ARGV[2]) do
  local raw = redis.call('RPOP', KEYS[2]) or redis.call('RPOP', KEYS[1])
  if not raw then break end
  local id = ARGV[3] .. n
  redis.call('HSET', KEYS[3], id, raw)
  redis.call('ZADD', KEYS[4], now + ARGV[1], id)
  found[#found + 1] = id
  found[#found + 1] = raw
end
return found
"""

# KEYS: taken, until. ARGV: for how long, ms, then ids. Those that are settled stay so.
_KEEP = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for n = 2, #ARGV do redis.call('ZADD', KEYS[2], 'XX', now + ARGV[1], ARGV[n]) end
"""


class RedisSource:
    """The list `queue` on the server at `url`; it is emptied from its right, as BRPOP does, where LPUSH fills it."""

    def __init__(self, url: str, queue: str) -> None:
        self._client = connect(url, decode_responses=False)
        self._queue = queue
        self._arrived, self._taken, self._until = keys.queue_keys(queue)
        self._take = self._client.register_script(_TAKE)
        self._keep = self._client.register_script(_KEEP)

    def take(self, wait_s: float) -> Sequence[Message]:
        found = self._fetch()
        if not found and self._client.blmove(self._queue, self._arrived, wait_s, "RIGHT", "LEFT") is not None:
            found = self._fetch()
        return found

    def _fetch(self) -> list[Message]:
        names = [self._queue, self._arrived, self._taken, self._until]
        flat = self._take(keys=names, args=[TAKEN_MS, BATCH, f"{uuid.uuid4().hex}."])
        return [_message(id_.decode(), raw) for id_, raw in zip(flat[::2], flat[1::2], strict=True)]

    def keep(self, messages: Sequence[Message]) -> None:
        self._keep(keys=[self._taken, self._until], args=[TAKEN_MS, *(one.handle for one in messages)])

    def settle(self, messages: Sequence[Message]) -> None:
        with self._client.pipeline(transaction=True) as pipe:
            pipe.hdel(self._taken, *(one.handle for one in messages))
            pipe.zrem(self._until, *(one.handle for one in messages))
            pipe.execute()

    def close(self, messages: Sequence[Message] = ()) -> None:
        if messages:
            with contextlib.suppress(redis.RedisError):
                self._keep(keys=[self._taken, self._until], args=[0, *(one.handle for one in messages)])
        self._client.close()


def _message(handle: str, raw: bytes) -> Message:
    """Return a message; what kombu or Celery have put in is in an envelope of theirs, with an id of its own."""
    with contextlib.suppress(ValueError):
        return opened(parse(raw), id_=handle, handle=handle)
    return Message(id=handle, body=raw, handle=handle)
