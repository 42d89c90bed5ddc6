"""A queue of RabbitMQ that somebody else fills, as a source of the queue trigger.

The queue is theirs: it must be there, and is used as it is. What is not settled comes again when the connection ends,
marked as such. A message without an id of its own gets one from us, which the ledger holds until the server is known to
have its acknowledgement: one that comes again gets the id that its first delivery had, by what is in it.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence
from typing import Any

from kombu import Connection, Consumer, Queue

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
#: An id that was claimed for a message that came again is not claimed for another one in that time.
_CLAIM_MS = 10_000

# KEYS: taken. ARGV: digest, now, ms, for how long. Answers the id of a delivery of the same that nobody has claimed.
_CLAIM = """
local rows = redis.call('HGETALL', KEYS[1])
for n = 1, #rows, 2 do
  local digest, claimed = string.match(rows[n + 1], '^(.*):(%d+)$')
  if digest == ARGV[1] and tonumber(claimed) <= tonumber(ARGV[2]) then
    redis.call('HSET', KEYS[1], rows[n], digest .. ':' .. string.format('%d', ARGV[2] + ARGV[3]))
    return rows[n]
  end
end
return ''
"""


class AmqpSource:
    """The queue `queue` on the server at `url`; `trigger` names what the ids of its messages are held under."""

    def __init__(self, url: str, queue: str, *, trigger: str, ledger: Ledger) -> None:
        self._ledger = ledger
        self._claim = ledger.client.register_script(_CLAIM)
        self._key = keys.taken_key(trigger)
        self._inbox: list[Any] = []
        self._queue = queue
        self._connection = Connection(url, heartbeat=HEARTBEAT_S, connect_timeout=_CONNECT_S)
        try:
            self._connection.ensure_connection(max_retries=1, timeout=_CONNECT_S)
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

    def take(self, wait_s: float) -> Sequence[Message]:
        with contextlib.suppress(TimeoutError):
            while len(self._inbox) < BATCH:
                self._connection.drain_events(timeout=_MORE_S if self._inbox else wait_s)
        self._connection.heartbeat_check()
        taken, self._inbox[:] = self._inbox[:BATCH], self._inbox[BATCH:]
        return self._identified(taken)

    def _identified(self, taken: Sequence[Any]) -> list[Message]:
        found, given = [], {}
        for message in taken:
            properties = message.properties or {}
            own, headers = properties.get("message_id"), plain(message.headers)
            raw = body_of(message)
            if not own:
                content = digest(raw.decode("latin-1"), str(sorted(headers.items())), str(message.content_type))[:24]
                own = self._claimed(content) if (message.delivery_info or {}).get("redelivered") else ""
                if not own:
                    own = f"{content}-{uuid.uuid4().hex}"
                    given[own] = f"{content}:0"
            found.append(
                Message(id=str(own), body=raw, headers=headers, content_type=message.content_type or "", handle=message)
            )
        if given:
            with self._ledger.client.pipeline(transaction=False) as pipe:
                pipe.hset(self._key, mapping=given)
                pipe.expire(self._key, _TAKEN_TTL_S)
                pipe.execute()
        return found

    def _claimed(self, content: str) -> str:
        return str(self._claim(keys=[self._key], args=[content, time.time_ns() // 1_000_000, _CLAIM_MS]))

    def keep(self, messages: Sequence[Message]) -> None:
        with contextlib.suppress(TimeoutError):
            self._connection.drain_events(timeout=_MORE_S)
        self._connection.heartbeat_check()

    def settle(self, messages: Sequence[Message]) -> None:
        for one in messages:
            one.handle.ack()
        self._sync()
        self._ledger.client.hdel(self._key, *(one.id for one in messages))

    def close(self, messages: Sequence[Message] = ()) -> None:
        # Not `close`, which would say goodbye to a server that may not answer any more.
        self._connection.collect(_CONNECT_S)
