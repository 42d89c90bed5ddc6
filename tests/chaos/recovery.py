"""How long it took from what was done to a process until the work went on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from tests.chaos.record import Execution, Harm

#: A process whose last body ended so long ago, at most, was between two steps when it was struck.
_BETWEEN_S = 0.5
#: So long after a kill of the server a lease may be held up: it starts again, and all are given time to renew theirs.
_OUTAGE_S = 15.0


@dataclass(frozen=True, slots=True)
class Recovery:
    """`body`: it was interrupted and began again. `run`: its next step began. `all`: anything at all began."""

    harm: Harm
    of: str
    seconds: float
    run: str = ""
    slot: str = ""
    #: Whether the server was killed meanwhile, or so shortly before that leases were not yet looked after again.
    server_too: bool = False


def measure(
    record: Mapping[str, Mapping[str, list[Execution]]], harms: Sequence[Harm], pausing: Container[str] = ()
) -> list[Recovery]:
    """Return all recoveries: of bodies and runs for workers, of anything for the other processes.

    When the next step of the runs that are `pausing` begins is not for us to say.
    """
    by_pid: dict[int, list[tuple[Execution, str, Execution | None]]] = {}
    by_run: dict[str, list[float]] = {}
    for run, slots in record.items():
        for executions in slots.values():
            for number, one in enumerate(executions):
                later = next((other for other in executions[number + 1 :] if other.attempt == one.attempt), None)
                by_pid.setdefault(one.pid, []).append((one, run, later))
                by_run.setdefault(run, []).append(one.begin)
    begins = sorted(moment for moments in by_run.values() for moment in moments)
    for moments in by_run.values():
        moments.sort()
    found = []
    outages = [harm.at for harm in harms if harm.target == "server"]
    for harm in harms:
        if harm.target in ("child", "worker", "parent", "family"):
            for pid in (harm.pid, *harm.family):
                of_process = _of_process(by_pid.get(pid, []), by_run, harm)
                found += [entry for entry in of_process if entry.of != "run" or entry.run not in pausing]
        elif (moment := _next(begins, harm.at)) is not None:
            found.append(Recovery(harm, "all", moment - harm.at))
    return [
        replace(one, server_too=any(one.harm.at - _OUTAGE_S <= at <= one.harm.at + one.seconds for at in outages))
        if one.of != "all"
        else one
        for one in found
    ]


def _of_process(
    executions: Sequence[tuple[Execution, str, Execution | None]], by_run: Mapping[str, list[float]], harm: Harm
) -> list[Recovery]:
    found = []
    before = [entry for entry in executions if entry[0].begin <= harm.at]
    for one, run, later in before:
        if (one.end is None or one.end > harm.at) and later is not None:
            found.append(Recovery(harm, "body", later.begin - harm.at, run, one.slot))
    if before:
        one, run, _ = max(before, key=lambda entry: entry[0].begin)
        if one.end is not None and harm.at - _BETWEEN_S <= one.end <= harm.at:
            last = by_run[run][bisect_right(by_run[run], harm.at) - 1]
            moment = _next(by_run[run], harm.at)
            if moment is not None and last == one.begin:  # nothing else of this run was going on
                found.append(Recovery(harm, "run", moment - harm.at, run, one.slot))
    return found


def _next(moments: Sequence[float], after: float) -> float | None:
    index = bisect_right(moments, after)
    return moments[index] if index < len(moments) else None
