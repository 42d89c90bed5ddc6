"""What must hold at the end, whatever was killed: the ledger and the broker against the outside record.

Each check answers what it found wrong, one line per fault.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from orchestrator.brokers.claims import UNACKED, UNACKED_INDEX
from orchestrator.deadletters import DeadLetter
from orchestrator.engine import Engine
from orchestrator.ledger import keys
from orchestrator.workflows import END, Phase
from tests.chaos.acts import Act, Snapshot, counts_of, late_of
from tests.chaos.load import Load
from tests.chaos.record import Execution, Harm
from tests.chaos.workload import Expected, Will

#: Broker keys that stay: which queue an exchange feeds, and doorbells.
BROKER_KEYS = ("_kombu.binding*", "*.bell")
_BATCH = 50
#: A process that was stopped, and took something before, begins it this soon after it goes on.
_AWAKE_S = 2.0
#: What was taken before a run was cancelled begins so soon, on a busy machine; ...
_TAKEN_S = 2.0
#: ... and runs that are nested in it are cancelled so soon when whoever did it could not: the rescuer takes its time.
_CHORES_S = 10.0
#: So long after a kill of the server everybody is at work again.
_OUTAGE_S = 10.0
_ENDS = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that is looked at: what must be there, what was recorded, what was done, what the ledger says.

    `acts` and `snapshots` are what a person did, and what there was of a run's episodes before the last; `letters` the
    dead letters of steps as (run, slot), and `litter` how often bytes that nobody can read are one; `timers` and
    `outbox` are what runs that have ended have left in them.
    """

    expected: Sequence[Expected]
    record: Mapping[str, Mapping[str, list[Execution]]]
    harms: Sequence[Harm]
    runs: Mapping[str, Mapping[str, str]]
    attempts: Mapping[str, Mapping[str, str]]
    outputs: Mapping[str, Any] = field(default_factory=dict)
    acts: Sequence[Act] = ()
    snapshots: Mapping[str, Mapping[int, Snapshot]] = field(default_factory=dict)
    letters: Mapping[tuple[str, str], DeadLetter] = field(default_factory=dict)
    litter: Mapping[bytes, int] = field(default_factory=dict)
    thrown: Mapping[bytes, int] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    def states(self, run: str) -> str:
        return self.runs.get(run, {}).get("state", "")

    def is_whole(self, one: Expected) -> bool:
        """Tell whether a run must have come to its own end: it has succeeded, or the run that it is nested in has."""
        return self.states(one.root or one.run) == "succeeded"


def gather(load: Load, record: Mapping[str, Mapping[str, list[Execution]]], harms: Sequence[Harm]) -> Evidence:
    """Read what the ledger says of all runs, those too that nobody expects."""
    engine, expected = load.engine, load.expected()
    client = engine.ledger.client
    left: dict[str, str] = {}
    ids = list(dict.fromkeys([*(one.run for one in expected), *client.zrange(keys.RUNS, 0, -1)]))
    runs: dict[str, Mapping[str, str]] = {}
    attempts: dict[str, Mapping[str, str]] = {}
    for lo in range(0, len(ids), _BATCH):
        batch = ids[lo : lo + _BATCH]
        with client.pipeline(transaction=False) as pipe:
            for run in batch:
                pipe.hgetall(keys.run_key(run, "run"))
                pipe.hgetall(keys.run_key(run, "attempts"))
                pipe.zrange(keys.run_key(run, "outbox"), 0, -1)
                pipe.zrange(keys.run_key(run, "timers"), 0, -1)
            rows = pipe.execute()
        runs |= {run: row for run, row in zip(batch, rows[::4], strict=True) if row}
        attempts |= dict(zip(batch, rows[1::4], strict=True))
        for run, outbox, timers in zip(batch, rows[2::4], rows[3::4], strict=True):
            left |= {run: f"{outbox} in its outbox, {timers} in its timers"} if outbox or timers else {}
    outputs = {run: engine.payloads.unpack(row.get("output", "")) for run, row in runs.items()}
    letters: dict[tuple[str, str], DeadLetter] = {}
    litter: Counter[bytes] = Counter()
    for letter in engine.dead_letters.all():
        if letter.kind == "step":
            letters[str(letter.run), letter.slot] = letter
        else:
            litter[engine.dead_letters.raw(letter.id) or b""] += 1
    return Evidence(
        expected, record, harms, runs, attempts, outputs, list(load.operator.acts), load.operator.snapshots,
        letters, litter, load.litter, left,
    )  # fmt: skip


def check_runs(seen: Evidence) -> list[str]:
    """Every accepted event has its run, nobody else has one, and each has come to what it should, with its output.

    What is nested in a run that was cancelled or has failed has ended too, if it began.
    """
    wrong = []
    for one in seen.expected:
        row, where = seen.runs.get(one.run), f"{one.kind.name}{f' in {one.parent}' if one.parent else ''}"
        states = ("succeeded",) if seen.is_whole(one) else one.will.states if not one.parent else _ENDS
        if row is None:
            if seen.is_whole(one) or not one.parent:
                wrong.append(f"no run {one.run or f'with {dict(one.params)}'} of {where}")
        elif row["state"] not in states:
            how = f" ({one.will})" if one.will else ""
            wrong.append(f"run {one.run} of {where}{how} is {row['state']}: {row.get('error', '')[:200]}")
        elif row["state"] == "succeeded" and seen.outputs.get(one.run) != one.kind.result(one.params):
            wrong.append(
                f"run {one.run} of {one.kind.name} answers {seen.outputs.get(one.run)!r},"
                f" not {one.kind.result(one.params)!r}"
            )
    wanted = {one.run for one in seen.expected}
    wrong += [f"nobody asked for run {run} of {row['workflow']}" for run, row in seen.runs.items() if run not in wanted]
    return wrong


def check_bodies(seen: Evidence) -> list[str]:
    """Every body of every run that succeeded ran to its end at least once; and none that a run does not have ran."""
    wrong = []
    for one in seen.expected:
        slots = seen.record.get(one.run, {})
        wanted = set(one.kind.slots(one.params))
        missing = sorted(slot for slot in wanted if not any(e.is_whole for e in slots.get(slot, ())))
        if missing and seen.states(one.run) == "succeeded":
            wrong.append(f"run {one.run} of {one.kind.name}: no body of {missing[:5]} ({len(missing)}) came to its end")
        if odd := sorted(slots.keys() - wanted - one.kind.hooks.keys()):
            wrong.append(f"run {one.run} of {one.kind.name}: bodies that it does not have: {odd[:5]}")
    strangers = seen.record.keys() - {one.run for one in seen.expected}
    return wrong + [f"bodies of run {run}, for which nobody asked" for run in sorted(strangers)]


def check_outcomes(seen: Evidence) -> list[str]:
    """Each attempt of a step or item has one outcome in the ledger, of which one is its success; so joins fired once.

    Hooks succeed once in each episode.
    """
    wrong = []
    for one in seen.expected:
        records: Counter[str] = Counter()
        for name, text in seen.attempts.get(one.run, {}).items():
            slot, at, _ = name.rpartition("@")
            if not at or slot == END:  # a count; or the end of the run, whose outcome is the run's
                continue
            pairs = json.loads(text, object_pairs_hook=list)
            records[slot] += sum(1 for key, value in pairs if key == "state" and value == "succeeded")
            outcomes = [value for key, value in pairs if key == "state"]
            if len(outcomes) != 1:
                wrong.append(f"run {one.run} of {one.kind.name}: {name} has {len(outcomes)} outcomes: {outcomes}")
        for slot in one.kind.slots(one.params):
            if records[slot] > 1 or (records[slot] < 1 and seen.states(one.run) == "succeeded"):
                wrong.append(f"run {one.run} of {one.kind.name}: {slot} has succeeded {records[slot]} times")
    return wrong


def _episodes(seen: Evidence, run: str) -> int:
    return int(seen.runs.get(run, {}).get("episode", 1))


def check_attempts(seen: Evidence) -> list[str]:
    """There are as many attempts as the policies say, whatever was lost; in no episode more than `maximum_attempts`.

    A process that is stopped past a step's timeout makes for another one of that. How often something crashes is
    counted as losses, and these are all where nothing was done to anybody.
    """
    wrong = []
    for one in seen.expected:
        made, episodes = counts_of(seen.attempts.get(one.run, {})), _episodes(seen, one.run)
        earlier = [snapshot.attempts for _, snapshot in sorted(seen.snapshots.get(one.run, {}).items())]
        needed, broken = one.kind.attempts(one.params), one.kind.broken(one.params)
        where = f"run {one.run} of {one.kind.name}"
        for slot in one.kind.slots(one.params):
            counts = [*(attempts.get(slot, 0) for attempts in earlier), made.get(slot, 0)]
            if any(later - before > one.kind.maximum for before, later in pairwise([0, *counts])):
                wrong.append(f"{where}: {slot} has made more than {one.kind.maximum} attempts in an episode: {counts}")
            exact = needed.get(slot, 1)
            if slot in broken:
                exact = one.kind.maximum * (episodes - (seen.states(one.run) == "succeeded")) + (
                    seen.states(one.run) == "succeeded"
                )
            is_exact = one.will is not Will.CANCEL_RESUME and (seen.states(one.run) == "succeeded" or slot in broken)
            if is_exact and made.get(slot, 0) != exact and not (slot in one.kind.timed and _was_stopped(seen, one.run)):
                wrong.append(f"{where}: {slot} has made {made.get(slot, 0)} attempts, not {exact}")
        for slot, crashes in one.kind.crashes(one.params).items():
            lost = int(seen.attempts.get(one.run, {}).get(f"{slot}#l", 0))
            if lost < crashes or (lost > crashes and not _was_harmed(seen, one.run, slot)):
                wrong.append(f"{where}: {slot} has crashed {crashes} times, the ledger counts {lost} losses")
    return wrong


def _was_stopped(seen: Evidence, run: str) -> bool:
    executions = [one for many in seen.record.get(run, {}).values() for one in many]
    return any(
        harm.what == "stop" and any(harm.hit(one.pid, one.begin, one.end or float("inf")) for one in executions)
        for harm in seen.harms
    )


def _was_harmed(seen: Evidence, run: str, slot: str) -> bool:
    """Tell whether anything was done to anybody while a slot was at work, or shortly before."""
    executions = seen.record.get(run, {}).get(slot, [])
    since, to = executions[0].begin - _AWAKE_S, max(one.end or one.begin for one in executions)
    return any(harm.at <= to and min(harm.until, harm.at + _OUTAGE_S) >= since for harm in seen.harms)


def check_episodes(seen: Evidence) -> list[str]:
    """What had succeeded did not run again in a later episode; each run had the episodes that were asked for.

    (No workflow here has a step that runs although one above it has failed: what succeeds is downstream of nothing that
    runs again.)
    """
    wrong = []
    for one in seen.expected:
        made, episodes = counts_of(seen.attempts.get(one.run, {})), _episodes(seen, one.run)
        where = f"run {one.run} of {one.kind.name} ({one.will})"
        for number, snapshot in seen.snapshots.get(one.run, {}).items():
            kept = [slot for slot in one.kind.slots(one.params) if snapshot.states.get(slot) == "succeeded"]
            if again := [slot for slot in kept if made.get(slot, 0) > snapshot.attempts.get(slot, 0)]:
                wrong.append(f"{where}: {again[:5]} had succeeded in episode {number} and ran again later")
        if not one.will.goes_on and episodes != 1:
            wrong.append(f"{where} has {episodes} episodes")
        asked = sum(1 for act in seen.acts if act.run == (one.root or one.run) and act.what != "cancel")
        if one.will.goes_on and not one.parent and one.kind.children(one.params) == () and episodes > 1 + asked:
            wrong.append(f"{where} has {episodes} episodes, and was asked {asked} times to go on")
        if one.will is Will.BOTH and episodes != 2:
            wrong.append(f"{where} has {episodes} episodes, not 2, and two went on with it at once")
    return wrong


def check_hooks(seen: Evidence) -> list[str]:
    """Each hook ran once in each episode that ended so as to have it run; a cancel may have come while it did."""
    wrong = []
    for one in seen.expected:
        made, episodes = counts_of(seen.attempts.get(one.run, {})), _episodes(seen, one.run)
        row = seen.runs.get(one.run)
        if row is None:
            continue
        failed, broken = episodes - 1 + (row["state"] == "failed"), one.kind.broken(one.params)
        for hook, phase in one.kind.hooks.items():
            wanted = episodes if phase is Phase.FINALLY else failed if set(broken) - one.kind.hooks.keys() else 0
            count = made.get(hook, 0)
            depends = one.will.cancels or hook not in one.kind.first_hooks
            if count > wanted or (count < wanted and not depends):
                wrong.append(
                    f"run {one.run} of {one.kind.name} ({one.will}): {hook} has made {count} attempts in {episodes}"
                    f" episodes, not {wanted}"
                )
    return wrong


def check_cancelled(seen: Evidence) -> list[str]:
    """Nothing of a cancelled run began after that: by the ledger at all, by the record after what was being taken.

    The latter is what a process had taken before: it begins within _TAKEN_S, or when it goes on, or the server is back.
    Nested runs are cancelled before the call returns; where it was not done at once, within _CHORES_S.
    """
    wrong = []
    families: dict[str, list[Expected]] = {}
    for one in seen.expected:
        families.setdefault(one.root or one.run, []).append(one)
        snapshots = seen.snapshots.get(one.run, {}).values()
        late = late_of(seen.runs.get(one.run, {}), seen.attempts.get(one.run, {}), one.kind.hooks)
        for slots in (*(snapshot.late for snapshot in snapshots), late):
            if slots:
                wrong.append(f"run {one.run} of {one.kind.name}: {slots} were taken after it was cancelled")
    for act in seen.acts:
        if act.what != "cancel" or (act.answer == "nothing to cancel" and not act.is_disturbed):
            continue
        later = [other.asked for other in seen.acts if other.run == act.run and other.asked > act.done]
        again = min(later, default=float("inf"))
        for one in families[act.run]:
            if seen.states(one.root or one.run) == "succeeded" and not later:
                continue  # its end came first
            since = act.done + _TAKEN_S + (_CHORES_S if act.is_disturbed and one.parent else 0.0)
            for slot, executions in seen.record.get(one.run, {}).items():
                for body in executions:
                    if slot in one.kind.hooks or not since < body.begin < again or _was_late(seen, act, body):
                        continue
                    wrong.append(
                        f"run {one.run} of {one.kind.name}: {slot} began in {body.pid} {body.begin - act.done:.2f} s"
                        f" after it was cancelled, at {body.begin:.3f}"
                    )
    return wrong


def _was_late(seen: Evidence, act: Act, body: Execution) -> bool:
    """Tell whether a process that had taken something before could not begin it in time."""
    for harm in seen.harms:
        if harm.what == "stop" and harm.hit(body.pid, body.begin - _AWAKE_S, body.begin):
            return True
        if harm.target == "server" and act.asked - _OUTAGE_S <= harm.at <= body.begin <= harm.at + _OUTAGE_S:
            return True
    return False


def check_letters(seen: Evidence) -> list[str]:
    """There is one dead letter for each slot that failed for good, none for what has been redriven, and all litter."""
    wrong = []
    wanted: dict[tuple[str, str], int] = {}
    for one in seen.expected:
        if one.will is Will.LEAVE:
            for slot in one.kind.broken(one.params):
                wanted[one.run, slot] = 1 if slot in one.kind.hooks else one.kind.maximum
    wrong += [f"no dead letter of {slot} of run {run}" for run, slot in sorted(wanted.keys() - seen.letters.keys())]
    for (run, slot), letter in sorted(seen.letters.items()):
        if (run, slot) not in wanted:
            wrong.append(f"a dead letter of {slot} of run {run}, which is {seen.states(run)}: {letter.to_record()}")
        elif (letter.count, letter.episode, letter.attempts) != (1, 1, wanted[run, slot]):
            wrong.append(f"the dead letter of {slot} of run {run} is wrong: {letter.to_record()}")
    for raw in seen.thrown.keys() | seen.litter.keys():
        if not min(1, seen.thrown.get(raw, 0)) <= seen.litter.get(raw, 0) <= seen.thrown.get(raw, 0):
            wrong.append(
                f"{raw!r} was thrown {seen.thrown.get(raw, 0)} times, and is {seen.litter.get(raw, 0)} letters"
            )
    return wrong


def check_left(seen: Evidence) -> list[str]:
    """Runs that have ended have left nothing to be done."""
    return [f"run {run} has {what}" for run, what in seen.left.items()]


def blame(earlier: Execution, later: Execution, harms: Iterable[Harm]) -> str:
    """Say what made a body run again: a harm to its process or the server, else `lease`.

    A process that was stopped begins, when it goes on, what it had taken before; another may be at it by then.
    """
    if earlier.how == "crash":
        return "its own crash"
    harms = list(harms)
    if earlier.how == "hang":  # it was killed for its deadline, and who was to say so may have been struck
        for harm in harms:
            if harm.target in ("worker", "parent", "family", "server") and earlier.begin <= harm.at <= later.begin:
                return f"its deadline, and {harm.what} {harm.target}"
    for harm in harms:
        if any(harm.hit(one.pid, one.begin - _AWAKE_S, later.begin) for one in (earlier, later)):
            return f"{harm.what} {harm.target}"
    if any(h.target == "server" and earlier.begin - 1 <= h.at <= later.begin for h in harms):
        return "server"
    return "lease"


def check_repeats(seen: Evidence) -> list[str]:
    """A body ran again only if its process died or was stopped, or its lease was lost; and the ledger counts that."""
    wrong = []
    for run, slots in seen.record.items():
        losses = seen.attempts.get(run, {})
        for slot, executions in slots.items():
            again = len(executions) - len({one.attempt for one in executions})
            if again <= 0:
                continue
            counted = int(losses.get(f"{slot}#l", 0))
            if again > counted:
                wrong.append(
                    f"run {run}: {slot} ran again {again} times in its attempts, the ledger counts {counted} losses"
                )
    return wrong


def _again(seen: Evidence) -> Iterator[tuple[str, Execution, Execution]]:
    """Give the bodies that ran again in the same attempt: (run, before, again)."""
    for run, slots in seen.record.items():
        for executions in slots.values():
            by_attempt: dict[int, list[Execution]] = {}
            for one in executions:
                by_attempt.setdefault(one.attempt, []).append(one)
            for ones in by_attempt.values():
                yield from ((run, earlier, later) for earlier, later in pairwise(ones))


def repeats(seen: Evidence) -> Counter[str]:
    """Count the repeated bodies by what is to blame."""
    return Counter(blame(earlier, later, seen.harms) for _, earlier, later in _again(seen))


def check_unblamed(seen: Evidence) -> list[str]:
    """No live worker lost a lease: where the ledger alone says that one was lost, something was done to somebody."""
    wrong = []
    for run, earlier, later in _again(seen):
        if blame(earlier, later, seen.harms) == "lease":
            after = f"{later.begin - earlier.begin:.3f} s"
            ended = "ended it" if earlier.end is not None else "did not end it"
            wrong.append(
                f"run {run}: {later.slot} began again in {later.pid} after {after}, at {later.begin:.3f};"
                f" nothing was done to {earlier.pid}, which {ended}"
            )
    return wrong


def check_queues(engine: Engine, patience_s: float = 60.0) -> list[str]:
    """Every queue is empty, nothing is unacknowledged, no run is in flight; stragglers have some time."""
    until = time.monotonic() + patience_s
    while (wrong := _left_over(engine.ledger.client)) and time.monotonic() < until:
        time.sleep(0.2)
    return wrong


def _left_over(client: Any) -> list[str]:
    wrong = []
    for key in client.scan_iter("orchestrator.*", count=1000, _type="list"):
        if not key.endswith(".bell") and (first := client.lindex(key, 0)) is not None:  # None: it was taken just now
            wrong.append(f"queue {key} has {client.llen(key)} messages: {first[:300]}")
    sizes: dict[str, Callable[[str], int]] = {"hash": client.hlen, "zset": client.zcard}
    for key in (UNACKED, UNACKED_INDEX):
        kind = client.type(key)
        if kind != "none":
            wrong.append(f"{key} has {sizes[kind](key)} entries")
    if active := client.zrange(keys.ACTIVE, 0, -1):
        wrong.append(f"{len(active)} runs are on the list of those in flight: {active[:5]}")
    if aside := client.llen(keys.SET_ASIDE):
        wrong.append(f"{aside} messages are set aside, and no dead letters")
    if timers := client.zrange(keys.TIMERS, 0, -1):
        wrong.append(f"{len(timers)} runs are on the list of those in which something is due: {timers[:5]}")
    return wrong


def check_keys(engine: Engine) -> list[str]:
    """No key lives for ever that is not on the list of those that do."""
    client = engine.ledger.client
    found = [str(key) for key in client.scan_iter("*", count=1000)]
    wrong = []
    for lo in range(0, len(found), 1000):
        with client.pipeline(transaction=False) as pipe:
            for key in found[lo : lo + 1000]:
                pipe.ttl(key)
            ttls = pipe.execute()
        for key, ttl in zip(found[lo : lo + 1000], ttls, strict=True):
            if ttl == -1 and not any(fnmatchcase(key, pattern) for pattern in (*keys.PERMANENT, *BROKER_KEYS)):
                wrong.append(f"{key} has no time to live")
    return wrong


def state_of(engine: Engine, runs: Iterable[str]) -> dict[str, Any]:
    """Return all that the ledger and the broker hold of runs that have not ended, to be looked into."""
    client = engine.ledger.client
    found: dict[str, Any] = {"now": client.time(), "queues": {}, "unacked": {}, "runs": {}}
    for key in client.scan_iter("orchestrator.*", _type="list"):
        found["queues"][key] = client.lrange(key, 0, 50)
    for key in (UNACKED, UNACKED_INDEX):
        if client.type(key) == "hash":
            found["unacked"][key] = client.hgetall(key)
    for run in runs:
        found["runs"][run] = {name: client.hgetall(keys.run_key(run, name)) for name in ("run", "states", "units")}
        for name in ("leases", "outbox", "timers"):
            found["runs"][run][name] = client.zrange(keys.run_key(run, name), 0, -1, withscores=True)
    return found


#: What is said of the evidence alone.
CHECKS: Mapping[str, Callable[[Evidence], list[str]]] = {
    "runs": check_runs,
    "bodies": check_bodies,
    "outcomes": check_outcomes,
    "attempts": check_attempts,
    "episodes": check_episodes,
    "hooks": check_hooks,
    "cancelled": check_cancelled,
    "letters": check_letters,
    "left": check_left,
    "repeats": check_repeats,
    "unblamed": check_unblamed,
}


def check_all(
    load: Load, record: Mapping[str, Mapping[str, list[Execution]]], harms: Sequence[Harm]
) -> tuple[dict[str, list[str]], Evidence]:
    """Do every check: (name -> what is wrong, what was looked at)."""
    # First, for these wait for stragglers.
    wrong = {"sources": load.faults(), "queues": check_queues(load.engine)}
    seen = gather(load, record, harms)
    wrong |= {name: check(seen) for name, check in CHECKS.items()}
    return wrong | {"keys": check_keys(load.engine)}, seen
