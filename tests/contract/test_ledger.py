"""The ledger's verbs on a real server: what they promise whatever is delivered twice, late, or by a dead process."""

from __future__ import annotations

import json
import random
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from orchestrator.expressions import parse
from orchestrator.ledger import Answer, Ledger, Taken, keys
from orchestrator.ledger.ledger import How, connect
from orchestrator.plan import Plan
from orchestrator.runs import STEP_RUN_MOVES, StepRunState
from orchestrator.workflows import END, Step, TriggerRule, Workflow

HOW = How('{"worker":"w"')
BRIEF = How('{"worker":"w"', lease_ms=1)
OTHER = How('{"worker":"another"')


@pytest.fixture
def ledger(engine: Engine) -> Ledger:
    return engine.ledger


def step(step_id: str, *needs: str, **options: Any) -> Step:
    return Step(id=step_id, task="tasks:f", needs=needs, **options)


def start(ledger: Ledger, run: str, *steps: Step) -> Plan:
    plan = Plan.of(Workflow(name="w", steps=steps))
    ledger.put_plan(plan)
    assert ledger.start(run, plan, event="{}", event_id="e", run_input="{}", created_ms=1)
    ledger.clear(run, list(plan.roots))
    return plan


def take(ledger: Ledger, run: str, *units: str, how: How = HOW) -> Taken:
    answer = ledger.begin(run, units, how)
    assert answer.verdict == "go", answer
    assert answer.taken is not None
    return answer.taken


def resolve(ledger: Ledger, child: str, state: str, *, payload: str) -> Answer:
    return ledger.resolve("r", "a", -1, 1, child, state, payload=payload, tail="", now_ms=0)


def states(ledger: Ledger, run: str) -> dict[str, str]:
    return {k: v for k, v in ledger.client.hgetall(keys.run_key(run, "states")).items() if ":" not in k}


def test_start_is_idempotent_by_run_id(ledger: Ledger) -> None:
    plan = start(ledger, "r", step("a"))
    assert not ledger.start("r", plan, event='"other"', event_id="x", run_input="{}", created_ms=2)
    assert ledger.client.hget(keys.run_key("r", "run"), "event_id") == "e"


def test_begin_and_the_next_step_come_in_one_answer(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b", with_={"x": parse("{{ a }}")}))
    taken = take(ledger, "r", "a", "b")
    answer = ledger.complete("r", taken, "succeeded", payload="41", how=HOW, inline="default")
    assert answer.taken is not None
    assert (answer.taken.unit, answer.taken.inputs) == ("b", [["a", "succeeded", "41", []]])
    assert answer.publish == ()


def test_a_step_in_work_is_held_and_an_ended_one_is_done(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b", "a"))
    taken = take(ledger, "r", "a")
    assert ledger.begin("r", ["a"], OTHER).verdict == "held"
    ledger.complete("r", taken, "succeeded", how=HOW, inline="")
    assert ledger.begin("r", ["a"], OTHER).verdict == "done"


def test_who_did_not_hear_the_answer_gets_what_it_has_taken(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b", "a"), step("f", "b", foreach=[1, 2, 3]))
    take(ledger, "r", "a", "b")
    a = take(ledger, "r", "a", "b")  # again: the first answer was lost
    for _ in range(2):
        answer = ledger.complete("r", a, "succeeded", payload="1", how=HOW, inline="default")
        assert answer.taken is not None
        assert (answer.taken.unit, answer.taken.losses) == ("b", 0)
    f = ledger.complete("r", answer.taken, "succeeded", payload="1", how=HOW, inline="default").taken
    assert f is not None
    for _ in range(2):
        answer = ledger.expand("r", f, 3, size=3, max_parallel=0, per=3, chunks=["[]"], how=HOW, inline="default")
        assert answer.taken is not None
        assert (answer.taken.unit, answer.taken.index) == ("f/0-3", 0)
    item = answer.taken
    for _ in range(2):
        answer = ledger.complete("r", item, "succeeded", payload="1", how=HOW, inline="default")
        assert answer.taken is not None
        assert (answer.taken.unit, answer.taken.index, answer.taken.losses) == ("f/0-3", 1, 0)
    assert states(ledger, "r")["f/0"] == "succeeded"
    assert ledger.complete("r", item, "failed", how=OTHER, inline="default").verdict == "refused"


def test_a_redelivered_chain_goes_on_at_its_first_unfinished_link(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b", "a"), step("c", "b"))
    ledger.complete("r", take(ledger, "r", "a", "b", "c"), "succeeded", how=HOW, inline="")
    assert take(ledger, "r", "a", "b", "c").unit == "b"


def test_a_link_whose_upstream_has_not_ended_is_not_begun(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b", "a"))
    assert ledger.begin("r", ["b"], HOW).verdict == "early"


def test_what_is_no_unit_is_not_begun(ledger: Ledger) -> None:
    """Somebody has named a field or an item of the run in a message; the run goes on."""
    start(ledger, "r", step("f", foreach=[0, 1]))
    answer = ledger.expand(
        "r", take(ledger, "r", "f"), 2, size=2, max_parallel=0, per=2, chunks=["[0,1]"], how=HOW, inline=""
    )
    taken = take(ledger, "r", *answer.publish)
    for unit in ("n:f", "d:f", "b:f", "f/0", "w:f", "nope"):
        assert ledger.begin("r", [unit], HOW).verdict == "early"
    assert ledger.renew([("r", taken.unit, taken.fence)]) == (set(), set())
    assert ledger.client.zrange(keys.run_key("r", "leases"), 0, -1) == [taken.unit]
    assert ledger.sweep("r")[1] == []


def test_an_unknown_run_is_told(ledger: Ledger) -> None:
    assert ledger.begin("nobody", ["a"], HOW).verdict == "unknown"


def test_a_join_fires_once_whatever_is_completed_twice(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b"), step("c", "a", "b"))
    a, b = take(ledger, "r", "a"), take(ledger, "r", "b", how=OTHER)
    assert ledger.complete("r", a, "succeeded", how=HOW, inline="").publish == ()
    assert ledger.complete("r", a, "succeeded", how=HOW, inline="").verdict == "done"
    assert ledger.complete("r", b, "succeeded", how=OTHER, inline="").publish == ("c",)
    assert ledger.complete("r", b, "failed", how=OTHER, inline="").verdict == "done"
    assert states(ledger, "r")["b"] == "succeeded"


def test_no_false_barrier_c_is_ready_while_b_still_runs(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b"), step("c", "a"), step("d", "a", "b"), step("e", "b"))
    a, b = take(ledger, "r", "a"), take(ledger, "r", "b")
    assert ledger.complete("r", a, "succeeded", how=HOW, inline="").publish == ("c",)
    assert set(ledger.complete("r", b, "succeeded", how=HOW, inline="").publish) == {"d", "e"}


def test_a_takeover_raises_the_fence_and_refuses_who_was_before(ledger: Ledger) -> None:
    start(ledger, "r", step("a"))
    first = take(ledger, "r", "a", how=BRIEF)
    time.sleep(0.005)  # the lease of 1 ms has run out
    # A message that comes again takes nothing over: only the sweep knows whether leases could be renewed.
    assert ledger.begin("r", ["a"], OTHER).verdict == "held"
    assert ledger.sweep("r")[1] == ["a"]
    second = take(ledger, "r", "a", how=OTHER)
    assert second.fence > first.fence
    assert ledger.complete("r", first, "failed", how=HOW, inline="").verdict == "refused"
    assert ledger.complete("r", second, "succeeded", how=HOW, inline="").verdict == "ok"
    assert ledger.renew([("r", "a", first.fence)])[0] == {("r", "a")}


def test_who_slept_past_the_lease_may_commit_if_nobody_took_over(ledger: Ledger) -> None:
    start(ledger, "r", step("a"))
    taken = take(ledger, "r", "a", how=BRIEF)
    time.sleep(0.005)
    assert ledger.complete("r", taken, "succeeded", how=HOW, inline="").verdict == "ok"


def test_a_lease_that_was_given_up_is_the_holders_again_if_nobody_took_over(ledger: Ledger) -> None:
    start(ledger, "r", step("a"))
    taken = take(ledger, "r", "a", how=BRIEF)
    time.sleep(0.005)
    assert ledger.sweep("r")[1] == ["a"]
    assert ledger.renew([("r", "a", taken.fence)])[0] == set()
    assert ledger.begin("r", ["a"], OTHER).verdict == "held"  # the message that the sweep had published
    assert ledger.sweep("r", 0)[1] == []
    ledger.complete("r", taken, "succeeded", how=HOW, inline="")
    assert ledger.renew([("r", "a", taken.fence)])[0] == set()  # too late: it has ended
    assert ledger.client.zcard(keys.run_key("r", "leases")) == 0


def test_a_part_that_was_given_up_is_the_holders_again_only_for_the_item_in_work(ledger: Ledger) -> None:
    fan(ledger, "r")
    part = take(ledger, "r", *expand(ledger, "r", "f", 3, size=3).publish, how=BRIEF)
    time.sleep(0.005)
    assert ledger.sweep("r")[1] == [part.unit]
    assert ledger.renew([("r", part.unit, part.fence)])[0] == set()
    assert ledger.begin("r", [part.unit], OTHER).verdict == "held"
    ledger.complete("r", part, "succeeded", payload="1", how=HOW, inline="")  # draining: the rest goes back
    assert ledger.renew([("r", part.unit, part.fence)])[0] == set()
    assert take(ledger, "r", part.unit).index == 1


def test_the_sweep_finds_lost_leases_once_and_counts_the_loss(ledger: Ledger) -> None:
    start(ledger, "r", step("a"))
    take(ledger, "r", "a", how=BRIEF)
    time.sleep(0.005)
    assert ledger.sweep("r") == ("running", ["a"], 1, 1)
    assert ledger.sweep("r") == ("running", [], 0, 1)
    assert take(ledger, "r", "a").losses == 1


def test_of_many_runs_only_those_that_need_care_are_named(ledger: Ledger) -> None:
    for run in ("quiet", "lost", "waiting"):
        start(ledger, run, step("a"), step("b", "a"))
    take(ledger, "quiet", "a")
    take(ledger, "lost", "a", how=BRIEF)
    ledger.complete("waiting", take(ledger, "waiting", "a"), "succeeded", how=HOW, inline="")
    time.sleep(0.005)
    assert ledger.look(["quiet", "lost", "waiting", "nobody"], 60_000) == (["lost", "nobody"], {})
    assert ledger.look(["quiet", "lost", "waiting"], 1) == (["lost", "waiting"], {})
    assert ledger.look([]) == ([], {})


def test_leases_that_ran_out_are_left_alone_if_asked(ledger: Ledger) -> None:
    start(ledger, "r", step("a"))
    take(ledger, "r", "a", how=BRIEF)
    time.sleep(0.005)
    assert ledger.sweep("r", with_leases=False) == ("running", [], 0, 0)
    assert ledger.sweep("r")[1] == ["a"]


# Messages that are lost ---------------------------------------------------------------------------------------------


def idle(ledger: Ledger, run: str) -> str | None:
    return ledger.look([run])[1].get(run)


def test_a_run_is_idle_if_only_a_message_brings_it_on(ledger: Ledger) -> None:
    plan = start(ledger, "r", step("a"), step("b"), step("c", "a"))
    version = idle(ledger, "r")
    assert version is not None
    assert version.endswith(":" + plan.hash)
    assert sorted(ledger.limbo({"r": version})["r"][0]) == ["a", "b"]
    a = take(ledger, "r", "a")
    assert idle(ledger, "r") is None
    assert ledger.limbo({"r": version})["r"][0] == []
    assert ledger.complete("r", a, "succeeded", how=HOW, inline="").publish == ("c",)
    assert idle(ledger, "r") is None  # c waits in the outbox
    ledger.clear("r", ["c"])
    later = idle(ledger, "r")
    assert later is not None
    assert ledger.limbo({"r": version})["r"][0] == []  # it has moved since
    assert sorted(ledger.limbo({"r": later})["r"][0]) == ["b", "c"]


def test_publishing_again_is_a_move(ledger: Ledger) -> None:
    start(ledger, "r", step("a"))
    before = idle(ledger, "r")
    ledger.clear("r", ["a"])
    assert idle(ledger, "r") not in (None, before)


def test_who_still_runs_a_step_of_a_run_that_was_given_up_is_refused(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b", "a"), step("c"))
    taken = take(ledger, "r", "a")
    assert ledger.give_up("r", {"type": "RunLost"}) == ["^close"]
    ledger.log("r", "a", 1, "text")
    assert ledger.renew([("r", "a", taken.fence)])[0] == {("r", "a")}
    assert ledger.complete("r", taken, "succeeded", how=HOW, inline="default").verdict == "refused"
    assert ledger.begin("r", ["c"], HOW).verdict == "done"
    assert resolve(ledger, "child", "succeeded", payload="").verdict == "done"
    assert ledger.outcome("r")[0] == "failed"
    of_the_run = list(ledger.client.scan_iter("orchestrator:{r}:*"))
    assert [key for key in of_the_run if ledger.client.ttl(key) < 0] == []


def test_of_a_fan_out_the_parts_are_known_that_nobody_has_begun(ledger: Ledger) -> None:
    fan(ledger, "r")
    parts = expand(ledger, "r", "f", 7, size=3).publish
    ledger.clear("r", parts)
    version = idle(ledger, "r")
    assert version is not None
    assert sorted(ledger.limbo({"r": version})["r"][0]) == ["f/0-3", "f/3-6", "f/6-7"]
    part = take(ledger, "r", "f/3-6")
    given = ledger.give_back("r", part.unit, part.fence, 1)
    ledger.clear("r", given)
    ledger.complete("r", part, "succeeded", payload="1", how=HOW, inline="")
    version = idle(ledger, "r")
    assert version is not None
    assert sorted(ledger.limbo({"r": version})["r"][0]) == ["f/0-3", "f/4-5", "f/5-6", "f/6-7"]


def test_a_run_that_waits_for_another_run_is_not_in_limbo(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b", "a"))
    ledger.complete("r", take(ledger, "r", "a"), "waiting", payload="child", how=HOW, inline="")
    version = idle(ledger, "r")
    assert version is not None
    assert ledger.limbo({"r": version})["r"][0] == []


def test_a_run_that_is_given_up_has_failed_once(engine: Engine, ledger: Ledger) -> None:
    start(ledger, "r", step("a"))
    ledger.client.expire(keys.run_key("r", "run"), 100)
    ledger.client.persist(keys.run_key("r", "run"))
    engine.give_up("r", "its plan is gone")
    engine.give_up("r", "again")
    state, _, error = ledger.outcome("r")
    assert (state, json.loads(error)["message"]) == ("failed", "its plan is gone")
    assert ledger.active() == []
    assert ledger.client.ttl(keys.run_key("r", "states")) > 0
    assert ledger.begin("r", ["a"], HOW).verdict != "unknown"


def test_who_leads_keeps_the_lead_until_the_lease_runs_out_or_is_given_up(ledger: Ledger) -> None:
    assert ledger.lead("x", "one")[0]
    assert not ledger.lead("x", "two")[0]
    assert ledger.lead("x", "one", lease_ms=20)[0]
    time.sleep(0.03)
    assert ledger.lead("x", "two")[0]
    ledger.resign("x", "one")
    assert ledger.lead("x", "two")[0]
    ledger.resign("x", "two")
    leads, now_ms = ledger.lead("x", "one")
    assert leads
    assert abs(now_ms - time.time() * 1000) < 60_000


def test_a_live_lease_is_not_swept_and_renewing_keeps_it(ledger: Ledger) -> None:
    start(ledger, "r", step("a"))
    taken = take(ledger, "r", "a", how=How('{"worker":"w"', lease_ms=200))
    assert ledger.renew([("r", "a", taken.fence)], lease_ms=60_000)[0] == set()
    time.sleep(0.25)
    assert ledger.sweep("r")[1] == []


def test_what_was_not_published_stays_in_the_outbox_until_it_is_cleared(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b", "a"), step("c", "a"))
    answer = ledger.complete("r", take(ledger, "r", "a"), "succeeded", how=HOW, inline="default")
    assert answer.taken is not None
    assert (answer.taken.unit, answer.publish) == ("b", ("c",))
    assert ledger.sweep("r", outbox_age_ms=60_000)[1] == []
    time.sleep(0.002)
    assert ledger.sweep("r", outbox_age_ms=1)[1] == ["c"]
    assert ledger.clear("r", ["c"]) == 0


def test_a_child_that_died_is_given_up_at_once(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b"), step("f", foreach=[1, 2]))
    dead, alive = How('{"worker": "w/1", "code": ""'), How('{"worker": "w/11", "code": ""')
    take(ledger, "r", "a", how=dead)
    take(ledger, "r", "b", how=alive)
    fan_out = take(ledger, "r", "f", how=dead)
    answer = ledger.expand("r", fan_out, 2, size=2, max_parallel=0, per=2, chunks=["[1,2]"], how=dead, inline="default")
    assert answer.taken is not None  # it has gone on with the part, and nobody else knows
    lost, rows = ledger.abandon("r", dead.record, "killed by SIGKILL")
    assert sorted(lost) == sorted(rows) == ["a", "f/0-2"]
    assert ledger.abandon("r", dead.record, "again") == ([], [])
    assert ledger.losses("r", "a")[0]["reason"] == "killed by SIGKILL"
    assert take(ledger, "r", "a").losses == 1
    assert ledger.begin("r", ["b"], HOW).verdict == "held"


def expand(
    ledger: Ledger, run: str, unit: str, count: int, *, size: int, max_parallel: int = 0, inline: str = ""
) -> Any:
    taken = take(ledger, run, unit)
    chunks = [json.dumps([n]) for n in range(count)]
    return ledger.expand(
        run, taken, count, size=size, max_parallel=max_parallel, per=1, chunks=chunks, how=HOW, inline=inline
    )


def fan(ledger: Ledger, run: str) -> None:
    start(ledger, run, step("f", foreach=[0]), step("g", with_={"x": parse("{{ f }}")}))


def test_an_empty_fan_out_succeeds_at_once(ledger: Ledger) -> None:
    fan(ledger, "r")
    assert expand(ledger, "r", "f", 0, size=1).publish == ("g",)
    assert take(ledger, "r", "g").inputs == [["f", "succeeded", [], []]]


def test_a_fan_out_is_expanded_once(ledger: Ledger) -> None:
    fan(ledger, "r")
    taken = take(ledger, "r", "f")
    for verdict in ("ok", "done"):
        answer = ledger.expand("r", taken, 2, size=1, max_parallel=0, per=2, chunks=["[1,2]"], how=HOW, inline="")
        assert answer.verdict == verdict
    assert ledger.begin("r", ["f"], HOW).verdict == "done"


def test_outputs_come_in_the_order_of_the_list_and_failures_with_their_index(ledger: Ledger) -> None:
    fan(ledger, "r")
    parts = list(expand(ledger, "r", "f", 4, size=2).publish)
    for part in reversed(parts):
        taken = take(ledger, "r", part)
        while taken is not None:
            bad = taken.index == 2
            answer = ledger.complete(
                "r", taken, "failed" if bad else "succeeded", payload="" if bad else str(taken.index),
                tail=',"error":{"type":"E"}' if bad else "", how=HOW, inline="default",
            )  # fmt: skip
            taken = answer.taken
            if taken is not None and taken.unit == END:
                break
    assert states(ledger, "r")["f"] == "failed"
    assert states(ledger, "r")["g"] == "upstream_failed"
    assert ledger.failure("r", "f") == {"type": "E", "step": "f", "index": 2}


def test_items_behind_one_in_work_are_given_back_and_each_runs_once(ledger: Ledger) -> None:
    fan(ledger, "r")
    (part,) = expand(ledger, "r", "f", 5, size=5).publish
    taken = take(ledger, "r", part)
    given = ledger.give_back("r", part, taken.fence, 2)
    assert given == ["f/1-3", "f/3-5"]
    assert ledger.give_back("r", part, taken.fence, 2) == []
    # The part itself ends with the item in work, also when its message comes again.
    assert ledger.complete("r", taken, "succeeded", how=HOW, inline="default").taken is None
    assert ledger.begin("r", [part], HOW).verdict == "done"
    ran = [0]
    for unit in given:
        item: Taken | None = take(ledger, "r", unit)
        while item is not None and item.index >= 0:
            ran.append(item.index)
            item = ledger.complete("r", item, "succeeded", how=HOW, inline="default").taken
    assert ran == [0, 1, 2, 3, 4]


def test_a_drained_part_goes_back_as_it_is_and_goes_on_where_it_was(ledger: Ledger) -> None:
    fan(ledger, "r")
    (part,) = expand(ledger, "r", "f", 3, size=3).publish
    answer = ledger.complete("r", take(ledger, "r", part), "succeeded", how=HOW, inline="")
    assert (answer.taken, answer.publish) == (None, (part,))
    assert take(ledger, "r", part).index == 1


def test_max_parallel_bounds_the_items_in_work(ledger: Ledger) -> None:
    fan(ledger, "r")
    ready = list(expand(ledger, "r", "f", 6, size=1, max_parallel=2).publish)
    in_work: list[Taken] = []
    most = 0
    while ready or in_work:
        in_work += [take(ledger, "r", unit) for unit in ready]
        most = max(most, len(in_work))
        answer = ledger.complete("r", in_work.pop(0), "succeeded", how=HOW, inline="")
        ready = [unit for unit in answer.publish if unit.startswith("f/")]
    assert most == 2
    assert states(ledger, "r")["f"] == "succeeded"


def test_a_step_waits_for_its_nested_run_and_takes_its_outcome_once(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b", "a"))
    taken = take(ledger, "r", "a")
    assert ledger.complete("r", taken, "waiting", payload="child", how=HOW, inline="default").publish == ()
    assert ledger.begin("r", ["a"], HOW).verdict == "done"
    assert ledger.sweep("r", outbox_age_ms=0)[1] == []
    assert resolve(ledger, "child", "succeeded", payload="7").publish == ("b",)
    assert resolve(ledger, "child", "failed", payload="").verdict == "done"


def test_a_nested_run_may_end_before_its_step_was_noted_as_waiting(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b", "a"))
    taken = take(ledger, "r", "a")
    assert resolve(ledger, "child", "succeeded", payload="7").publish == ("b",)
    assert ledger.complete("r", taken, "waiting", payload="child", how=HOW, inline="").verdict == "done"


def test_a_nested_run_that_ended_early_leaves_no_lease_to_be_lost(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b", "a"))
    taken = take(ledger, "r", "a")
    resolve(ledger, "child", "succeeded", payload="7")
    ledger.complete("r", taken, "waiting", payload="child", how=HOW, inline="")
    assert not ledger.client.exists(keys.run_key("r", "leases"))


def test_a_fan_out_that_was_expanded_is_ended_by_its_items_alone(ledger: Ledger) -> None:
    start(ledger, "r", step("f", foreach=[0]), step("g", "f"))
    taken = take(ledger, "r", "f")
    answer = ledger.expand("r", taken, 2, size=2, max_parallel=0, per=2, chunks=["[1,2]"], how=HOW, inline="")
    # The answer of the server was lost, and its caller gave up.
    assert ledger.complete("r", taken, "failed", how=HOW, inline="").verdict == "done"
    part = take(ledger, "r", *answer.publish)
    for _ in range(2):
        part = ledger.complete("r", part, "succeeded", payload="1", how=HOW, inline="default").taken or part
    assert states(ledger, "r")["f"] == "succeeded"
    assert part.unit == "g"


def test_a_run_that_is_looked_at_while_it_starts_stays_in_flight(
    engine: Engine, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.of(Workflow(name="w", steps=(step("a"),)))
    call = ledger._call

    def call_late(run: str, *argv: str | int) -> Any:
        if argv[0] == "start":
            monkeypatch.undo()
            engine.repair(run)
        return call(run, *argv)

    monkeypatch.setattr(ledger, "_call", call_late)
    now = time.time_ns() // 1_000_000
    assert ledger.start("r", plan, event="{}", event_id="e", run_input="{}", created_ms=now)
    assert ledger.active() == ["r"]


def test_an_id_without_a_run_is_dropped_in_the_end(engine: Engine, ledger: Ledger) -> None:
    ledger.client.zadd(keys.ACTIVE, {"nobody": 1})
    engine.repair("nobody")
    assert ledger.active() == []


def test_a_run_that_failed_at_once_is_whole_and_does_not_touch_one_that_is_there(ledger: Ledger) -> None:
    given = {"workflow": "w", "plan": "p", "event": "{}", "event_id": "e", "created_ms": 5, "error": "{}"}
    assert ledger.start_failed("x", **given)
    assert not ledger.start_failed("x", **given)
    assert ledger.client.hget(keys.run_key("x", "run"), "state") == "failed"
    assert ledger.client.ttl(keys.run_key("x", "run")) > 0
    start(ledger, "r", step("a"))
    assert not ledger.start_failed("r", **given)
    assert ledger.client.ttl(keys.run_key("r", "run")) == -1
    assert ledger.client.hget(keys.run_key("r", "run"), "error") is None


def test_text_that_comes_after_the_outcome_does_not_replace_it(ledger: Ledger) -> None:
    start(ledger, "r", step("a"), step("b"))
    a = take(ledger, "r", "a")
    take(ledger, "r", "b")
    ledger.log("r", "a", 1, "half")
    ledger.complete("r", a, "succeeded", log="all of it", how=HOW, inline="")
    ledger.log("r", "a", 1, "half")
    assert ledger.client.hget(keys.run_key("r", "logs"), "a@1") == "all of it"


def test_after_its_end_every_key_of_a_run_has_a_ttl(ledger: Ledger) -> None:
    fan(ledger, "r")
    for part in expand(ledger, "r", "f", 2, size=1).publish:
        ledger.complete("r", take(ledger, "r", part), "succeeded", payload="1", log="text", how=HOW, inline="")
    g = take(ledger, "r", "g")
    end = ledger.complete("r", g, "succeeded", how=HOW, inline="default").taken
    assert end is not None
    assert ledger.finish("r", end, "succeeded", payload="1", error="").publish == ("^close",)
    assert ledger.finish("r", end, "failed", payload="1", error="").verdict == "done"
    # A process that woke up late leaves nothing behind either.
    ledger.complete("r", g, "failed", how=HOW, inline="default")
    ledger.log("r", "g", 1, "late")
    found = list(ledger.client.scan_iter(f"{keys.PREFIX}:{{r}}:*"))
    assert found
    assert [key for key in found if ledger.client.ttl(key) < 0] == []


# Any graph, any rules, any outcomes, in any order -----------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[str, list[str], TriggerRule, str]]:
    """Steps as (id, upstream, trigger rule, how it ends if it runs)."""
    count = draw(st.integers(1, 12))
    made = []
    for n in range(count):
        above = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=4)) if n else []
        rule = draw(st.sampled_from(list(TriggerRule)))
        outcome = draw(st.sampled_from(["succeeded", "succeeded", "failed", "skipped"]))
        made.append((f"s{n}", [f"s{m}" for m in above], rule, outcome))
    return made


def expected(graph: list[tuple[str, list[str], TriggerRule, str]]) -> dict[str, str]:
    """Say how each step ends, by the words of the documentation and not by the ledger's counters."""
    ends: dict[str, str] = {}
    for step_id, above, rule, outcome in graph:
        found = [ends[up] for up in above]
        failed = any(state in ("failed", "upstream_failed") for state in found)
        skipped = "skipped" in found
        runs = {
            TriggerRule.ALL_SUCCESS: not failed and not skipped,
            TriggerRule.NONE_FAILED: not failed,
            TriggerRule.ALL_DONE: True,
            TriggerRule.ONE_FAILED: failed or not above,
        }[rule]
        if runs:
            ends[step_id] = outcome
        elif rule is TriggerRule.ONE_FAILED:
            ends[step_id] = "skipped"
        else:
            ends[step_id] = "upstream_failed" if failed else "skipped"
    return ends


@given(graph=graphs(), seed=st.integers(0, 2**32), inline=st.booleans())
@hypothesis_settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_graph_ends_as_documented(
    ledger: Ledger, graph: list[tuple[str, list[str], TriggerRule, str]], seed: int, *, inline: bool
) -> None:
    """Every step ends in the state that its rule says, none twice, and the run's end becomes ready exactly once."""
    chance = random.Random(seed)
    run = uuid.uuid4().hex
    outcome = {step_id: end for step_id, _, _, end in graph}
    plan = start(ledger, run, *(step(step_id, *above, trigger_rule=rule) for step_id, above, rule, _ in graph))
    queue, ended, begun = list(plan.roots), 0, []
    while queue:
        unit = queue.pop(chance.randrange(len(queue)))
        how = How(f'{{"worker":"{uuid.uuid4().hex}"')
        answer = ledger.begin(run, [unit], how)
        if chance.random() < 0.2:
            queue.append(unit)  # delivered twice
        while answer.taken is not None and answer.taken.unit != END:
            taken = answer.taken
            begun.append(taken.step)
            pool = "default" if inline and chance.random() < 0.7 else ""
            answer = ledger.complete(run, taken, outcome[taken.step], how=how, inline=pool)
            queue += answer.publish
        ended += answer.taken is not None
    assert ended == 1
    assert len(begun) == len(set(begun))
    final = states(ledger, run)
    assert {step_id: final[step_id] for step_id in plan.steps} == expected(graph)


@st.composite
def shapes(draw: st.DrawFn) -> list[Step]:
    """Steps of any graph, some of them fan-outs."""
    made = []
    for n in range(draw(st.integers(1, 7))):
        above = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=3)) if n else []
        items = draw(st.none() | st.integers(0, 9))
        options: dict[str, Any] = {}
        if items is not None:
            options = {"foreach": list(range(items)), "max_parallel": draw(st.none() | st.integers(1, 3))}
        made.append(step(f"s{n}", *(f"s{m}" for m in above), **options))
    return made


@given(shape=shapes(), seed=st.integers(0, 2**32))
@hypothesis_settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_graph_ends_whatever_is_lost(ledger: Ledger, shape: list[Step], seed: int) -> None:
    """Messages get lost and come twice, processes die between any two verbs; what is left says how to go on."""
    chance = random.Random(seed)
    run = uuid.uuid4().hex
    plan = start(ledger, run, *shape)
    queue, finished = list(plan.roots), 0
    begun: Counter[str] = Counter()

    def publish(units: Sequence[str]) -> None:
        queue.extend(units)
        if chance.random() < 0.8:
            ledger.clear(run, units)

    for _ in range(5000):
        if not queue:
            time.sleep(0.002)  # leases of the dead run out
            again = ledger.sweep(run, 0)[1]
            if again:
                ledger.clear(run, again)
                queue += again
                continue
            version = idle(ledger, run)
            if version is None:
                break
            queue += ledger.limbo({run: version})[run][0]
            assert queue, "idle, and nothing is in limbo"
            continue
        unit = queue.pop(chance.randrange(len(queue)))
        if chance.random() < 0.2:
            continue  # the message is lost
        how = How(f'{{"worker":"{uuid.uuid4().hex}"', lease_ms=1)
        answer = ledger.begin(run, [unit], how)
        if chance.random() < 0.1:
            answer = ledger.begin(run, [unit], how)  # the answer was lost
        if chance.random() < 0.1:
            queue.append(unit)  # and this one is delivered twice
        while answer.taken is not None and chance.random() > 0.05:  # or the process dies with what it has taken
            taken = answer.taken
            inline = "default" if chance.random() < 0.7 else ""
            if taken.unit == END:
                finished += ledger.finish(run, taken, "succeeded", payload="", error="").verdict == "ok"
                break
            begun[taken.slot] += 1
            foreach = plan.steps[taken.step].foreach
            if foreach is not None and taken.index < 0:
                parallel = plan.steps[taken.step].max_parallel or 0
                answer = ledger.expand(
                    run, taken, len(foreach), size=1 if parallel else chance.randint(1, 4), max_parallel=parallel,
                    per=100, chunks=["[]"], how=how, inline=inline,
                )  # fmt: skip
            else:
                answer = ledger.complete(run, taken, "succeeded", payload="1", how=how, inline=inline)
                if chance.random() < 0.1:
                    publish(answer.publish)  # in truth, the rescuer
                    answer = ledger.complete(run, taken, "succeeded", payload="1", how=how, inline=inline)
            if chance.random() < 0.1:
                break  # it dies before it has published
            publish(answer.publish)
    else:
        pytest.fail("the run does not end")
    assert finished == 1
    final = states(ledger, run)
    slots = [slot for s in shape for slot in ([s.id] if s.foreach is None else [f"{s.id}/{i}" for i in s.foreach])]
    assert {final[slot] for slot in slots} <= {"succeeded"}
    assert {final[step_id] for step_id in plan.steps} == {"succeeded"}
    assert set(slots) <= set(begun)


@pytest.mark.parametrize("state", list(StepRunState))
def test_end_states_are_those_without_moves(state: StepRunState) -> None:
    assert state.is_end == (not STEP_RUN_MOVES[state])


def test_a_broken_run_harms_no_other_that_is_looked_at_or_renewed_with_it(ledger: Ledger) -> None:
    start(ledger, "good", step("a"))
    start(ledger, "bad", step("a"))
    taken = take(ledger, "good", "a", how=BRIEF)
    ledger.client.delete(keys.run_key("bad", "units"))
    ledger.client.set(keys.run_key("bad", "units"), "no hash")
    ledger.client.delete(keys.run_key("bad", "outbox"))
    ledger.client.set(keys.run_key("bad", "outbox"), "no sorted set")
    time.sleep(0.005)
    assert ledger.look(["bad", "good"]) == (["good"], {})
    assert ledger.renew([("bad", "a", 1), ("good", "a", taken.fence)])[0] == set()
    assert ledger.client.zcard(keys.run_key("good", "leases")) == 1


def test_every_verb_says_in_one_way_that_the_server_is_away() -> None:
    ledger = Ledger(connect("redis://127.0.0.1:1/0"))
    plan = Plan.of(Workflow(name="w", steps=(Step(id="a", task="tasks:f"),)))
    for verb in (lambda: ledger.put_plan(plan), lambda: ledger.publish_workflows([plan]), ledger.workflows,
                 lambda: ledger.trim(1), ledger.active, lambda: ledger.renew([("r", "a", 1)])):  # fmt: skip
        with pytest.raises(UnavailableError):
            verb()
