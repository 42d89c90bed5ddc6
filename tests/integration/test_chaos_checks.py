"""The checks of the chaos harness notice what they are there for: each is shown a fault of its kind."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.engine import Engine
from tests.chaos import checks
from tests.chaos.checks import Evidence
from tests.chaos.record import Execution, Harm, parse
from tests.chaos.recovery import measure
from tests.chaos.workload import KINDS, Expected

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


def _twice(seen: Evidence, earlier: Execution, **changes: object) -> Evidence:
    """Let `h` run again."""
    slots = dict(seen.record["r"])
    slots["h"] = [earlier, Execution("h", 1, 11, 20.0, 21.0)]
    return replace(seen, record={"r": slots}, **changes)  # type: ignore[arg-type]


def test_nothing_is_wrong_with_what_is_right() -> None:
    good = _good()
    for check in (
        checks.check_runs, checks.check_bodies, checks.check_outcomes, checks.check_repeats, checks.check_unblamed,
    ):  # fmt: skip
        assert check(good) == []


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
