"""The index finds exactly the workflows whose patterns match, whatever the patterns are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.events import FILE_CREATED, MANUAL, MANUAL_SOURCE, S3_EVENTS
from orchestrator.matching import Matcher
from orchestrator.patterns import EventPattern
from orchestrator.recurrence import OnSchedule
from orchestrator.subscriptions import (
    On,
    OnEvent,
    OnFile,
    OnQueue,
    OnRun,
    OnS3,
    OnWebhook,
    file_source,
    queue_trigger,
    schedule_source,
)
from orchestrator.workflows import Step, Workflow

TEXTS = st.sampled_from(["", "a", "b", "ab", "ba", "aba", "a*", "1", "é", "in/1.csv"])
SCALARS = st.one_of(TEXTS, st.integers(-3, 3), st.sampled_from([0.0, 1.0, 1.5, 2.0]), st.booleans(), st.none())
NUMERIC = st.one_of(
    st.tuples(st.sampled_from(["<", "<=", "=", ">", ">="]), st.integers(-3, 3)).map(list),
    st.integers(-3, 0).flatmap(lambda low: st.integers(1, 3).map(lambda high: [">=", low, "<", high])),
)
RULES = st.one_of(
    SCALARS,
    TEXTS.map(lambda text: {"prefix": text}),
    TEXTS.map(lambda text: {"suffix": text}),
    TEXTS.map(lambda text: {"equals-ignore-case": text}),
    TEXTS.map(lambda text: {"prefix": {"equals-ignore-case": text}}),
    st.sampled_from(["*", "a*", "*a", "a*b", "in/*.csv", r"a\*"]).map(lambda text: {"wildcard": text}),
    st.sampled_from(["a", "b"]).map(lambda text: {"anything-but": text}),
    NUMERIC.map(lambda operand: {"numeric": operand}),
    st.booleans().map(lambda there: {"exists": there}),
)
NAMES = st.sampled_from(["type", "x", "y"])
LEAVES = st.lists(RULES, min_size=1, max_size=3)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(NAMES, inner, min_size=1, max_size=3)


PATTERNS = st.one_of(
    objects(st.one_of(LEAVES, objects(LEAVES))),
    st.lists(objects(LEAVES), min_size=2, max_size=2).map(lambda branches: {"$or": branches}),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3))
NESTED = objects(VALUES)
EVENTS = objects(st.one_of(VALUES, NESTED, st.lists(NESTED, max_size=2)))


def workflow(name: str, *on: On) -> Workflow:
    return Workflow(name=name, steps=(Step(id="a", task="t:a"),), on=on)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(PATTERNS, min_size=1, max_size=2), max_size=8), st.lists(EVENTS, min_size=1, max_size=5))
def test_the_index_changes_nothing(patterns: list[list[dict[str, Any]]], events: list[dict[str, Any]]) -> None:
    """Those found by it are those whose patterns match, in the order of the definitions; the others say why not."""
    matcher = Matcher(workflow(f"w{n}", *(OnEvent(pattern=one) for one in some)) for n, some in enumerate(patterns))
    for event in events:
        wanted = [
            f"w{n}" for n, some in enumerate(patterns) if any(EventPattern.compile(one).matches(event) for one in some)
        ]
        assert matcher.match(event) == wanted
        for n in range(len(patterns)):
            assert (matcher.why_not(f"w{n}", event) is None) == (f"w{n}" in wanted)


QUEUE = OnQueue(url="redis://x", queue="q")


@pytest.mark.parametrize(
    ("on", "event", "refused", "why"),
    [
        (
            OnFile(path="/in"),
            {"type": FILE_CREATED, "source": file_source("w", "/in")},
            {"type": FILE_CREATED, "source": file_source("v", "/in")},
            'file: source: wanted ["file:///in?workflow=w"], saw "file:///in?workflow=v"',
        ),
        (
            OnS3(bucket="b-1", prefix="in*/", suffix=".csv"),
            {
                "type": S3_EVENTS["created"],
                "source": "orchestrator:s3/b-1",
                "data": {"bucket": "b-1", "key": "in*/a.csv"},
            },
            {
                "type": S3_EVENTS["created"],
                "source": "orchestrator:s3/b-1",
                "data": {"bucket": "b-1", "key": "in/a.csv"},
            },
            r's3: data.key: wanted [{"wildcard":"in\\*/*.csv"}], saw "in/a.csv"',
        ),
        (
            OnS3(bucket="b-1", events=("removed",)),
            {"type": S3_EVENTS["removed"], "source": "orchestrator:s3/b-1", "data": {"bucket": "b-1", "key": "a"}},
            {"type": "orchestrator.s3.object.created", "data": {"bucket": "b-1", "key": "a"}},
            's3: type: wanted ["orchestrator.s3.object.removed"], saw "orchestrator.s3.object.created"',
        ),
        (OnWebhook(path="a/b"), {"trigger": "webhook:a/b"}, {}, 'webhook: trigger: wanted ["webhook:a/b"], saw absent'),
        (
            OnWebhook(path="a", pattern={"data": {"n": [1]}}),
            {"trigger": "webhook:a", "data": {"n": 1}},
            {"trigger": "webhook:a", "data": {"n": 2}},
            "webhook: data.n: wanted [1], saw 2",
        ),
        (
            OnSchedule(cron="@daily", name="n"),
            {"type": "orchestrator.schedule.due", "source": schedule_source("w.n")},
            {"type": "orchestrator.schedule.due", "source": schedule_source("w")},
            'schedule: source: wanted ["orchestrator:schedule/w.n"], saw "orchestrator:schedule/w"',
        ),
        (QUEUE, {"trigger": queue_trigger(QUEUE)}, {"trigger": "queue:q"}, "queue: trigger: wanted "),
        (
            OnRun(workflow=("a", "b"), state=("failed",)),
            {"type": "orchestrator.run.failed", "data": {"workflow": "b"}},
            {"type": "orchestrator.run.failed", "data": {"workflow": "c"}},
            'run: data.workflow: wanted ["a","b"], saw "c"',
        ),
    ],
)
def test_every_kind_of_entry_is_a_pattern(on: On, event: dict[str, Any], refused: dict[str, Any], why: str) -> None:
    """And the clause that says no is told, with what it saw."""
    matcher = Matcher([workflow("w", on), workflow("none")])
    assert matcher.match(event) == ["w"]
    assert matcher.match(refused) == []
    assert (matcher.why_not("w", refused) or "").startswith(why)
    assert matcher.why_not("none", event) == "it has no `on:`; only `orchestrator run` starts it"


@given(st.text("ab", max_size=4), st.text("ab", max_size=4), st.text("ab", max_size=6))
def test_the_keys_of_a_bucket_have_the_prefix_and_the_suffix(prefix: str, suffix: str, key: str) -> None:
    """Which may overlap in a short key."""
    matcher = Matcher([workflow("w", OnS3(bucket="b-1", prefix=prefix, suffix=suffix))])
    event = {"type": S3_EVENTS["created"], "source": "orchestrator:s3/b-1", "data": {"bucket": "b-1", "key": key}}
    assert bool(matcher.match(event)) == (key.startswith(prefix) and key.endswith(suffix))


def test_what_is_started_by_hand_is_for_one_workflow() -> None:
    """Also where a pattern of another one would take it."""
    matcher = Matcher([workflow("w"), workflow("v", OnEvent(pattern={"type": [MANUAL]}))])
    event = {"type": MANUAL, "source": MANUAL_SOURCE, "subject": "w"}
    assert matcher.match(event) == ["w"]
    assert matcher.why_not("v", event) == "the event is for another workflow"
    assert matcher.match(event | {"subject": "x"}) == []


@pytest.mark.parametrize(
    ("on", "followed"),
    [
        (
            OnRun(workflow=("a", "b"), state=("failed", "cancelled")),
            {"a:failed", "a:cancelled", "b:failed", "b:cancelled"},
        ),
        (OnEvent(pattern={"type": [{"prefix": "orchestrator.run.f"}]}), {"*:failed"}),
        (OnEvent(pattern={"data": {"x": [1]}}), {"*:succeeded", "*:failed", "*:cancelled"}),
        (OnEvent(pattern={"source": ["shop"]}), set()),
        (OnFile(path="/in"), set()),
        (OnS3(bucket="b-1"), set()),
        (OnWebhook(path="a"), set()),
        (OnSchedule(cron="@daily"), set()),
        (QUEUE, set()),
    ],
)
def test_ends_of_runs_are_events_only_where_an_entry_may_ask_for_them(on: On, followed: set[str]) -> None:
    assert Matcher([workflow("w", on)]).followed() == followed
