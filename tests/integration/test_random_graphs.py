"""Graphs drawn at random, on a real worker and a real server."""

from __future__ import annotations

import uuid
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.expressions import parse
from orchestrator.runs import RunState
from orchestrator.workflows import Step, Workflow
from tests.conftest import wait_until
from tests.integration.conftest import Place, read_stamps

STEPS = 30


@st.composite
def graphs(draw: st.DrawFn) -> list[list[int]]:
    """For each of 30 steps the steps upstream of it, with the N of a graph that is not series-parallel in it."""
    above = [sorted(draw(st.sets(st.integers(0, n - 1), max_size=3))) if n else [] for n in range(STEPS)]
    # s0, s1; s2 needs s0; s3 needs s0 and s1; s4 needs s1: no nesting of chains and chords says this.
    above[1], above[2], above[3], above[4] = [], [0], [0, 1], [1]
    return above


@given(above=graphs())
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_step_runs_once_and_after_its_upstreams(place: Place, tmp_path: Path, above: list[list[int]]) -> None:
    record = tmp_path / uuid.uuid4().hex
    run = place.run(
        Workflow(
            name="random",
            steps=tuple(
                Step(
                    id=f"s{n}",
                    task="tasks:stamp",
                    with_={"record": str(record), "name": f"s{n}", "after": [parse(f"{{{{ s{m} }}}}") for m in ups]},
                )
                for n, ups in enumerate(above)
            ),
        )
    )
    assert run.state is RunState.SUCCEEDED
    stamps = read_stamps(record)
    assert len(stamps) == STEPS
    for n, ups in enumerate(above):
        for m in ups:
            assert stamps[f"s{m}"][1] <= stamps[f"s{n}"][0], f"s{n} began before s{m} had ended"


@given(above=graphs(), slow=st.integers(0, STEPS - 1))
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_step_waits_for_one_that_is_not_upstream_of_it(
    place: Place, tmp_path: Path, above: list[list[int]], slow: int
) -> None:
    """One step waits until every step that does not need it has run: a false barrier anywhere would be for ever."""
    record, gate = tmp_path / uuid.uuid4().hex, tmp_path / uuid.uuid4().hex
    below = {slow}
    for n, ups in enumerate(above):
        if below & set(ups):
            below.add(n)
    steps = []
    for n, ups in enumerate(above):
        needs = tuple(f"s{m}" for m in ups)
        if n == slow:
            steps.append(Step(id=f"s{n}", task="tasks:wait_for", with_={"path": str(gate)}, needs=needs))
        else:
            given_ = {"record": str(record), "name": f"s{n}"}
            steps.append(Step(id=f"s{n}", task="tasks:stamp", with_=given_, needs=needs))
    record.touch()
    run = place.start(Workflow(name="random", steps=tuple(steps)))
    free = {f"s{n}" for n in range(STEPS) if n not in below}
    wait_until(lambda: free <= read_stamps(record).keys(), "every step that does not need the slow one has run")
    gate.touch()
    assert place.end(run).state is RunState.SUCCEEDED
