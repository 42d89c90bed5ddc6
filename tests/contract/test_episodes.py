"""Attempts, timers, cancelling and further episodes on a real server: what the ledger and resume.py promise."""

from __future__ import annotations

import json
import random
import time
import uuid
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orchestrator.engine import Engine
from orchestrator.errors import InputError, UnavailableError
from orchestrator.ledger import Answer, Ledger, Taken, keys
from orchestrator.ledger.ledger import How
from orchestrator.ledger.queries import Queries
from orchestrator.plan import Plan
from orchestrator.resume import InFlightError, check, redrive, rerun, resume
from orchestrator.retries import RetryPolicy
from orchestrator.runs import child_run_id
from orchestrator.settings import Settings
from orchestrator.workflows import END, Phase, Step, TriggerRule, Workflow
from tests.conftest import Server

HOW = How('{"worker": "w"')
ERROR = ',"error":{"type":"Boom","message":"no","fingerprint":"f"}'


@pytest.fixture
def ledger(engine: Engine) -> Ledger:
    return engine.ledger


def step(step_id: str, *needs: str, **options: Any) -> Step:
    return Step(id=step_id, task="tasks:f", needs=needs, **options)


def start(engine: Engine, run: str, *steps: Step, **options: Any) -> Plan:
    plan = Plan.of(Workflow(name="w", steps=steps, **options))
    engine.ledger.publish_workflows([plan])
    event = {"id": "e", "source": "s", "type": "t", "data": {}}
    assert engine.start(run, plan, event=event, params={})
    return plan


def take(ledger: Ledger, run: str, unit: str, how: How = HOW) -> Taken:
    answer = ledger.begin(run, [unit], how)
    assert answer.verdict == "go", answer
    assert answer.taken is not None
    return answer.taken


def do(engine: Engine, run: str, unit: str, state: str = "succeeded", *, delay_ms: int = 0, how: How = HOW) -> Answer:
    """Take a unit and complete it; what is ready is published."""
    taken = take(engine.ledger, run, unit, how)
    if unit == END:
        answer = engine.ledger.finish(run, taken, state, payload="1", error="" if state == "succeeded" else "{}")
    else:
        tail = ERROR if state in ("failed", "retrying") else ""
        answer = engine.ledger.complete(run, taken, state, tail=tail, delay_ms=delay_ms, how=how, inline="")
    engine.publish(run, answer.publish)
    return answer


def states(ledger: Ledger, run: str) -> dict[str, str]:
    return {k: v for k, v in ledger.client.hgetall(keys.run_key(run, "states")).items() if ":" not in k}


def state(ledger: Ledger, run: str) -> str:
    return ledger.outcome(run)[0]


def expand(engine: Engine, run: str, step_id: str, count: int, *, parallel: int = 0, size: int = 10) -> None:
    taken = take(engine.ledger, run, step_id)
    answer = engine.ledger.expand(
        run, taken, count, size=size, max_parallel=parallel, per=100, chunks=[json.dumps(list(range(count)))],
        how=HOW, inline="",
    )  # fmt: skip
    engine.publish(run, answer.publish)


# Attempts and timers


def test_a_failed_attempt_is_followed_by_another_when_it_is_due(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("b", "a"))
    do(engine, "r", "a", "retrying", delay_ms=60_000)
    assert states(ledger, "r")["a"] == "retrying"
    assert ledger.begin("r", ["a", "b"], HOW).verdict == "done"  # not before its time, and not the next link either
    assert ledger.fire("r") == []
    ledger.client.zadd(keys.run_key("r", "timers"), {"a": 1})
    assert ledger.fire("r") == ["a"]
    assert ledger.fire("r") == []
    taken = take(ledger, "r", "a")
    assert (taken.attempt, taken.tries, taken.losses) == (2, 2, 0)
    found = Queries(ledger, engine.payloads).step("r", "a")
    assert found.attempts == 2


def test_a_repeated_report_of_a_failed_attempt_counts_once(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"))
    taken = take(ledger, "r", "a")
    for verdict in ("ok", "done"):
        answer = ledger.complete("r", taken, "retrying", tail=ERROR, delay_ms=0, how=HOW, inline="")
        assert answer.verdict == verdict
    assert ledger.attempts_of("r", "a") == (2, 2)


def test_what_is_due_is_known_over_all_runs_in_order(engine: Engine, ledger: Ledger) -> None:
    for run in ("r1", "r2", "r3"):
        start(engine, run, step("a"))
    now = ledger.now_ms()
    for run, delay in (("r1", 50_000), ("r2", 0), ("r3", 90_000)):
        do(engine, run, "a", "retrying", delay_ms=delay)
    runs, following = ledger.due(now + 20_000, 100)
    assert runs == ["r2"]
    assert following is not None
    assert 40_000 < following - now < 60_000
    assert ledger.due(now + 100_000, 1)[0] == ["r1"]


def test_a_timer_that_the_index_has_lost_is_found_by_the_rescuer(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"))
    do(engine, "r", "a", "retrying", delay_ms=0)
    ledger.client.delete(keys.TIMERS)
    ledger.client.zadd(keys.run_key("r", "timers"), {"a": 1})
    assert ledger.look(["r"])[0] == ["r"]
    engine.repair("r")
    assert states(ledger, "r")["a"] == "queued"


def test_an_item_waits_alone_for_its_next_attempt(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("f", foreach=[1, 2, 3]))
    expand(engine, "r", "f", 3)
    taken = take(ledger, "r", "f/0-3")
    answer = ledger.complete("r", taken, "retrying", tail=ERROR, delay_ms=0, how=HOW, inline="default")
    assert answer.taken is not None
    assert answer.taken.slot == "f/1"
    answer = ledger.complete("r", answer.taken, "succeeded", how=HOW, inline="default")
    assert answer.taken is not None
    ledger.complete("r", answer.taken, "succeeded", how=HOW, inline="default")
    assert states(ledger, "r")["f"] == "running"
    assert ledger.fire("r") == ["f/0-1"]
    do(engine, "r", "f/0-1", "retrying")  # its own part has the same name again
    assert ledger.fire("r") == ["f/0-1"]
    do(engine, "r", "f/0-1")
    assert states(ledger, "r")["f"] == "succeeded"


def test_a_step_sleeps_without_anybody_and_then_has_succeeded(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", Step(id="a", sleep="1h"), step("b", "a"))
    do(engine, "r", "a", "sleeping", delay_ms=0)
    assert ledger.begin("r", ["a"], HOW).verdict == "done"
    assert ledger.fire("r") == ["b"]
    assert states(ledger, "r")["a"] == "succeeded"


def test_a_function_that_is_not_there_is_no_attempt(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"))
    do(engine, "r", "a", "postponed")
    ledger.fire("r")
    time.sleep(0.002)
    taken = take(ledger, "r", "a")
    assert (taken.attempt, taken.tries) == (1, 1)
    assert taken.postponed_ms > 0


def test_a_run_past_its_timeout_fails_and_its_hooks_run(engine: Engine, ledger: Ledger) -> None:
    hooks = (step("tell", phase=Phase.ON_FAILURE), step("clean", phase=Phase.FINALLY))
    start(engine, "r", step("a"), step("b", "a"), *hooks, timeout_s=3600)
    taken = take(ledger, "r", "a")
    assert ledger.fire("r") == []
    ledger.client.zadd(keys.run_key("r", "timers"), {"$deadline": 1})
    ledger.fire("r")
    assert ledger.renew([("r", "a", taken.fence)]) == (set(), {("r", "a")})
    engine.publish("r", ledger.complete("r", taken, "cancelled", how=HOW, inline="").publish)
    assert states(ledger, "r") == {"a": "cancelled", "b": "cancelled", "tell": "queued"}
    hook = take(ledger, "r", "tell")
    assert hook.meta[8:10] == ["on_failure", "failed"]
    ledger.complete("r", hook, "succeeded", how=HOW, inline="")
    do(engine, "r", "clean")
    assert state(ledger, "r") == "failed"
    assert json.loads(ledger.outcome("r")[2])["type"] == "RunTimeout"


# Hooks


def test_hooks_run_after_the_outcome_is_known_and_before_the_end(engine: Engine, ledger: Ledger) -> None:
    tell, clean = step("tell", phase=Phase.ON_FAILURE), step("clean", phase=Phase.FINALLY)
    hooks = (tell, clean, step("after", "clean", phase=Phase.FINALLY))
    start(engine, "ok", step("a"), *hooks)
    do(engine, "ok", "a")
    do(engine, "ok", END)
    assert state(ledger, "ok") == "running"
    assert states(ledger, "ok") == {"a": "succeeded", END: "succeeded", "tell": "skipped", "clean": "queued"}
    do(engine, "ok", "clean")
    do(engine, "ok", "after")
    assert state(ledger, "ok") == "succeeded"
    start(engine, "bad", step("a"), *hooks)
    do(engine, "bad", "a", "failed")
    do(engine, "bad", END, "failed")
    assert ledger.begin("bad", ["clean"], HOW).verdict == "early"
    for hook in ("tell", "clean", "after"):
        do(engine, "bad", hook)
    assert state(ledger, "bad") == "failed"


def test_a_hook_that_fails_fails_the_run(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("clean", phase=Phase.FINALLY))
    do(engine, "r", "a")
    do(engine, "r", END)
    do(engine, "r", "clean", "failed")
    assert state(ledger, "r") == "failed"
    assert json.loads(ledger.outcome("r")[2]) == {"type": "Boom", "message": "no", "step": "clean"}


# Cancelling


def test_a_cancelled_run_begins_nothing_further_and_ends_when_all_is_stopped(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("b"), step("c", "a"), step("f", foreach=[1, 2, 3]))
    expand(engine, "r", "f", 3)
    item = take(ledger, "r", "f/0-3")
    a = take(ledger, "r", "a", OTHER)
    assert engine.cancel("r")
    assert not engine.cancel("r")
    assert ledger.begin("r", ["b"], HOW).verdict == "done"
    assert ledger.renew([("r", "a", a.fence), ("r", "f/0-3", item.fence)])[1] == {("r", "a"), ("r", "f/0-3")}
    answer = ledger.complete("r", item, "cancelled", how=HOW, inline="default")
    assert answer.taken is None
    assert state(ledger, "r") == "running"
    engine.publish("r", ledger.complete("r", a, "succeeded", how=OTHER, inline="default").publish)
    assert state(ledger, "r") == "cancelled"
    assert set(states(ledger, "r").values()) == {"cancelled", "succeeded"}
    assert ledger.active() == []


OTHER = How('{"worker": "another"')


def test_nobody_needs_to_be_there_for_a_cancel(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("f", foreach=[1, 2]), Step(id="s", sleep="1h"), step("t"))
    do(engine, "r", "s", "sleeping", delay_ms=100_000)
    do(engine, "r", "t", "retrying", delay_ms=100_000)
    expand(engine, "r", "f", 2)
    assert engine.cancel("r")
    assert state(ledger, "r") == "cancelled"
    assert ledger.fire("r") == []
    assert Queries(ledger, engine.payloads).run("r").cancel_requested


def test_a_worker_that_dies_while_its_run_is_cancelled_is_not_waited_for(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("b", "a"))
    take(ledger, "r", "a", How('{"worker": "w"', lease_ms=1))
    engine.cancel("r")
    time.sleep(0.005)
    engine.repair("r")
    assert state(ledger, "r") == "cancelled"


def test_cancelling_goes_down_into_nested_runs_and_comes_back_up(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("b", "a"))
    plan = start(engine, "parent", step("n"), step("m", "n"))
    parent = {"run": "parent", "step": "n", "index": -1, "attempt": 1}
    engine.start("child", plan, event={}, params={}, parent=parent)
    taken = take(ledger, "parent", "n")
    ledger.complete("parent", taken, "waiting", payload="child", how=HOW, inline="")
    engine.cancel("parent")
    assert state(ledger, "child") == "cancelled"
    assert state(ledger, "parent") == "cancelled"
    assert states(ledger, "parent") == {"n": "cancelled", "m": "cancelled"}


def test_a_nested_run_that_was_being_started_is_cancelled_too(engine: Engine, ledger: Ledger) -> None:
    plan = start(engine, "parent", step("n"))
    taken = take(ledger, "parent", "n")
    engine.cancel("parent")
    engine.start("child", plan, event={}, params={}, parent={"run": "parent", "step": "n", "index": -1, "attempt": 1})
    engine.publish("parent", ledger.complete("parent", taken, "waiting", payload="child", how=HOW, inline="").publish)
    assert (state(ledger, "child"), state(ledger, "parent")) == ("cancelled", "cancelled")


@pytest.mark.parametrize("is_started", [True, False])
def test_a_nested_run_whose_starter_died_before_it_could_say_so_is_cancelled_too(
    engine: Engine, ledger: Ledger, is_started: bool
) -> None:
    inner = start(engine, "other", step("a"))
    start(engine, "top", Step(id="n", workflow="w"))
    take(ledger, "top", "n", How('{"worker": "w"', lease_ms=1))
    child = child_run_id("top", "n", None, 1)
    if is_started:
        parent = {"run": "top", "step": "n", "index": -1, "attempt": 1}
        engine.start(child, inner, event={}, params={}, parent=parent)
    engine.cancel("top")
    time.sleep(0.005)
    engine.repair("top")
    assert (state(ledger, child), state(ledger, "top")) == ("cancelled" if is_started else "", "cancelled")


def test_a_cancel_whose_answer_was_lost_is_not_a_second_one(
    engine: Engine, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(engine, "r", step("a"), step("clean", phase=Phase.FINALLY))
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_script", _asked_again(ledger))
        assert ledger.cancel("r").verdict == "done"
    do(engine, "r", "clean")
    assert (state(ledger, "r"), states(ledger, "r")["clean"]) == ("cancelled", "succeeded")


def _asked_again(ledger: Ledger) -> Any:
    """Call the script twice and answer what the second call does, as the client does when an answer is lost."""
    script = ledger._script
    return lambda **call: script(**call) and script(**call)


def test_a_second_cancel_ends_the_hooks_too(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("clean", phase=Phase.FINALLY), step("late", "clean", phase=Phase.FINALLY))
    engine.cancel("r")
    assert state(ledger, "r") == "queued"
    assert engine.cancel("r")
    assert state(ledger, "r") == "cancelled"
    assert states(ledger, "r")["late"] == "cancelled"


# Further episodes


def fail_at_b(engine: Engine, run: str, **options: Any) -> Plan:
    plan = start(engine, run, step("a"), step("b", "a"), step("c", "b"), step("d", "a"), **options)
    do(engine, run, "a")
    do(engine, run, "d")
    do(engine, run, "b", "failed")
    do(engine, run, END, "failed")
    assert state(engine.ledger, run) == "failed"
    return plan


def test_a_redriven_step_goes_on_in_its_own_run(engine: Engine, ledger: Ledger) -> None:
    fail_at_b(engine, "r")
    assert [states(ledger, "r")[slot] for slot in "abcd"] == ["succeeded", "failed", "upstream_failed", "succeeded"]
    done = redrive(engine, "r", {"b": {"x": 5}, "a": None})
    assert (done.episode, done.slots, dict(done.skipped)) == (2, ("b",), {"a": "it has not failed: it is succeeded"})
    assert states(ledger, "r") == {"a": "succeeded", "b": "queued", "d": "succeeded"}
    taken = take(ledger, "r", "b")
    assert (taken.attempt, taken.tries, taken.mended) == (2, 1, '{"x":5}')
    ledger.complete("r", taken, "succeeded", how=HOW, inline="")
    do(engine, "r", "c")
    do(engine, "r", END)
    assert state(ledger, "r") == "succeeded"
    run = Queries(ledger, engine.payloads).run("r")
    assert (run.episode, run.error) == (2, None)


def test_a_server_that_is_away_is_said_to_be(settings: Settings, own_server: Server) -> None:
    engine = Engine(settings.evolve(broker_url=own_server.url, ledger_url=own_server.url), patience_s=0.0)
    own_server.stop()
    for go_on in (resume, rerun, lambda engine, run: redrive(engine, run, {"a": None})):
        with pytest.raises(UnavailableError, match="cannot be used"):
            go_on(engine, "r")


def test_what_runs_again_is_a_dead_letter_no_longer_hooks_too(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("clean", phase=Phase.FINALLY))
    do(engine, "r", "a", "failed")
    do(engine, "r", END, "failed")
    do(engine, "r", "clean", "failed")
    assert {letter.slot for letter in engine.dead_letters.all()} == {"a", "clean"}
    resume(engine, "r")
    assert list(engine.dead_letters.all()) == []


def test_who_dies_while_it_opens_an_episode_leaves_no_dead_letter(
    engine: Engine, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at_b(engine, "r")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "publish", _die)
        with pytest.raises(KeyboardInterrupt):
            redrive(engine, "r", {"b": None})
    assert [letter.slot for letter in engine.dead_letters.all()] == ["b"]
    engine.publish("r", ledger.sweep("r", 0)[1])
    assert list(engine.dead_letters.all()) == []


def _die(*_given: Any, **_options: Any) -> None:
    raise KeyboardInterrupt


def test_all_that_is_downstream_of_a_redriven_step_runs_again(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), *(step(below, above) for above, below in pairwise("abcde")))
    do(engine, "r", "a")
    do(engine, "r", "b", "failed")
    do(engine, "r", END, "failed")
    redrive(engine, "r", {"b": None})
    assert states(ledger, "r") == {"a": "succeeded", "b": "queued"}
    for unit in ("b", "c", "d", "e", END):
        do(engine, "r", unit)
    assert (state(ledger, "r"), states(ledger, "r")["e"]) == ("succeeded", "succeeded")


def test_of_two_who_do_the_same_one_has_the_effect(engine: Engine) -> None:
    fail_at_b(engine, "r")
    redrive(engine, "r", {"b": None})
    with pytest.raises(InFlightError, match="going on"):
        redrive(engine, "r", {"b": None})
    with pytest.raises(InFlightError, match="going on"):
        resume(engine, "r")
    fail_at_b(engine, "s")
    assert rerun(engine, "s") != "s"


def test_who_opened_an_episode_and_lost_the_answer_was_nobody_else(
    engine: Engine, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at_b(engine, "r")
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_script", _asked_again(ledger))
        assert redrive(engine, "r", {"b": None}).episode == 2
    do(engine, "r", "b")


def test_the_items_of_a_fan_out_are_sent_back_alone(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("f", foreach=[1, 2, 3, 4], max_parallel=2), step("g", "f"))
    expand(engine, "r", "f", 4, parallel=2, size=1)
    for index in range(4):
        do(engine, "r", f"f/{index}-{index + 1}", "failed" if index != 1 else "succeeded")
    do(engine, "r", END, "failed")
    assert redrive(engine, "r", {"f": None}).skipped == {"f": "its items have failed, not the step: send them back"}
    done = redrive(engine, "r", {"f/0": None, "f/2": {"x": 1}, "f/3": None})
    assert done.slots == ("f/0", "f/2", "f/3")
    assert ledger.begin("r", ["f/3-4"], HOW).verdict == "early"  # max_parallel: not handed out yet
    do(engine, "r", "f/0-1")
    do(engine, "r", "f/2-3")
    do(engine, "r", "f/3-4")
    assert states(ledger, "r")["f"] == "succeeded"
    do(engine, "r", "g")
    do(engine, "r", END)
    assert state(ledger, "r") == "succeeded"


def test_a_resumed_run_keeps_what_is_there(engine: Engine, ledger: Ledger) -> None:
    fail_at_b(
        engine,
        "r",
    )
    found = check(engine, "r")
    assert (found.keeps, dict(found.again)) == (("a", "d"), {"b": "failed", "c": "runs after b"})
    assert resume(engine, "r", episode=1) == 2
    with pytest.raises(InFlightError):
        resume(engine, "r", episode=1)
    for unit in ("b", "c", END):
        do(engine, "r", unit)
    assert state(ledger, "r") == "succeeded"
    with pytest.raises(InputError, match="has succeeded"):
        resume(engine, "r")


def test_a_cancelled_run_is_resumed_where_it_was_stopped(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("f", "a", foreach=[1, 2, 3]), step("c", "f"))
    do(engine, "r", "a")
    expand(engine, "r", "f", 3, size=1)
    do(engine, "r", "f/0-1")
    engine.cancel("r")
    assert state(ledger, "r") == "cancelled"
    resume(engine, "r")
    assert [states(ledger, "r")[slot] for slot in ("a", "f", "f/0", "f/1", "f/2")] == [
        "succeeded", "running", "succeeded", "queued", "queued"
    ]  # fmt: skip
    for unit in ("f/1-2", "f/2-3", "c", END):
        do(engine, "r", unit)
    assert state(ledger, "r") == "succeeded"


def test_a_resumed_run_takes_the_mended_definition_and_says_what_runs_again(engine: Engine, ledger: Ledger) -> None:
    fail_at_b(engine, "r")
    mended = Workflow(
        name="w",
        steps=(step("a"), step("b", "a", with_={"x": 1}), step("c", "b"), step("d", "a", pool="cpu"), step("e", "d")),
    )
    ledger.publish_workflows([Plan.of(mended)])
    found = check(engine, "r")
    assert found.definition_changed
    assert found.keeps == ("a", "d")
    assert dict(found.again) == {"b": "its definition changed (with)", "c": "runs after b", "e": "is new"}
    assert check(engine, "r", keep_definition=True).again.keys() == {"b", "c"}
    resume(engine, "r")
    assert states(ledger, "r") == {"a": "succeeded", "b": "queued", "d": "succeeded", "e": "queued"}
    for unit in ("b", "c", "e", END):
        do(engine, "r", unit)
    assert state(ledger, "r") == "succeeded"


def test_a_step_that_is_gone_leaves_nothing_behind(engine: Engine, ledger: Ledger) -> None:
    fail_at_b(engine, "r")
    ledger.publish_workflows([Plan.of(Workflow(name="w", steps=(step("a"), step("d", "a"))))])
    assert check(engine, "r").gone == ("b", "c")
    resume(engine, "r")
    do(engine, "r", END)
    assert state(ledger, "r") == "succeeded"
    assert set(states(ledger, "r")) == {"a", "d", END}


def test_a_nested_run_takes_along_who_waits_for_it(engine: Engine, ledger: Ledger) -> None:
    def nest(run: str, child: str) -> None:
        plan = start(engine, run, Step(id="n", workflow="w"), step("m", "n"))
        taken = take(ledger, run, "n")
        engine.start(child, plan, event={}, params={}, parent={"run": run, "step": "n", "index": -1, "attempt": 1})
        ledger.complete(run, taken, "waiting", payload=child, how=HOW, inline="")

    nest("top", "middle")
    taken = take(ledger, "middle", "n")
    plan = Plan.of(Workflow(name="leaf", steps=(step("a"), step("b", "a"))))
    ledger.put_plan(plan)
    engine.start("leaf", plan, event={}, params={}, parent={"run": "middle", "step": "n", "index": -1, "attempt": 1})
    ledger.complete("middle", taken, "waiting", payload="leaf", how=HOW, inline="")
    for again in ("redrive", "resume"):
        do(engine, "leaf", "a") if again == "redrive" else None
        do(engine, "leaf", "b", "failed")
        do(engine, "leaf", END, "failed")
        do(engine, "middle", END, "failed")
        do(engine, "top", END, "failed")
        assert [state(ledger, run) for run in ("leaf", "middle", "top")] == ["failed"] * 3
        if again == "redrive":
            redrive(engine, "leaf", {"b": None})
        else:
            resume(engine, "top")
        assert [state(ledger, run) for run in ("leaf", "middle", "top")] == ["running"] * 3
    do(engine, "leaf", "b")
    do(engine, "leaf", END)
    for run in ("middle", "top"):
        do(engine, run, "m")
        do(engine, run, END)
    assert [state(ledger, run) for run in ("leaf", "middle", "top")] == ["succeeded"] * 3


def test_who_died_between_the_runs_leaves_none_waiting_for_ever(engine: Engine, ledger: Ledger) -> None:
    plan = start(engine, "top", Step(id="n", workflow="w"))
    taken = take(ledger, "top", "n")
    leaf = Plan.of(Workflow(name="leaf", steps=(step("a"),)))
    ledger.put_plan(leaf)
    engine.start("leaf", leaf, event={}, params={}, parent={"run": "top", "step": "n", "index": -1, "attempt": 1})
    ledger.complete("top", taken, "waiting", payload="leaf", how=HOW, inline="")
    do(engine, "leaf", "a", "failed")
    do(engine, "leaf", END, "failed")
    do(engine, "top", END, "failed")
    reopening = {
        "plan": plan.hash, "input": "{}", "graph": None, "reset": [], "gone": [], "items": {}, "waits": {"n": "leaf"},
        "mended": {}, "failed": [], "timeout_ms": 0, "parent": None, "hooks": False,
    }  # fmt: skip
    assert ledger.reopen("top", 1, reopening).verdict == "ok"  # and here whoever did it has died
    for row in ledger.sweep("top", -60_000)[1]:
        engine.publish("top", [row])
    do(engine, "top", END, "failed")
    assert state(ledger, "top") == "failed"


def test_a_reopened_run_is_in_flight_whoever_closes_it_late(engine: Engine, ledger: Ledger) -> None:
    fail_at_b(engine, "r")
    resume(engine, "r")
    ledger.close("r")
    assert ledger.active() == ["r"]
    assert ledger.client.ttl(keys.run_key("r", "run")) == -1


# Whatever happens


@st.composite
def shapes(draw: st.DrawFn) -> list[Step]:
    made = []
    for n in range(draw(st.integers(1, 6))):
        above = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=3)) if n else []
        items = draw(st.none() | st.integers(0, 6))
        options: dict[str, Any] = {}
        if items is not None:
            options = {"foreach": list(range(items)), "max_parallel": draw(st.none() | st.integers(1, 3))}
        if above:
            options["trigger_rule"] = draw(st.sampled_from([TriggerRule.ALL_SUCCESS] * 3 + list(TriggerRule)))
        made.append(step(f"s{n}", *(f"s{m}" for m in above), **options))
    if draw(st.booleans()):
        made.append(step("tell", phase=Phase.ON_FAILURE))
    if draw(st.booleans()):
        made += [step("clean", phase=Phase.FINALLY), step("after", "clean", phase=Phase.FINALLY)]
    return made


class World:
    """Messages get lost and come twice, processes die between any two verbs, attempts fail as they like."""

    def __init__(self, engine: Engine, plan: Plan, run: str, seed: int) -> None:
        self.engine, self.ledger, self.plan, self.run = engine, engine.ledger, plan, run
        self.chance = random.Random(seed)
        self.queue: list[str] = list(plan.roots)
        self.begun: Counter[str] = Counter()
        self.is_mended = False
        self.may_cancel = False
        #: Steps and items that this episode was told to cancel.
        self.cancelled: set[str] = set()

    def publish(self, rows: Sequence[str]) -> None:
        self.queue.extend(row for row in rows if row[0] not in "!^")
        chores = [row for row in rows if row[0] in "!^"]
        if self.chance.random() < 0.8:
            self.engine.publish(self.run, chores)
            self.ledger.clear(self.run, rows)

    def live(self, cancel_at: int, cancel_steps_at: Container[int] = ()) -> str:
        """Go on until the run has ended; returns its state."""
        self.cancelled.clear()
        for turn in range(5000):
            if turn == cancel_at:
                self.publish(self.ledger.cancel(self.run).publish)
            if turn in cancel_steps_at:
                self.cancel_a_step()
            if self.queue:
                unit = self.queue.pop(self.chance.randrange(len(self.queue)))
                if self.chance.random() > 0.2:  # else the message is lost
                    self.deliver(unit)
                continue
            time.sleep(0.002)  # leases of the dead run out
            now, again, _, _ = self.ledger.sweep(self.run, 0)
            self.publish(again)
            if now in ("succeeded", "failed", "cancelled"):
                return now
            fired = self.ledger.fire(self.run)
            self.publish(fired)
            if not self.queue and not again and not fired:
                version = self.ledger.look([self.run], 0)[1].get(self.run)
                if version is not None:
                    self.queue += self.ledger.limbo({self.run: version})[self.run][0]
                    timers = self.ledger.client.zcard(keys.run_key(self.run, "timers"))
                    assert self.queue or timers, "idle, and nothing is in limbo"
        pytest.fail("the run does not end")

    def cancel_a_step(self) -> None:
        """Cancel any step or item there is, whatever it does."""
        slot = self.chance.choice(sorted({*self.plan.steps, *states(self.ledger, self.run)}))
        for _ in range(1 if self.chance.random() < 0.9 else 2):  # the answer was lost
            answer = self.ledger.cancel_step(self.run, slot)
            if answer.verdict == "ok":
                self.cancelled.add(slot)
            self.publish(answer.publish)

    def deliver(self, unit: str) -> None:
        how = How(f'{{"worker": "{uuid.uuid4().hex}"', lease_ms=1)
        answer = self.ledger.begin(self.run, [unit], how)
        if self.chance.random() < 0.1:
            answer = self.ledger.begin(self.run, [unit], how)  # the answer was lost
        if self.chance.random() < 0.1:
            self.queue.append(unit)  # and this one is delivered twice
        while answer.taken is not None and self.chance.random() > 0.05:  # or the process dies with what it has taken
            answer = self.work(answer.taken, how)
            if self.chance.random() < 0.1:
                return  # it dies before it has published
            self.publish(answer.publish)

    def work(self, taken: Taken, how: How) -> Answer:
        inline = "default" if self.chance.random() < 0.7 else ""
        if taken.unit == END:
            final = dict(zip(taken.chunk[::2], taken.chunk[1::2], strict=True))
            bad = bool(final) and bool(self.plan.unhandled(final))
            error = '{"type": "Boom", "message": ""}' if bad else ""
            return self.ledger.finish(self.run, taken, "failed" if bad else "succeeded", payload="1", error=error)
        assert not self.cancelled & {taken.step, taken.slot}, "what was cancelled is begun"
        foreach = self.plan.steps[taken.step].foreach
        if foreach is not None and taken.index < 0:
            parallel = self.plan.steps[taken.step].max_parallel or 0
            return self.ledger.expand(
                self.run, taken, len(foreach), size=1 if parallel else self.chance.randint(1, 4), max_parallel=parallel,
                per=100, chunks=["[]"], how=how, inline=inline,
            )  # fmt: skip
        self.begun[taken.slot] += 1
        outcome = "succeeded"
        if not self.is_mended:
            outcome = self.chance.choice(["succeeded"] * 6 + ["retrying", "sleeping", "postponed", "failed"])
        if taken.tries > 3 and outcome == "retrying":
            outcome = "failed"
        if self.chance.random() < 0.3:
            if self.may_cancel and not self.is_mended and self.chance.random() < 0.2:
                self.cancel_a_step()
            _, to_stop = self.ledger.renew([(self.run, taken.unit, taken.fence)], 1)
            outcome = "cancelled" if to_stop else outcome
        tail = ERROR if outcome in ("failed", "retrying") else ""
        for _ in range(1 if self.chance.random() < 0.9 else 2):  # the answer was lost
            answer = self.ledger.complete(
                self.run, taken, outcome, payload="1", tail=tail, delay_ms=0, how=how, inline=inline
            )
        return answer


def slots_of(plan: Plan, final: Mapping[str, str]) -> set[str]:
    """Return every step and item that there has to be."""
    found = set()
    for s in plan.steps.values():
        found.add(s.id)
        if s.foreach is not None and final.get(s.id) not in ("skipped", "upstream_failed", "cancelled"):
            found |= {f"{s.id}/{i}" for i in range(len(s.foreach))}
    return found


@given(
    shape=shapes(),
    seed=st.integers(0, 2**32),
    cancel_at=st.none() | st.integers(0, 30),
    cancel_steps_at=st.sets(st.integers(0, 30), max_size=4),
)
@hypothesis_settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_run_ends_and_is_brought_to_its_end_in_further_episodes(
    engine: Engine, ledger: Ledger, shape: list[Step], seed: int, cancel_at: int | None, cancel_steps_at: set[int]
) -> None:
    run = uuid.uuid4().hex
    plan = start(engine, run, *shape)
    world = World(engine, plan, run, seed)
    world.may_cancel = bool(cancel_steps_at)
    end = world.live(-1 if cancel_at is None else cancel_at, cancel_steps_at)
    episode = 1
    while end != "succeeded":
        final = states(ledger, run)
        assert set(final.values()) <= {"succeeded", "failed", "skipped", "upstream_failed", "cancelled"}, final
        ended = {slot: final.get(slot) for slot in world.cancelled}
        assert set(ended.values()) <= {"succeeded", "failed", "cancelled"}, "what was cancelled ends as if it was not"
        assert end == "failed" or cancel_at is not None
        kept = {slot for slot, one in final.items() if one == "succeeded"}
        bad = {slot.partition("/")[0] for slot, one in final.items() if one in ("failed", "cancelled")}
        missing = bad & set(plan.main)
        below = plan.closure(b for s in missing for b in plan.downstream[s])
        before = Counter(world.begun)
        world.is_mended = episode == 3
        episode += 1
        assert resume(engine, run) == episode
        end = world.live(-1)
        again = {slot for slot, count in world.begun.items() if count > before[slot]}
        spared = {slot for slot in kept if slot.partition("/")[0] in plan.main and slot.partition("/")[0] not in below}
        assert not again & spared, "what was there ran again"
        assert episode < 6
    final = states(ledger, run)
    there = {final[slot] for slot in slots_of(plan, final) if slot in final}
    wanted = {"succeeded"}
    if any(s.trigger_rule is not TriggerRule.ALL_SUCCESS for s in plan.steps.values()):
        wanted |= {"skipped", "failed", "upstream_failed"}
    assert there <= wanted | {"skipped"}, final
    assert {final[s] for s in plan.main} <= wanted, final
    assert not plan.unhandled(final), final
    records = ledger.client.hgetall(keys.run_key(run, "attempts"))
    for field, text in records.items():
        if "@" in field and not field.startswith(END):
            pairs = json.loads(text, object_pairs_hook=list)
            assert sum(1 for key, _ in pairs if key == "state") <= 1, (field, text)
    assert ledger.client.ttl(keys.run_key(run, "run")) > 0
    for name in keys.RUN_KEYS:
        assert ledger.client.ttl(keys.run_key(run, name)) != -1, name


@pytest.mark.parametrize("chore", ["^ended", "^parent"])
def test_runs_that_an_earlier_version_began_come_to_their_end(engine: Engine, ledger: Ledger, chore: str) -> None:
    start(engine, "parent", step("n"))
    plan = start(engine, "other", step("a"))
    taken = take(ledger, "parent", "n")
    ledger.complete("parent", taken, "waiting", payload="child", how=HOW, inline="")
    engine.start("child", plan, event={}, params={}, parent={"run": "parent", "step": "n", "index": -1})
    for run in ("parent", "child"):
        ledger.client.hdel(keys.run_key(run, "run"), "phase")
    do(engine, "child", "a")
    ended = ledger.finish("child", take(ledger, "child", END), "succeeded", payload="1", error="")
    assert ended.publish == ("^ended",)
    ledger.client.delete(keys.run_key("child", "outbox"))
    ledger.client.zadd(keys.run_key("child", "outbox"), {chore: 1})
    engine.publish("child", [chore])
    do(engine, "parent", END)
    found, _ = Queries(ledger, engine.payloads).runs()
    assert {run.id: run.state for run in found if run.id != "other"} == {"parent": "succeeded", "child": "succeeded"}
    assert {run.id: run.parent for run in found}["child"] == {"run": "parent", "step": "n", "index": None}
    assert ledger.active() == ["other"]


def test_a_nested_run_that_another_attempt_has_replaced_is_not_gone_on_with(engine: Engine, ledger: Ledger) -> None:
    once_more = RetryPolicy(maximum_attempts=2, initial_interval=0.001, maximum_interval=0.001)
    start(engine, "parent", step("n", retry=once_more))
    plan = start(engine, "other", step("a"))
    taken = take(ledger, "parent", "n")
    ledger.complete("parent", taken, "waiting", payload="child", how=HOW, inline="")
    engine.start("child", plan, event={}, params={}, parent={"run": "parent", "step": "n", "index": -1, "attempt": 1})
    do(engine, "child", "a", "failed")
    why = json.dumps({"type": "Boom", "message": "no"})
    ended = ledger.finish("child", take(ledger, "child", END), "failed", payload="", error=why)
    engine.publish("child", ended.publish)
    while states(ledger, "parent")["n"] == "retrying":
        engine.fire("parent")
    do(engine, "parent", "n")
    do(engine, "parent", END)
    for go_on in (check, resume, lambda engine, run: redrive(engine, run, {"a": None})):
        with pytest.raises(InputError, match="run parent, in which child is nested, has succeeded without it"):
            go_on(engine, "child")


def test_what_waits_shows_its_last_error_and_when_it_is_due(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("b", foreach=[1, 2]), Step(id="c", sleep="1h"))
    a, b, c = (take(ledger, "r", step_id) for step_id in "abc")
    ledger.complete("r", a, "retrying", tail=ERROR, log="first", delay_ms=60_000, how=HOW, inline="")
    ledger.complete("r", c, "sleeping", delay_ms=60_000, how=HOW, inline="")
    parts = ledger.expand("r", b, 2, size=1, max_parallel=0, per=2, chunks=["[1, 2]"], how=HOW, inline="").publish
    item = take(ledger, "r", parts[0])
    ledger.complete("r", item, "retrying", tail=ERROR, delay_ms=60_000, how=HOW, inline="")
    queries = Queries(ledger, engine.payloads)
    shown = {one.id: one for one in queries.run("r").steps}
    (first, second), _ = queries.items("r", "b")
    for one in (shown["a"], first):
        assert (one.state, one.attempts, (one.error or {}).get("type")) == ("retrying", 1, "Boom")
    assert second.attempts == 0
    assert [bool(one.due_at) for one in (shown["a"], first, shown["c"], second)] == [True, True, True, False]
    assert [(slot, n, text, (error or {}).get("type")) for slot, n, text, error in queries.logs("r")[0]] == [
        ("a", 1, "first", "Boom"),
        ("b/0", 1, "", "Boom"),
    ]
