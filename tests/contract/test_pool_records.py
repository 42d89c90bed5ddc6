"""What is kept of pools, on the real server."""

from __future__ import annotations

import json

import pytest

from orchestrator.engine import Engine
from orchestrator.ledger import keys
from orchestrator.pools import PoolState, WorkerReport


def test_a_worker_that_reports_is_told_its_target_only_while_an_autoscaler_leads(engine: Engine) -> None:
    pools, report = engine.pools, WorkerReport(worker="w1", pool="default", in_work=[1.5], served=[1, 2])
    assert pools.report(report) == (None, False)
    pools.decide([PoolState(pool="default", desired=3)], {"w1": 3})
    assert pools.report(report) == (None, False)
    engine.ledger.lead("autoscaler", "me")
    assert pools.report(report) == (3, False)
    assert pools.reports() == [report]
    assert pools.states()["default"].desired == 3
    pools.withdraw(["w1"])
    assert pools.reports() == []
    assert pools.report(report) == (None, False)


def test_who_monitors_is_told_to_workers(engine: Engine) -> None:
    engine.pools.monitor()
    assert engine.pools.report(WorkerReport(worker="w", pool="p"))[1]


def test_who_waits_is_woken_for_all_pools_that_were_rung_for(engine: Engine) -> None:
    engine.pools.ring(["a", "b"])
    engine.pools.ring(["a"])
    assert engine.pools.wait(1) == {"a", "b"}
    assert engine.pools.wait(0.01) == set()


def test_a_size_set_by_hand_is_kept_until_it_is_taken_back(engine: Engine) -> None:
    engine.pools.pin("a", 3)
    assert engine.pools.pins() == {"a": 3}
    engine.pools.pin("a", None)
    assert engine.pools.pins() == {}


def test_faults_are_kept_by_place(engine: Engine) -> None:
    engine.pools.note_fault("a", "here", "exit code 1")
    engine.pools.note_fault("a", "there", "exit code 2")
    assert engine.pools.faults() == {"a": ["exit code 1", "exit code 2"]}
    engine.pools.note_fault("a", "here", "")
    engine.pools.note_fault("a", "here", "")
    assert engine.pools.faults() == {"a": ["exit code 2"]}


@pytest.mark.parametrize("row", ["{", "[]", "3", json.dumps({"seen_ms": 3})])
def test_what_another_version_has_left_does_not_hide_the_rest(engine: Engine, row: str) -> None:
    pools = engine.pools
    for key in (keys.WORKERS, keys.POOLS, keys.POOL_MEMORIES):
        engine.ledger.client.hset(key, "old", row)
    report = WorkerReport(worker="w", pool="p", in_work=[1.5], served=[1, 2])
    state = PoolState(pool="p", leave=["w"], faults=[])
    pools.report(report)
    engine.ledger.client.hset(keys.POOLS, "p", json.dumps(state.to_json()))
    assert pools.reports() == [report]
    assert pools.states() == {"p": state}
    assert all(isinstance(memory, dict) for memory in pools.memories().values())
