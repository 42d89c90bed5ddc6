"""The Celery application is ours alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.celery_app import make_app
from orchestrator.settings import Settings


def test_the_environment_of_somebodys_celery_is_not_for_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery itself reads these before its configuration."""
    for name in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"):
        monkeypatch.setenv(name, "amqp://theirs")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://theirs/0")
    app = make_app(Settings.load(tmp_path, environ={}, broker_url="redis://ours:1/0"), pool="default")
    assert app.connection_for_read().hostname == "ours"
    assert app.connection_for_write().hostname == "ours"
    with app.producer_pool.connections.acquire(block=False) as connection:
        assert connection.hostname == "ours"
    assert type(app.backend).__name__ == "DisabledBackend"


def test_rabbitmq_has_its_options_and_confirms_what_is_published(tmp_path: Path) -> None:
    urls = {"broker_url": "amqp://h//", "ledger_url": "redis://h/0"}
    app = make_app(Settings.load(tmp_path, environ={}, **urls), pool="default")
    assert app.conf.broker_transport_options == {"confirm_publish": True}
    assert all(queue.durable for queue in app.conf.task_queues)
