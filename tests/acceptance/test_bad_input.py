"""Bad messages in all queues while real runs go on: each is a dead letter, and nobody dies (tests/chaos)."""

from __future__ import annotations

import kombu

from tests.acceptance.rabbitmq import RabbitMQ
from tests.chaos import bad_input
from tests.conftest import Server


def test_bad_messages_on_redis() -> None:
    report = bad_input.run(messages=2000, seed=20261121)
    report.show()
    assert report.ok, report.faults
    assert report.letters > 1500
    assert report.by_reason.keys() == {
        "envelope", "not_a_step", "body", "content_type", "expired", "unknown_task", "not_an_event"
    }  # fmt: skip


def test_bad_messages_on_rabbitmq(rabbitmq: RabbitMQ, own_server: Server) -> None:
    """As far as AMQP has words for them."""
    with kombu.Connection(rabbitmq.url) as connection:  # what other tests have left
        for queue in bad_input.QUEUES:
            kombu.Queue(queue, channel=connection.channel()).delete()
    servers = bad_input.Servers(rabbitmq.url, own_server.url, rabbitmq.depth)
    report = bad_input.run(messages=2000, seed=20261121, servers=servers)
    report.show()
    assert report.ok, report.faults
    assert report.letters > 1000
    assert report.by_reason.keys() >= {"not_a_step", "body", "content_type", "expired", "unknown_task", "not_an_event"}
