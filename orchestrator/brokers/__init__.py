"""What differs between brokers, beyond what kombu hides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from celery import Celery
from redis import RedisError  # not the module: its name here is that of the transport

from orchestrator.brokers.claims import Claims, parse
from orchestrator.canvas import QUEUED_AT
from orchestrator.celery_app import PRIORITIES, broker_errors, queue_name
from orchestrator.errors import UnavailableError
from orchestrator.ledger.ledger import connect, unavailable
from orchestrator.settings import Settings, mask_url

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits for a pool: how many messages, and for how long the one that has waited longest; None: not known."""

    backlog: int = 0
    oldest_age_s: float | None = None


class Broker:
    """What is asked of a broker apart from its messages. Safe to share between threads.

    Every verb raises UnavailableError. This one looks after its messages itself, and does not tell what is in work.
    """

    def tend(self) -> int:
        """Give back messages whose consumers are gone; answers how many."""
        return 0

    def empty(self, queues: Iterable[str]) -> set[str]:
        """Answer those of `queues` of which it is sure that no message waits or is in work."""
        return set()

    def depths(self, queues: Sequence[str]) -> list[int]:
        """Answer how many messages wait in each of `queues`; 0 for one that nobody has made."""
        raise NotImplementedError

    def queued_at(self, queues: Sequence[str]) -> list[int | None]:
        """Answer when the message that is taken next from each of `queues` was published, ms since the epoch.

        None if there is none, if it does not say, or if the broker shows nobody a message before it is taken.
        """
        return [None] * len(queues)

    def waiting(self, pools: Sequence[str], now_ms: int) -> dict[str, Waiting]:
        """Answer what waits for each of `pools`, in its queues of all priorities."""
        queues = [queue_name(pool, priority) for pool in pools for priority in PRIORITIES]
        depths, since = self.depths(queues), self.queued_at(queues)
        found = {}
        for n, pool in enumerate(pools):
            span = slice(n * len(PRIORITIES), (n + 1) * len(PRIORITIES))
            oldest = min((at for at in since[span] if at is not None), default=None)
            age_s = None if oldest is None else max(0.0, (now_ms - oldest) / 1000)
            found[pool] = Waiting(sum(depths[span]), age_s)
        return found

    def close(self) -> None:
        """Close connections."""


class RedisBroker(Broker):
    """Redis, where claims run out although no worker may be there to notice."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self._client = connect(url, timeout_s=timeout_s, decode_responses=False)
        self._claims = Claims(self._client)

    def tend(self) -> int:
        return self._guard(self._claims.tend)

    def empty(self, queues: Iterable[str]) -> set[str]:
        return self._guard(lambda: self._claims.empty(queues))

    def depths(self, queues: Sequence[str]) -> list[int]:
        def ask() -> list[int]:
            with self._client.pipeline(transaction=False) as pipe:
                for queue in queues:
                    pipe.llen(queue)
                return list(pipe.execute())

        return self._guard(ask)

    def queued_at(self, queues: Sequence[str]) -> list[int | None]:
        def ask() -> list[bytes | None]:
            with self._client.pipeline(transaction=False) as pipe:
                for queue in queues:
                    pipe.lindex(queue, -1)  # messages are put in on the left
                return list(pipe.execute())

        return [None if raw is None else _queued_at(raw) for raw in self._guard(ask)]

    def close(self) -> None:
        self._client.close()

    def _guard(self, ask: Callable[[], _Answer]) -> _Answer:
        try:
            return ask()
        except RedisError as exc:
            raise unavailable(self._client, exc) from exc


class AmqpBroker(Broker):
    """RabbitMQ, which looks after its messages itself; what waits it tells of a queue that is declared passively."""

    def __init__(self, settings: Settings, app: Celery, *, timeout_s: float) -> None:
        self._settings = settings
        self._app = app
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._connection: Any = None

    def depths(self, queues: Sequence[str]) -> list[int]:
        with self._lock:
            if self._connection is not None:
                try:
                    return [self._depth(queue) for queue in queues]
                except broker_errors(self._app):  # it may have been idle for too long
                    self._drop()
            try:
                self._connect()
                return [self._depth(queue) for queue in queues]
            except broker_errors(self._app) as exc:
                self._drop()
                where = mask_url(self._settings.broker_url)
                raise UnavailableError(
                    f"the broker at {where} cannot be used ({exc}); start it, or set broker_url"
                ) from exc

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _connect(self) -> None:
        # Without heartbeats, which nobody would send between two questions.
        timeouts = {"read_timeout": self._timeout_s, "write_timeout": self._timeout_s}
        connection = self._app.connection_for_read(
            connect_timeout=self._timeout_s, heartbeat=0, transport_options=timeouts
        )
        connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
        self._connection = connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.collect()  # without a goodbye, for whose answer kombu would wait
            self._connection = None

    def _depth(self, queue: str) -> int:
        channel = self._connection.channel()
        try:
            return int(channel.queue_declare(queue, passive=True).message_count)
        except self._connection.channel_errors:  # nobody has made it; the channel is closed by that
            return 0
        finally:
            channel.close()


def _queued_at(raw: bytes) -> int | None:
    """Return when a message was published, as far as it says that in our way."""
    try:
        headers = parse(raw).get("headers")
        said = headers.get(QUEUED_AT) if isinstance(headers, dict) else None
    except ValueError:
        return None
    return said if isinstance(said, int) and not isinstance(said, bool) else None


def broker_of(settings: Settings, app: Celery, *, timeout_s: float = 10.0) -> Broker:
    """Return the broker of `settings`; connects when asked something. An answer may take no longer than `timeout_s`."""
    if settings.has_redis_broker:
        return RedisBroker(settings.broker_url, timeout_s=timeout_s)
    return AmqpBroker(settings, app, timeout_s=timeout_s)
