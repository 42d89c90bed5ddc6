"""The file trigger: a file that has arrived in a watched folder becomes one event.

    observation.py   what inotify tells of the folder --+
    folder.py        what a scan finds in it -----------+--> settling.py: does it count? --> the bus, then the marks
    writers.py       who has the file open -------------+

**Nothing is lost.** Events are hints. What counts is the folder against the marks: a scan, at the start, every
`rescan_s` and after any sign of loss, finds every file that is there and not marked. A file's identity is path, size,
mtime and inode (no inode with `polling`: network file systems renumber), so a file rewritten in place is a new one.
It is emitted first and marked then; a kill in between emits it again under the same id.

**Whose marks are forgotten.** Those of files that are gone, but only as seen from the folder they were made in: a
mount that went away leaves an empty folder behind, and forgetting then would make all its files new when it returns.
So marks made before we started, or before the folder became another one (device, inode), stay until one of them is
found again.

What is taken as what: symlinks to files count as the file they point to; folders behind symlinks are not entered
(loops), except the watched folder itself. A folder with an ignored name is left alone with all that is in it. Names
that are not UTF-8 cannot be in JSON: they are logged and left.

Attributes set within 2 s after the close belong to the arrival: one event, of the file as it was when the event was
made. While an event is tried again it keeps its id, for the bus may have it already. Two events come of it if the
trigger is stopped between the close and the setting, or if inotify's queue ran over.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from orchestrator.errors import OrchestratorError
from orchestrator.events import FILE_CREATED, Event
from orchestrator.subscriptions import OnFile, file_source
from orchestrator.telemetry import Outage, get_logger
from orchestrator.workflows import Workflow
from triggers.folder import Folder, Names, is_gone
from triggers.observation import Observation
from triggers.settling import QUIET_S, Settling, Sight, Verdict, Version
from triggers.writers import writer_of

_FOLDER_S = 1.0  # how often to see that the folder is there and still the same
_SCAN_SHARE = 0.05  # at most this part of the time goes into scans, however many files lie there
_SCAN_SLICE = 500  # entries between two looks at what is hot
_BATCH = 500
_INBOX_MAX = 20_000  # paths with events not looked at; more are left to a scan
_PENDING_MAX = 100_000  # files not settled; more are left to the next scan
_BACKOFF_S = (0.1, 5.0)
_STOP_S = 10.0

T = TypeVar("T")
log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileWatch:
    """What one workflow asks for.

    `source` is the event source and the key of the marks. `path` is absolute. `glob` is matched against the name, or,
    if it has a `/` or `**`, against the path relative to the folder (as `PurePath.full_match`). `settle_s` None: a
    close or a move in counts at once; a number: after these, too, size and mtime must stay for that long. `marker` is a
    suffix: with ".done", `data.csv` counts once `data.csv.done` exists.
    """

    source: str
    path: Path
    glob: str = "*"
    recursive: bool = False
    settle_s: float | None = None
    min_size: int = 0
    marker: str | None = None
    polling: bool = False


class Marks(Protocol):
    """Which files were handled, by the source of a watch. Durable; all may raise OrchestratorError or OSError."""

    def read(self, source: str) -> dict[str, str]:
        """Return path -> identity of all files that were handled."""

    def write(self, source: str, marks: Mapping[str, str]) -> None:
        """Add or replace; durable when it returns."""

    def forget(self, source: str, paths: Iterable[str]) -> None:
        """Remove; unknown paths are fine."""


class FileTrigger:
    """Emits an event for each file that arrives in a folder.

    `emit` blocks until all of the events are durable and raises OrchestratorError or OSError if they are not; then, and
    if `marks` raises, the trigger tries again until it works. Both are called by one thread of the trigger.
    """

    def __init__(
        self,
        watch: FileWatch,
        *,
        marks: Marks,
        emit: Callable[[Sequence[Event]], None],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        rescan_s: float = 30.0,
    ) -> None:
        self._source = watch.source
        self._new_loop = partial(_Loop, watch, marks=marks, emit=emit, clock=clock, rescan_s=rescan_s)
        self._loop: _Loop | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start watching and return at once. Idempotent. The folder need not exist."""
        with self._lock:
            if self._loop is None:
                self._loop = self._new_loop()
                self._loop.start()

    def stop(self) -> None:
        """Return when nothing will be emitted any more, or after 10 s if `emit` or a mount hangs. Idempotent."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None and not loop.stop(_STOP_S):
            log.warning("file_trigger_stop_timed_out", source=self._source)


class _StoppedError(Exception):
    """Control flow: stop was asked for while something was being tried again."""


class _Loop(threading.Thread):
    """One run of a trigger, from start to stop: sees, scans, looks and delivers, all in this thread."""

    def __init__(
        self,
        watch: FileWatch,
        *,
        marks: Marks,
        emit: Callable[[Sequence[Event]], None],
        clock: Callable[[], datetime],
        rescan_s: float,
    ) -> None:
        super().__init__(name=f"file-trigger:{watch.source}", daemon=True)
        self._watch = watch
        self._marks = marks
        self._emit = emit
        self._clock = clock
        self._rescan_s = rescan_s
        self._poll_s = QUIET_S if watch.settle_s is None else min(max(watch.settle_s, 0.05), QUIET_S)
        self._log = log.bind(source=watch.source, folder=str(watch.path))
        self._outage = Outage(self._log, "file_trigger")
        self._names = Names(watch.glob, recursive=watch.recursive, marker=watch.marker)
        self._folder = Folder(str(watch.path), self._names, self._log, recursive=watch.recursive, polling=watch.polling)
        self._settling = Settling(watch.settle_s)

        self._wake = threading.Condition()  # guards the next three, which other threads write
        self._inbox: dict[str, tuple[Sight, float]] = {}  # what was seen, and when
        self._lost = False
        self._stopping = False

        self._marked: dict[str, str] = {}
        self._unproven: set[str] = set()  # marks that were not seen from this folder yet; see "Whose marks" above
        self._folder_id: tuple[int, int] | None = None  # device and inode; None while it is away
        self._observation: Observation | None = None
        self._degraded = self._losing = False  # what was logged last
        self._folder_at = self._scan_at = 0.0  # when to look at the folder, when to scan it
        self._scan: Iterator[None] | None = None

    # ---- other threads

    def stop(self, timeout_s: float) -> bool:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self is not threading.current_thread():
            self.join(timeout_s)
        return not self.is_alive() or self is threading.current_thread()

    def _see(self, path: str, sight: Sight) -> None:
        with self._wake:
            earlier = self._inbox.get(path)
            if earlier is None and len(self._inbox) >= _INBOX_MAX:
                self._lost = True
            elif earlier is None or sight.adds_to(earlier[0]):
                self._inbox[path] = (sight.after(earlier and earlier[0]), time.monotonic())
            self._wake.notify()

    def _lose(self) -> None:
        with self._wake:
            self._lost = True
            self._wake.notify()

    # ---- this thread

    def run(self) -> None:
        with suppress(_StoppedError):
            while True:
                try:
                    self._begin()
                    while True:
                        self._turn()
                except _StoppedError:
                    raise
                except Exception:  # noqa: BLE001 - the loop owns this thread
                    self._log.exception("file_trigger_crashed")
                    self._pause(_BACKOFF_S[1])
        self._unwatch()

    def _begin(self) -> None:
        """Start from the marks; after a crash as well, for what was let go of is not marked and the scan finds it."""
        self._unwatch()
        self._marked = dict(self._persist(lambda: self._marks.read(self._watch.source)))
        self._settling = Settling(self._watch.settle_s)
        self._folder_id, self._folder_at, self._scan = None, 0.0, None

    def _turn(self) -> None:
        wait_s = 0.0
        if self._scan is None:
            wake_at = min(self._folder_at, self._scan_at, self._settling.next_due())
            wait_s = max(0.0, wake_at - time.monotonic())
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._inbox or self._lost, wait_s)
            if self._stopping:
                raise _StoppedError
            inbox, self._inbox = self._inbox, {}
            lost, self._lost = self._lost, False
        now = time.monotonic()
        if lost:
            self._recover(now)
        if now >= self._folder_at or (self._observation is not None and not self._observation.is_alive()):
            self._check_folder(now)
        for path, (sight, seen_at) in inbox.items():
            self._note(path, sight, seen_at)
        self._scan_on(now)
        self._look(now)

    def _recover(self, now: float) -> None:
        """Events were lost: scan, but once for a burst of losses."""
        if not self._losing:
            self._losing = True
            self._log.warning("file_events_lost")
        self._settling.doubt()
        self._scan_at = min(self._scan_at, now + 0.5)

    def _note(self, path: str, sight: Sight, seen_at: float) -> None:
        data = self._names.data_of(path)
        if data is not None:
            if sight is Sight.ATTRIBUTES:
                return
            path, sight = data, Sight.COMPLETE
        if self._folder.wants(path):
            self._settling.note(path, sight, seen_at)

    def _counts(self, path: str, status: os.stat_result) -> bool:
        return (
            stat.S_ISREG(status.st_mode)
            and status.st_size >= self._watch.min_size
            and (self._watch.marker is None or os.path.lexists(path + self._watch.marker))
        )

    def _is_known(self, path: str, status: os.stat_result) -> bool:
        return self._marked.get(path) == self._identity(path, status)

    def _identity(self, path: str, status: os.stat_result) -> str:
        identity = f"{path}:{status.st_size}:{status.st_mtime_ns}"
        return identity if self._watch.polling else f"{identity}:{status.st_ino}"

    # ---- settled files go out

    def _look(self, now: float) -> None:
        new: list[tuple[str, os.stat_result]] = []
        marks: dict[str, str] = {}
        for path in self._settling.due(now, _BATCH):
            try:
                status = Path(path).stat()
            except OSError:  # gone; or unreadable for now, then a scan brings it back
                self._settling.drop(path)
                continue
            if not self._counts(path, status):
                self._settling.drop(path)
                continue
            version = Version(status.st_size, status.st_mtime_ns, status.st_ino)
            known = self._is_known(path, status)
            verdict = self._settling.judge(path, now, version, partial(writer_of, path, status), known=known)
            if verdict is Verdict.NEW:
                new.append((path, status))
            if verdict in (Verdict.NEW, Verdict.SAME):
                marks[path] = self._identity(path, status)
        if new:
            events = [self._event(path, status) for path, status in new]
            self._persist(lambda: self._emit(events))
        if marks:
            self._persist(lambda: self._marks.write(self._watch.source, marks))
            self._marked.update(marks)
            self._unproven.difference_update(marks)

    def _event(self, path: str, status: os.stat_result) -> Event:
        return Event(
            id=self._identity(path, status),
            source=self._watch.source,
            type=FILE_CREATED,
            time=_rfc3339(self._clock().astimezone(UTC)),
            subject=self._folder.relative(path),
            data={
                "path": path,
                "name": path.rpartition("/")[2],
                "size": status.st_size,
                "mtime": _rfc3339_of_ns(status.st_mtime_ns),
                "watched": self._folder.root,
            },
        )

    def _persist(self, action: Callable[[], T]) -> T:
        """Do it until it works; raises _StoppedError if it did not until stop."""
        delay_s, longest_s = _BACKOFF_S
        while True:
            try:
                result = action()
            except (OrchestratorError, OSError) as error:
                self._outage.begins(error)
                self._pause(delay_s)
                delay_s = min(2 * delay_s, longest_s)
            else:
                self._outage.ends()
                return result

    def _pause(self, seconds: float) -> None:
        with self._wake:
            if self._wake.wait_for(lambda: self._stopping, seconds):
                raise _StoppedError

    # ---- the folder

    def _check_folder(self, now: float) -> None:
        """See that the folder is there, readable, still the same one and being watched; put right what is not."""
        self._folder_at = now + _FOLDER_S
        folder_id = self._folder.look()
        if folder_id is None:
            self._folder_id, self._scan = None, None
            self._unwatch()
            return
        observed = self._watch.polling or (self._observation is not None and self._observation.is_alive())
        if folder_id == self._folder_id and observed:
            return
        if folder_id != self._folder_id:
            self._folder_id, self._scan, self._scan_at = folder_id, None, now
            self._unproven = set(self._marked)
        if not self._watch.polling and self._observe():
            self._scan, self._scan_at = None, now  # after the watch began, so that nothing falls in between

    def _observe(self) -> bool:
        """Begin to watch anew. False where inotify has no more to give: then it is polled until it has."""
        self._unwatch()
        self._settling.doubt()
        watch = self._watch
        try:
            self._observation = Observation(
                str(watch.path), watch.source, self._see, self._lose, recursive=watch.recursive
            )
        except OSError as error:
            if not self._degraded:
                self._degraded = True
                self._log.warning("file_watch_degraded", reason=str(error), poll_s=self._poll_s)
            return False
        if self._degraded:
            self._degraded = False
            self._log.info("file_watch_restored")
        return True

    def _unwatch(self) -> None:
        if self._observation is not None:
            self._observation.stop()
            self._observation = None

    # ---- scans

    def _scan_on(self, now: float) -> None:
        """Begin a scan that is due, go on with the one that runs: a slice, so that hot files do not wait."""
        if self._folder_id is None:
            self._scan_at = float("inf")
            return
        if self._scan is None and now >= self._scan_at:
            self._scan, self._scan_at = self._scan_slices(self._folder_id), float("inf")
        if self._scan is not None:
            with suppress(StopIteration):
                next(self._scan)
                return
            self._scan = None

    def _scan_slices(self, folder_id: tuple[int, int]) -> Iterator[None]:
        """Find what is there and not marked, forget what is marked and not there."""
        present: set[str] = set()  # of the marked ones
        proven = full = self._losing = False
        busy_s, began = 0.0, time.monotonic()
        for count, (path, status) in enumerate(self._folder.walk(self._watch_anew), start=1):
            if path in self._marked:
                present.add(path)
                proven = proven or (path in self._unproven and self._is_known(path, status))
            if path not in self._settling and not self._is_known(path, status) and self._counts(path, status):
                full = len(self._settling) >= _PENDING_MAX
                if not full:
                    self._settling.note(path, Sight.FOUND, time.monotonic())
            if count % _SCAN_SLICE == 0:
                busy_s += time.monotonic() - began
                yield
                began = time.monotonic()
        if proven:
            self._unproven.clear()
        gone = [path for path in self._marked.keys() - present - self._unproven if is_gone(path)]
        if gone and self._folder.look() == folder_id:  # else the folder went, not its files
            self._forget(gone)
        self._folder.forget_gone()
        busy_s += time.monotonic() - began
        polls = full or self._watch.polling or self._degraded
        period_s = self._poll_s if polls else self._rescan_s
        self._scan_at = min(self._scan_at, time.monotonic() + max(period_s, busy_s / _SCAN_SHARE))

    def _watch_anew(self) -> None:
        """A subfolder can be read now: inotify was refused it before."""
        self._unwatch()
        self._folder_at = 0.0

    def _forget(self, gone: list[str]) -> None:
        for start in range(0, len(gone), _BATCH):
            batch = gone[start : start + _BATCH]
            self._persist(partial(self._marks.forget, self._watch.source, batch))
            for path in batch:
                del self._marked[path]


def _rfc3339(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _rfc3339_of_ns(mtime_ns: int) -> str:
    """An mtime is whatever somebody set: what no calendar has becomes the last moment that it has."""
    try:
        return _rfc3339(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=mtime_ns // 1000))
    except OverflowError:
        return _rfc3339(datetime.max.replace(tzinfo=UTC))


def file_triggers(
    workflows: Iterable[Workflow], *, marks: Marks, emit: Callable[[Sequence[Event]], None], rescan_s: float
) -> dict[Hashable, Callable[[], FileTrigger]]:
    """Return what makes a trigger for each folder that is watched, by its watch."""
    watches = {
        FileWatch(
            source=file_source(workflow.name, on.path),
            path=Path(on.path),
            glob=on.glob,
            recursive=on.recursive,
            settle_s=on.settle_s,
            min_size=on.min_size,
            marker=on.marker,
            polling=on.polling,
        )
        for workflow in workflows
        for on in workflow.on
        if isinstance(on, OnFile)
    }
    return {watch: partial(FileTrigger, watch, marks=marks, emit=emit, rescan_s=rescan_s) for watch in watches}
