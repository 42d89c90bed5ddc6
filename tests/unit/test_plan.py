"""Plans: paths, hashes, parts, and who takes up a failure."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.expressions import parse
from orchestrator.plan import MAX_ITEMS, MAX_LINKS, Plan, parts
from orchestrator.subscriptions import OnEvent
from orchestrator.workflows import END, Step, TriggerRule, Workflow


def plan(**above: str) -> Plan:
    """Make a plan of steps given as a="", b="a", c="a b"."""
    return Plan.of(Workflow(name="w", steps=tuple(step(s, *ups.split()) for s, ups in above.items())))


def step(step_id: str, *needs: str, **options: object) -> Step:
    return Step(id=step_id, task="t:f", needs=needs, **options)  # type: ignore[arg-type]


def test_a_path_ends_where_the_graph_forks_and_before_it_joins() -> None:
    made = plan(a="", b="a", c="b", d="b", e="c d", f="e")
    assert made.path("a") == ("a", "b")
    assert made.path("c") == ("c",)
    assert made.path("e") == ("e", "f")


def test_a_path_ends_at_another_pool_a_fan_out_and_a_nested_workflow() -> None:
    steps = (
        step("a"),
        step("b", "a", pool="gpu"),
        step("c", "b", pool="gpu", foreach=[1]),
        step("d", "c", pool="gpu"),
    )
    made = Plan.of(Workflow(name="w", steps=steps))
    assert [made.path(s) for s in "abcd"] == [("a",), ("b", "c"), ("c",), ("d",)]
    nested = Plan.of(Workflow(name="w", steps=(Step(id="a", workflow="x"), step("b", "a"))))
    assert nested.path("a") == ("a",)


def test_a_long_path_is_cut() -> None:
    made = plan(**{f"s{n}": f"s{n - 1}" if n else "" for n in range(60)})
    assert [len(path) for path in made.segments().values()] == [MAX_LINKS, MAX_LINKS, 10]


def test_the_hash_is_of_what_runs_and_not_of_what_starts_it() -> None:
    one = Workflow(name="w", steps=(step("a", description="x"),), description="y")
    two = Workflow(name="w", steps=(step("a"),), on=(OnEvent(pattern={"type": ["t"]}),))
    assert Plan.of(one).hash == Plan.of(two).hash
    assert Plan.of(one).hash != Plan.of(Workflow(name="w", steps=(step("b"),))).hash


def test_a_plan_survives_being_stored() -> None:
    steps = (step("a"), Step(id="b", task="t:f", with_={"x": parse("{{ a }}")}, if_=parse("{{ a > 1 }}")))
    made = Plan.of(Workflow(name="w", steps=steps, output=parse("{{ b }}"), has_output=True))
    again = Plan.from_json(made.to_json())
    assert again == made
    assert again.graph_rows == made.graph_rows
    assert again.graph_rows[END] == '["*","all_done",2,[],["b"],"",""]'


def test_a_workflow_with_faults_has_no_plan() -> None:
    with pytest.raises(ValueError, match="circle"):
        plan(a="b", b="a")


@given(count=st.integers(0, 20_000), max_parallel=st.none() | st.integers(1, 50))
def test_parts_cover_every_item_once(count: int, max_parallel: int | None) -> None:
    made = parts(count, max_parallel=max_parallel)
    assert list(itertools.chain.from_iterable(range(lo, hi) for lo, hi in made)) == list(range(count))
    assert all(hi - lo <= (1 if max_parallel else MAX_ITEMS) for lo, hi in made)
    assert max_parallel or len(made) <= max(64, -(-count // MAX_ITEMS))


RULES = [TriggerRule.ALL_DONE, TriggerRule.ONE_FAILED]


@pytest.mark.parametrize("rule", RULES)
def test_a_failure_is_taken_up_by_a_step_that_ran_for_it(rule: TriggerRule) -> None:
    steps = (step("a"), step("b", "a"), step("c", "b", trigger_rule=rule))
    made = Plan.of(Workflow(name="w", steps=steps))
    states = {"a": "failed", "b": "upstream_failed", "c": "succeeded"}
    assert made.unhandled(states) == []
    assert made.unhandled(states | {"c": "skipped"}) == ["a"]
    assert made.unhandled(states | {"c": "failed"}) == ["c"]


def test_a_failure_below_a_step_that_ran_is_not_taken_up_by_it() -> None:
    steps = (step("a"), step("b", "a"), step("c", "a", trigger_rule=TriggerRule.ALL_DONE))
    made = Plan.of(Workflow(name="w", steps=steps))
    assert made.unhandled({"a": "succeeded", "b": "failed", "c": "succeeded"}) == ["b"]


@given(st.data())
def test_topological_order_and_segments_cover_any_graph(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    above = {}
    for n in range(count):
        earlier = st.sampled_from([f"s{m}" for m in range(n)] or ["s0"])
        above[f"s{n}"] = data.draw(st.lists(earlier, unique=True, max_size=3 if n else 0))
    made = Plan.of(Workflow(name="w", steps=tuple(step(s, *ups) for s, ups in above.items())))
    order = made.topological()
    place = {s: n for n, s in enumerate(order)}
    assert sorted(order) == sorted(above)
    assert all(place[up] < place[s] for s, ups in above.items() for up in ups)
    segments = made.segments()
    assert sorted(itertools.chain.from_iterable(segments.values())) == sorted(above)
