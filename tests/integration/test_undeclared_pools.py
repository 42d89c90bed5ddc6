"""How large a pool may be whose size nobody has declared, where somebody else starts its workers."""

from __future__ import annotations

import time

from orchestrator import canvas
from orchestrator.engine import Engine
from orchestrator.plan import Plan
from orchestrator.pools import PoolSettings, WorkerReport
from orchestrator.workflows import Step, Workflow
from workers.autoscaler import Autoscaler
from workers.launchers import Launcher
from workers.launchers.none import NoLauncher

MOST = PoolSettings().maximum


def desired(engine: Engine, launcher: Launcher) -> int:
    """Return how large the autoscaler wants the default pool to be when much waits and two workers are there."""
    plan = Plan.of(Workflow(name="w", steps=(Step(id="s", task="t:f"),)))
    for n in range(4 * MOST):
        canvas.publish(engine.app, canvas.link(engine.app, plan, f"run-{n}", "s", "normal"))
    for name in ("one", "two", "leaving"):
        engine.pools.report(
            WorkerReport(
                worker=name, pool="default", host=name, ceiling=MOST, seen_ms=time.time_ns() // 1_000_000,
                is_draining=name == "leaving",
            )
        )  # fmt: skip
    scaler = Autoscaler(engine, launcher)
    try:
        scaler.turn()
    finally:
        scaler.stop()
    return engine.pools.states()["default"].desired


def test_it_is_as_large_as_the_workers_that_somebody_has_started(engine: Engine) -> None:
    assert desired(engine, NoLauncher()) == 2 * MOST


def test_a_declared_one_keeps_to_what_is_declared(engine: Engine) -> None:
    engine.settings = engine.settings.evolve(pools={"default": PoolSettings(maximum=1)})
    assert desired(engine, NoLauncher()) == 1


def test_where_workers_are_started_here_it_does_not_grow_with_them(engine: Engine) -> None:
    class Starts(NoLauncher):
        starts_workers = True

    assert desired(engine, Starts()) == MOST
