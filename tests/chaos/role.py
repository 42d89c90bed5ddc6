"""A launcher for one role, in which named points of the code kill the process; then it is `orchestrator ROLE ...`.

    python -m tests.chaos.role dispatcher|trigger|beat|gateway|worker|runs|dead-letters ARGUMENTS

What is armed comes in the environment as JSON, CHAOS_ARMS: [{"point", "role", "nth", "marker", "after"}], each struck
once, by whoever makes its marker file; one with `after` is armed when that marker is there. CHAOS_PAUSES: [{"point",
"role", "seconds"}] holds up one of two that race. Production code has no hooks: methods are wrapped here.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orchestrator.engine import CHORES
from tests.chaos.record import Harm, Journal


@dataclass(frozen=True, slots=True)
class Point:
    """A place in the code: before or after this method, if the call is one that counts."""

    where: str
    when: str
    counts: Callable[[tuple[Any, ...], Any], bool] = lambda _arguments, _result: True


_LEDGER = "orchestrator.ledger.ledger:Ledger."
_LETTERS = "orchestrator.deadletters:DeadLetters."
_ROLES = ("dispatcher", "trigger", "beat", "gateway", "worker")
_ADVANCE = "orchestrator.schedules:ScheduleStore.put_states"
#: Threads of a dispatcher that have a role of their own.
_CARE = ("rescuer", "timers", "keeper")


def _ledger(verb: str, when: str, counts: Callable[[tuple[Any, ...], Any], bool] = lambda _a, _r: True) -> Point:
    return Point(_LEDGER + verb, when, counts)


def _units(rows: Sequence[str]) -> list[str]:
    return [row for row in rows if row[0] not in CHORES]


def _advances(rows: Sequence[Any]) -> bool:
    """Tell whether schedules go on from what was emitted, and are not merely taken up."""
    return any(state is not None and state.last_due for _, _, state in rows)


POINTS = {
    "fetch.after": Point("orchestrator.brokers.redis:Channel._fetch", "after", lambda _, deliveries: bool(deliveries)),
    "ack.before": Point("orchestrator.brokers.redis:QoS.ack", "before"),
    "begin.before": _ledger("begin", "before"),
    "begin.after": _ledger("begin", "after", lambda _, answer: answer.taken is not None),
    "begin_lost.after": _ledger("begin", "after", lambda _, answer: answer.taken is not None and answer.taken.losses),
    "complete.before": _ledger("complete", "before"),
    "complete.after": _ledger("complete", "after"),
    "expand.before": _ledger("expand", "before"),
    "expand.after": _ledger("expand", "after"),
    "publish.before": Point("orchestrator.engine:Engine.publish", "before", lambda given, _: bool(_units(given[2]))),
    "publish_part.before": Point(
        "orchestrator.engine:Engine.publish", "before", lambda given, _: any("/" in unit for unit in _units(given[2]))
    ),
    "bulk": Point("kombu.transport.redis:PublishBatch.publish", "after"),
    "clear.before": _ledger("clear", "before"),
    "sweep.after": _ledger("sweep", "after", lambda _, answer: bool(answer[1])),
    "abandon.before": _ledger("abandon", "before"),
    "abandon.after": _ledger("abandon", "after", lambda _, answer: answer[0]),
    "give_back.after": _ledger("give_back", "after", lambda _, units: bool(units)),
    "start_index.after": _ledger("index", "after"),
    "start.after": _ledger("start", "after", lambda _, started: started),
    "finish.after": _ledger("finish", "after", lambda _, answer: "^ended" in answer.publish),
    "resolve.after": _ledger("resolve", "after", lambda _, answer: bool(answer.publish)),
    "retry.after": _ledger("complete", "after", lambda given, _: given[3] == "retrying"),
    "stopped.after": _ledger("complete", "after", lambda given, _: given[3] == "cancelled"),
    "conclude.after": _ledger("finish", "after", lambda _, answer: bool(_units(answer.publish))),
    "due.after": _ledger("due", "after", lambda _, answer: bool(answer[0])),
    "fire.after": _ledger("fire", "after", lambda _, rows: bool(rows)),
    "cancel.after": _ledger("cancel", "after", lambda _, answer: answer.verdict == "ok"),
    "child.before": Point("orchestrator.engine:Engine._see_to_child", "before"),
    "reopen.after": _ledger("reopen", "after", lambda _, answer: answer.verdict == "ok"),
    "bury.before": Point(_LETTERS + "bury", "before"),
    "bury.after": Point(_LETTERS + "bury", "after", lambda _, count: bool(count)),
    "keep.before": Point(_LETTERS + "_keep", "before"),
    "keep.after": Point(_LETTERS + "_keep", "after"),
    "killed.before": Point("workers.deadlines:Deadlines._record", "before"),
    "emit.before": Point("orchestrator.bus:EventBus.publish", "before"),
    "mark.before": _ledger("write", "before"),
    "seen.before": Point("orchestrator.eventlog:EventLog.note", "before"),
    "told.before": Point("orchestrator.engine:Engine.tell_followers", "before"),
    "told.after": Point("orchestrator.engine:Engine.tell_followers", "after"),
    "emit.after": Point("orchestrator.bus:EventBus.publish", "after"),
    "claim.after": Point(
        "orchestrator.ledger.objects:ObjectRecords.claim",
        "after",
        lambda _, claims: any(claim.event_id for claim in claims),
    ),
    "confirm.before": Point(
        "orchestrator.ledger.objects:ObjectRecords.confirm", "before", lambda given, _: bool(given[1])
    ),
    "confirm.after": Point(
        "orchestrator.ledger.objects:ObjectRecords.confirm", "after", lambda given, _: bool(given[1])
    ),
    "delete.before": Point("triggers.notified:_Receiving._delete", "before", lambda given, _: bool(given[1])),
    "taken.after": Point("triggers.queue_redis:RedisSource.take", "after", lambda _, taken: bool(taken)),
    "settle.before": Point("triggers.queue_redis:RedisSource.settle", "before"),
    "settle_sqs.before": Point("triggers.queue_sqs:SqsSource.settle", "before"),
    "advance.before": Point(_ADVANCE, "before", lambda given, _: _advances(given[1])),
    "advance.after": Point(_ADVANCE, "after", lambda given, _: _advances(given[1])),
}

#: Who reaches the point that is struck under this name; others reach it themselves.
_REACHED_BY = {
    "worker": "child",
    "server": "child",
    "server-dispatcher": "dispatcher",
    "server-trigger": "trigger",
    "server-parent": "parent",
    "server-timers": "timers",
    "server-keeper": "keeper",
    "server-operator": "operator",
    "server-beat": "beat",
    "server-gateway": "gateway",
}


class _Arms:
    """What is armed in this process and in those that it forks."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._main = os.getpid()
        self._work = Path(os.environ["CHAOS_WORK"])
        self._arms: list[dict[str, Any]] = json.loads(os.environ["CHAOS_ARMS"])
        self._pauses: list[dict[str, Any]] = json.loads(os.environ["CHAOS_PAUSES"])
        self._counts: dict[int, int] = {}

    def who(self) -> str:
        """Say which role this thread of this process has."""
        if self._role == "worker":
            return "parent" if os.getpid() == self._main else "child"
        thread = threading.current_thread().name
        return thread if thread in _CARE else self._role

    def reached(self, point: str, batch: Any) -> None:
        """Kill, if this is what something is armed for."""
        who = self.who()
        for pause in self._pauses:
            if (pause["point"], pause["role"]) == (point, who):
                time.sleep(pause["seconds"])
        for number, arm in enumerate(self._arms):
            if arm["point"] != point or _REACHED_BY.get(arm["role"], arm["role"]) != who:
                continue
            if arm["after"] and not Path(arm["after"]).exists():
                continue
            self._counts[number] = self._counts.get(number, 0) + 1
            if self._counts[number] >= arm["nth"] and not Path(arm["marker"]).exists():
                self._strike(arm, batch)

    def _strike(self, arm: dict[str, Any], batch: Any) -> None:
        if arm["point"] == "bulk":
            batch.flush()  # what was added until now is in the broker, what comes is not
        try:
            os.close(os.open(arm["marker"], os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return
        pids = self._victims(arm["role"])
        target = arm["role"].partition("-")[0]
        Journal(self._work / "harms.jsonl").harm(Harm(time.monotonic(), "kill", target, pids[0], tuple(pids[1:])))
        # The children of a parent that is killed alone are left to themselves.
        for pid in pids[:1] if arm["role"] == "parent" else pids:
            os.kill(pid, signal.SIGKILL)

    def _victims(self, role: str) -> list[int]:
        """Return whom to kill, this process last; for a parent also those who suffer with it."""
        if role.startswith("server"):
            return [int((self._work / "server.pid").read_text())]
        if role not in ("worker", "parent"):
            return [os.getpid()]
        below = [child.pid for child in psutil.Process(self._main).children(recursive=True)]
        return [self._main, *sorted(below, key=lambda pid: pid == os.getpid())]


def _wrap(name: str, point: Point, arms: _Arms) -> None:
    module, _, path = point.where.partition(":")
    *owners, method = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, method)

    @functools.wraps(original)
    def wrapped(*given: Any, **options: Any) -> Any:
        if point.when == "before" and point.counts(given, None):
            arms.reached(name, given[0])
        result = original(*given, **options)
        if point.when == "after" and point.counts(given, result):
            arms.reached(name, given[0])
        return result

    setattr(owner, method, wrapped)


def main() -> None:
    """Wrap what is armed and become the role."""
    arms = _Arms(sys.argv[1] if sys.argv[1] in _ROLES else "operator")
    armed = {
        entry["point"] for variable in ("CHAOS_ARMS", "CHAOS_PAUSES") for entry in json.loads(os.environ[variable])
    }
    for name in armed:
        _wrap(name, POINTS[name], arms)
    from orchestrator.cli import main as orchestrator

    orchestrator()


if __name__ == "__main__":
    main()
