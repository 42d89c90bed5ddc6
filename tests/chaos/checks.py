"""What must hold at the end, whatever was killed: the ledger and the broker against the outside record.

Each check answers what it found wrong, one line per fault.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from orchestrator.brokers.claims import UNACKED, UNACKED_INDEX
from orchestrator.engine import Engine
from orchestrator.ledger import keys
from orchestrator.workflows import END
from tests.chaos.record import Execution, Harm
from tests.chaos.workload import Expected

#: Broker keys that stay: which queue an exchange feeds, and doorbells.
BROKER_KEYS = ("_kombu.binding*", "*.bell")
_BATCH = 50
#: A process that was stopped, and took something before, begins it this soon after it goes on.
_AWAKE_S = 2.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that is looked at: what must be there, what was recorded, what was done, what the ledger says."""

    expected: Sequence[Expected]
    record: Mapping[str, Mapping[str, list[Execution]]]
    harms: Sequence[Harm]
    runs: Mapping[str, Mapping[str, str]]
    attempts: Mapping[str, Mapping[str, str]]
    outputs: Mapping[str, Any] = field(default_factory=dict)


def gather(
    engine: Engine,
    expected: Sequence[Expected],
    record: Mapping[str, Mapping[str, list[Execution]]],
    harms: Sequence[Harm],
) -> Evidence:
    """Read what the ledger says of all runs, those too that nobody expects."""
    client = engine.ledger.client
    ids = list(dict.fromkeys([*(one.run for one in expected), *client.zrange(keys.RUNS, 0, -1)]))
    runs: dict[str, Mapping[str, str]] = {}
    attempts: dict[str, Mapping[str, str]] = {}
    for lo in range(0, len(ids), _BATCH):
        batch = ids[lo : lo + _BATCH]
        with client.pipeline(transaction=False) as pipe:
            for run in batch:
                pipe.hgetall(keys.run_key(run, "run"))
                pipe.hgetall(keys.run_key(run, "attempts"))
            rows = pipe.execute()
        runs |= {run: row for run, row in zip(batch, rows[::2], strict=True) if row}
        attempts |= dict(zip(batch, rows[1::2], strict=True))
    outputs = {run: engine.payloads.unpack(row.get("output", "")) for run, row in runs.items()}
    return Evidence(expected, record, harms, runs, attempts, outputs)


def check_runs(seen: Evidence) -> list[str]:
    """Every accepted event has its run, nobody else has one, and each has succeeded with the right output."""
    wrong = []
    for one in seen.expected:
        row = seen.runs.get(one.run)
        if row is None:
            wrong.append(f"no run {one.run} of {one.kind.name}{f' in {one.parent}' if one.parent else ''}")
        elif row["state"] != "succeeded":
            wrong.append(f"run {one.run} of {one.kind.name} is {row['state']}: {row.get('error', '')[:200]}")
        elif seen.outputs.get(one.run) != one.kind.result(one.params):
            wrong.append(
                f"run {one.run} of {one.kind.name} answers {seen.outputs.get(one.run)!r},"
                f" not {one.kind.result(one.params)!r}"
            )
    wanted = {one.run for one in seen.expected}
    wrong += [f"nobody asked for run {run} of {row['workflow']}" for run, row in seen.runs.items() if run not in wanted]
    return wrong


def check_bodies(seen: Evidence) -> list[str]:
    """Every body of every run ran to its end at least once, and no other body did."""
    wrong = []
    for one in seen.expected:
        slots = seen.record.get(one.run, {})
        wanted = set(one.kind.slots(one.params))
        missing = sorted(slot for slot in wanted if not any(e.end is not None for e in slots.get(slot, ())))
        if missing:
            wrong.append(f"run {one.run} of {one.kind.name}: no body of {missing[:5]} ({len(missing)}) came to its end")
        if odd := sorted(slots.keys() - wanted):
            wrong.append(f"run {one.run} of {one.kind.name}: bodies that it does not have: {odd[:5]}")
    strangers = seen.record.keys() - {one.run for one in seen.expected}
    return wrong + [f"bodies of run {run}, for which nobody asked" for run in sorted(strangers)]


def check_outcomes(seen: Evidence) -> list[str]:
    """Each step and item has exactly one outcome in the ledger, and so each join fired once."""
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
            if records[slot] != 1:
                wrong.append(f"run {one.run} of {one.kind.name}: {slot} has succeeded {records[slot]} times")
    return wrong


def blame(earlier: Execution, later: Execution, harms: Iterable[Harm]) -> str:
    """Say what made a body run again: a harm to its process or the server, else `lease`.

    A process that was stopped begins, when it goes on, what it had taken before; another may be at it by then.
    """
    harms = list(harms)
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
            again = len(executions) - 1
            if again <= 0:
                continue
            counted = int(losses.get(f"{slot}#l", 0))
            if again > counted:
                wrong.append(f"run {run}: {slot} ran {again + 1} times, the ledger counts {counted} losses")
    return wrong


def repeats(seen: Evidence) -> Counter[str]:
    """Count the repeated bodies by what is to blame."""
    found: Counter[str] = Counter()
    for slots in seen.record.values():
        for executions in slots.values():
            for earlier, later in pairwise(executions):
                found[blame(earlier, later, seen.harms)] += 1
    return found


def check_unblamed(seen: Evidence) -> list[str]:
    """No live worker lost a lease: where the ledger alone says that one was lost, something was done to somebody."""
    wrong = []
    for run, slots in seen.record.items():
        for slot, executions in slots.items():
            for earlier, later in pairwise(executions):
                if blame(earlier, later, seen.harms) == "lease":
                    after = f"{later.begin - earlier.begin:.3f} s"
                    ended = "ended it" if earlier.end is not None else "did not end it"
                    wrong.append(
                        f"run {run}: {slot} began again in {later.pid} after {after}, at {later.begin:.3f};"
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
        wrong.append(f"{aside} events were set aside")
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
        for name in ("leases", "outbox"):
            found["runs"][run][name] = client.zrange(keys.run_key(run, name), 0, -1, withscores=True)
    return found


def check_all(engine: Engine, seen: Evidence) -> dict[str, list[str]]:
    """Do every check: name -> what is wrong."""
    return {
        "runs": check_runs(seen),
        "bodies": check_bodies(seen),
        "outcomes": check_outcomes(seen),
        "repeats": check_repeats(seen),
        "unblamed": check_unblamed(seen),
        "queues": check_queues(engine),
        "keys": check_keys(engine),
    }
