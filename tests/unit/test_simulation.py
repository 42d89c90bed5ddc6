"""The rule that sizes pools, run in simulated time: it gets all work done, grows once and does not flap."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.pools import PoolSettings
from tests.simulation.arrivals import Pattern, poisson, steady
from tests.simulation.plots import plot
from tests.simulation.pool import Figures, Pool
from tests.simulation.rules import Ours, rules

SETTINGS = PoolSettings(maximum=32, concurrency=8)


def pattern(*messages: tuple[float, float], horizon_s: float = 300) -> Pattern:
    return Pattern(name="p", title="p", messages=sorted(messages), horizon_s=horizon_s)


def simulate(made: Pattern, settings: PoolSettings = SETTINGS, *, knows_age: bool = True) -> Figures:
    pool = Pool(made)
    Ours(pool, settings, knows_age=knows_age)
    return pool.run()


def wanted_sizes(figures: Figures) -> list[int]:
    return [size for _, size in figures.sizes]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 200), st.floats(0.001, 100)), min_size=1, max_size=60),
    st.integers(0, 3),
    st.integers(1, 20),
    st.integers(1, 8),
    st.booleans(),
)
def test_all_work_is_done_and_the_pool_is_at_its_minimum_in_the_end(
    messages: list[tuple[float, float]], minimum: int, more: int, concurrency: int, knows_age: bool
) -> None:
    chosen = PoolSettings(minimum=minimum, maximum=minimum + more, concurrency=concurrency)
    # All of it one after the other, and the time in which the pool shrinks.
    horizon_s = 210 + sum(held_s for _, held_s in messages) + 80
    figures = simulate(pattern(*messages, horizon_s=horizon_s), chosen, knows_age=knows_age)
    assert len(figures.waits_s) == len(messages)
    assert figures.sizes[-1][1] == minimum
    # A message that wakes a worker, and those that have yet to leave, may be on top for a moment.
    assert max(wanted_sizes(figures)) <= chosen.maximum + concurrency


def test_a_lone_message_begins_when_its_process_has_started() -> None:
    figures = simulate(pattern((100.0, 1.0)))
    assert figures.waits_s == [pytest.approx(0.2)]
    assert figures.starts == 1
    # It stays for as long as it may be idle.
    assert figures.process_s == pytest.approx(62, abs=3)


def test_a_pool_under_steady_load_keeps_its_size() -> None:
    figures = simulate(steady())
    in_between = [row for row in figures.sizes if 100 < row[0] < 600]
    assert len(in_between) <= 4
    assert max(abs(after - before) for (_, before), (_, after) in pairwise(figures.sizes) if before > 2) <= 4
    assert figures.waits_s[int(0.99 * len(figures.waits_s))] < 1


def test_a_pool_of_several_workers_keeps_its_processes() -> None:
    """While the size that is wanted stays the same, no process is started in place of another."""
    rng = random.Random(1)
    load = [(at_s, 1.0) for at_s in poisson(rng, lambda at_s: 15 if at_s < 100 else 8, 15, 400)]
    figures = simulate(pattern(*load, horizon_s=500))
    assert figures.starts <= max(wanted_sizes(figures)) + 15


def test_a_burst_begins_within_the_target_where_the_maximum_allows() -> None:
    known = [(float(at_s), 0.5) for at_s in range(20)]
    figures = simulate(pattern(*known, *[(100.0, 0.5)] * 300), replace(SETTINGS, maximum=64))
    assert figures.waits_s[int(0.9 * len(figures.waits_s))] <= 5


def test_a_step_of_two_hours_holds_one_process_and_no_more() -> None:
    rng = random.Random(1)
    short = [(at_s, 0.5) for at_s in poisson(rng, lambda _: 2, 2, 600)]
    with_long = simulate(pattern((60.0, 7200.0), *short, horizon_s=7400))
    without = simulate(pattern(*short, horizon_s=7400))
    assert with_long.process_s - without.process_s == pytest.approx(7200, rel=0.1)
    assert max(wanted_sizes(with_long)) <= max(wanted_sizes(without)) + 1


def test_every_rule_gets_all_work_done_and_is_drawn_alike_each_time() -> None:
    made = pattern(*[(float(at_s), 2.0) for at_s in range(100)], horizon_s=900)

    def run() -> dict[str, Figures]:
        pools = {name: (Pool(made), start) for name, start in rules(made, SETTINGS).items()}
        for pool, start in pools.values():
            start(pool)
        return {name: pool.run() for name, (pool, _) in pools.items()}

    figures = run()
    assert {len(each.waits_s) for each in figures.values()} == {100}
    drawn = plot(made, figures, 32, 5.0)
    assert drawn == plot(made, run(), 32, 5.0)
    assert len(drawn) < 30_000
