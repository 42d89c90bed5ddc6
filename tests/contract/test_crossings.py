"""What crosses: cancels, resumes, redrives, lost leases and deaths that come in the middle of each other."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from orchestrator.engine import Engine
from orchestrator.errors import InputError
from orchestrator.ledger import Ledger, keys
from orchestrator.ledger.ledger import How
from orchestrator.plan import Plan
from orchestrator.resume import redrive, resume
from orchestrator.runs import child_run_id
from orchestrator.workflows import END, Phase, Step, TriggerRule, Workflow
from tests.contract.test_episodes import ERROR, HOW, OTHER, do, expand, start, state, states, step, take
from workers.step import Identity, StepRunner

BRIEF = How('{"worker": "brief"', lease_ms=1)


@pytest.fixture
def ledger(engine: Engine) -> Ledger:
    return engine.ledger


def nested(engine: Engine, *steps: Step, leaf: tuple[Step, ...] = (), **options: Any) -> Plan:
    """Put a workflow `leaf` in force and start a run `top` of another."""
    plan = Plan.of(Workflow(name="leaf", steps=leaf or (step("a"),)))
    top = Plan.of(Workflow(name="top", steps=steps, **options))
    engine.ledger.publish_workflows([plan, top])
    assert engine.start("top", top, event={"id": "e"}, params={})
    return plan


def begin_child(engine: Engine, plan: Plan, unit: str, slot: str, child: str, run: str = "top") -> None:
    """Have a slot of a run wait for a nested run."""
    taken = take(engine.ledger, run, unit)
    name, _, index = slot.partition("/")
    parent = {"run": run, "step": name, "index": int(index or -1), "attempt": taken.attempt}
    engine.start(child, plan, event={"id": "e"}, params={}, parent=parent)
    answer = engine.ledger.complete(run, taken, "waiting", payload=child, how=HOW, inline="")
    engine.publish(run, answer.publish)


def fail(engine: Engine, run: str, unit: str = "a") -> None:
    do(engine, run, unit, "failed")
    do(engine, run, END, "failed")


def test_two_who_cancel_at_once_leave_the_hooks_alone(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("clean", phase=Phase.FINALLY))
    assert ledger.cancel("r").verdict == "ok"
    ledger.cancel("r")  # redis-py repeats a call whose answer was lost
    assert states(ledger, "r")["clean"] == "queued"


def test_a_repeated_chore_does_not_end_the_hooks_of_a_nested_run(engine: Engine, ledger: Ledger) -> None:
    plan = nested(engine, Step(id="n", workflow="leaf"), leaf=(step("a"), step("clean", phase=Phase.FINALLY)))
    begin_child(engine, plan, "n", "n", "leaf")
    engine.cancel("top")
    assert states(ledger, "leaf")["clean"] == "queued"
    engine.publish("top", ["^cancel:n"])  # whoever did it died before it had cleared the row
    assert states(ledger, "leaf")["clean"] == "queued"


def test_a_redriven_step_of_a_cancelled_run_does_not_make_it_succeed(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("b"), step("c", "b"))
    do(engine, "r", "a", "failed")
    engine.cancel("r")
    assert state(ledger, "r") == "cancelled"
    redrive(engine, "r", {"a": None})
    do(engine, "r", "a")
    taken = take(ledger, "r", END)
    plan = engine.plan(ledger.plan_of("r"))
    final = dict(zip(taken.chunk[::2], taken.chunk[1::2], strict=True))
    assert final
    assert plan.unhandled(final) == ["b", "c"]


def test_what_needs_a_fan_out_with_cancelled_items_does_not_run(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("f", foreach=[1, 2]), step("g", "f"))
    expand(engine, "r", "f", 2, size=1)
    do(engine, "r", "f/0-1", "failed")
    engine.cancel("r")
    redrive(engine, "r", {"f/0": None})
    do(engine, "r", "f/0-1")
    assert states(ledger, "r")["f"] == "cancelled"
    assert states(ledger, "r")["g"] == "upstream_failed"


@pytest.mark.parametrize("phase", [Phase.ON_FAILURE, Phase.FINALLY])
def test_a_run_nested_in_a_hook_does_not_go_on_by_itself(engine: Engine, ledger: Ledger, phase: Phase) -> None:
    plan = nested(engine, step("m"), Step(id="n", workflow="leaf", phase=phase))
    do(engine, "top", "m", "failed")
    do(engine, "top", END, "failed")
    begin_child(engine, plan, "n", "n", "leaf")
    fail(engine, "leaf")
    assert state(ledger, "top") == "failed"
    with pytest.raises(InputError, match="hook"):
        redrive(engine, "leaf", {"a": None})
    assert state(ledger, "top") == "failed"


def test_a_slow_resume_is_not_overtaken_by_the_rescuer(engine: Engine, ledger: Ledger, monkeypatch: Any) -> None:
    plan = nested(engine, Step(id="n", workflow="leaf", foreach=[0, 1, 2]))
    expand(engine, "top", "n", 3, size=1)
    for i in range(3):
        begin_child(engine, plan, f"n/{i}-{i + 1}", f"n/{i}", f"leaf{i}")
        fail(engine, f"leaf{i}")
    do(engine, "top", END, "failed")
    publish = engine.publish

    def slow(run: str, rows: Any, **options: Any) -> None:
        publish(run, rows, **options)
        if rows == ["^await:n/0"]:  # with many children it takes longer than a row may wait
            outbox = keys.run_key("top", "outbox")
            for row in ledger.client.zrange(outbox, 0, -1):
                ledger.client.zincrby(outbox, -6000, row)  # OUTBOX_AGE_MS, and more
            engine.repair("top")

    monkeypatch.setattr(engine, "publish", slow)
    resume(engine, "top")
    assert [states(ledger, "top")[f"n/{i}"] for i in range(3)] == ["running"] * 3


def test_a_cancel_in_the_middle_of_a_resume_stops_the_nested_run(
    engine: Engine, ledger: Ledger, monkeypatch: Any
) -> None:
    plan = nested(engine, Step(id="n", workflow="leaf"))
    begin_child(engine, plan, "n", "n", "leaf")
    fail(engine, "leaf")
    do(engine, "top", END, "failed")
    reopen = ledger.reopen

    def crossed(run: str, *arguments: Any) -> Any:
        if run == "leaf":
            engine.cancel("top")
        return reopen(run, *arguments)

    monkeypatch.setattr(ledger, "reopen", crossed)
    resume(engine, "top")
    assert state(ledger, "top") == "cancelled"
    assert state(ledger, "leaf") == "cancelled"


def test_a_cancel_in_the_middle_of_a_lift_stops_the_nested_run(
    engine: Engine, ledger: Ledger, monkeypatch: Any
) -> None:
    plan = nested(engine, Step(id="n", workflow="leaf"))
    begin_child(engine, plan, "n", "n", "leaf")
    fail(engine, "leaf")
    do(engine, "top", END, "failed")
    reopen = ledger.reopen

    def crossed(run: str, *arguments: Any) -> Any:
        if run == "leaf":
            engine.cancel("top")
        return reopen(run, *arguments)

    monkeypatch.setattr(ledger, "reopen", crossed)
    redrive(engine, "leaf", {"a": None})
    assert state(ledger, "top") == "cancelled"
    assert state(ledger, "leaf") == "cancelled"


def test_a_fan_out_that_was_given_up_in_a_cancelled_run_does_not_expand(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("f", foreach=[1, 2]), step("clean", phase=Phase.FINALLY))
    taken = take(ledger, "r", "f", BRIEF)
    engine.cancel("r")
    time.sleep(0.005)
    engine.repair("r")  # its lease has run out
    assert states(ledger, "r") == {"f": "cancelled", "clean": "queued"}
    answer = ledger.expand("r", taken, 2, size=1, max_parallel=0, per=10, chunks=["[1,2]"], how=BRIEF, inline="default")
    assert answer.taken is None
    assert states(ledger, "r") == {"f": "cancelled", "clean": "queued"}


def test_a_lost_unit_whose_slot_has_ended_is_not_ended_twice(engine: Engine, ledger: Ledger) -> None:
    plan = nested(engine, Step(id="n", workflow="leaf"), step("x"))
    take(ledger, "top", "n", BRIEF)
    take(ledger, "top", "x", OTHER)
    engine.start("leaf", plan, event={}, params={}, parent={"run": "top", "step": "n", "index": -1, "attempt": 1})
    do(engine, "leaf", "a")
    do(engine, "leaf", END)  # ends before it is recorded that n waits for it, and here the process dies
    assert states(ledger, "top")["n"] == "succeeded"
    engine.cancel("top")
    time.sleep(0.005)
    engine.repair("top")
    assert states(ledger, "top") == {"n": "succeeded", "x": "running"}
    assert state(ledger, "top") == "running"


def test_a_hook_whose_error_is_no_unicode_ends_the_run_all_the_same(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("clean", phase=Phase.FINALLY))
    do(engine, "r", "a")
    do(engine, "r", END)
    taken = take(ledger, "r", "clean")
    error = json.dumps({"type": "ValueError", "message": "\udcff"})
    answer = ledger.complete("r", taken, "failed", tail=f',"error":{error}', how=HOW, inline="")
    engine.publish("r", answer.publish)
    assert state(ledger, "r") == "failed"


def test_a_part_is_not_given_back_when_its_run_has_ended(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("f", foreach=[1, 2, 3]))
    expand(engine, "r", "f", 3)
    taken = take(ledger, "r", "f/0-3", BRIEF)
    engine.cancel("r")
    time.sleep(0.005)
    engine.repair("r")
    assert state(ledger, "r") == "cancelled"
    assert ledger.give_back("r", "f/0-3", taken.fence, 1) == []
    ledger.complete("r", taken, "succeeded", how=BRIEF, inline="")
    for name in keys.RUN_KEYS:
        assert ledger.client.ttl(keys.run_key("r", name)) != -1, name


def test_a_step_that_becomes_a_hook_begins_anew(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("f", foreach=[1, 2]), step("b"))
    expand(engine, "r", "f", 2, size=1)
    do(engine, "r", "f/0-1")
    do(engine, "r", "f/1-2")
    do(engine, "r", "b", "failed")
    do(engine, "r", END, "failed")
    moved = step("f", phase=Phase.FINALLY, foreach=[1])
    ledger.publish_workflows([Plan.of(Workflow(name="w", steps=(step("b"), moved)))])
    resume(engine, "r")
    do(engine, "r", "b")
    do(engine, "r", END)
    expand(engine, "r", "f", 1)
    do(engine, "r", "f/0-1")
    assert state(ledger, "r") == "succeeded"


def test_the_timeout_of_a_nested_step_holds_in_each_episode(engine: Engine, ledger: Ledger) -> None:
    plan = nested(engine, Step(id="n", workflow="leaf", timeout_s=60))
    taken = take(ledger, "top", "n")
    parent = {"run": "top", "step": "n", "index": -1, "attempt": 1}
    engine.start("leaf", plan, event={"id": "e"}, params={}, parent=parent, timeout_ms=60_000)
    ledger.complete("top", taken, "waiting", payload="leaf", how=HOW, inline="")
    for again in ("redrive", "resume"):
        assert ledger.client.zscore(keys.run_key("leaf", "timers"), "$deadline")
        fail(engine, "leaf")
        do(engine, "top", END, "failed")
        redrive(engine, "leaf", {"a": None}) if again == "redrive" else resume(engine, "top")
    assert ledger.client.zscore(keys.run_key("leaf", "timers"), "$deadline")


def test_hooks_do_not_have_the_deadline_of_the_run(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("clean", phase=Phase.FINALLY), timeout_s=3600)
    ledger.client.zadd(keys.run_key("r", "timers"), {"$deadline": 1})
    engine.fire("r")
    assert take(ledger, "r", "clean").meta[7] == ""


def test_the_letter_of_a_hook_goes_when_its_run_goes_on(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("clean", phase=Phase.FINALLY))
    do(engine, "r", "a")
    do(engine, "r", END)
    do(engine, "r", "clean", "failed")
    assert len(engine.dead_letters.list()[0]) == 1
    resume(engine, "r")
    do(engine, "r", END)
    do(engine, "r", "clean")
    assert state(ledger, "r") == "succeeded"
    assert not engine.dead_letters.list()[0]


def test_who_buries_while_the_run_goes_on_leaves_no_letter(engine: Engine, ledger: Ledger, monkeypatch: Any) -> None:
    start(engine, "r", step("a"))
    taken = take(ledger, "r", "a")
    ledger.complete("r", taken, "failed", tail=ERROR, how=HOW, inline="")  # and it dies
    do(engine, "r", END, "failed")
    write = engine.dead_letters._write_steps

    def slow(letters: Any) -> None:
        resume(engine, "r")
        write(letters)

    monkeypatch.setattr(engine.dead_letters, "_write_steps", slow)
    engine.dead_letters.bury("r", ["a"])
    monkeypatch.undo()
    do(engine, "r", "a")
    do(engine, "r", END)
    assert state(ledger, "r") == "succeeded"
    assert not engine.dead_letters.list()[0]


def test_an_entry_of_anything_becomes_a_letter(engine: Engine) -> None:
    entry = json.dumps({"raw": "x", "at": 1, "reason": "\ud800", "detail": "\ud800", "queue": ""}).encode()
    engine.ledger.client.lpush(keys.SET_ASIDE, entry)
    assert engine.dead_letters.drain() == 1


def test_a_nested_run_of_a_lost_process_is_cancelled_too(engine: Engine, ledger: Ledger) -> None:
    plan = nested(engine, Step(id="n", workflow="leaf"))
    take(ledger, "top", "n", BRIEF)
    child = child_run_id("top", "n", None, 1)
    engine.start(child, plan, event={}, params={}, parent={"run": "top", "step": "n", "index": -1, "attempt": 1})
    engine.cancel("top")  # and its process dies before it could say that n waits for it
    time.sleep(0.005)
    engine.repair("top")
    assert state(ledger, "top") == "cancelled"
    assert state(ledger, child) == "cancelled"
    assert ledger.active() == []


def test_a_nested_run_that_is_started_after_its_slot_was_given_up_is_cancelled_too(
    engine: Engine, ledger: Ledger
) -> None:
    plan = nested(engine, Step(id="n", workflow="leaf"))
    taken = take(ledger, "top", "n", BRIEF)
    engine.cancel("top")
    time.sleep(0.005)
    engine.repair("top")
    assert state(ledger, "top") == "cancelled"
    child = child_run_id("top", "n", None, 1)
    engine.start(child, plan, event={}, params={}, parent={"run": "top", "step": "n", "index": -1, "attempt": 1})
    answer = ledger.complete("top", taken, "waiting", payload=child, how=BRIEF, inline="")
    engine.publish("top", answer.publish)
    assert state(ledger, child) == "cancelled"
    assert ledger.client.exists(keys.run_key("top", "outbox")) == 0


def test_an_end_that_kills_its_process_each_time_is_no_loop(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"))
    do(engine, "r", "a")
    for _ in range(engine.settings.maximum_losses):
        take(ledger, "r", END, BRIEF)
        time.sleep(0.005)
        engine.repair("r")
    StepRunner(engine, Identity("w", "c"), pool="default", slots=None, slot=0).carry("r", [END])
    assert state(ledger, "r") == "failed"
    assert json.loads(ledger.outcome("r")[2])["type"] == "WorkerLostError"


def test_a_cancel_while_on_failure_runs_leaves_finally_alone(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("tell", phase=Phase.ON_FAILURE), step("clean", phase=Phase.FINALLY))
    do(engine, "r", "a", "failed")
    do(engine, "r", END, "failed")
    engine.cancel("r")
    assert states(ledger, "r")["clean"] == "queued"


def test_what_was_mended_for_an_item_is_not_for_one_of_a_new_list(engine: Engine, ledger: Ledger) -> None:
    start(engine, "r", step("a"), step("f", "a", foreach=[1, 2], trigger_rule=TriggerRule.ALL_DONE))
    do(engine, "r", "a", "failed")
    expand(engine, "r", "f", 2, size=1)
    do(engine, "r", "f/0-1", "failed")
    do(engine, "r", "f/1-2")
    do(engine, "r", END, "failed")
    redrive(engine, "r", {"a": {"x": 1}, "f/0": {"x": 2}})
    do(engine, "r", "a")
    expand(engine, "r", "f", 2, size=1)
    assert take(ledger, "r", "f/0-1").mended == ""
