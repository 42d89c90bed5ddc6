"""The checks of the chaos harness notice what they are there for: each is shown a fault of its kind."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.deadletters import DeadLetter
from orchestrator.engine import Engine
from orchestrator.ledger import keys
from orchestrator.plan import Plan
from orchestrator.workflows import Step, Workflow
from tests.chaos import checks
from tests.chaos.acts import Act, Snapshot, counts_of
from tests.chaos.checks import Evidence
from tests.chaos.load import Load
from tests.chaos.record import Execution, Harm, parse
from tests.chaos.recovery import measure
from tests.chaos.sources import Sources
from tests.chaos.workload import KINDS, Expected, Will
from tests.conftest import Server

RUN = Expected("r", KINDS["tangle"], {"x": 1})


def _outcome(state: str = "succeeded") -> str:
    return f'{{"worker":"w","fence":1,"finished_at":1,"state":"{state}"}}'


def _good() -> Evidence:
    slots = RUN.kind.slots(RUN.params)
    return Evidence(
        expected=[RUN],
        record={"r": {slot: [Execution(slot, 1, 10, n, n + 0.5)] for n, slot in enumerate(slots)}},
        harms=[],
        runs={"r": {"workflow": "tangle", "state": "succeeded"}},
        attempts={"r": {f"{slot}@1": _outcome() for slot in slots} | {"$end@1": '{"worker":"w"}'}},
        outputs={"r": 19},
    )


def _mend(will: Will, broken: int = 1, hook: int = 0) -> Expected:
    return Expected("m", KINDS["mend"], {"x": 1, "broken": broken, "hook": hook}, will=will)


def _failed(one: Expected) -> dict[str, str]:
    """Return the attempts of a first episode in which what is broken has failed."""
    broken = one.kind.broken(one.params)
    rows = {f"{slot}@1": _outcome() for slot in ("a", "d", "clean", "tell", *(f"each/{n}" for n in range(8)))}
    return rows | {f"{slot}@{n}": _outcome("failed") for slot in broken for n in (1, 2)}


def _redriven() -> Evidence:
    """What a run should be like that has failed, and was resumed."""
    one = _mend(Will.RESUME)
    before = _failed(one)
    states = {name.partition("@")[0]: json.loads(text)["state"] for name, text in before.items()}
    again = [f"{slot}@3" for slot in one.kind.broken(one.params)] + ["c@1", "total@1", "clean@2", "last@1"]
    slots = one.kind.slots(one.params)
    return Evidence(
        expected=[one],
        record={"m": {slot: [Execution(slot, 1, 10, n, n + 0.5)] for n, slot in enumerate(slots)}},
        harms=[],
        runs={"m": {"workflow": "mend", "state": "succeeded", "episode": "2"}},
        attempts={"m": before | {name: _outcome() for name in again}},
        outputs={"m": 64},
        acts=[Act("m", "resume", 50.0, 51.0, 1)],
        snapshots={"m": {1: Snapshot(1, "failed", states, counts_of(before), ())}},
    )


def _left() -> Evidence:
    """What a run should be like that has failed, with its dead letters."""
    one = _mend(Will.LEAVE)
    return Evidence(
        expected=[one],
        record={"m": {}},
        harms=[],
        runs={"m": {"workflow": "mend", "state": "failed"}},
        attempts={"m": _failed(one)},
        letters={("m", slot): _letter(slot) for slot in one.kind.broken(one.params)},
        thrown={b"x": 2},
        litter={b"x": 1},
    )


def _letter(slot: str, **changes: Any) -> DeadLetter:
    letter = DeadLetter(
        id=slot, kind="step", reason="error", detail="", fingerprint="", first_at=1, last_at=1, run="m", episode=1,
        attempts=2,
    )  # fmt: skip
    return replace(letter, **changes)


def _cancelled() -> Evidence:
    """What a run should be like that was cancelled at 10 s, and at 1000 ms by the ledger."""
    one = Expected("c", KINDS["slow"], {"x": 1, "ms": 250}, will=Will.CANCEL)
    return Evidence(
        expected=[one],
        record={"c": {"s0": [Execution("s0", 1, 10, 9.0, 9.5)], "s1": [Execution("s1", 1, 10, 10.5, 11.0, "fail")]}},
        harms=[],
        runs={"c": {"workflow": "slow", "state": "cancelled", "cancel_requested": "1000"}},
        attempts={"c": {"s0@1": _outcome(), "s1@1": _outcome("cancelled"), "clean@1": _outcome()}},
        acts=[Act("c", "cancel", 9.8, 10.0, 1, "asked")],
    )


def _twice(seen: Evidence, earlier: Execution, **changes: object) -> Evidence:
    """Let `h` run again."""
    slots = dict(seen.record["r"])
    slots["h"] = [earlier, Execution("h", 1, 11, 20.0, 21.0)]
    return replace(seen, record={"r": slots}, **changes)  # type: ignore[arg-type]


def test_nothing_is_wrong_with_what_is_right() -> None:
    good = _good()
    for seen in (good, _redriven(), _left(), _cancelled()):
        for name, check in checks.CHECKS.items():
            assert check(seen) == [], name


def test_runs_that_are_missing_failed_wrong_or_uncalled_for() -> None:
    good = _good()
    assert "no run r" in checks.check_runs(replace(good, runs={}))[0]
    for state in ("running", "failed"):
        row = {"workflow": "tangle", "state": state}
        assert f"is {state}" in checks.check_runs(replace(good, runs={"r": row}))[0]
    assert "answers 18, not 19" in checks.check_runs(replace(good, outputs={"r": 18}))[0]
    assert "nobody asked" in checks.check_runs(replace(good, expected=[]))[0]


def test_bodies_that_did_not_run_or_did_not_end_or_are_strange() -> None:
    good = _good()
    slots = dict(good.record["r"])
    assert "no body of ['h']" in checks.check_bodies(replace(good, record={"r": slots | {"h": []}}))[0]
    unended = slots | {"h": [Execution("h", 1, 10, 7.0)]}
    assert "no body of ['h']" in checks.check_bodies(replace(good, record={"r": unended}))[0]
    assert "does not have" in checks.check_bodies(replace(good, record={"r": slots | {"z": slots["a"]}}))[0]
    assert "nobody asked" in checks.check_bodies(replace(good, record=good.record | {"s": {}}))[0]


def test_outcomes_that_are_missing_or_several() -> None:
    good = _good()
    for text in ('{"worker":"w"}', _outcome()[:-1] + ',"state":"succeeded"}', _outcome("failed")):
        rows = dict(good.attempts["r"]) | {"h@1": text}
        assert checks.check_outcomes(replace(good, attempts={"r": rows})), text
    rows = dict(good.attempts["r"]) | {"h@2": _outcome()}
    assert "h has succeeded 2 times" in checks.check_outcomes(replace(good, attempts={"r": rows}))[0]


def test_a_body_that_ran_again_needs_a_loss_and_somebody_to_blame() -> None:
    good = _good()
    lost = {"r": dict(good.attempts["r"]) | {"h#l": "1"}}
    again = _twice(good, Execution("h", 1, 10, 7.0, 8.0))
    assert "the ledger counts 0 losses" in checks.check_repeats(again)[0]
    assert checks.check_repeats(replace(again, attempts=lost)) == []
    assert "h began again" in checks.check_unblamed(again)[0]
    killed = Harm(7.5, "kill", "child", 10)
    assert checks.check_unblamed(replace(again, harms=[killed])) == []
    # Another process, another time, a stop that was over: none of these is to blame.
    for harm in (replace(killed, pid=9), replace(killed, at=20.5), Harm(1.0, "stop", "child", 10, until=4.5)):
        assert checks.check_unblamed(replace(again, harms=[harm])), harm
    family = Harm(7.5, "stop", "family", 9, (10, 12), until=9.0)
    assert checks.check_unblamed(replace(again, harms=[family])) == []
    assert checks.repeats(replace(again, harms=[family])) == {"stop family": 1}
    # It was taken by 11, which then slept, and had been done by 10 when 11 went on.
    assert checks.check_unblamed(replace(again, harms=[Harm(6.5, "stop", "child", 11, until=19.9)])) == []
    assert checks.check_unblamed(replace(again, harms=[Harm(6.5, "stop", "child", 11, until=17.0)]))


def test_attempts_that_are_too_many_or_too_few() -> None:
    good = _redriven()
    rows = dict(good.attempts["m"])
    for changed, said in (
        (rows | {"a@2": _outcome("failed")}, "a has made 2 attempts, not 1"),
        ({name: text for name, text in rows.items() if name != "b@3"}, "b has made 2 attempts, not 3"),
        (rows | {f"c@{n}": _outcome("failed") for n in range(1, 4)}, "more than 2 attempts in an episode"),
    ):
        assert any(said in fault for fault in checks.check_attempts(replace(good, attempts={"m": changed}))), said
    crashy = Expected("r", KINDS["crashy"], {"x": 1})
    slots = crashy.kind.slots(crashy.params)
    rows = {f"{slot}@1": _outcome() for slot in slots} | {"a#l": "2", "b#l": "2", "each/1#l": "1", "each/4#l": "1"}
    seen = replace(
        _good(), expected=[crashy], attempts={"r": rows}, runs={"r": {"workflow": "crashy", "state": "succeeded"}},
        record={"r": {slot: [Execution(slot, 1, 10, 5.0, 5.5)] for slot in slots}},
    )  # fmt: skip
    assert checks.check_attempts(seen) == ["run r of crashy: b has crashed 1 times, the ledger counts 2 losses"]
    assert checks.check_attempts(replace(seen, harms=[Harm(5.2, "kill", "child", 9)])) == []


def test_episodes_in_which_too_much_ran_or_that_nobody_asked_for() -> None:
    good = _redriven()
    again = dict(good.attempts["m"]) | {"d@2": _outcome()}
    assert "['d'] had succeeded" in checks.check_episodes(replace(good, attempts={"m": again}))[0]
    row = dict(good.runs["m"]) | {"episode": "3"}
    assert "3 episodes, and was asked 1 times" in checks.check_episodes(replace(good, runs={"m": row}))[0]
    assert "has 2 episodes" in checks.check_episodes(replace(good, expected=[_mend(Will.LEAVE)]))[0]
    assert "not 2, and two" in checks.check_episodes(replace(good, runs={"m": row}, expected=[_mend(Will.BOTH)]))[-1]


def test_hooks_that_ran_too_often_or_not() -> None:
    good = _redriven()
    rows = dict(good.attempts["m"])
    for changed in (rows | {"clean@3": _outcome()}, rows | {"tell@2": _outcome()}, rows | {"last@3": _outcome()}):
        assert len(checks.check_hooks(replace(good, attempts={"m": changed}))) == 1
    del rows["tell@1"]
    assert "tell has made 0 attempts" in checks.check_hooks(replace(good, attempts={"m": rows}))[0]


def test_what_began_after_it_was_cancelled() -> None:
    good = _cancelled()
    late = dict(good.attempts["c"]) | {"s2@1": '{"started_at":1001,"state":"cancelled"}'}
    assert "('s2',) were taken after" in checks.check_cancelled(replace(good, attempts={"c": late}))[0]
    began = {
        "c": dict(good.record["c"]) | {"s2": [Execution("s2", 1, 10, 12.1)], "clean": [Execution("clean", 1, 9, 20)]}
    }
    seen = replace(good, record=began)
    assert "s2 began in 10 2.10 s after" in checks.check_cancelled(seen)[0]
    for harm in (Harm(9.0, "stop", "child", 10, until=11.9), Harm(9.9, "kill", "server", 1)):
        assert checks.check_cancelled(replace(seen, harms=[harm])) == []
        assert checks.check_cancelled(replace(seen, harms=[replace(harm, pid=11, target="child")])) != []
    resumed = [*good.acts, Act("c", "resume", 12.0, 12.05, 1)]
    assert checks.check_cancelled(replace(seen, acts=resumed)) == []
    running = {"c": dict(good.runs["c"]) | {"state": "running"}}
    assert "is running" in checks.check_runs(replace(good, runs=running))[0]


def test_dead_letters_that_are_missing_wrong_or_should_be_gone() -> None:
    good = _left()
    assert "no dead letter of b" in checks.check_letters(replace(good, letters={}))[0]
    for changed in (_letter("b", count=2), _letter("b", episode=2), _letter("b", attempts=3)):
        letters = dict(good.letters) | {("m", "b"): changed}
        assert "of b of run m is wrong" in checks.check_letters(replace(good, letters=letters))[0]
    stale = replace(_redriven(), letters={("m", "b"): _letter("b")})
    assert "which is succeeded" in checks.check_letters(stale)[0]
    for litter in ({}, {b"x": 3}, {b"x": 1, b"y": 1}):
        assert len(checks.check_letters(replace(good, litter=litter))) == 1
    assert checks.check_left(replace(good, left={"m": "['b'] in its outbox"})) == ["run m has ['b'] in its outbox"]


def test_a_body_says_how_it_has_ended() -> None:
    lines = ["begin r/a 1 10 1.0", "fail r/a 1 10 1.1", "begin r/a 2 10 1.2", "crash r/a 2 10 1.3"]
    lines += ["begin r/a 2 11 2.0", "hang r/a 2 11 2.1", "fail r/a 2 11 3.0", "begin r/a 3 11 4.0", "end r/a 3 11 4.1"]
    found = parse(f"{line} ." for line in lines)["r"]["a"]
    assert [(one.how, one.end) for one in found] == [("fail", 1.1), ("crash", None), ("fail", 3.0), ("end", 4.1)]
    assert [one.is_whole for one in found] == [False, False, False, True]
    seen = replace(_good(), record={"r": {"a": found}})
    assert checks.repeats(seen) == {"its own crash": 1}


def test_queues_and_keys_that_are_left_over(engine: Engine) -> None:
    client = engine.ledger.client
    assert checks.check_queues(engine, 0) == []
    assert checks.check_keys(engine) == []
    for spoil, undo in (
        (lambda: client.lpush("orchestrator.default.normal", "{}"), "orchestrator.default.normal"),
        (lambda: client.hset("orchestrator.unacked", "tag", "{}"), "orchestrator.unacked"),
        (lambda: client.zadd("orchestrator.unacked_index", {"tag": 1}), "orchestrator.unacked_index"),
        (lambda: client.zadd("orchestrator:active", {"r": 1}), "orchestrator:active"),
        (lambda: client.lpush("orchestrator:set-aside", "{}"), "orchestrator:set-aside"),
        (lambda: client.zadd("orchestrator:timers", {"r": 1}), "orchestrator:timers"),
    ):
        spoil()
        assert len(checks.check_queues(engine, 0)) == 1, undo
        client.delete(undo)
    client.lpush("orchestrator.default.normal.bell", "1")
    assert checks.check_queues(engine, 0) == []
    client.set("orchestrator:{r}:run", "1")
    assert checks.check_keys(engine) == ["orchestrator:{r}:run has no time to live"]
    client.expire("orchestrator:{r}:run", 10)
    assert checks.check_keys(engine) == []


def test_recovery_is_from_the_kill_to_the_next_start() -> None:
    lines = ["begin r/a 1 10 1.0", "end r/a 1 10 1.1", "begin r/b 1 10 1.2", "begin s/a 1 11 1.3", "end s/a 1 11 1.4"]
    lines += ["begin r/b 1 12 3.5", "end r/b 1 12 3.6", "begin s/b 1 12 5.5"]
    harms = [Harm(1.5, "kill", "child", 10), Harm(1.5, "kill", "worker", 9, (11,)), Harm(3.0, "kill", "server", 1)]
    found = [(one.of, one.run, round(one.seconds, 3)) for one in measure(parse(f"{line} ." for line in lines), harms)]
    assert found == [("body", "r", 2.0), ("run", "s", 4.0), ("all", "", 0.5)]


def test_a_line_that_a_kill_has_torn_is_no_line() -> None:
    torn = ["", "begin r/a 1 10 1.0 .", "begin r/b 1 1", "end r/a 1 10 1.1 .", "begin r/c 1 10 1.2", "."]
    assert {slot: [one.end for one in runs] for slot, runs in parse(torn)["r"].items()} == {"a": [1.1]}


def test_what_a_stopped_process_had_taken_before_is_blamed_on_the_stop() -> None:
    asleep = [Harm(1.0, "stop", "family", 10, (11,), until=14.0)]
    by_sleeper, by_other = Execution("a", 1, 11, 14.01), Execution("a", 1, 20, 14.02)
    assert checks.blame(by_sleeper, by_other, asleep) == checks.blame(by_other, by_sleeper, asleep) == "stop family"
    assert checks.blame(Execution("a", 1, 12, 14.01), by_other, asleep) == "lease"


class _Accepted(Sources):
    """A source that has accepted things beforehand."""

    def __init__(self, work: Path, accepted: list[Expected]) -> None:
        super().__init__(work, ())
        self._accepted = accepted

    def collect(self) -> list[Expected]:
        accepted, self._accepted = self._accepted, []
        return accepted


def test_a_run_whose_id_nobody_can_know_is_found_by_its_input(own_server: Server, tmp_path: Path) -> None:
    """Of two with the same input nobody asked for one; and one that never comes is missing."""
    listed = KINDS["listed"]
    things = [Expected("", listed, {"x": x}) for x in (1, 2)]
    (tmp_path / "project").mkdir()
    sources = _Accepted(tmp_path, things)
    load = Load(tmp_path, own_server.data_dir, random.Random(0), sources=sources)
    workflow = Workflow(name="listed", steps=(Step(id="a", task="t:a"),))
    plan = Plan.of(workflow)
    load.engine.ledger.publish_workflows([plan])
    for run in ("first", "second"):
        load.engine.start(run, plan, event={"id": run, "source": "s", "type": "t", "data": {}}, params={"x": 1})
    load.refresh()
    assert load.in_flight == 2
    assert [(one.run, one.params) for one in load.expected()] == [("first", {"x": 1}), ("", {"x": 2})]
    seen = checks.gather(load, {}, [])
    wrong = checks.check_runs(replace(seen, runs={run: row | {"state": "failed"} for run, row in seen.runs.items()}))
    assert wrong[1:] == ["no run with {'x': 2} of listed", "nobody asked for run second of listed"]
    load.close()
    sources.close()


def test_each_end_of_a_run_that_is_followed_has_a_run(own_server: Server, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    load = Load(tmp_path, own_server.data_dir, random.Random(0), follows=True)
    one = load.emit("mend", Will.RESUME, x=1, broken=1, hook=0)
    assert one is not None
    load.operator.snapshots[one.run] = {1: Snapshot(1, "failed", {}, {}, ())}
    run = keys.run_key(one.run, "run")
    load.engine.ledger.client.hset(run, mapping={"state": "succeeded", "episode": "2"})
    load.refresh()
    assert [after.params for after in load.open.values()] == [
        {"run": one.run, "state": "failed", "episode": 1, "output": None},
        {"run": one.run, "state": "succeeded", "episode": 2, "output": 64},
    ]
    load.close()
