"""When does a file count as arrived? When its writer is done with it. Nobody tells us, so three things are looked at:

1. *What inotify says.* A close after writing or a move into the folder means done. It says neither for hard links,
   for files that a new folder brought along, and for what was there before we started; it says nothing at all
   on a network mount (`polling`), on other platforms, and when its queue ran over.
2. *Whether the file is quiet*: size and mtime unchanged for `settle_s`, 1 s if the user did not say.
3. *Whether some process has it open for writing*, which the kernel knows (`triggers/writers.py`). This is asked before
   every verdict and holds back a slow writer that pauses for longer than `settle_s`, also one that began before us, and
   mappings of a file already closed. Where we may not ask, a Modified without a Close stands for the open file, for
   `_PATIENCE_S` (a Close may have been lost).

           Created, Modified, found by a scan                      Closed, moved in, marker came
                         |                                                     |
                         v        Closed, moved in, marker came                v
          +---> [ must become quiet ] -------------------------------> [ complete ] <---------+
          |              |       ^                                        |      |            |
          +- changed ----+       +------- `settle_s` was given -----------+      |            |
                         | quiet for settle_s                                    |            |
                         v                                                       v            |
                      [ does a writer have it open? ] --- yes: look again, after 2 ms to 1 s -+
                         | no
                         v
                        NEW

**What is set after the close.** `shutil.copy2` and `wget` close a file, which makes it NEW at once, and set its mtime
then. That is the same arrival: where size and inode are those of a file that was closed less than `_SAME_S` ago, and
inotify tells of a change of attributes only, the verdict is SAME. A scan may see the other mtime before that event has
come, so what only a scan says of such a file waits for it. The look comes later than the event, and may see what a
rewrite has made of the file since: a Modified that comes after the verdict SAME therefore makes the file NEW although
it is known. So does the Close of `touch`, which is to count like every Close. If events were lost, no change
is taken for one of attributes only: rather twice than never.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from triggers.writers import Writer

QUIET_S = 1.0  # "unchanged for", where the user did not say and a close cannot be seen
_HELD_FIRST_S = 0.002  # inotify reports a close a moment before the kernel counts the writer out
_PATIENCE_S = 900.0
_SAME_S = 2.0  # what is set so soon after the close belongs to the arrival
_LATE_S = 1.0  # a scan waits so much longer for the event that tells what was set
_TOUCH_S = 0.1  # `touch` opens, sets and closes: no more than this lies between the two events
_REMEMBER_S = 10.0  # arrivals, for events that come late


class Sight(Enum):
    """What was seen of a file. The last one counts, but for the first two, which add nothing to what is known."""

    FOUND = auto()  # by a scan
    ATTRIBUTES = auto()  # only these changed: mtime, mode, owner
    CREATED = auto()  # or linked, or come along with a new folder
    MODIFIED = auto()
    COMPLETE = auto()  # closed after writing, or its marker came
    REPLACED = auto()  # complete, and with other content: moved in, or closed after it was seen to be modified

    def adds_to(self, earlier: Sight) -> bool:
        """Tell whether this says more than what was seen before, or the same again."""
        return self is earlier or self not in _HINTS

    def after(self, earlier: Sight | None) -> Sight:
        """Return what both say together, nobody having looked at the file in between."""
        return Sight.REPLACED if self is Sight.COMPLETE and earlier in _WRITTEN else self


_HINTS = (Sight.FOUND, Sight.ATTRIBUTES)
_COMPLETE = (Sight.COMPLETE, Sight.REPLACED)
_WRITTEN = (Sight.CREATED, Sight.MODIFIED, Sight.REPLACED)


class Verdict(Enum):
    WAIT = auto()  # it comes back from `due`
    NEW = auto()  # a file has arrived
    SAME = auto()  # the file that has arrived, under an identity that is not known yet
    KNOWN = auto()  # nothing to do


class Version(NamedTuple):
    """What `stat` says of a file."""

    size: int
    mtime_ns: int
    inode: int

    @property
    def body(self) -> tuple[int, int]:
        return self.size, self.inode


@dataclass(slots=True)
class _Pending:
    complete: bool
    modified: bool  # and no close since
    written: bool  # at some time since the file is pending
    seen_at: float
    quiet_since: float
    look_at: float
    attributes_at: float | None = None  # they changed, and nothing else, soon enough to belong to the arrival
    held_s: float = _HELD_FIRST_S
    seen: Version | None = None


@dataclass(slots=True)
class _Arrival:
    """A file that was NEW because it was closed."""

    closed_at: float
    body: tuple[int, int]
    kept_since: float
    same_at: float | None = None  # when the attributes changed for which the verdict was SAME


class Settling:
    """The files that were seen and are not settled yet. No threads, no clock, no file system: time is passed in.

    Call `note` for what is seen; look at each path that `due` returns and pass what `stat` says to `judge`, or `drop`.
    """

    def __init__(self, settle_s: float | None) -> None:
        self._explicit = settle_s is not None
        self._settle_s = QUIET_S if settle_s is None else settle_s
        self._pending: dict[str, _Pending] = {}
        self._queue: list[tuple[float, str]] = []
        self._arrivals: dict[str, _Arrival] = {}  # those kept longest come first

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, path: str) -> bool:
        return path in self._pending

    def note(self, path: str, sight: Sight, seen_at: float) -> None:
        """Take up what was seen; the path is due for a look at once. What a scan finds never undoes what is known."""
        entry = self._pending.get(path)
        attributes_at = None
        if sight is Sight.ATTRIBUTES:
            arrival = self._arrivals.get(path)
            if arrival is not None and seen_at <= arrival.closed_at + _SAME_S:
                attributes_at = seen_at
        if entry is not None and sight in _HINTS:
            if attributes_at is not None and not entry.complete and not entry.written:  # a scan was faster
                entry.attributes_at = attributes_at
                self._again(path, entry, seen_at)
            return
        self._pending[path] = _Pending(
            complete=sight in _COMPLETE,
            modified=sight is Sight.MODIFIED,
            written=sight in _WRITTEN or (entry is not None and entry.written),
            seen_at=seen_at,
            quiet_since=seen_at,
            look_at=seen_at,
            attributes_at=attributes_at,
        )
        self._push(path, seen_at)

    def due(self, now: float, limit: int) -> list[str]:
        """Return up to `limit` paths that want a look; each of them needs a `judge` or `drop`."""
        paths: list[str] = []
        while self._queue and self._queue[0][0] <= now and len(paths) < limit:
            look_at, path = heapq.heappop(self._queue)
            entry = self._pending.get(path)
            if entry is not None and entry.look_at == look_at:  # else the entry was rescheduled or is gone
                entry.look_at = float("inf")
                paths.append(path)
        return paths

    def next_due(self) -> float:
        """Return when the next look may be due (never later than it is), infinity if nothing is pending."""
        return self._queue[0][0] if self._queue else float("inf")

    def judge(
        self, path: str, now: float, version: Version, writer: Callable[[], Writer], *, known: bool = False
    ) -> Verdict:
        """Return what is to be done; but for WAIT, the path is let go of.

        `known` says that the file was handled in this version. `writer` is asked only where everything else says that
        the file is settled.
        """
        entry, arrival = self._pending[path], self._arrivals.get(path)
        if known and not self._was_rewritten(entry, arrival):
            del self._pending[path]
            return Verdict.KNOWN
        may_be_same = arrival is not None and arrival.body == version.body and not entry.complete and not entry.written
        if arrival is not None and may_be_same and entry.attributes_at is not None:
            del self._pending[path]
            self._remember(path, _Arrival(arrival.closed_at, version.body, now, same_at=entry.attributes_at))
            return Verdict.SAME
        if self._explicit or not entry.complete:
            if entry.seen != version:
                entry.quiet_since = now
            entry.seen = version
            quiet_at = entry.quiet_since + self._settle_s
            if arrival is not None and may_be_same:
                quiet_at = max(quiet_at, arrival.closed_at + _SAME_S + _LATE_S)
            if now < quiet_at:
                self._again(path, entry, quiet_at)
                return Verdict.WAIT
        held = writer()
        if held is Writer.SOME or (held is Writer.UNKNOWN and entry.modified and now < entry.quiet_since + _PATIENCE_S):
            self._again(path, entry, now + entry.held_s)
            entry.held_s = min(2 * entry.held_s, max(self._settle_s, QUIET_S))
            return Verdict.WAIT
        del self._pending[path]
        self._arrivals.pop(path, None)
        if entry.held_s > _HELD_FIRST_S:  # the writer has gone since the last look
            self._remember(path, _Arrival(now, version.body, now))
        elif entry.complete:
            self._remember(path, _Arrival(entry.seen_at, version.body, now))
        return Verdict.NEW

    def drop(self, path: str) -> None:
        """Let go of a file that is gone or does not count; unknown paths are fine."""
        self._pending.pop(path, None)

    def doubt(self) -> None:
        """Events were lost: the close that a Modified waits for may be among them, or what followed a close."""
        for arrival in self._arrivals.values():
            arrival.closed_at = float("-inf")
        for entry in self._pending.values():
            entry.modified, entry.attributes_at = False, None

    @staticmethod
    def _was_rewritten(entry: _Pending, arrival: _Arrival | None) -> bool:
        """Tell whether the verdict SAME was passed on what a writer had made of the file already."""
        if arrival is None or arrival.same_at is None:
            return False
        return entry.written or (entry.complete and entry.seen_at <= arrival.same_at + _TOUCH_S)

    def _remember(self, path: str, arrival: _Arrival) -> None:
        self._arrivals.pop(path, None)
        self._arrivals[path] = arrival
        while True:
            oldest = next(iter(self._arrivals))
            if arrival.kept_since <= self._arrivals[oldest].kept_since + _REMEMBER_S or oldest in self._pending:
                break
            del self._arrivals[oldest]

    def _again(self, path: str, entry: _Pending, look_at: float) -> None:
        entry.look_at = look_at
        self._push(path, look_at)

    def _push(self, path: str, look_at: float) -> None:
        if len(self._queue) > 2 * len(self._pending) + 1000:  # mostly rescheduled: a writer that never rests
            self._queue = [(entry.look_at, name) for name, entry in self._pending.items() if name != path]
            heapq.heapify(self._queue)
        heapq.heappush(self._queue, (look_at, path))
