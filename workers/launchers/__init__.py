"""Launchers: what starts and stops workers in some kind of place. The autoscaler says how many; this is the contract.

    process   workers are processes of this machine, supervised here (process.py)
    none      somebody else has workers started: the autoscaler tells how many it would want (none.py)

What holds for each (tests/contract/test_launchers.py):

- `scale` returns at once and may be called as often as one likes: it says what is to be, not what is to be done.
- A worker that is to go *drains*: it takes nothing new, finishes the steps that it has, however long they take, and is
  gone then. Where a platform would end it sooner (a grace period) its launcher sees to it that this does not happen.
- A worker that dies unasked is started again, after a pause that grows as long as it dies young; until it has lived
  for a while it is `failed`, and says why. Of a pool with such a worker no more are started.
- A launcher knows its workers by the names under which they report (pools.worker_name), where it can.
- What shares a machine with its launcher outlives neither `close` nor the launcher, should that be killed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.ledger.pools import PoolRecords


class Phase(StrEnum):
    """How far a worker is that was launched."""

    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A worker that was launched and is not gone. `since` is of `time.monotonic`."""

    pool: str
    #: The name under which it reports; empty: that is not known (yet).
    worker: str
    phase: Phase
    since: float
    #: Why it does not live, in one line; kept until it has lived for a while.
    fault: str = ""


class Launcher(ABC):
    """Starts and stops workers in one place."""

    #: Which of several launchers says that workers do not start.
    place: str
    #: Whether it starts workers; else how many there are is somebody else's decision.
    starts_workers: bool = True

    @abstractmethod
    def scale(self, pool: str, count: int, leave: Sequence[str] = ()) -> None:
        """Have `count` workers of a pool; of those too many the ones named in `leave` go first."""

    @abstractmethod
    def renew(self, generation: str) -> None:
        """Say which generation of the user's code is the current one; returns at once. Others drain as it starts."""

    @abstractmethod
    def look(self) -> list[Launched]:
        """Return the workers there are, and see to those that have died; to be called about once a second."""

    @abstractmethod
    def close(self) -> None:
        """Have workers that cannot do without this launcher stop, in order; idempotent. Blocks until they have."""


class FaultNotes:
    """Keeps in the ledger why workers of a launcher do not live: says what has changed, and nothing else."""

    def __init__(self, records: PoolRecords, place: str) -> None:
        self._records = records
        self._place = place
        self._said: dict[str, str] = {}

    def note(self, launched: Iterable[Launched]) -> None:
        """Say how it is now. Raises UnavailableError, and then says it the next time."""
        found = dict.fromkeys(self._said, "")
        for one in launched:
            if one.fault or one.pool not in found:
                found[one.pool] = one.fault
        for pool, fault in found.items():
            if self._said.get(pool) != fault:  # what somebody has left here who was killed is cleared, too
                self._records.note_fault(pool, self._place, fault)
                self._said[pool] = fault
