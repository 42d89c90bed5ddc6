"""The Celery application: how messages are sent and taken. There is no result backend; the ledger keeps outcomes."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from kombu import Queue
from kombu.exceptions import KombuError
from redis import RedisError

from orchestrator.settings import Settings

#: The one task that every message names.
STEP_TASK = "orchestrator.step"
#: The queue on which events travel from the triggers to the dispatcher.
EVENT_QUEUE = "orchestrator.events"

PRIORITIES = ("high", "normal", "low")
#: AMQP: a connection on which nothing came for up to three times this long is dead, and what was taken on it is
#: delivered again. That is shorter than a lease: what is published when one ran out is not to go to who let it.
HEARTBEAT_S = 3
#: AMQP: a message that the server has not confirmed for this long was not accepted.
CONFIRM_TIMEOUT_S = 10


def queue_name(pool: str, priority: str = "normal") -> str:
    """Return the queue of a pool's messages of one priority (high, normal, low)."""
    return f"orchestrator.{pool}.{priority}"


class _App(Celery):  # type: ignore[misc]  # celery has no types
    """Celery whose broker is that of our settings alone.

    Celery reads CELERY_BROKER_URL, its READ and WRITE forms and CELERY_RESULT_BACKEND before its own configuration:
    where somebody runs a Celery of theirs, these are set, and they are not meant for us.
    """

    backend_cls = "disabled"

    def connection_for_read(self, url: str | None = None, **options: Any) -> Any:
        return super().connection_for_read(url or self.conf.get("broker_read_url"), **options)

    def connection_for_write(self, url: str | None = None, **options: Any) -> Any:
        return super().connection_for_write(url or self.conf.get("broker_write_url"), **options)


def _transport_options(settings: Settings) -> dict[str, Any]:
    if settings.has_redis_broker:
        return {"socket_keepalive": True, "socket_timeout": 5, "socket_connect_timeout": 5, "health_check_interval": 5}
    # A publish returns when the server has the message on disk, and not when it was sent.
    return {"confirm_publish": True}


def broker_errors(app: Celery) -> tuple[type[Exception], ...]:
    """Return what the broker of an application raises when it is away or refuses."""
    connection = app.connection_for_write()
    return (KombuError, OSError, RedisError, *connection.connection_errors, *connection.channel_errors)


def impatient_connection(app: Celery, timeout_s: float, *, heartbeat: int | None = None) -> Any:
    """Return a kombu Connection for what may be lost: nothing on it waits for longer than that, nor to be confirmed."""
    options: dict[str, Any] = {"confirm_publish": False, "read_timeout": timeout_s, "write_timeout": timeout_s}
    if str(app.conf.broker_write_url).startswith("redis"):
        options = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    return app.connection_for_write(connect_timeout=timeout_s, transport_options=options, heartbeat=heartbeat)


@contextmanager
def publishing(app: Celery) -> Iterator[Any]:
    """Give a kombu Producer. When publishing fails its connection is dropped, as one that may not answer any more.

    Left to itself, kombu would say goodbye to an AMQP server, and wait for its answer without end.
    """
    with app.producer_pool.acquire(block=True) as producer:
        try:
            yield producer
        except broker_errors(app):
            producer.connection.collect()
            raise


def make_app(settings: Settings, *, pool: str | None = None) -> Celery:
    """Return a Celery application on the broker of `settings`; with `pool`, one whose workers take its steps."""
    app = _App("orchestrator", broker=settings.broker_url, set_as_current=False)
    if settings.has_redis_broker:
        app.conf.broker_transport = "orchestrator.brokers.redis:Transport"
        if settings.broker_url.startswith("rediss://") and "ssl_" not in settings.broker_url:
            app.conf.broker_use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    app.conf.update(
        broker_read_url=settings.broker_url,
        broker_write_url=settings.broker_url,
        broker_transport_options=_transport_options(settings),
        broker_heartbeat=HEARTBEAT_S,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # RabbitMQ closes the channel of a step that takes longer than its consumer_timeout: the worker goes on with it.
        # A Redis may refuse to be written to for a while.
        broker_channel_error_retry=True,
        task_serializer="json",
        accept_content=["json"],
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        task_send_sent_event=False,
        # What a process takes in advance waits behind its long step while others are idle.
        worker_prefetch_multiplier=1,
        # It is killed then. On a machine that has much else to do a process may take long to say that it is there.
        worker_proc_alive_timeout=60.0,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_prefetch_count_reduction=False,
        task_queues=[Queue(queue_name(pool, p), routing_key=queue_name(pool, p)) for p in PRIORITIES] if pool else None,
    )
    return app
