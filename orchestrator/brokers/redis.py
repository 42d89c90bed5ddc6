"""kombu's Redis transport with message claims (claims.py) in place of its `unacked` and `visibility_timeout`.

What differs from kombu, whose messages, queues and bindings are used as they are:

- Taking a message and noting who has it are one step, so no kill can lose it. No Redis command both waits on several
  lists and notes: a consumer waits on the *bells* of its queues, which publishers ring, and takes with a script. Who
  does not know of bells (stock kombu) is heard a second later.
- A claim is renewed while its message is in work, however long that is, and given back 10 s after the last renewal.
- Each delivery has a tag of its own: a late ack by somebody who has lost the message does not touch the next delivery.
- What cannot be read is set aside with its bytes; kombu loses it, and the worker dies.
- The client for commands is kept; kombu makes one for each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Empty
from typing import Any

import redis
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual

from orchestrator.brokers.claims import TEND_S, Claims, Delivery, bell, parse, ring
from orchestrator.telemetry import Outage, get_logger

log = get_logger(__name__)

#: Taken at once by a consumer that sets itself no limit.
_UNLIMITED = 64
#: A new consumer looks at once at what waits there, whether somebody rang or not.
_FIRST_WAIT_S = 0.01
#: How long a server that refuses writes is left alone.
_REFUSED_S = 1.0


class QoS(virtual.QoS):  # type: ignore[misc]  # kombu has no types
    """The deliveries in work of a channel. What fails here costs nothing: the claim runs out, and the ledger knows."""

    def ack(self, delivery_tag: str) -> None:
        self.channel.settle(self.channel.claims.ack, delivery_tag)
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """With `requeue`, give the message back; otherwise forget it."""
        self.channel.settle(self.channel.claims.give_back if requeue else self.channel.claims.ack, delivery_tag)
        super().ack(delivery_tag)

    def tags(self) -> list[str]:
        """Return the tags of what is in work."""
        return [tag for tag in list(self._delivered) if tag not in self._dirty]


class Batch(kombu_redis.PublishBatch):  # type: ignore[misc]
    """A pipeline of messages that rings once for each queue."""

    def __init__(self, channel: Channel, max_size: int) -> None:
        super().__init__(channel, max_size)
        self._queues: set[str] = set()

    def will_ring(self, queue: str) -> None:
        self._queues.add(queue)

    def flush(self) -> None:
        for queue in self._queues:
            ring(self.pipeline, queue)
        self._queues.clear()
        super().flush()


class Channel(kombu_redis.Channel):  # type: ignore[misc]
    """A channel whose direct queues are consumed by claims. Fanout (Celery's remote control) is kombu's."""

    QoS = QoS
    priority_steps = (0,)
    from_transport_options = tuple(
        name for name in kombu_redis.Channel.from_transport_options if name != "priority_steps"
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._commands: Any = None
        self._receivers: dict[str, Callable[[Delivery], None]] = {}
        self._tend_at = 0.0
        self._refused_until = 0.0
        self._wait_s = _FIRST_WAIT_S
        self._outage = Outage(log, "broker")
        super().__init__(*args, **kwargs)
        self.claims = Claims(self._command_client())

    # Commands

    def _command_client(self) -> Any:
        if self._commands is None:
            self._commands = self._create_client()
        return self._commands

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        yield client or self._command_client()

    def close(self) -> None:
        commands = self._commands
        super().close()
        if commands is not None:  # what was in work is given back last, and that has connected again
            commands.connection_pool.disconnect()

    def _disconnect_pools(self) -> None:
        self._commands = None
        super()._disconnect_pools()

    def _after_fork(self) -> None:
        super()._after_fork()
        self.claims = Claims(self._command_client())

    def settle(self, verb: Callable[[str], object], tag: str) -> None:
        """Ack or give back; where the server does not let us, the claim runs out by itself."""
        try:
            verb(tag)
        except (*self.connection_errors, redis.RedisError) as exc:
            log.info("claim_left_to_run_out", tag=tag, error=f"{type(exc).__name__}: {exc}")

    # Publishing

    def create_publish_batch(self, max_size: int) -> Batch:
        return Batch(self, max_size)

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        batch = kwargs.pop("_publish_batch", None)
        if batch is not None:
            super()._put(queue, message, _publish_batch=batch)
            batch.will_ring(queue)
        elif queue in self._expires:
            super()._put(queue, message)
            with self._command_client().pipeline(transaction=False) as pipe:
                ring(pipe, queue)
                pipe.execute()
        else:
            with self._command_client().pipeline(transaction=False) as pipe:
                pipe.lpush(queue, kombu_redis.dumps(message))
                ring(pipe, queue)
                pipe.execute()

    def _put_fanout(self, exchange: str, message: Any, routing_key: str, **kwargs: Any) -> None:
        """Publish to whoever listens (Celery's events and remote control), who acks nothing, with what they read."""
        given = message["properties"]
        properties = {"body_encoding": given["body_encoding"], "delivery_tag": given["delivery_tag"][:8]}
        super()._put_fanout(exchange, {**message, "properties": properties}, routing_key, **kwargs)

    # Consuming

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], Any], *args: Any, **kwargs: Any
    ) -> None:
        super().basic_consume(queue, no_ack, callback, *args, **kwargs)
        if queue in self.active_fanout_queues:
            return
        self._receivers[queue] = partial(self._receive_delivery, callback, no_ack)
        self._wait_s = _FIRST_WAIT_S

    def _receive_delivery(self, callback: Callable[[Any], Any], no_ack: bool, delivery: Delivery) -> None:
        try:
            envelope = parse(delivery.raw)
            envelope["properties"]["delivery_tag"] = delivery.tag
            message = self.Message(envelope, channel=self)
            message.delivery = delivery
        except Exception as exc:  # noqa: BLE001 -- whatever it is made of, it must not end the consumer
            detail = str(exc) if type(exc) is ValueError else f"its envelope cannot be read ({type(exc).__name__})"
            self.claims.set_aside(delivery, detail, time.time_ns() // 1_000_000)
            log.error("message_set_aside", queue=delivery.queue, reason="envelope", detail=detail)
            return
        if no_ack:
            self.settle(self.claims.ack, delivery.tag)
        else:
            self.qos.append(message, delivery.tag)
        callback(message)

    def _basic_cancel(self, consumer_tag: str) -> Any:
        self._receivers.pop(self._tag_to_queue.get(consumer_tag, ""), None)
        return super()._basic_cancel(consumer_tag)

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Wait for a bell; kombu's poller calls this when there is room for a message."""
        queues = self.active_queues
        if not queues or time.monotonic() < self._refused_until:
            return
        self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        self.client.connection.send_command("BRPOP", *map(bell, queues), timeout or self._wait_s)
        self._wait_s = self.brpop_timeout

    def _brpop_read(self, **options: Any) -> bool:
        """Take messages: a bell has rung, or nobody rang for a second."""
        rung = None
        try:
            rung = self.client.parse_response(self.client.connection, "BRPOP", **options)
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        except redis.ResponseError as exc:
            self._refuse(exc)
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        deliveries = self._fetch()
        if not deliveries:
            if rung and not (self.active_queues and self.qos.can_consume()):  # somebody else may have room for it
                with self._command_client().pipeline(transaction=False) as pipe:
                    ring(pipe, rung[0].decode().removesuffix(bell("")))
                    pipe.execute()
            raise Empty
        for delivery in deliveries:
            receive = self._receivers.get(delivery.queue)
            if receive is None:  # cancelled while we asked
                self.settle(self.claims.give_back, delivery.tag)
            else:
                receive(delivery)
        return True

    def _fetch(self) -> list[Delivery]:
        free = self.qos.can_consume_max_estimate()
        limit = _UNLIMITED if free is None else free
        if not limit or not self.active_queues:
            return []
        try:
            deliveries = self.claims.fetch(self.active_queues, limit)
        except self.connection_errors:
            raise
        except redis.ResponseError as exc:
            self._refuse(exc)
        self._outage.ends()
        return deliveries

    def _refuse(self, exc: Exception) -> None:
        """The server answers but lets nobody write (read-only, disk full): it is asked again in a moment."""
        self._outage.begins(str(exc))
        self._refused_until = time.monotonic() + _REFUSED_S
        raise Empty from exc

    def _get(self, queue: str) -> Any:
        for delivery in self.claims.fetch([queue], 1):
            envelope = parse(delivery.raw)
            envelope["properties"]["delivery_tag"] = delivery.tag
            return envelope
        raise Empty

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        message = super().basic_get(queue, no_ack=no_ack, **kwargs)
        if message is not None and no_ack:
            self.settle(self.claims.ack, message.delivery_tag)
        return message

    def _delete(self, queue: str, *args: Any, **kwargs: Any) -> None:
        super()._delete(queue, *args, **kwargs)
        self._command_client().delete(bell(queue))

    # Claims

    def tend(self) -> None:
        """Renew our claims and give back lost ones, once a second; called at every turn of the event loop.

        Raises what a connection raises when it is lost, which the other one, that only waits, may notice much later.
        """
        now = time.monotonic()
        if now < self._tend_at or not (self.active_queues or self.qos.tags()):
            return
        self._tend_at = now + TEND_S
        try:
            restored = self.claims.tend(self.qos.tags())
        except self.connection_errors:
            raise
        except redis.ResponseError as exc:
            self._outage.begins(exc)
            return
        if restored:
            log.warning("messages_given_back", messages=restored, reason="nobody renewed the claims on them")

    def _restore(self, message: Any, leftmost: bool = False) -> None:
        self.settle(self.claims.give_back, message.delivery_tag)


class Poller(kombu_redis.MultiChannelPoller):  # type: ignore[misc]
    """kombu's poller, which tends claims where kombu looks for messages to restore."""

    def on_poll_init(self, poller: Any) -> None:
        self.poller = poller

    def on_poll_start(self) -> None:
        super().on_poll_start()
        for channel in list(self._channels):
            channel.tend()

    def maybe_restore_messages(self) -> None:
        """Nothing: `tend` does it."""


class Transport(kombu_redis.Transport):  # type: ignore[misc]
    """For Celery's `broker_transport`."""

    Channel = Channel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()
