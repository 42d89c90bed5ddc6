"""What `up` says that it listens to, and what lists say of `on:`."""

from datetime import UTC, datetime

from orchestrator.cli.listening import listened_to
from orchestrator.recurrence import OnSchedule
from orchestrator.subscriptions import OnEvent, OnFile, OnQueue, OnRun, OnS3, OnWebhook, Verification
from orchestrator.workflows import Workflow

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
SIGNED = Verification(scheme="github", secrets=("env:SECRET",))


def of(*on):
    return Workflow(name="w", on=on, steps=())


def test_each_kind_says_what_it_listens_to():
    """An address can be copied, a schedule says when it is due next, and a webhook that is open says so."""
    workflow = of(
        OnFile(path="/shop/inbox", glob="*.csv"),
        OnS3(bucket="incoming", prefix="a/", suffix=".csv", poll_s=5.0),
        OnWebhook(path="github", verify=SIGNED),
        OnWebhook(path="open"),
        OnSchedule(cron="0 6 * * MON", timezone="Europe/Paris"),
        OnSchedule(name="idle", every_s=60.0),
        OnSchedule(name="past", at=("2026-01-01T00:00:00Z",)),
        OnQueue(url="amqp://me:secret@rabbit/shop", queue="orders"),
        OnRun(workflow=("a", "b"), state=("failed",)),
        OnEvent(pattern={"type": ["shop.order.placed", {"prefix": "x"}]}),
        OnEvent(pattern={"source": ["s"]}),
    )
    assert listened_to([workflow], "http://127.0.0.1:8080", NOW, paused={"w.idle"}) == [
        ("file", "/shop/inbox/*.csv for w"),
        ("s3", "incoming/a/*.csv for w"),
        ("webhook", "http://127.0.0.1:8080/hooks/github for w"),
        ("webhook", "http://127.0.0.1:8080/hooks/open, open to everybody who reaches it, for w"),
        ("schedule", "w: cron 0 6 * * MON (Europe/Paris), next at 2026-02-02T05:00:00Z for w"),
        ("schedule", "w.idle: every 60 s (UTC), paused for w"),
        ("schedule", "w.past: at 2026-01-01T00:00:00Z (UTC), never due again for w"),
        ("queue", "orders at amqp://me:***@rabbit/shop for w"),
        ("run", "a, b: failed for w"),
        ("event", "shop.order.placed, ... for w"),
        ("event", "a pattern for w"),
    ]
