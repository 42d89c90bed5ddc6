"""Runs of low priority: their messages are on the low queues at every turn, and others are served before them."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from orchestrator.celery_app import queue_name
from orchestrator.engine import Engine
from orchestrator.expressions import parse
from orchestrator.ledger import keys
from orchestrator.plan import Plan
from orchestrator.rescuer import Rescuer
from orchestrator.workflows import Step, Workflow
from tests.conftest import wait_until
from tests.integration.conftest import Monitor, Place, read_stamps

EVENT: dict[str, Any] = {
    "specversion": "1.0", "id": "e", "source": "orchestrator:schedule/w", "type": "orchestrator.schedule.due",
    "data": None, "priority": "low",
}  # fmt: skip


def test_all_messages_of_a_low_run_are_on_the_low_queue(place: Place, monitor: Monitor) -> None:
    """At the start, of a fan-out, after a join, of a nested run and of another attempt."""
    child = Workflow(name=f"child-{uuid.uuid4().hex}", steps=(Step(id="c", task="tasks:noop"),))
    place.engine.ledger.publish_workflows([Plan.of(child)])
    workflow = Workflow(
        name="low",
        steps=(
            Step(id="list", task="tasks:numbers", with_=parse({"n": 40})),
            Step(id="each", task="tasks:echo", with_=parse({"value": "{{ item }}"}), foreach=parse("{{ list }}")),
            Step(id="sum", task="tasks:add", with_=parse({"numbers": "{{ each }}"})),
            Step(id="other", task="tasks:noop", needs=("list",)),
            Step(id="nested", workflow=child.name, needs=("sum", "other")),
            Step(id="end", task="tasks:noop", needs=("nested",)),
        ),
    )
    run = place.run(workflow, event=EVENT)
    assert run.state == "succeeded"
    keys_seen = {message["properties"]["delivery_info"]["routing_key"] for message in monitor.messages}
    assert keys_seen == {queue_name("default", "low")}


def test_what_others_call_priority_is_theirs(place: Place, monitor: Monitor) -> None:
    workflow = Workflow(name="normal", steps=(Step(id="a", task="tasks:noop"),))
    place.run(workflow, event=EVENT | {"source": "https://example.com"})
    place.run(workflow, event=EVENT | {"priority": "urgent"})
    keys_seen = {message["properties"]["delivery_info"]["routing_key"] for message in monitor.messages}
    assert keys_seen == {queue_name("default")}


def test_normal_is_served_before_low(place: Place, tmp_path: Path) -> None:
    """A hundred low runs wait when a normal one comes: only what was in work already goes before it."""
    gate, record = tmp_path / "gate", tmp_path / "record"

    def workflow(name: str) -> Workflow:
        return Workflow(
            name=name,
            steps=(Step(id="a", task="tasks:stamp", with_=parse({"record": str(record), "name": "{{ run.id }}"})),),
        )

    hold = Workflow(name="hold", steps=(Step(id="a", task="tasks:wait_for", with_={"path": str(gate)}),))
    holding = [place.start(hold) for _ in range(4)]
    wait_until(lambda: _waiting(place, "normal") <= 2, "the children are at work")
    low = [place.start(workflow("low"), event=EVENT) for _ in range(100)]
    normal = [place.start(workflow("normal")) for _ in range(5)]
    gate.touch()
    for run in (*holding, *low, *normal):
        place.end(run)
    order = sorted(read_stamps(record).items(), key=lambda entry: entry[1][0])
    places = [number for number, (name, _) in enumerate(order) if name in normal]
    assert max(places) < 20, places


def _waiting(place: Place, priority: str) -> int:
    return int(place.engine.ledger.client.llen(queue_name("default", priority)))


def test_what_a_dead_process_left_goes_to_the_low_queue_again(engine: Engine) -> None:
    workflow = Workflow(name="w", steps=(Step(id="a", task="tasks:noop"), Step(id="b", task="tasks:noop", pool="cpu")))
    plan = Plan.of(workflow)
    engine.ledger.put_plan(plan)
    client, low, normal = engine.ledger.client, queue_name("default", "low"), queue_name("default")
    assert engine.start("r", plan, event=EVENT, params={})
    assert (client.llen(low), client.llen(normal)) == (1, 0)
    # Its message is lost; others wait on the normal queue.
    client.delete(low)
    client.lpush(normal, json.dumps({"other": 1}))
    rescuer = Rescuer(engine)
    for _ in range(6):
        rescuer.round()
    rescuer.stop()
    assert (client.llen(low), client.llen(normal)) == (1, 1)
    assert client.hget(keys.run_key("r", "run"), "priority") == "low"
