"""Workers on RabbitMQ get more and fewer processes, stand by and go on, as on Redis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import kombu
import pytest

from orchestrator.celery_app import PRIORITIES, queue_name
from orchestrator.pools import STANDBY
from orchestrator.settings import Settings
from tests.acceptance.proxy import Proxy
from tests.acceptance.rabbitmq import RabbitMQ
from tests.conftest import wait_until
from tests.sizing import Place, attempts, has, make, pids, stamped, step

QUEUE = queue_name("default")


@pytest.fixture
def place(settings: Settings, rabbitmq: RabbitMQ) -> Iterator[Place]:
    made = make(settings.evolve(broker_url=rabbitmq.url))
    yield made
    made.close()
    with kombu.Connection(rabbitmq.url) as connection:  # what is in the queues of one test is not for the next
        for priority in PRIORITIES:
            kombu.Queue(queue_name("default", priority), channel=connection.channel()).delete()


def test_a_worker_grows_from_nothing_and_shrinks_again(place: Place, tmp_path: Path) -> None:
    worker = place.worker()
    assert pids(worker) == []
    runs = [place.start(step("a", "wait_for", with_={"path": str(tmp_path / "go")})) for _ in range(6)]
    wait_until(lambda: len(place.told(worker).in_work) == 4, "four steps run")
    (tmp_path / "go").touch()
    for run in runs:
        place.end(run)
    wait_until(has(worker, 0), "all have gone", 10)


def test_targets_are_followed_and_no_message_waits_behind_a_busy_process(
    place: Place, rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    worker = place.worker()
    place.tell((worker, 2))
    runs = [place.start(step("a", "wait_for", with_={"path": str(tmp_path / "go")})) for _ in range(6)]
    wait_until(lambda: rabbitmq.depth(QUEUE) == (4, 2), "two are taken")
    place.target((worker, 4))
    wait_until(lambda: rabbitmq.depth(QUEUE) == (2, 4), "four are taken")
    place.tell((worker, 1))
    assert rabbitmq.depth(QUEUE) == (2, 4)
    (tmp_path / "go").touch()
    found = [place.end(run) for run in runs]
    assert [attempts(run) for run in found] == [{"a": (1, 0)}] * 6
    wait_until(has(worker, 1), "one is left")


def test_standing_by_leaves_messages_to_others_and_outlives_a_lost_connection(
    place: Place, rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    proxy = Proxy(rabbitmq.url)
    direct = place.settings
    place.settings = direct.evolve(broker_url=proxy.url)
    worker = place.worker()
    place.settings = direct
    begun = place.start(step("a", "wait_for", with_={"path": str(tmp_path / "go")}), stamped(place, "b", "a"))
    wait_until(lambda: place.told(worker).in_work, "it is at work")
    place.tell((worker, STANDBY))
    waiting = place.start(stamped(place, "c"))
    proxy.break_connections()
    wait_until(lambda: "consumer" in worker.log.read_text(), "it has lost its connection")
    (tmp_path / "go").touch()
    place.let_report(worker, 5.0)
    assert place.stamps() == []
    assert rabbitmq.depth(QUEUE)[0] >= 2
    place.target((worker, 3))
    assert {**attempts(place.end(begun)), **attempts(place.end(waiting))} == dict.fromkeys("abc", (1, 0))
    assert Counter(name for name, _ in place.stamps()) == Counter("bc")
    wait_until(has(worker, 3), "there are three")
    proxy.stop()
