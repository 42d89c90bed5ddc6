"""What attempts take, added up by step, run and workflow; on a real worker."""

from __future__ import annotations

import time

import pytest

from orchestrator.errors import InputError
from orchestrator.operations import costs
from orchestrator.runs import RunState
from orchestrator.workflows import Workflow
from tests.integration.conftest import Place
from tests.integration.test_steps import states, step, workflow

NAP = {"record": "/dev/null", "name": "n"}


def test_an_attempt_says_what_it_took(place: Place) -> None:
    """The peak is that of this attempt, not of one before in the same process."""
    run = place.run(
        workflow(
            step("large", "take", with_={"megabytes": 300, "cpu_s": 0.2, "seconds": 0.1}),
            step("small", "take", with_={"megabytes": 1, "cpu_s": 0.0, "after": "{{ large }}"}),
        )
    )
    assert run.state is RunState.SUCCEEDED
    large, small = (one.usage for one in run.steps)
    assert large is not None
    assert small is not None
    assert 0.3 <= large["wall_s"] < 10
    assert 0.2 <= large["cpu_s"] <= large["wall_s"]
    assert 300e6 <= large["memory"] < 1e9
    assert small["memory"] < 300e6
    assert large["queued_s"] > 0
    assert small["queued_s"] == 0  # it went on in the same process
    total = run.cost
    assert total["wall_s"] == pytest.approx(large["wall_s"] + small["wall_s"], abs=0.001)
    assert total["cpu_s"] == pytest.approx(large["cpu_s"] + small["cpu_s"], abs=0.001)
    assert total["gb_s"] == pytest.approx(
        (large["memory"] * large["wall_s"] + small["memory"] * small["wall_s"]) / 1e9, abs=0.001
    )
    assert run.to_json()["cost"] == total


def test_failed_attempts_and_items_cost_too(place: Place) -> None:
    run = place.run(
        workflow(
            step("each", "stamp", foreach=[0.05, 0.1], with_=NAP | {"seconds": "{{ item }}"}),
            step("bad", "fail"),
        )
    )
    assert states(run) == {"each": "succeeded", "bad": "failed"}
    each, bad = run.steps
    assert each.cost is not None
    assert bad.cost is not None
    assert bad.usage is not None
    assert each.cost["wall_s"] >= 0.15
    assert bad.cost["wall_s"] == pytest.approx(bad.usage["wall_s"], abs=0.001)
    assert bad.cost["wall_s"] > 0
    items, _ = place.queries.items(run.id, "each")
    used = [one.usage["wall_s"] for one in items if one.usage is not None]
    assert used[0] >= 0.05
    assert used[1] >= 0.1
    assert items[0].cost is None
    # The fan-out itself was evaluated, and the run's end is no step.
    assert run.cost["wall_s"] >= each.cost["wall_s"] + bad.cost["wall_s"] - 0.001


def test_costs_add_up_by_workflow_and_idle_is_zero(place: Place) -> None:
    before = place.engine.ledger.now_ms()
    names = [f"costly{before}", f"cheap{before}"]
    for name, seconds in zip(names, (0.2, 0.01), strict=True):
        for _ in range(2):
            place.run(Workflow(name=name, steps=(step("s", "stamp", with_=NAP | {"seconds": seconds}),)))
    found = costs(place.engine, since="10m")
    by_name = {one["workflow"]: one for one in found["items"]}
    costly, cheap = (by_name[name] for name in names)
    assert (costly["runs"], cheap["runs"]) == (2, 2)
    assert costly["wall_s"] >= 0.4 > cheap["wall_s"]
    assert list(by_name).index(names[0]) < list(by_name).index(names[1])
    assert found["total"]["runs"] == sum(one["runs"] for one in found["items"])
    none = costs(place.engine, since="2099-01-01T00:00Z")
    assert none["total"] == {"runs": 0, "wall_s": 0.0, "cpu_s": 0.0, "gb_s": 0.0}
    with pytest.raises(InputError, match="--since must be a duration"):
        costs(place.engine, since="soon")


def test_the_costs_are_metrics(place: Place) -> None:
    from orchestrator.metrics import Metrics

    name = f"metered{time.time_ns()}"
    place.run(Workflow(name=name, steps=(step("s", "take", with_={"megabytes": 10, "cpu_s": 0.1}),)))
    metrics = Metrics(place.engine)
    until = time.monotonic() + 30
    labels = f'{{pool="default",workflow="{name}"}}'
    wanted = [f"orchestrator_step_{what}_seconds_total{labels}" for what in ("cpu", "memory_gb")]
    while not all(line in (text := metrics.expose("text/plain")[0].decode()) for line in wanted):
        assert time.monotonic() < until, text
