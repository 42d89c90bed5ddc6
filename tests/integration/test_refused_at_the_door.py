"""A server that takes nothing more: events stay with their source, and nothing is half-written."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from orchestrator.bus import EventBus
from orchestrator.celery_app import EVENT_QUEUE
from orchestrator.cli.doctor import examine
from orchestrator.dispatcher import Dispatcher, manual_event
from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.ledger import keys
from orchestrator.settings import Settings
from orchestrator.subscriptions import file_source
from orchestrator.workflows import Step, Workflow
from tests.conftest import Server, wait_until
from triggers.files import FileTrigger, FileWatch

WORKFLOW = Workflow(name="w", steps=(Step(id="a", task="tasks:f"),))


@pytest.fixture
def own(settings: Settings, own_server: Server) -> Iterator[Engine]:
    made = Engine(settings.evolve(broker_url=own_server.url, ledger_url=own_server.url), patience_s=0.0)
    yield made
    made.close()


@pytest.fixture(params=["read-only", "out of memory"])
def refuse(request: pytest.FixtureRequest, own_server: Server) -> Iterator[Callable[[bool], None]]:
    """Have the server refuse writes, or no longer."""
    client = redis.Redis.from_url(own_server.url)

    def do(refuses: bool) -> None:
        if request.param == "read-only":
            client.replicaof(*(("127.0.0.1", "1") if refuses else ("no", "one")))
        else:
            client.config_set("maxmemory", "1" if refuses else "0")

    yield do
    do(False)
    client.close()


def test_an_event_is_refused_and_nothing_of_it_is_kept(own: Engine, refuse: Callable[[bool], None]) -> None:
    bus = EventBus(own.app)
    refuse(True)
    with pytest.raises(UnavailableError, match=r"maxmemory|read only"):
        bus.publish([manual_event("w", {}, event_id=uuid.uuid4().hex) for _ in range(20)])
    assert own.ledger.client.llen(EVENT_QUEUE) == 0
    refuse(False)
    bus.publish([manual_event("w", {}, event_id="e")])
    assert own.ledger.client.llen(EVENT_QUEUE) == 1


def test_a_file_is_not_marked_until_its_event_is_on_the_bus(
    own: Engine, refuse: Callable[[bool], None], tmp_path: Path
) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    source = file_source("w", str(inbox))
    bus = EventBus(own.app)
    tried = threading.Event()

    def emit(events: object) -> None:
        try:
            bus.publish(events)  # type: ignore[arg-type]
        finally:
            tried.set()

    trigger = FileTrigger(FileWatch(source=source, path=inbox), marks=own.ledger, emit=emit)
    trigger.start()
    try:
        refuse(True)
        (inbox / "a.csv").write_text("1")
        assert tried.wait(10)
        assert own.ledger.read(source) == {}
        refuse(False)
        wait_until(lambda: own.ledger.read(source), "the file is marked")
        assert own.ledger.client.llen(EVENT_QUEUE) == 1
    finally:
        trigger.stop()


def test_a_run_is_started_whole_or_not_at_all(own: Engine, refuse: Callable[[bool], None]) -> None:
    dispatcher = Dispatcher(own)
    dispatcher.apply([WORKFLOW])
    event = manual_event("w", {}, event_id="e")
    refuse(True)
    with pytest.raises(UnavailableError):
        dispatcher.dispatch(event)
    assert list(own.ledger.client.scan_iter("orchestrator:{*")) == []
    refuse(False)
    assert dispatcher.dispatch(event)["w"].verdict == "started"
    (run,) = own.ledger.active()
    assert own.ledger.client.hget(keys.run_key(run, "run"), "state") == "queued"


def test_doctor_says_that_the_server_refuses_and_what_is_there_can_be_read(
    own: Engine, refuse: Callable[[bool], None]
) -> None:
    settings = own.settings
    assert {check["name"]: check["ok"] for check in examine(settings)["checks"]}["ledger"]
    refuse(True)
    (found,) = [check for check in examine(settings)["checks"] if check["name"] == "ledger"]
    assert not found["ok"]
    assert "cannot be used" in found["detail"]
    assert own.ledger.is_up()
    assert own.ledger.active() == []
