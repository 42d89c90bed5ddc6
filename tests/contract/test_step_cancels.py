"""Cancelling one step or item on a real server: what ends, what is told to stop, and that the rest goes on."""

from __future__ import annotations

import pytest

from orchestrator.engine import Engine
from orchestrator.errors import InputError, NotFoundError
from orchestrator.ledger import Ledger, keys
from orchestrator.ledger.ledger import How
from orchestrator.ledger.queries import Queries
from orchestrator.resume import resume
from orchestrator.runs import parse_task_id, task_id
from orchestrator.workflows import END, Phase, Step, TriggerRule
from tests.contract.test_episodes import ERROR, HOW, do, expand, start, state, states, step, take

OTHER = How('{"worker": "other"')


@pytest.fixture
def ledger(engine: Engine) -> Ledger:
    return engine.ledger


def end(engine: Engine, run: str) -> str:
    do(engine, run, END, "failed")
    return state(engine.ledger, run)


def test_a_step_that_waits_for_its_turn_never_begins_and_the_rest_goes_on(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("b", "a"), step("c", "b"), step("d"))
    assert engine.cancel_step("r", "b") is True
    assert states(ledger, "r") == {"a": "queued", "b": "cancelled", "c": "upstream_failed", "d": "queued"}
    do(engine, "r", "a")
    assert ledger.begin("r", ["b", "c"], HOW).verdict == "done"
    do(engine, "r", "d")
    assert end(engine, "r") == "failed"
    assert ledger.losses("r", "b") == []
    assert Queries(ledger, engine.payloads).step("r", "b").attempts == 0


def test_a_step_downstream_that_takes_up_failures_runs_after_a_cancelled_one(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("tidy", "a", trigger_rule=TriggerRule.ALL_DONE))
    engine.cancel_step("r", "a")
    assert states(ledger, "r") == {"a": "cancelled", "tidy": "queued"}
    do(engine, "r", "tidy")
    assert end(engine, "r") == "failed"


def test_a_step_whose_message_is_on_its_way_is_cancelled_at_once(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"))
    assert engine.cancel_step("r", "a") is True
    assert ledger.begin("r", ["a"], HOW).verdict == "done"
    assert end(engine, "r") == "failed"
    assert ledger.is_active("r") is False


@pytest.mark.parametrize("outcome", ["retrying", "postponed", "sleeping"])
def test_a_step_that_waits_for_its_time_is_cancelled_at_once(engine: Engine, ledger: Ledger, outcome: str) -> None:
    start(engine, "r", step("a"), step("b", "a"))
    do(engine, "r", "a", outcome, delay_ms=60_000)
    assert engine.cancel_step("r", "a") is True
    assert ledger.client.exists(keys.run_key("r", "timers")) == 0
    assert states(ledger, "r") == {"a": "cancelled", "b": "upstream_failed", END: "queued"}
    shown = Queries(ledger, engine.payloads).step("r", "a")
    assert (shown.state, shown.due_at) == ("cancelled", None)


@pytest.mark.parametrize("outcome", ["cancelled", "retrying", "postponed", "sleeping", "succeeded", "failed"])
def test_a_step_at_work_is_told_to_stop_and_then_says_how_it_ended(
    engine: Engine, ledger: Ledger, outcome: str
) -> None:
    start(engine, "r", step("a"), step("b"))
    a, b = take(ledger, "r", "a"), take(ledger, "r", "b", OTHER)
    assert engine.cancel_step("r", "a") is True
    assert states(ledger, "r")["a"] == "running"
    assert ledger.renew([("r", "a", a.fence), ("r", "b", b.fence)]) == (set(), {("r", "a")})
    tail = ERROR if outcome in ("failed", "retrying") else ""
    ledger.complete("r", a, outcome, tail=tail, delay_ms=0, how=HOW, inline="")
    assert states(ledger, "r")["a"] == (outcome if outcome in ("succeeded", "failed") else "cancelled")
    assert ledger.complete("r", b, "succeeded", how=OTHER, inline="").verdict == "ok"


def test_a_step_whose_worker_dies_meanwhile_is_not_started_again(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"))
    take(ledger, "r", "a")
    engine.cancel_step("r", "a")
    assert ledger.abandon("r", HOW.record, "it died") == (["a"], [END])
    assert states(ledger, "r")["a"] == "cancelled"


def test_a_step_that_nobody_holds_any_more_is_cancelled_at_once(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"))
    taken = take(ledger, "r", "a")
    ledger.abandon("r", HOW.record, "it seemed to be dead")
    assert engine.cancel_step("r", "a") is True
    assert states(ledger, "r")["a"] == "cancelled"
    assert ledger.renew([("r", "a", taken.fence)])[1] == {("r", "a")}


def test_a_fan_out_is_cancelled_with_its_items(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("f", foreach=[1] * 6), step("g", "f"), step("other"))
    expand(engine, "r", "f", 6, size=2)
    first = take(ledger, "r", "f/0-2")
    do(engine, "r", "f/2-4", "retrying", delay_ms=60_000)
    assert engine.cancel_step("r", "f") is True
    assert engine.cancel_step("r", "f") is False
    assert ledger.renew([("r", "f/0-2", first.fence)])[1] == {("r", "f/0-2")}
    assert ledger.begin("r", ["f/4-6"], HOW).verdict == "done"
    ledger.complete("r", first, "cancelled", how=HOW, inline="default")
    assert {states(ledger, "r")[slot] for slot in ("f", *(f"f/{i}" for i in range(6)))} == {"cancelled"}
    assert states(ledger, "r")["g"] == "upstream_failed"
    do(engine, "r", "other")
    assert end(engine, "r") == "failed"


def test_a_fan_out_that_is_about_to_be_expanded_is_cancelled(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("f", foreach=[1, 2]))
    taken = take(ledger, "r", "f")
    engine.cancel_step("r", "f")
    ledger.expand("r", taken, 2, size=1, max_parallel=0, per=2, chunks=["[1, 2]"], how=HOW, inline="")
    assert states(ledger, "r")["f"] == "cancelled"


def test_one_item_is_cancelled_and_its_neighbours_go_on(engine: Engine, ledger: Ledger) -> None:
    """They share a message with it, and one of them waits behind it."""
    start(engine, "r", step("f", foreach=[1] * 4))
    expand(engine, "r", "f", 4)
    first = take(ledger, "r", "f/0-4")
    assert engine.cancel_step("r", "f/1") is True
    assert engine.cancel_step("r", "f/1") is False
    assert ledger.renew([("r", "f/0-4", first.fence)]) == (set(), set())
    second = ledger.complete("r", first, "succeeded", how=HOW, inline="default").taken
    assert second is not None
    assert second.index == 2
    assert engine.cancel_step("r", "f/2") is True
    assert ledger.renew([("r", "f/0-4", first.fence)])[1] == {("r", "f/0-4")}
    third = ledger.complete("r", second, "cancelled", how=HOW, inline="default").taken
    assert third is not None
    assert ledger.renew([("r", "f/0-4", first.fence)]) == (set(), set())
    ledger.complete("r", third, "succeeded", how=HOW, inline="default")
    assert states(ledger, "r") == {
        "f": "cancelled", "f/0": "succeeded", "f/1": "cancelled", "f/2": "cancelled", "f/3": "succeeded",
        END: "running",
    }  # fmt: skip


def test_what_is_behind_a_cancelled_item_is_given_back_when_the_worker_stops(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("f", foreach=[1] * 3))
    expand(engine, "r", "f", 3)
    first = take(ledger, "r", "f/0-3")
    engine.cancel_step("r", "f/1")
    assert ledger.complete("r", first, "succeeded", how=HOW, inline="").publish == ("f/0-3",)
    assert take(ledger, "r", "f/0-3", OTHER).index == 2


def test_what_is_behind_a_cancelled_item_is_taken_up_when_the_worker_dies(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("f", foreach=[1] * 3))
    expand(engine, "r", "f", 3)
    take(ledger, "r", "f/0-3")
    engine.cancel_step("r", "f/0")
    assert ledger.abandon("r", HOW.record, "it died")[1] == ["f/0-3"]
    assert take(ledger, "r", "f/0-3", OTHER).index == 1


def test_with_max_parallel_a_cancelled_item_lets_the_next_begin(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("f", foreach=[1] * 3, max_parallel=1))
    expand(engine, "r", "f", 3, parallel=1, size=1)
    engine.cancel_step("r", "f/0")
    do(engine, "r", "f/1-2")
    do(engine, "r", "f/2-3")
    assert states(ledger, "r")["f"] == "cancelled"


def test_a_step_that_waits_for_a_nested_run_is_cancelled_with_it(engine: Engine, ledger: Ledger) -> None:
    start(engine, "parent", Step(id="n", workflow="child"), step("after", "n"))
    child = start(engine, "other", step("a"))
    taken = take(ledger, "parent", "n")
    parent = {"run": "parent", "step": "n", "index": -1, "attempt": 1}
    engine.start("child", child, event={}, params={}, parent=parent)
    ledger.complete("parent", taken, "waiting", payload="child", how=HOW, inline="")
    assert engine.cancel_step("parent", "n") is True
    assert engine.cancel_step("parent", "n") is False
    assert state(ledger, "child") == "cancelled"
    assert states(ledger, "parent") == {"n": "cancelled", "after": "upstream_failed", END: "queued"}
    assert state(ledger, "other") == "queued"


def test_a_nested_run_that_was_being_started_is_cancelled_with_its_step(engine: Engine, ledger: Ledger) -> None:
    start(engine, "parent", Step(id="n", workflow="child"))
    child = start(engine, "other", step("a"))
    taken = take(ledger, "parent", "n")
    engine.cancel_step("parent", "n")
    parent = {"run": "parent", "step": "n", "index": -1, "attempt": 1}
    engine.start("child", child, event={}, params={}, parent=parent)
    answer = ledger.complete("parent", taken, "waiting", payload="child", how=HOW, inline="")
    engine.publish("parent", answer.publish)
    assert state(ledger, "child") == "cancelled"
    assert states(ledger, "parent")["n"] == "cancelled"


def test_what_was_cancelled_runs_in_the_next_episode(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("b", "a"), step("f", foreach=[1, 2]))
    expand(engine, "r", "f", 2)
    do(engine, "r", "a")
    taken = take(ledger, "r", "b")
    engine.cancel_step("r", "b")
    engine.cancel_step("r", "f/1")
    ledger.complete("r", taken, "cancelled", how=HOW, inline="")
    do(engine, "r", "f/0-2")
    assert end(engine, "r") == "failed"
    assert resume(engine, "r") == 2
    again = take(ledger, "r", "b")
    assert ledger.renew([("r", "b", again.fence)]) == (set(), set())
    ledger.complete("r", again, "succeeded", how=HOW, inline="")
    do(engine, "r", "f/1-2")
    do(engine, "r", END)
    assert state(ledger, "r") == "succeeded"


def test_an_attempt_that_is_over_is_left_as_it_is(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"))
    do(engine, "r", "a", "retrying", delay_ms=0)
    ledger.client.zadd(keys.run_key("r", "timers"), {"a": 1})
    engine.fire("r")
    take(ledger, "r", "a")
    assert engine.cancel_step("r", "a", 1) is False
    assert states(ledger, "r")["a"] == "running"
    assert engine.cancel_step("r", "a", 2) is True


def test_the_attempt_that_waits_for_the_next_is_not_over(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"))
    do(engine, "r", "a", "retrying", delay_ms=60_000)
    assert engine.cancel_step("r", "a", 1) is True


def test_what_has_ended_or_is_being_cancelled_is_not_cancelled_again(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("b"))
    do(engine, "r", "a")
    assert engine.cancel_step("r", "a") is False
    take(ledger, "r", "b")
    engine.cancel("r")
    assert engine.cancel_step("r", "b") is False


def test_a_repeat_whose_first_answer_was_lost_publishes_the_rest_from_the_outbox(
    engine: Engine, ledger: Ledger
) -> None:
    start(engine, "r", step("a"))
    ledger.cancel_step("r", "a")
    assert engine.cancel_step("r", "a") is False
    assert ledger.sweep("r", -60_000)[1] == [END]


@pytest.mark.parametrize(
    ("slot", "kind", "said"),
    [
        ("b", NotFoundError, "run r has no step 'b'; it has a, f, clean"),
        (END, NotFoundError, "has no step"),
        ("a/0", NotFoundError, "step a of run r has no item 0"),
        ("f/0", InputError, "f/0 of run r is not there yet"),
        ("clean", InputError, "clean of run r is not there yet"),
    ],
)
def test_what_is_not_there_is_said_to_be(engine: Engine, slot: str, kind: type[Exception], said: str) -> None:
    start(engine, "r", step("a"), step("f", foreach=[1]), step("clean", phase=Phase.FINALLY))
    with pytest.raises(kind, match=said.replace("(", r"\(")):
        engine.cancel_step("r", slot)


def test_an_attempt_that_nobody_will_make_next_is_not_there(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("b"))
    do(engine, "r", "b", "retrying", delay_ms=60_000)
    for slot, attempt in (("a", 2), ("b", 3)):
        with pytest.raises(NotFoundError, match=f"step {slot} of run r has no attempt {attempt}"):
            engine.cancel_step("r", slot, attempt)
    assert engine.cancel_step("r", "a", 1) is True
    assert engine.cancel_step("r", "b", 2) is True
    assert states(ledger, "r") == {"a": "cancelled", "b": "cancelled", END: "queued"}


def test_an_item_beyond_the_last_is_not_there(engine: Engine) -> None:
    start(engine, "r", step("f", foreach=[1]))
    expand(engine, "r", "f", 1)
    with pytest.raises(NotFoundError, match="step f of run r has no item 1"):
        engine.cancel_step("r", "f/1")


def test_a_run_that_is_not_known_is_said_to_be(engine: Engine) -> None:
    with pytest.raises(NotFoundError, match="run nobody is not known"):
        engine.cancel_step("nobody", "a")


@pytest.mark.parametrize("slot", ["a", "f/12"])
def test_a_task_id_says_run_step_item_and_attempt(slot: str) -> None:
    assert parse_task_id(task_id("r1", slot, 3)) == ("r1", slot, 3)


@pytest.mark.parametrize("text", ["", "r", "r:a", "r:a:", "r:a:x", ":a:1", "r::1", "r:a:0:1:2", "r:a:-1:1", "r:a:²"])
def test_what_is_no_task_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no task id"):
        parse_task_id(text)
