"""Metrics and health over HTTP: what workers and the control process count is there, and asking costs little."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.api import make_health
from orchestrator.counters import Counters, field, read_field
from orchestrator.engine import Engine
from orchestrator.events import Event
from orchestrator.ledger import Ledger, keys
from orchestrator.ledger.ledger import connect
from orchestrator.plan import Plan
from orchestrator.settings import Settings
from orchestrator.subscriptions import OnEvent
from orchestrator.workflows import Param, Step, Workflow
from tests.conftest import WorkerProcess, wait_until
from tests.integration.conftest import Place
from tests.integration.test_api import Served, is_problem, put_in_force, start

Read = Callable[..., float]


def reader(url: str) -> Read:
    """Return what reads one sample."""

    def read(name: str, **labels: str) -> float:
        answer = httpx.get(f"{url}/metrics", timeout=10)
        assert answer.status_code == 200
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0

    return read


@pytest.fixture
def health(engine: Engine) -> Iterator[str]:
    with Served(make_health(engine)) as served:
        yield served.url


def test_what_workers_do_is_counted_by_workflow_state_and_pool(place: Place) -> None:
    with Served(make_health(place.engine)) as served:
        read = reader(served.url)
        good = Workflow(
            name="counted", steps=(Step(id="a", task="tasks:noop"), Step(id="b", task="tasks:noop", needs=("a",)))
        )
        bad = Workflow(name="counted", steps=(Step(id="f", task="tasks:fail"),))
        nested = Workflow(name="outer", steps=(Step(id="n", workflow="counted"),))
        place.engine.ledger.put_plan(Plan.of(good))
        place.engine.ledger.publish_workflows([Plan.of(good)])
        queued = read("orchestrator_queue_time_seconds_count", pool="default")
        for workflow in (good, good, bad, nested):
            place.run(workflow)
        wait_until(
            lambda: read("orchestrator_runs_total", workflow="outer", state="succeeded") == 1, "the last is counted"
        )
        wait_until(
            lambda: read("orchestrator_steps_total", workflow="outer", state="succeeded") == 1, "its step is counted"
        )
        assert read("orchestrator_runs_total", workflow="counted", state="succeeded") == 3
        assert read("orchestrator_runs_total", workflow="counted", state="failed") == 1
        assert read("orchestrator_runs_started_total", workflow="counted") == 4
        assert read("orchestrator_steps_total", workflow="counted", state="succeeded") == 6
        assert read("orchestrator_steps_total", workflow="counted", state="failed") == 1
        assert read("orchestrator_queue_time_seconds_count", pool="default") >= queued + 5
        assert read("orchestrator_step_duration_seconds_bucket", pool="default", le="+Inf") >= 7
        assert read("orchestrator_dead_lettered_total", reason="error") >= 1
        assert read("orchestrator_dead_letters") >= 1
        assert read("orchestrator_runs_in_flight") == 0
    place.engine.ledger.publish_workflows([])


def test_a_worker_that_stops_hands_in_what_it_has_counted(
    settings: Settings, engine: Engine, start_worker: Callable[..., WorkerProcess]
) -> None:
    (settings.project / "tasks.py").write_text("def noop(): pass\n")
    plan = Plan.of(Workflow(name="short", steps=(Step(id="a", task="tasks:noop"),)))
    engine.ledger.put_plan(plan)
    worker = start_worker()
    engine.start("r", plan, event={"id": "e"}, params={})
    wait_until(lambda: engine.ledger.outcome("r")[0] == "succeeded", "the run succeeds")
    assert worker.stop() == 0
    assert engine.ledger.client.hget(keys.COUNTERS, field("steps", workflow="short", state="succeeded")) == "1"


def test_a_run_that_was_refused_is_counted_as_failed(health: str, engine: Engine) -> None:
    strict = Workflow(
        name="strict", steps=(Step(id="a", task="tasks:noop"),), params={"n": Param(type="integer")},
        on=(OnEvent(pattern={"type": ["t"]}),),
    )  # fmt: skip
    dispatcher = put_in_force(engine, strict)
    dispatcher.dispatch(Event(id="1", source="s", type="t", time="2026-01-01T00:00:00Z"))
    engine.counters.flush()
    assert reader(health)("orchestrator_runs_total", workflow="strict", state="failed") == 1
    assert reader(health)("orchestrator_events_total", verdict="refused") == 1


def test_what_waits_is_told_by_pool_and_priority(health: str, engine: Engine) -> None:
    put_in_force(engine)
    start(engine)
    read = reader(health)
    assert read("orchestrator_queue_depth", pool="default", priority="normal") == 1
    assert read("orchestrator_bus_depth") == 0
    assert read("orchestrator_runs_in_flight") == 1
    assert read("orchestrator_broker_up") == read("orchestrator_ledger_up") == 1


def test_health_is_open_and_answers_no_more_than_it_should(health: str) -> None:
    assert httpx.get(f"{health}/healthz").json() == {"ok": True}
    assert httpx.get(f"{health}/readyz").json() == {"ok": True}
    assert httpx.head(f"{health}/readyz").status_code == 200
    is_problem(httpx.get(f"{health}/api/v1/runs"), 404)
    is_problem(httpx.post(f"{health}/healthz"), 405)
    openmetrics = httpx.get(f"{health}/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert openmetrics.text.endswith("# EOF\n")
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")


def test_metrics_cost_the_same_with_100000_runs(health: str, engine: Engine) -> None:
    def least_s() -> float:
        took = []
        for _ in range(10):
            began = time.monotonic()
            assert httpx.get(f"{health}/metrics").status_code == 200
            took.append(time.monotonic() - began)
        return min(took)

    client = engine.ledger.client
    for n in range(200):
        client.hincrby(keys.COUNTERS, field("runs", workflow=f"w{n}", state="succeeded"), n + 1)
    without = least_s()
    for lo in range(0, 100_000, 10_000):
        names = {f"{n:024x}": float(n) for n in range(lo, lo + 10_000)}
        with client.pipeline(transaction=False) as pipe:
            pipe.zadd(keys.RUNS, names)
            pipe.zadd(keys.ACTIVE, names)
            for name in names:
                pipe.hset(keys.run_key(name, "run"), mapping={"workflow": "w", "state": "running"})
            pipe.execute()
    assert reader(health)("orchestrator_runs_in_flight") == 100_000
    assert least_s() < 4 * without  # to read them all would take a hundred times as long


def test_a_counter_of_any_labels_is_read_back() -> None:
    for value in ("w", "a,b=c|d%e", "ü \n", ""):
        assert read_field(field("runs", workflow=value, state="failed")) == (
            "runs",
            {"workflow": value, "state": "failed"},
        )


def test_what_could_not_be_handed_in_is_handed_in_later(own_server: Any, tmp_path: Any) -> None:
    ledger = Ledger(connect(own_server.url))
    counters = Counters(ledger)
    own_server.stop()
    counters.add("x", 2)
    counters.observe("queue_seconds", 0.2, pool="p")
    counters.flush()
    counters.add("x", 1)
    own_server.start()
    counters.flush()
    counters.close()
    assert ledger.client.hgetall(keys.COUNTERS) == {
        "x": "3", "queue_seconds_bucket|pool=p,le=0.25": "1", "queue_seconds_sum|pool=p": "0.2"
    }  # fmt: skip
    ledger.client.close()


def test_a_broker_that_is_away_is_not_ready(settings: Settings) -> None:
    engine = Engine(settings.evolve(broker_url="amqp://guest:guest@127.0.0.1:1//"))
    with Served(make_health(engine)) as served:
        assert "amqp://guest:***@127.0.0.1:1//" in is_problem(httpx.get(f"{served.url}/readyz"), 503)
        assert reader(served.url)("orchestrator_broker_up") == 0
    engine.close()
