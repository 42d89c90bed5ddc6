"""The named points at which a process is killed, each with the smallest load that comes by there.

A name is `point@role`, or several joined by ` then `: the next is armed when the one before has struck. Who is killed:
`child`, `parent` (alone), `worker` (parent and children at once), `dispatcher`, `rescuer`, `timers` or `keeper` (its
process, while that thread is at the point), `trigger`, `beat`, `gateway`, `operator` (the command line), or `server`
(while a child is at the point, or who stands behind a dash). Where a trigger starts the run, its kind follows; where
something is done with it, its kind and that do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.chaos.workload import TRIGGERED, Will


@dataclass(frozen=True, slots=True)
class Strike:
    """One kill: at which point, of whom, when it is reached for the nth time in a process."""

    point: str
    role: str
    nth: int = 1


@dataclass(frozen=True, slots=True)
class Scenario:
    """One or more strikes, one run, what is done with it, and who is held up so that another gets there first.

    `params` are those of the run besides x. With `litter` there is also a message that nobody can read.
    """

    strikes: tuple[Strike, ...]
    kind: str
    x: int = 5
    pauses: tuple[tuple[str, str, float], ...] = ()
    params: Mapping[str, int] = field(default_factory=dict)
    will: Will = Will.NOTHING
    litter: bool = False

    @property
    def name(self) -> str:
        name = " then ".join(f"{strike.point}@{strike.role}" for strike in self.strikes)
        if not self.will:
            return f"{name}, {self.kind}" if self.kind in TRIGGERED else name
        nth = self.strikes[-1].nth
        return f"{name}, {self.kind}, {self.will}{f', {nth}' if nth > 1 else ''}"


def _one(
    point: str, roles: Sequence[str], kind: str, x: int = 5, nth: int = 1, *, will: Will = Will.NOTHING, **params: int
) -> list[Scenario]:
    return [Scenario((Strike(point, role, nth),), kind, x, will=will, params=params) for role in roles]


_EXECUTORS = ("child", "worker", "server")
_LOST_CHILD = Strike("complete.before", "child")
_LOST_WORKER = Strike("complete.before", "worker")
_LEFT_BEHIND = Strike("publish.before", "child")
_LEFT_PARTS = Strike("publish_part.before", "child")
_SLOW_PARENT = (("abandon.before", "parent", 3.0),)
_SLOW_CHILD = (("abandon.before", "child", 3.0),)

SCENARIOS: tuple[Scenario, ...] = (
    # A message: taken and noted, acknowledged.
    *_one("fetch.after", ("parent", "dispatcher"), "chain"),
    *_one("ack.before", ("parent", "dispatcher"), "chain"),
    # A step: taken, run, completed; in the middle of a chain, and where a join fires.
    *_one("begin.before", _EXECUTORS, "chain"),
    *_one("begin.after", _EXECUTORS, "chain"),
    *_one("complete.before", _EXECUTORS, "chain", nth=3),
    *_one("complete.after", _EXECUTORS, "tangle", nth=2),
    # Ready, and not yet published; half of it published; published, and not cleared from the outbox.
    *_one("publish.before", (*_EXECUTORS, "dispatcher"), "tangle"),
    *_one("publish.before", ("parent",), "shared", 130),
    *_one("expand.before", ("child",), "fan", 200),
    *_one("expand.after", _EXECUTORS, "fan", 200),
    *_one("bulk", _EXECUTORS, "fan", 10_000, nth=40),
    *_one("bulk", ("dispatcher",), "wide", nth=20),
    *_one("clear.before", (*_EXECUTORS, "dispatcher"), "fan", 200),
    *_one("clear.before", ("parent",), "shared", 130),
    *_one("give_back.after", ("parent",), "shared", 130),
    # What another process was about to repair.
    Scenario((_LEFT_BEHIND, Strike("sweep.after", "rescuer")), "tangle"),
    Scenario((_LOST_WORKER, Strike("sweep.after", "rescuer")), "chain"),
    Scenario((_LEFT_BEHIND, Strike("clear.before", "rescuer")), "tangle"),
    Scenario((_LEFT_PARTS, Strike("bulk", "rescuer", 20)), "fan", 10_000),
    # A takeover: whoever has just begun a lost unit dies too, or whoever was handing it over.
    Scenario((_LOST_CHILD, Strike("begin_lost.after", "child")), "chain"),
    Scenario((_LOST_CHILD, Strike("begin_lost.after", "worker")), "chain"),
    Scenario((_LOST_WORKER, Strike("begin_lost.after", "child")), "chain"),
    Scenario((_LOST_WORKER, Strike("begin_lost.after", "worker")), "chain"),
    Scenario((_LOST_CHILD, Strike("abandon.after", "parent")), "chain", pauses=_SLOW_CHILD),
    Scenario((_LOST_CHILD, Strike("abandon.after", "child")), "chain", pauses=_SLOW_PARENT),
    # An event: noticed, on the bus, its runs started, noted as seen.
    *_one("emit.before", ("trigger",), "take"),
    *_one("mark.before", ("trigger",), "take"),
    *_one("start_index.after", ("dispatcher",), "chain"),
    *_one("start.after", ("dispatcher",), "chain"),
    *_one("seen.before", ("dispatcher",), "chain"),
    # The server, while others than a child are at work with it.
    *_one("ack.before", ("server-parent", "server-dispatcher"), "chain"),
    *_one("bulk", ("server-dispatcher",), "wide", nth=20),
    *_one("start.after", ("server-dispatcher",), "tangle"),
    *_one("seen.before", ("server-dispatcher",), "chain"),
    *_one("emit.before", ("server-trigger",), "take"),
    *_one("mark.before", ("server-trigger",), "take"),
    # A delivery: on the bus, not answered.
    *_one("emit.before", ("gateway", "server-gateway"), "hooked"),
    *_one("emit.after", ("gateway", "server-gateway"), "hooked"),
    *_one("emit.after", ("gateway",), "answered"),
    *_one("emit.after", ("gateway",), "posted"),
    # An object: claimed, on the bus, confirmed; its message deleted.
    *_one("claim.after", ("trigger", "server-trigger"), "object"),
    *_one("emit.before", ("trigger",), "object"),
    *_one("confirm.before", ("trigger", "server-trigger"), "object"),
    *_one("delete.before", ("trigger",), "object"),
    *_one("delete.before", ("trigger",), "removed"),
    # One that is found in a listing: claimed, on the bus, confirmed; the listing has come so far.
    *_one("claim.after", ("trigger",), "polled"),
    *_one("confirm.before", ("trigger", "server-trigger"), "polled"),
    *_one("confirm.after", ("trigger",), "polled"),
    # A message of a queue: taken, on the bus, let go of.
    *_one("taken.after", ("trigger",), "listed"),
    *_one("emit.before", ("trigger", "server-trigger"), "listed"),
    *_one("settle.before", ("trigger",), "listed"),
    *_one("settle_sqs.before", ("trigger",), "queued"),
    # A due time: on the bus, the schedule moved on.
    *_one("emit.before", ("beat", "server-beat"), "tick", nth=2),
    *_one("advance.before", ("beat", "server-beat"), "tick", nth=2),
    *_one("advance.after", ("beat",), "tick", nth=2),
    # A run has ended: its event on the bus, the run off the list of those in flight.
    *_one("told.before", _EXECUTORS, "after"),
    *_one("told.after", _EXECUTORS, "after"),
    # A nested run: started, ended, its parent told.
    *_one("start_index.after", ("child", "worker"), "nested"),
    *_one("start.after", ("child", "worker"), "nested"),
    *_one("finish.after", _EXECUTORS, "nested"),
    *_one("resolve.after", ("child", "worker"), "nested"),
    # An attempt that has failed, and the next when it is due; a sleep.
    *_one("retry.after", _EXECUTORS, "flaky", fails=2),
    *_one("due.after", ("timers",), "flaky", fails=2),
    *_one("fire.after", ("timers", "server-timers"), "flaky", fails=2),
    *_one("clear.before", ("timers",), "flaky", fails=2),
    # What had to be killed at its deadline, and has no outcome yet.
    *_one("killed.before", ("parent",), "hang"),
    # Hooks: the outcome is known, and they are not published.
    *_one("conclude.after", ("child", "server"), "slow_inner", ms=10),
    # A step that has failed for good, on its way to the dead letters; a message, too.
    *_one("bury.before", ("child", "server"), "mend", will=Will.LEAVE, broken=1, hook=1),
    *_one("bury.after", ("child",), "mend", will=Will.LEAVE, broken=1, hook=1),
    *(
        Scenario((Strike(point, "keeper"),), "diamond", litter=True)
        for point in ("keep.before", "keep.after")
    ),
    # A cancel: in the ledger, and nobody told; nested runs told; what was in work stopped.
    *_one("cancel.after", ("operator", "server-operator"), "slow", will=Will.CANCEL, ms=2500),
    *_one("child.before", ("operator",), "slow", will=Will.CANCEL_RESUME, ms=2500),
    *_one("stopped.after", ("child", "worker"), "slow", will=Will.CANCEL, ms=6000),
    # A further episode: open, and not published; of whoever waits for a nested run, and not of that yet.
    *_one("reopen.after", ("operator", "server-operator"), "mend", will=Will.RESUME, broken=1, hook=1),
    *_one("reopen.after", ("operator",), "mend", will=Will.REDRIVE_INPUT, broken=1, hook=0),
    *_one("reopen.after", ("operator", "server-operator"), "outer", will=Will.RESUME, hook=0),
    *_one("reopen.after", ("operator",), "outer", will=Will.REDRIVE, hook=0),
    *_one("reopen.after", ("operator",), "outer", nth=2, will=Will.REDRIVE, hook=0),
)  # fmt: skip
