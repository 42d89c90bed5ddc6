"""Decisions on the size of a pool, and which of its workers are to have the processes."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pools import MESSAGE_BOUNDS, STANDBY, PoolSettings, WorkerReport
from workers.pools import Decision, Memory, Observation, allocate, decide, first_to_leave, workers_wanted

POOL = PoolSettings(maximum=100, concurrency=8)
GB = 1024**3


def served(*durations_s: float) -> dict[str, list[int]]:
    """Count messages as a worker does."""
    counts = [0] * (len(MESSAGE_BOUNDS) + 1)
    for took_s in durations_s:
        counts[bisect_left(MESSAGE_BOUNDS, took_s)] += 1
    return {"w": counts}


def knows(*durations_s: float) -> Memory:
    """Remember what messages took, of a pool at rest."""
    return decide(POOL, Observation(now_s=0, served=served(*durations_s)), Memory())[1]


def see(
    memory: Memory,
    now_s: float = 1.0,
    *,
    pool: PoolSettings = POOL,
    backlog: int = 0,
    age_s: float | None = 0.0,
    in_work: Sequence[float] = (),
    done: Mapping[str, Sequence[int]] | None = None,
    pinned: int | None = None,
) -> tuple[Decision, Memory]:
    """Decide on a pool whose workers have served nothing more, unless it is said what."""
    counts = {worker: row for worker, (_, row) in memory.served.items()} if done is None else done
    seen = Observation(now_s=now_s, backlog=backlog, oldest_age_s=age_s, in_work=in_work, served=counts, pinned=pinned)
    return decide(pool, seen, memory)


# The decision


def test_a_pool_with_nothing_to_do_has_nothing() -> None:
    decision, _ = see(Memory())
    assert (decision.desired, decision.why, decision.clears_in_s) == (0, "nothing to do", 0.0)


def test_a_first_message_is_given_a_process() -> None:
    decision, _ = see(Memory(), backlog=1)
    assert decision.desired == 1


def test_each_message_is_given_a_process_until_it_is_known_how_long_they_take() -> None:
    decision, _ = see(Memory(), backlog=38)
    assert decision.desired == 38
    assert decision.why == "38 wait, and it is not known yet how long they take: one process for each"
    assert decision.clears_in_s is None


def test_as_many_are_started_as_begin_what_waits_in_time() -> None:
    memory = knows(*[0.5] * 100)
    decision, _ = see(memory, backlog=200)
    # Each takes half a second (or what is in the middle of its bucket), and three seconds are left.
    assert 25 <= decision.desired <= 34
    assert decision.why == f"200 wait, about 0.38 s each: {decision.desired} processes start them within 5 s"


def test_a_pool_asks_for_no_more_than_its_maximum_and_says_so() -> None:
    decision, _ = see(Memory(), backlog=38, pool=replace(POOL, maximum=8))
    assert decision.desired == 8
    assert decision.why.endswith("one process for each; but max is 8")


def test_a_pool_keeps_its_minimum_and_says_so() -> None:
    decision, _ = see(Memory(), pool=replace(POOL, minimum=2))
    assert (decision.desired, decision.why) == (2, "nothing to do; min is 2")


def test_a_size_set_by_hand_holds_whatever_the_bounds_and_the_load_are() -> None:
    pool = replace(POOL, minimum=1, maximum=8)
    decision, memory = see(Memory(), backlog=5, pool=pool, pinned=12)
    assert decision.desired == 12
    assert decision.why.startswith("set to 12 by hand; by itself it would be 5: 5 wait")
    assert see(memory, 2, pool=pool, in_work=[1.0] * 5, pinned=0)[0].desired == 0
    assert see(memory, 2, pool=pool, in_work=[1.0] * 5)[0].desired == 5


def test_a_step_of_two_hours_does_not_make_ten_thousand_short_ones_look_long() -> None:
    short = knows(*[0.5] * 10_000)
    with_long = knows(*[0.5] * 10_000, 7200.0)
    assert see(short, backlog=300)[0].desired == see(with_long, backlog=300)[0].desired


def test_a_step_of_two_hours_that_is_at_work_is_a_process_more() -> None:
    memory = knows(*[0.5] * 10_000)
    without, _ = see(memory, backlog=300)
    decision, _ = see(memory, backlog=300, in_work=[1800.0])
    assert decision.desired == without.desired + 1
    assert decision.why.endswith(", 1 held by long ones")


def test_long_messages_among_short_ones_are_reckoned_with() -> None:
    assert see(knows(*[0.1] * 90, *[60.0] * 10), backlog=100)[0].desired >= 10


def test_messages_that_wait_too_long_are_given_a_process_each_whatever_was_known_of_them() -> None:
    memory = knows(*[0.01] * 5000)
    assert see(memory, backlog=20)[0].desired <= 2
    decision, _ = see(memory, backlog=20, age_s=6.0, now_s=6)
    assert decision.desired == 20
    assert "the oldest for 6 s: one process for each" in decision.why


@pytest.mark.parametrize("age_s", [None, 1e6])
def test_nothing_is_older_than_the_time_in_which_something_has_waited(age_s: float | None) -> None:
    """A publisher's clock may be wrong, and a broker may not tell."""
    memory = knows(*[0.01] * 5000)
    assert see(memory, 1, backlog=20, age_s=age_s)[0].desired <= 2
    for now_s in range(1, 7):
        decision, memory = see(memory, now_s, backlog=20, age_s=age_s)
    assert decision.desired == 20


def test_messages_from_the_future_have_not_waited() -> None:
    assert see(knows(*[0.01] * 5000), 100, backlog=20, age_s=-3600)[0].desired <= 2


def test_short_messages_that_no_report_shows_at_work_keep_a_process() -> None:
    memory = knows(0.01)
    decision, _ = see(memory, done=served(0.01, 0.01))
    assert (decision.desired, decision.why) == (1, "messages come and are done at once")


def test_a_worker_that_goes_takes_nothing_from_what_is_known() -> None:
    memory = knows(*[0.5] * 100)
    before, memory = see(memory, done={})
    after, memory = see(memory, 2, done={})
    assert before.service_s == after.service_s == pytest.approx(0.384)
    assert after.service_rate == 0


def test_a_worker_that_is_heard_again_is_not_counted_twice() -> None:
    memory = knows(*[0.5] * 100)
    _, memory = see(memory, 1, done={})
    decision, _ = see(memory, 2, done=served(*[0.5] * 100))
    assert (decision.arrival_rate, decision.service_rate) == (0, 0)


def test_rates_are_those_of_the_last_time() -> None:
    memory, count = Memory(), 0
    for now_s in range(120):
        count += 10
        decision, memory = see(memory, now_s, done=served(*[0.1] * count), in_work=[0.05])
    assert decision.arrival_rate == pytest.approx(10, rel=0.01)
    assert decision.service_rate == pytest.approx(10, rel=0.01)
    # A rate of ten a second keeps one process at work; the rest is room.
    assert decision.desired == 1


def test_it_is_said_when_the_backlog_will_be_gone() -> None:
    memory = knows(*[0.4] * 1000)
    pool = replace(POOL, maximum=10)
    _, memory = see(memory, backlog=1000, pool=pool)
    # A burst that is over does not look as if it went on.
    decision, memory = see(memory, 20, backlog=1000, pool=pool)
    assert decision.clears_in_s == pytest.approx(1000 * 0.384 / 10, rel=0.2)
    decision, _ = see(memory, 21, backlog=1000, in_work=[3600.0] * 10, pool=replace(POOL, maximum=10))
    assert decision.clears_in_s is None


def test_a_worker_that_drains_is_no_longer_part_of_the_pool() -> None:
    going = WorkerReport(worker="a", pool="p", size=1, in_work=[90.0], served=[1], is_draining=True)
    staying = WorkerReport(worker="b", pool="p", size=2, in_work=[1.0], served=[2])
    seen = Observation.of([going, staying], now_s=1, backlog=3)
    assert (seen.size, seen.in_work, seen.served) == (2, (1.0,), {"a": (1,), "b": (2,)})


def test_what_is_remembered_survives_being_stored() -> None:
    memory = knows(0.5, 60.0)
    _, memory = see(memory, backlog=7, in_work=[1.0])
    assert Memory.from_json(json.loads(json.dumps(memory.to_json()))) == memory


def test_a_clock_that_goes_back_ends_nothing() -> None:
    decision, memory = see(Memory(), 1000, backlog=5)
    assert decision.desired == 5
    decision, memory = see(memory, 10, in_work=[1.0] * 2)
    assert decision.desired == 2


@pytest.mark.parametrize("now_s", [1e-9, 0.0, 1e9])
def test_turns_may_be_at_any_distance(now_s: float) -> None:
    pool = replace(POOL, start_within_s=0, idle_after_s=0)
    _, memory = see(Memory(), 0, backlog=5, pool=pool)
    decision, _ = see(memory, now_s, backlog=5, in_work=[0.1], pool=pool, done=served(0.1))
    assert 1 <= decision.desired <= 6


ages = st.floats(0, 10_000)
histogram = st.lists(st.integers(0, 10_000), min_size=0, max_size=len(MESSAGE_BOUNDS) + 1)


@st.composite
def moments(draw: st.DrawFn) -> list[Observation]:
    """Draw what is seen of a pool in a row of turns."""
    now_s, made = 1e9, []
    for _ in range(draw(st.integers(1, 8))):
        now_s += draw(st.floats(0, 100))
        made.append(
            Observation(
                now_s=now_s,
                backlog=draw(st.integers(0, 10_000)),
                oldest_age_s=draw(st.none() | st.floats(-10_000, 10_000)),
                in_work=draw(st.lists(ages, max_size=20)),
                served=draw(st.dictionaries(st.sampled_from("abc"), histogram, max_size=3)),
            )
        )
    return made


pool_settings = st.builds(
    lambda minimum, more, idle_after_s, start_within_s: PoolSettings(
        minimum=minimum, maximum=minimum + more, idle_after_s=idle_after_s, start_within_s=start_within_s
    ),
    st.integers(0, 5),
    st.integers(1, 100),
    st.floats(0, 300),
    st.floats(0, 60),
)


def run_through(pool: PoolSettings, seen: Sequence[Observation]) -> tuple[list[Decision], Memory]:
    memory, decisions = Memory(), []
    for one in seen:
        decision, memory = decide(pool, one, memory)
        decisions.append(decision)
    return decisions, memory


@given(pool_settings, moments())
def test_what_is_desired_is_within_bounds_and_not_below_what_is_at_work(
    pool: PoolSettings, seen: list[Observation]
) -> None:
    for one, decision in zip(seen, run_through(pool, seen)[0], strict=True):
        assert pool.minimum <= decision.desired <= pool.maximum
        assert decision.desired >= min(len(one.in_work), pool.maximum)
        assert "\n" not in decision.why
        assert decision.clears_in_s is None or decision.clears_in_s >= 0


@given(pool_settings, moments())
def test_a_pool_never_grows_beyond_the_messages_there_are(pool: PoolSettings, seen: list[Observation]) -> None:
    decisions, _ = run_through(pool, seen)
    for (before, after), one in zip(pairwise(decisions), seen[1:], strict=True):
        if after.desired > before.desired:
            # One more may be for messages that came and went between two reports.
            assert after.desired <= max(pool.minimum, len(one.in_work) + one.backlog, 1)


@given(pool_settings, moments(), st.integers(0, 1000))
def test_a_longer_backlog_never_asks_for_less(pool: PoolSettings, seen: list[Observation], more: int) -> None:
    _, memory = run_through(pool, seen[:-1])
    less, _ = decide(pool, seen[-1], memory)
    longer, _ = decide(pool, replace(seen[-1], backlog=seen[-1].backlog + more), memory)
    assert longer.desired >= less.desired


@given(pool_settings, moments())
def test_a_pool_with_nothing_is_at_its_minimum_after_the_idle_time_and_not_before(
    pool: PoolSettings, seen: list[Observation]
) -> None:
    decisions, memory = run_through(pool, seen)
    # What had ended when it was last looked at has been seen; from then on nothing comes and nothing ends.
    quiet = Observation(now_s=seen[-1].now_s, served=seen[-1].served)
    if pool.idle_after_s > 0.01:
        soon, _ = decide(pool, replace(quiet, now_s=quiet.now_s + pool.idle_after_s * 0.99), memory)
        assert soon.desired >= min(decisions[-1].desired, max(pool.minimum, len(seen[-1].in_work)))
    for share in (0.3, 1.0, 1.001):
        last, memory = decide(pool, replace(quiet, now_s=quiet.now_s + pool.idle_after_s * share + 0.001), memory)
    assert last.desired == pool.minimum


@given(moments())
def test_any_memory_survives_being_stored(seen: list[Observation]) -> None:
    _, memory = run_through(POOL, seen)
    assert Memory.from_json(json.loads(json.dumps(memory.to_json()))) == memory


# The workers


def worker(name: str, **given: object) -> WorkerReport:
    """Make a report of a worker of pool `p` that may have four processes."""
    row: dict[str, object] = {"worker": name, "pool": "p", "host": "h", "ceiling": 4, "memory": 16 * GB, "cores": 8}
    return WorkerReport(**(row | given))  # type: ignore[arg-type]


def share(
    desired: int, *workers: WorkerReport, pool: PoolSettings = POOL, before: Mapping[str, int] | None = None
) -> dict[str, int]:
    return dict(allocate({"p": desired}, {"p": pool}, workers, before=before).targets)


def test_processes_that_are_kept_in_case_more_comes_make_room_for_a_pool_that_needs_it() -> None:
    pools = {"p": PoolSettings(memory=10 * GB), "q": PoolSettings(memory=10 * GB)}
    kept, waits = worker("p1", size=1), worker("q1", pool="q")
    desired = {"p": 1, "q": 1}
    first = allocate(desired, pools, [kept, waits], needed={"p": 0, "q": 1}, before={"p1": 1, "q1": STANDBY})
    assert first.targets["p1"] <= 0, "it has nothing to do"
    assert "p" not in first.held_back
    second = allocate(desired, pools, [worker("p1"), waits], needed={"p": 0, "q": 1}, before=first.targets)
    assert (second.targets["p1"], second.targets["q1"]) == (STANDBY, 1)
    busy = worker("p1", size=1, in_work=[1.0])
    third = allocate(desired, pools, [busy, waits], needed={"p": 1, "q": 1}, before={"p1": 1, "q1": STANDBY})
    assert (third.targets["p1"], third.targets["q1"]) == (1, STANDBY), "what is at work is not interrupted"


def test_new_processes_go_where_there_are_the_fewest() -> None:
    assert share(3, worker("a"), worker("b"), worker("c", size=1)) == {"a": 1, "b": 1, "c": 1}


def test_who_has_processes_keeps_them() -> None:
    assert share(2, worker("a"), worker("b", size=2)) == {"a": STANDBY, "b": 2}


def test_idle_processes_go_before_those_at_work() -> None:
    busy = worker("b", size=2, in_work=[1.0, 2.0])
    assert share(2, worker("a", size=3), busy) == {"a": STANDBY, "b": 2}
    assert share(3, worker("a", size=3), busy) == {"a": 1, "b": 2}


def test_what_was_decided_is_not_moved_before_it_is_reported() -> None:
    assert share(2, worker("a"), worker("b"), before={"b": 2}) == {"a": STANDBY, "b": 2}


def test_reports_that_are_late_move_nothing_back_and_forth() -> None:
    """Each reports what it had before it was told its target; followed, they would change places each second."""
    late = [worker("a", ceiling=8, size=8), worker("b", ceiling=8, size=3)]
    assert share(11, *late, before={"a": 5, "b": 6}) == {"a": 5, "b": 6}


def test_no_worker_has_more_than_its_ceiling() -> None:
    assert share(9, worker("a"), worker("b", ceiling=2)) == {"a": 4, "b": 2}


def test_a_worker_with_a_fault_grows_last() -> None:
    assert share(2, worker("a", fault="children die at start"), worker("b")) == {"a": STANDBY, "b": 2}


def test_a_worker_that_drains_is_told_nothing() -> None:
    assert share(2, worker("a", size=2, is_draining=True), worker("b")) == {"b": 2}


def test_of_an_empty_pool_as_many_workers_wake_as_it_may_have_processes() -> None:
    workers = [worker("a"), worker("b"), worker("c")]
    assert share(0, *workers, pool=replace(POOL, maximum=2)) == {"a": 0, "b": 0, "c": STANDBY}
    assert share(0, *workers) == {"a": 0, "b": 0, "c": 0}


def test_who_was_awake_stays_so() -> None:
    before = {"a": STANDBY, "b": 0}
    assert share(0, worker("a"), worker("b"), pool=replace(POOL, maximum=1), before=before) == {"a": STANDBY, "b": 0}


def test_no_worker_of_a_pool_that_was_stopped_by_hand_wakes() -> None:
    allocation = allocate({"p": 0}, {"p": POOL}, [worker("a", size=1, in_work=[9.0])], pinned=["p"])
    assert allocation.targets == {"a": STANDBY}


@pytest.mark.parametrize(
    ("needs", "host", "said"),
    [
        ({"memory": 3 * GB}, {"memory": 8 * GB}, "3 GB, and h has 8 GB for all pools"),
        ({"cpu": 1.5}, {"cores": 4}, "1.5 cores, and h has 4 for all pools"),
        ({"gpu": 1}, {"gpus": 2}, "1 GPU, and h has 2 for all pools"),
    ],
)
def test_all_workers_of_a_host_share_what_it_has(needs: dict[str, object], host: dict[str, object], said: str) -> None:
    pool = replace(POOL, **needs)  # type: ignore[arg-type]
    allocation = allocate({"p": 6}, {"p": pool}, [worker("a", **host), worker("b", **host)])
    assert sum(allocation.targets.values()) == 2
    assert allocation.held_back == {"p": f"no room for 4 more processes, each with {said}"}


def test_pools_of_a_host_get_equal_shares() -> None:
    pools = {"p": replace(POOL, cpu=1), "q": replace(POOL, cpu=1)}
    workers = [worker("a", ceiling=8), worker("b", pool="q", ceiling=8)]
    assert allocate({"p": 8, "q": 8}, pools, workers).targets == {"a": 4, "b": 4}
    assert allocate({"p": 8, "q": 1}, pools, workers).targets == {"a": 7, "b": 1}
    assert allocate({"p": 2, "q": 8}, pools, workers).targets == {"a": 2, "b": 6}


def test_a_pool_grows_into_another_when_that_has_given_way() -> None:
    pools = {"p": replace(POOL, cpu=1), "q": replace(POOL, cpu=1)}
    full = worker("a", ceiling=8, size=8, in_work=[5.0] * 8)
    allocation = allocate({"p": 4, "q": 4}, pools, [full, worker("b", pool="q", ceiling=8)])
    assert allocation.targets == {"a": 4, "b": STANDBY}
    assert allocation.held_back["q"] == "waits for processes on h to end that are on their way out"
    half = replace(full, size=6, in_work=[6.0] * 6)
    assert allocate({"p": 8, "q": 8}, pools, [half, worker("b", pool="q", ceiling=8)]).targets == {"a": 4, "b": 2}


def test_what_drains_holds_what_it_has() -> None:
    pool = replace(POOL, gpu=1)
    going = worker("a", gpus=1, size=1, in_work=[90.0], is_draining=True)
    allocation = allocate({"p": 1}, {"p": pool}, [going, worker("b", gpus=1)])
    assert allocation.targets == {"b": STANDBY}
    assert "p" in allocation.held_back


def test_two_empty_pools_do_not_wake_for_the_same_device() -> None:
    pools = {"p": replace(POOL, gpu=1), "q": replace(POOL, gpu=1)}
    workers = [worker("a", gpus=1), worker("b", pool="q", gpus=1)]
    assert allocate({"p": 0, "q": 0}, pools, workers).targets == {"a": 0, "b": STANDBY}
    assert allocate({"p": 0, "q": 1}, pools, workers).targets == {"a": STANDBY, "b": 1}


def test_a_host_that_says_nothing_of_itself_holds_nothing_back() -> None:
    pool = replace(POOL, memory=3 * GB, cpu=2)
    assert share(4, worker("a", memory=0, cores=0), pool=pool) == {"a": 4}


def test_as_many_workers_are_wanted_as_hold_what_is_desired() -> None:
    assert workers_wanted(POOL, 0, [worker("a")]) == 0
    assert workers_wanted(POOL, 1, []) == 1
    assert workers_wanted(POOL, 8, []) == 1
    assert workers_wanted(POOL, 9, []) == 2
    # The one that is there has room for four, and one more for eight.
    assert workers_wanted(POOL, 12, [worker("a")]) == 2
    assert workers_wanted(POOL, 13, [worker("a"), worker("b", ceiling=0)]) == 3
    assert workers_wanted(POOL, 4, [worker("a", is_draining=True)]) == 1


def test_who_is_idle_leaves_first() -> None:
    workers = [worker("a", in_work=[1.0], size=1), worker("b"), worker("c", fault="no"), worker("d", is_draining=True)]
    assert first_to_leave(workers, {"a": 1, "b": 0}) == ["c", "b", "a"]


@st.composite
def houses(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, PoolSettings], list[WorkerReport], dict[str, int]]:
    """Draw hosts with workers of several pools."""
    pools = {
        name: PoolSettings(
            maximum=draw(st.integers(1, 20)),
            memory=draw(st.none() | st.integers(1, 8)),
            cpu=draw(st.none() | st.sampled_from([0.5, 1, 2])),
            gpu=draw(st.integers(0, 1)),
        )
        for name in "pqr"
    }
    reports = []
    for index in range(draw(st.integers(0, 8))):
        ceiling = draw(st.integers(0, 8))
        size = draw(st.integers(0, ceiling))
        reports.append(
            WorkerReport(
                worker=f"w{index}",
                pool=draw(st.sampled_from("pqr")),
                host=draw(st.sampled_from("hi")),
                ceiling=ceiling,
                size=size,
                in_work=[1.0] * draw(st.integers(0, size)),
                memory=16,
                cores=8,
                gpus=2,
                is_draining=draw(st.integers(0, 5)) == 0,
            )
        )
    desired = {name: draw(st.integers(0, 30)) for name in pools}
    before = {one.worker: draw(st.integers(-1, 8)) for one in reports}
    return desired, pools, reports, before


@given(houses())
def test_an_allocation_sums_up_and_keeps_to_every_ceiling(
    house: tuple[dict[str, int], dict[str, PoolSettings], list[WorkerReport], dict[str, int]],
) -> None:
    desired, pools, reports, before = house
    allocation = allocate(desired, pools, reports, before=before)
    staying = [one for one in reports if not one.is_draining]
    assert set(allocation.targets) == {one.worker for one in staying}
    for one in staying:
        assert STANDBY <= allocation.targets[one.worker] <= one.ceiling
    for name, pool in pools.items():
        mine = [one for one in staying if one.pool == name]
        total = sum(max(0, allocation.targets[one.worker]) for one in mine)
        wakers = sum(allocation.targets[one.worker] == 0 for one in mine)
        assert total <= desired[name]
        assert not (total and wakers) or name in allocation.held_back
        assert total + wakers <= max(pool.maximum, desired[name])
        if total < min(desired[name], sum(one.ceiling for one in mine)):
            assert name in allocation.held_back
    for host in "hi":
        here = [one for one in reports if one.host == host]
        for resource, most in (("memory", 16), ("cpu", 8), ("gpu", 2)):
            of = {name: getattr(pool, resource) or 0 for name, pool in pools.items()}
            had = sum(of[one.pool] * one.size for one in here)
            will = sum(of[one.pool] * max(0, one.size, allocation.targets.get(one.worker, 0)) for one in here)
            # Nothing that is declared is given twice; what there is too much of already does not grow.
            assert will <= max(most, had)


@given(houses())
def test_an_allocation_that_was_carried_out_is_left_alone(
    house: tuple[dict[str, int], dict[str, PoolSettings], list[WorkerReport], dict[str, int]],
) -> None:
    desired, pools, reports, _ = house
    staying = [one for one in reports if not one.is_draining]
    first = allocate(desired, pools, staying)
    for _ in range(10):  # those that give way to other pools go one after the other
        sizes = {worker: max(0, target) for worker, target in first.targets.items()}
        staying = [replace(one, size=sizes[one.worker], in_work=one.in_work[: sizes[one.worker]]) for one in staying]
        last, first = first, allocate(desired, pools, staying, before=first.targets)
    assert first.targets == last.targets
