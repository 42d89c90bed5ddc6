"""The API against its own description: whatever a client may send, no answer is a fault of ours."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from orchestrator.api import make_app
from orchestrator.engine import Engine
from orchestrator.events import Event
from orchestrator.recurrence import OnSchedule
from orchestrator.runs import run_id
from tests.integration.test_api import Served, put_in_force, workflow

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 25


@pytest.fixture
def filled(engine: Engine) -> dict[str, list[str]]:
    """A ledger with something of everything, and the ids of these things by the name of the parameter."""
    scheduled = workflow("w", on=(OnSchedule(cron="0 6 * * *"),))
    dispatcher = put_in_force(engine, scheduled, workflow("other"))
    runs, events = [], []
    for n in range(5):
        event = Event(id=f"e{n}", source="test", type="t", time="2026-01-01T00:00:00Z", data={"n": n})
        engine.start(run_id("w", "test", event.id), dispatcher_plan(engine), event=event.to_json(), params={"n": n})
        runs.append(run_id("w", "test", event.id))
        dispatcher.dispatch(event)
        events.append(event.id)
    engine.cancel(runs[0])
    for n in range(3):
        engine.ledger.set_aside(b"\xff\x00{", "envelope", 1_700_000_000_000, detail=f"fault {n}", queue="q")
    engine.dead_letters.drain()
    letters = [one.id for one in engine.dead_letters.list()[0]]
    return {"run": runs, "workflow": ["w", "other"], "event": events, "letter": letters, "schedule": ["w"]}


def dispatcher_plan(engine: Engine):  # type: ignore[no-untyped-def]
    return engine.plan(engine.ledger.workflow_plan("w"))


@pytest.fixture
def url(engine: Engine) -> Iterator[str]:
    with Served(make_app(engine)) as served:
        yield served.url


@pytest.mark.timeout(300)
def test_no_request_that_the_description_allows_or_forbids_is_answered_by_a_fault_of_ours(
    url: str, filled: dict[str, list[str]]
) -> None:
    description = httpx.get(f"{url}/api/v1/openapi.json").json()
    schema = schemathesis.openapi.from_dict(description)
    schema.config.base_url = url
    tried = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        strategy = st.one_of(
            operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE),
            operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE),
        )

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy, known=st.integers(0, 9))
        def sends(case: schemathesis.Case, known: int) -> None:
            nonlocal tried
            tried += 1
            for name in case.path_parameters or {}:
                if name in filled and known < len(filled[name]):
                    case.path_parameters[name] = filled[name][known]
            if "wait" in (case.query or {}):
                case.query["wait"] = "0s"
            case.call_and_validate(checks=CHECKS, timeout=30)

        sends()
    assert tried > 10 * EXAMPLES
