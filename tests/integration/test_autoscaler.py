"""The autoscaler on a real ledger and broker, with workers of which there are only reports."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from orchestrator import canvas
from orchestrator.celery_app import queue_name
from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.ledger import keys
from orchestrator.plan import Plan
from orchestrator.pools import STANDBY, PoolSettings, WorkerReport
from orchestrator.settings import Settings
from orchestrator.workflows import Step, Workflow
from tests.conftest import Server, capture_logs, wait_until
from workers import autoscaler as module
from workers.autoscaler import Autoscaler
from workers.launchers import Launched, Launcher
from workers.launchers.none import NoLauncher
from workers.pools import Memory


class Asked(Launcher):
    """A launcher that keeps what it is asked for."""

    place = "test"

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.leave: dict[str, Sequence[str]] = {}
        self.generation = ""
        self.launched: list[Launched] = []

    def scale(self, pool: str, count: int, leave: Sequence[str] = ()) -> None:
        self.counts[pool], self.leave[pool] = count, leave

    def renew(self, generation: str) -> None:
        self.generation = generation

    def look(self) -> list[Launched]:
        return self.launched

    def close(self) -> None:
        return


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.evolve(
        pools={"p": PoolSettings(maximum=6, concurrency=2, idle_after_s=0.2), "q": PoolSettings(maximum=4)}
    )


@pytest.fixture
def launcher() -> Asked:
    return Asked()


@pytest.fixture
def scaler(engine: Engine, launcher: Asked) -> Iterator[Autoscaler]:
    made = Autoscaler(engine, launcher)
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers need no time to be heard of, but in the test of that."""
    monkeypatch.setattr(module, "_SETTLE_S", 0.0)


def publish(engine: Engine, count: int, pool: str = "p", priority: str = "normal") -> None:
    plan = Plan.of(Workflow(name="w", steps=(Step(id="s", task="t:f", pool=pool),)))
    for n in range(count):
        canvas.publish(engine.app, canvas.link(engine.app, plan, f"run-{n}", "s", priority))


def report(engine: Engine, name: str = "w1", pool: str = "p", **fields: object) -> int | None:
    said = {"ceiling": 2, "host": "h", "seen_ms": time.time_ns() // 1_000_000} | fields
    return engine.pools.report(WorkerReport(worker=name, pool=pool, **said))[0]  # type: ignore[arg-type]


def drain_queue(engine: Engine, pool: str = "p") -> None:
    engine.ledger.client.delete(*(queue_name(pool, priority) for priority in ("high", "normal", "low")))


def test_at_rest_all_is_zero_and_a_worker_may_wake(engine: Engine, scaler: Autoscaler, launcher: Asked) -> None:
    report(engine)
    assert scaler.round()
    state = engine.pools.states()["p"]
    assert (state.desired, state.size, state.workers, state.backlog) == (0, 0, 1, 0)
    assert report(engine) == 0
    assert state.why == "nothing to do"


def test_a_backlog_grows_a_pool_to_what_it_needs_and_workers_are_told(
    engine: Engine, scaler: Autoscaler, launcher: Asked
) -> None:
    for name in ("w1", "w2"):
        report(engine, name)
    publish(engine, 5)
    scaler.round()
    state = engine.pools.states()["p"]
    assert (state.desired, state.desired_workers, state.backlog) == (5, 3, 5)
    assert state.oldest_age_s is not None
    assert (report(engine, "w1"), report(engine, "w2")) == (2, 2)
    assert launcher.counts["p"] == 3
    publish(engine, 50, priority="low")
    scaler.round()
    state = engine.pools.states()["p"]
    assert (state.desired, state.desired_workers, state.backlog) == (6, 3, 55)


def test_it_shrinks_after_idle_after_and_says_who_goes_first(
    engine: Engine, scaler: Autoscaler, launcher: Asked
) -> None:
    for name in ("w1", "w2", "w3"):
        report(engine, name)
    publish(engine, 6)
    scaler.round()
    assert launcher.counts["p"] == 3
    drain_queue(engine)
    for name, work in (("w1", ()), ("w2", (30.0,)), ("w3", ())):
        report(engine, name, size=2, in_work=work)
    scaler.round()
    assert engine.pools.states()["p"].desired == 6, "not yet"

    def shrunk() -> bool:
        scaler.round()
        return engine.pools.states()["p"].desired == 1

    wait_until(shrunk, "it has shrunk to what is at work")
    assert launcher.counts["p"] == 1
    assert launcher.leave["p"][-1] == "w2"
    assert (report(engine, "w2", size=1, in_work=[30.0]), report(engine, "w1")) == (1, STANDBY)


def test_a_pool_that_nothing_uses_has_no_worker_launched(engine: Engine, scaler: Autoscaler, launcher: Asked) -> None:
    plan = Plan.of(Workflow(name="w", steps=(Step(id="s", task="t:f", pool="p"),)))
    engine.ledger.publish_workflows([plan])
    scaler.round()
    assert (launcher.counts["p"], launcher.counts["q"]) == (1, 0)


def test_a_pool_of_an_earlier_plan_keeps_its_worker_as_long_as_a_run_is_in_flight(
    engine: Engine, scaler: Autoscaler, launcher: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_POOLS_EVERY_S", 0.0)
    monkeypatch.setattr(module, "_POOLS_SHARE", 1e9)
    plan = Plan.of(Workflow(name="old", steps=(Step(id="s", task="t:f", pool="gone"),)))
    engine.ledger.publish_workflows([plan])
    engine.start("run", plan, event={}, params={})
    engine.ledger.publish_workflows([])
    scaler.round()
    assert launcher.counts["gone"] == 1
    engine.cancel("run")
    wait_until(lambda: engine.ledger.outcome("run")[0] == "cancelled", "it has ended")
    scaler.round()
    assert "gone" not in engine.pools.states()


def test_who_publishes_wakes_it(engine: Engine, scaler: Autoscaler) -> None:
    scaler.start()
    wait_until(lambda: engine.pools.states(), "it has looked")
    seen = []
    for n in range(3):
        publish(engine, 1)
        began = time.monotonic()
        engine.pools.ring(["p"])
        wait_until(lambda n=n: engine.pools.states()["p"].backlog == n + 1, "it has looked again")
        seen.append(time.monotonic() - began)
    assert min(seen) < 0.5


def test_a_size_set_by_hand_holds_until_it_is_taken_back(engine: Engine, scaler: Autoscaler, launcher: Asked) -> None:
    engine.pools.pin("p", 9)
    scaler.round()
    state = engine.pools.states()["p"]
    assert (state.desired, state.pinned, launcher.counts["p"]) == (9, 9, 5)
    assert "by hand" in state.why
    engine.pools.pin("p", None)
    scaler.round()
    assert engine.pools.states()["p"].desired == 0


def test_a_pool_set_to_zero_by_hand_takes_nothing(engine: Engine, scaler: Autoscaler) -> None:
    report(engine)
    publish(engine, 1)
    engine.pools.pin("p", 0)
    scaler.round()
    assert report(engine) == STANDBY


def test_workers_that_drain_or_are_silent_are_given_nothing(engine: Engine, scaler: Autoscaler) -> None:
    report(engine, "silent", seen_ms=time.time_ns() // 1_000_000 - 20_000)
    report(engine, "leaving", size=1, is_draining=True)
    report(engine, "there")
    publish(engine, 4)
    scaler.round()
    targets = engine.pools.targets()
    assert targets == {"there": 2}
    assert engine.pools.states()["p"].workers == 2, "those that can be heard"


def test_a_worker_whose_clock_is_wrong_is_there_all_the_same(engine: Engine, scaler: Autoscaler) -> None:
    wrong = time.time_ns() // 1_000_000 - 3_600_000
    report(engine, "w1", seen_ms=wrong)
    scaler.round()
    report(engine, "w1", seen_ms=wrong + 1000)
    scaler.round()
    assert engine.pools.states()["p"].workers == 1


def test_who_was_silent_for_long_is_forgotten(
    engine: Engine, scaler: Autoscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FORGET_S", 0.1)
    report(engine, "w1", seen_ms=time.time_ns() // 1_000_000 - 20_000)

    def forgotten() -> bool:
        scaler.round()
        return engine.pools.reports() == []

    scaler.round()
    assert engine.pools.reports(), "it is given a chance"
    wait_until(forgotten, "it is forgotten")


def test_a_broker_that_is_away_leaves_all_as_it_was(
    engine: Engine, scaler: Autoscaler, launcher: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(engine)
    publish(engine, 5)
    scaler.round()

    def away(*_: object) -> None:
        raise UnavailableError("it is away")

    monkeypatch.setattr(scaler._broker, "waiting", away)
    drain_queue(engine)
    with capture_logs() as logs:
        for _ in range(3):
            report(engine)
            scaler.round()
    state = engine.pools.states()["p"]
    assert (state.desired, state.backlog, launcher.counts["p"]) == (5, 5, 3)
    assert "the broker is away" in state.faults
    assert [entry["event"] for entry in logs].count("server_away") <= 1
    monkeypatch.undo()


def test_a_ledger_that_was_away_does_not_shrink_pools_of_workers_that_could_not_report(
    own_server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLE_S", 3.0)
    monkeypatch.setattr(module, "_GAP_S", 0.5)
    engine = Engine(settings.evolve(broker_url=own_server.url, ledger_url=own_server.url), patience_s=2.0)
    scaler = Autoscaler(engine, NoLauncher())
    try:
        for name in ("w1", "w2", "w3"):
            report(engine, name, size=2, in_work=[1.0, 1.0])
        assert scaler.try_turn() < 1
        assert engine.pools.states()["p"].desired == 6
        own_server.stop()
        for _ in range(2):
            assert scaler.try_turn() == 1.0, "it goes on trying"
        own_server.start()
        # Their last reports are from before, and too old by now.
        old = time.time_ns() // 1_000_000 - 20_000
        for one in engine.pools.reports():
            engine.pools.report(replace(one, seen_ms=old))
        scaler._heard.clear()
        scaler.try_turn()
        state = engine.pools.states()["p"]
        assert (state.desired, state.workers) == (6, 0)
        assert state.why.startswith("as before, until all workers had time to report")
    finally:
        scaler.stop()
        engine.close()


def test_one_leads_and_the_next_goes_on_with_what_it_remembered(engine: Engine, settings: Settings) -> None:
    first_launcher, second_launcher = Asked(), Asked()
    first, second = Autoscaler(engine, first_launcher), Autoscaler(engine, second_launcher)
    report(engine)
    publish(engine, 5)
    assert first.round()
    assert not second.round()
    assert (first_launcher.counts["p"], second_launcher.counts) == (3, {})
    drain_queue(engine)
    first.stop()
    report(engine)
    assert second.round()
    state = engine.pools.states()["p"]
    assert state.desired == 5, "the most of the last idle_after"
    second.stop()


def test_one_that_leads_no_longer_has_its_own_workers_drain(
    engine: Engine, scaler: Autoscaler, launcher: Asked
) -> None:
    report(engine)
    publish(engine, 5)
    scaler.round()
    engine.ledger.client.set(keys.leader_key("autoscaler"), "another")
    assert not scaler.round()
    assert set(launcher.counts.values()) == {0}


@pytest.mark.parametrize(
    "left",
    [
        {"something": "else"},
        Memory().to_json() | {"durations": [1.0]},
        Memory().to_json() | {"served": []},
    ],
)
def test_what_an_earlier_version_remembered_is_left(
    engine: Engine, scaler: Autoscaler, left: dict[str, object]
) -> None:
    engine.ledger.client.hset(keys.POOL_MEMORIES, "p", json.dumps(left))
    with capture_logs() as logs:
        assert scaler.round()
    assert "memory_not_understood" in [entry["event"] for entry in logs]


def test_messages_without_a_worker_are_a_fault_of_the_pool(
    engine: Engine, scaler: Autoscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_NO_WORKER_S", 0.0)
    publish(engine, 1)
    scaler.round()
    [fault] = engine.pools.states()["p"].faults
    assert "orchestrator worker --pool p" in fault
    report(engine)
    scaler.round()
    assert engine.pools.states()["p"].faults == []


def test_what_keeps_workers_from_starting_or_working_is_shown(engine: Engine, scaler: Autoscaler) -> None:
    engine.pools.note_fault("p", "somewhere", "its image is not there")
    report(engine, fault="its module kills it")
    scaler.round()
    assert engine.pools.states()["p"].faults == ["its image is not there", "its module kills it"]


def test_its_launcher_is_told_which_code_is_the_current_one(scaler: Autoscaler, launcher: Asked) -> None:
    scaler.renew("abc")
    scaler.round()
    assert launcher.generation == "abc"
