"""The file trigger on real files and a real watchdog. Nothing sleeps to wait: `wait_until` does, with a limit."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import UnavailableError
from orchestrator.events import FILE_CREATED, Event
from tests.conftest import capture_logs
from triggers import files, observation, settling
from triggers.files import FileTrigger, FileWatch
from triggers.folder import Names
from triggers.settling import Settling, Sight, Verdict, Version
from triggers.writers import Writer, remote_devices, writer_of

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="inotify and leases are Linux's")
PROBE = "probe"
NOW = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)


def wait_until(predicate: Callable[[], object], description: str, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {description}"
        time.sleep(0.005)


class MemoryMarks:
    """Marks that last as long as this object, and can be made to fail."""

    def __init__(self) -> None:
        self.marks: dict[str, str] = {}
        self.writes: list[str] = []
        self.down = False

    def read(self, source: str) -> dict[str, str]:
        self._check()
        return dict(self.marks)

    def write(self, source: str, marks: Mapping[str, str]) -> None:
        self._check()
        assert len(marks) <= 500
        marks = {path: identity for path, identity in marks.items() if not path.endswith(f"/{PROBE}")}
        self.marks.update(marks)
        self.writes.extend(marks)

    def forget(self, source: str, paths: Iterable[str]) -> None:
        self._check()
        for path in paths:
            self.marks.pop(path, None)

    def _check(self) -> None:
        if self.down:
            raise UnavailableError("the ledger is away")


class Inbox:
    """A watched folder, its trigger, its marks, and what was emitted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marks = MemoryMarks()
        self.events: list[Event] = []
        self.probed = False
        self.refused = 0
        self.bus_down = False
        self.trigger: FileTrigger | None = None

    def emit(self, events: Sequence[Event]) -> None:
        if self.bus_down:
            self.refused += 1
            raise UnavailableError("the bus is away")
        self.probed = self.probed or any(event.subject == PROBE for event in events)
        self.events.extend(event for event in events if event.subject != PROBE)

    def start(self, *, rescan_s: float = 30.0, **watch: Any) -> None:
        self.trigger = FileTrigger(
            FileWatch(source=f"file://{self.path}", path=self.path, **watch),
            marks=self.marks,
            emit=self.emit,
            clock=lambda: NOW,
            rescan_s=rescan_s,
        )
        self.trigger.start()

    def start_watching(self, **watch: Any) -> None:
        """Start, and wait until inotify tells of what comes: shown by a probe file that is then taken away.

        Watching begins before the first scan, so that the probe shows it whichever of the two finds it.
        """
        self.start(**watch)
        probe = self.path / PROBE
        marker = self.path / f"{PROBE}{watch.get('marker', '.tmp')}"
        marker.touch()
        write_at = 0.0

        def seen() -> bool:
            nonlocal write_at
            if time.monotonic() >= write_at:
                probe.write_bytes(b"x" * (watch.get("min_size", 0) + 1))
                write_at = time.monotonic() + 0.02 + 2 * (watch.get("settle_s") or 0)
            return self.probed

        wait_until(seen, "the probe is seen")
        probe.unlink()
        marker.unlink()

    def stop(self) -> None:
        if self.trigger is not None:
            self.trigger.stop()
            self.trigger = None

    @property
    def subjects(self) -> list[str]:
        return sorted(event.subject or "" for event in self.events)

    def expect(self, *subjects: str, timeout_s: float = 15.0) -> None:
        """Wait until exactly these files were emitted, and marked."""
        expected = sorted(subjects)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: len(self.events) >= len(expected), "events", timeout_s)
        assert self.subjects == expected
        wait_until(lambda: all(self.marks.marks.get(e.data["path"]) for e in self.events), "marks are written")

    def sentinel(self, name: str = "zz-sentinel.csv") -> None:
        """A file that counts at once: when it was emitted, what came before it and counts at once was, too."""
        before = len(self.events)
        (self.path / "sentinel.tmp").write_bytes(b"s" * 64)
        (self.path / "sentinel.tmp").rename(self.path / name)
        wait_until(lambda: any(e.subject == name for e in self.events[before:]), "the sentinel is seen")
        self.events = [event for event in self.events if event.subject != name]


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    folder = tmp_path / "inbox"
    folder.mkdir()
    it = Inbox(folder)
    before = set(threading.enumerate())
    yield it
    it.stop()
    wait_until(lambda: set(threading.enumerate()) <= before, "no thread is left")


@contextlib.contextmanager
def writer(path: Path, text: str = "half", mode: str = "a") -> Iterator[subprocess.Popen[str]]:
    """Another process that has written `text` and holds the file open; a line on stdin is written, its end closes."""
    code = (
        "import sys\n"
        f"with open({str(path)!r}, {mode!r}) as f:\n"
        f"    f.write({text!r}); f.flush(); print('ready', flush=True)\n"
        "    for line in sys.stdin: f.write(line); f.flush(); print('ready', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait(20)
        process.stdout.close()


def close(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(20)


# ---------------------------------------------------------------- when a file counts


@linux_only
def test_closed_file_counts_at_once(inbox: Inbox) -> None:
    """Far below the settle time, and the event says all there is to say."""
    inbox.start_watching()
    path = inbox.path / "a.csv"
    waits = []
    for n in range(5):
        path.write_text("x" * (n + 1))
        began = time.monotonic()
        wait_until(lambda n=n: len(inbox.events) == n + 1, "the file is seen")  # type: ignore[misc]
        waits.append(time.monotonic() - began)
    assert min(waits) < 0.1
    event, status = inbox.events[-1], path.stat()
    assert event.type == FILE_CREATED
    assert event.source == f"file://{inbox.path}"
    assert event.subject == "a.csv"
    assert event.time == "2026-01-02T03:04:05.000006Z"
    assert event.id == f"{path}:5:{status.st_mtime_ns}:{status.st_ino}"
    mtime = datetime.fromtimestamp(status.st_mtime_ns // 10**9, UTC).replace(
        microsecond=status.st_mtime_ns % 10**9 // 1000
    )
    assert event.data == {
        "path": str(path),
        "name": "a.csv",
        "size": 5,
        "mtime": mtime.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "watched": str(inbox.path),
    }
    wait_until(lambda: inbox.marks.marks.get(str(path)) == event.id, "it is marked")


@linux_only
@pytest.mark.parametrize("settle_s", [None, 0.1])
def test_slow_writer_is_waited_for(inbox: Inbox, settle_s: float | None) -> None:
    """A writer that pauses for longer than settle, then writes the rest and closes: one event, of the whole file."""
    inbox.start_watching(rescan_s=0.2, settle_s=settle_s)
    with writer(inbox.path / "slow.csv") as process:
        deadline = time.monotonic() + (1.6 if settle_s is None else 0.6)
        wait_until(lambda: time.monotonic() > deadline or inbox.events, "longer than settle")
        assert inbox.subjects == []
        close(process)
    inbox.expect("slow.csv")
    assert inbox.events[0].data["size"] == 4


@linux_only
def test_slow_writer_that_began_before_the_trigger_is_waited_for(inbox: Inbox) -> None:
    """No event tells of that writer; the kernel knows it."""
    (inbox.path / "quiet.csv").write_text("whole")
    with writer(inbox.path / "slow.csv") as process:
        inbox.start(rescan_s=0.2)
        inbox.expect("quiet.csv")
        deadline = time.monotonic() + 0.5
        wait_until(lambda: time.monotonic() > deadline or len(inbox.events) > 1, "a while longer")
        assert inbox.subjects == ["quiet.csv"]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("rest\n")
        process.stdin.flush()
        process.stdout.readline()
        close(process)
    inbox.expect("quiet.csv", "slow.csv")
    assert inbox.events[-1].data["size"] == 9


@linux_only
def test_file_moved_in_counts_at_once(inbox: Inbox, tmp_path: Path) -> None:
    inbox.start_watching()
    (tmp_path / "a.csv").write_text("x")
    began = time.monotonic()
    (tmp_path / "a.csv").rename(inbox.path / "a.csv")
    inbox.expect("a.csv")
    assert time.monotonic() - began < 0.9  # not the settle time


def test_hard_link_counts_when_quiet(inbox: Inbox, tmp_path: Path) -> None:
    inbox.start_watching()
    (tmp_path / "a.csv").write_text("x")
    (inbox.path / "a.csv").hardlink_to(tmp_path / "a.csv")
    inbox.expect("a.csv")


def test_directory_moved_in_brings_its_files(inbox: Inbox, tmp_path: Path) -> None:
    inbox.start_watching(recursive=True)
    (tmp_path / "new/deep/er").mkdir(parents=True)
    for name in ("a.csv", "deep/b.csv", "deep/er/c.csv"):
        (tmp_path / "new" / name).write_text(name)
    (tmp_path / "new").rename(inbox.path / "new")
    inbox.expect("new/a.csv", "new/deep/b.csv", "new/deep/er/c.csv")


def test_file_in_a_directory_made_just_before(inbox: Inbox) -> None:
    inbox.start_watching(recursive=True)
    for n in range(20):  # also one in another: watchdog meets "e" twice then
        (inbox.path / f"d{n}/e").mkdir(parents=True)
        (inbox.path / f"d{n}/e/a.csv").write_text("x")
    inbox.expect(*(f"d{n}/e/a.csv" for n in range(20)))


def test_directory_renamed_within_the_folder_gives_new_paths(inbox: Inbox) -> None:
    inbox.start_watching(recursive=True)
    (inbox.path / "one").mkdir()
    (inbox.path / "one/a.csv").write_text("x")
    inbox.expect("one/a.csv")
    (inbox.path / "one").rename(inbox.path / "two")
    inbox.expect("one/a.csv", "two/a.csv")
    (inbox.path / "two/b.csv").write_text("x")
    inbox.expect("one/a.csv", "two/a.csv", "two/b.csv")


@linux_only
def test_ignored_names_count_once_they_have_their_final_name(inbox: Inbox) -> None:
    inbox.start_watching(recursive=True, rescan_s=0.1)
    names = ["a.part", "b.TMP", "c.crdownload", ".d.csv", "e.swp", "f.csv~", ".g/x.csv", "h.tmp/x.csv", "i.filepart"]
    for name in names:
        (inbox.path / name).parent.mkdir(exist_ok=True)
        (inbox.path / name).write_text("x")
    inbox.sentinel()
    for n, name in enumerate(names):
        (inbox.path / name).rename(inbox.path / f"final{n}")
    inbox.expect(*(f"final{n}" for n in range(len(names))))


def test_glob_selects(inbox: Inbox) -> None:
    inbox.start(glob="in/**/*.csv", recursive=True, settle_s=0.05)
    for name in ("a.csv", "in/b.csv", "in/x/y/c.csv", "in/x/d.txt", "out/e.csv"):
        (inbox.path / name).parent.mkdir(parents=True, exist_ok=True)
        (inbox.path / name).write_text("x")
    inbox.expect("in/b.csv", "in/x/y/c.csv")


@linux_only
def test_marker_is_waited_for(inbox: Inbox) -> None:
    inbox.start_watching(marker=".done", rescan_s=0.1)
    (inbox.path / "a.csv").write_text("x")
    (inbox.path / "b.csv.done").touch()  # a marker before its file
    (inbox.path / "b.csv").write_text("y")
    inbox.expect("b.csv")
    with (inbox.path / "a.csv").open("a") as again:
        again.write("more")
    (inbox.path / "a.csv.done").touch()
    inbox.expect("a.csv", "b.csv")
    assert inbox.events[-1].data["size"] == 5


@linux_only
def test_min_size(inbox: Inbox) -> None:
    inbox.start_watching(min_size=10, rescan_s=0.1)
    (inbox.path / "a.csv").write_text("x" * 9)
    inbox.sentinel()
    assert inbox.subjects == []
    with (inbox.path / "a.csv").open("a") as again:
        again.write("x")
    inbox.expect("a.csv")


@linux_only
def test_explicit_settle_waits_for_writers_that_reopen(inbox: Inbox) -> None:
    """Closed ten times, each time before settle ran out: one event, of the whole."""
    inbox.start_watching(settle_s=1.0, rescan_s=0.1)
    for _ in range(10):
        with (inbox.path / "a.csv").open("a") as again:
            again.write("x")
        next_at = time.monotonic() + 0.15
        wait_until(lambda at=next_at: time.monotonic() > at, "the next append")  # type: ignore[misc]
    inbox.expect("a.csv")
    assert inbox.events[0].data["size"] == 10


@linux_only
def test_file_rewritten_in_place_is_a_new_event(inbox: Inbox) -> None:
    inbox.start_watching(rescan_s=0.1)
    path = inbox.path / "a.csv"
    path.write_text("one")
    inbox.expect("a.csv")
    path.write_text("two")  # the same size, and within the time in which attributes may still be set
    inbox.expect("a.csv", "a.csv")
    subprocess.run(["touch", path], check=True)  # opens and closes it
    inbox.expect("a.csv", "a.csv", "a.csv")
    assert len({event.id for event in inbox.events}) == 3
    assert len(inbox.marks.marks) == 1


@linux_only
def test_mtime_set_long_after_the_close_is_a_new_event(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a time that no calendar has does no harm."""
    monkeypatch.setattr(settling, "_SAME_S", -1.0)  # any time is long after
    inbox.start_watching()
    (inbox.path / "a.csv").write_text("x")
    inbox.expect("a.csv")
    os.utime(inbox.path / "a.csv", ns=(0, 2**53 * 10**3))
    inbox.expect("a.csv", "a.csv")


@linux_only
def test_mtime_set_while_nothing_watches_is_found_by_a_scan(inbox: Inbox) -> None:
    inbox.start(settle_s=0.05)
    (inbox.path / "a.csv").write_text("x")
    inbox.expect("a.csv")
    inbox.stop()
    os.utime(inbox.path / "a.csv", ns=(0, 0))
    inbox.start(settle_s=0.05)
    inbox.expect("a.csv", "a.csv")


@linux_only
@pytest.mark.parametrize("settle_s", [None, 0.05])
def test_mtime_set_after_the_close_is_the_same_arrival(inbox: Inbox, settle_s: float | None) -> None:
    """Copies by tools that close and set the mtime then, under load, with scans all the time: one event for each."""
    source = inbox.path.with_name("source")
    source.write_text("x" * 100)
    os.utime(source, (1, 1))
    inbox.start_watching(rescan_s=0.02, settle_s=settle_s)
    code = (
        "import shutil, sys, time\n"
        "for n in range(300):\n"
        "    shutil.copy2(sys.argv[1], f'{sys.argv[2]}/f{n}')\n"
        "    if n % 10 == 0: time.sleep(0.03)\n"
    )
    burn = "while True: pass"
    load = [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        subprocess.run([sys.executable, "-c", code, str(source), str(inbox.path)], check=True)
        names = [f"f{n}" for n in range(300)]
        inbox.expect(*names, timeout_s=30)
    finally:
        for process in load:
            process.kill()
            process.wait()

    def marked_as_they_are() -> bool:
        return all(_mtime_of(inbox.marks.marks[str(inbox.path / name)]) == 10**9 for name in names)

    wait_until(marked_as_they_are, "the marks are of the files as they are")
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 4.5, "scans also after the time in which they hold back")
    inbox.stop()
    inbox.start(settle_s=0.05)
    inbox.sentinel()
    inbox.expect(*names)


@linux_only
def test_rewritten_right_after_its_mtime_was_set_is_a_new_event(inbox: Inbox) -> None:
    """Also if the look at what was set sees the rewrite already: nothing was lost if the last event is of the end."""
    inbox.start_watching(rescan_s=0.05)
    for n in range(50):
        path = inbox.path / f"f{n}"
        path.write_text("one")
        wait_until(lambda n=n: any(e.subject == f"f{n}" for e in inbox.events), "the first")  # type: ignore[misc]
        os.utime(path, (1, 1))
        path.write_text("two")
        os.utime(path, (2, 2))
    inbox.expect(*(f"f{n}" for n in range(50) for _ in range(2)), timeout_s=10)
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 1.5, "no more come")
    inbox.expect(*(f"f{n}" for n in range(50) for _ in range(2)))


@linux_only
@pytest.mark.parametrize("what", ["bus", "ledger", "stuck"])
def test_mtime_set_while_the_event_is_on_its_way(inbox: Inbox, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused or stuck for a time, it goes out once, and under one id, for the bus may have had it the first time."""
    monkeypatch.setattr(files, "_BACKOFF_S", (0.05, 0.1))
    inbox.start_watching(rescan_s=0.05)
    gate, entered, real = threading.Event(), threading.Event(), inbox.trigger._loop._emit  # type: ignore[union-attr]
    tried = set()

    def emit(events: Sequence[Event]) -> None:
        tried.update(event.id for event in events)
        entered.set()
        if what == "stuck":
            gate.wait(20)
        real(events)

    inbox.trigger._loop._emit = emit  # type: ignore[union-attr]
    inbox.bus_down, inbox.marks.down = what == "bus", what == "ledger"
    path = inbox.path / "a.csv"
    path.write_text("x")
    assert entered.wait(10)
    os.utime(path, (1, 1))
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 2.5, "longer than the time in which it may be set")
    inbox.bus_down = inbox.marks.down = False
    gate.set()
    wait_until(lambda: _mtime_of(inbox.marks.marks.get(str(path), "0:0:0")) == 10**9, "it is marked as it is")
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 1.5, "no more come")
    assert inbox.subjects == ["a.csv"]
    assert tried == {inbox.events[0].id}


def test_symlinked_file_and_watched_symlink(inbox: Inbox, tmp_path: Path) -> None:
    """A link to a file counts as its target; the watched folder may be a link, and is called by that name."""
    (tmp_path / "target.txt").write_text("12345")
    (tmp_path / "link").symlink_to(inbox.path)
    inbox.path = tmp_path / "link"
    inbox.start_watching()
    (inbox.path / "a.csv").symlink_to(tmp_path / "target.txt")
    (inbox.path / "b.csv").write_text("x")
    inbox.expect("a.csv", "b.csv")
    by_name = {event.subject: event.data for event in inbox.events}
    assert by_name["a.csv"]["size"] == 5
    assert by_name["b.csv"]["path"] == str(tmp_path / "link" / "b.csv")


# ---------------------------------------------------------------- restarts, marks, failures


def test_restart_handles_what_was_not_handled(inbox: Inbox) -> None:
    inbox.start(settle_s=0.05)
    (inbox.path / "old.csv").write_text("x")
    inbox.expect("old.csv")
    inbox.stop()
    (inbox.path / "new.csv").write_text("x")
    inbox.start(settle_s=0.05)
    inbox.expect("new.csv", "old.csv")
    (inbox.path / "last.csv").write_text("x")
    inbox.expect("last.csv", "new.csv", "old.csv")


def test_marks_of_files_that_are_gone_are_forgotten(inbox: Inbox) -> None:
    inbox.start(settle_s=0.05, rescan_s=0.1)
    (inbox.path / "a.csv").write_text("x")
    inbox.expect("a.csv")
    (inbox.path / "a.csv").unlink()
    wait_until(lambda: not inbox.marks.marks, "the mark is forgotten")


def test_marks_outlive_an_empty_folder_at_start(inbox: Inbox) -> None:
    """A mount that is not there yet looks like an empty folder; one known file that is there lets the others go."""
    (inbox.path / "a.csv").write_text("x")
    (inbox.path / "b.csv").write_text("x")
    inbox.start(settle_s=0.05)
    inbox.expect("a.csv", "b.csv")
    inbox.stop()
    away = inbox.path.with_name("away")
    inbox.path.rename(away)
    inbox.path.mkdir()
    inbox.start(settle_s=0.05, rescan_s=0.05)
    (inbox.path / "c.csv").write_text("x")
    inbox.expect("a.csv", "b.csv", "c.csv")
    (inbox.path / "c.csv").unlink()
    wait_until(lambda: str(inbox.path / "c.csv") not in inbox.marks.marks, "a scan is through")
    assert len(inbox.marks.marks) == 2
    inbox.path.rmdir()
    away.rename(inbox.path)
    (inbox.path / "b.csv").unlink()
    wait_until(lambda: list(inbox.marks.marks) == [str(inbox.path / "a.csv")], "b is forgotten, a is not")
    assert inbox.subjects == ["a.csv", "b.csv", "c.csv"]


@linux_only
def test_folder_that_disappears_and_returns(inbox: Inbox) -> None:
    """Nothing is new when it comes back, it is watched again, and each change of state is one line."""
    away = inbox.path.with_name("away")
    with capture_logs() as logs:
        inbox.start_watching(rescan_s=0.1)
        (inbox.path / "a.csv").write_text("x")
        inbox.expect("a.csv")
        inbox.path.rename(away)
        wait_until(lambda: _logged(logs, "file_folder_unavailable"), "it is missed")
        assert inbox.marks.marks
        (away / "b.csv").write_text("y")
        away.rename(inbox.path)
        inbox.expect("a.csv", "b.csv")
        wait_until(lambda: len(_logged(logs, "file_folder_watched")) == 2, "it is watched again")
        (inbox.path / "c.csv").write_text("z")
        inbox.expect("a.csv", "b.csv", "c.csv")
        for entry in inbox.path.iterdir():
            entry.unlink()
        inbox.path.rmdir()
        wait_until(lambda: len(_logged(logs, "file_folder_unavailable")) == 2, "it is missed")
        inbox.path.mkdir()
        (inbox.path / "d.csv").write_text("z")
        inbox.expect("a.csv", "b.csv", "c.csv", "d.csv")
    assert len(_logged(logs, "file_folder_unavailable")) == 2
    assert len(_logged(logs, "file_folder_watched")) == 3


def test_folder_that_is_not_there_at_start(inbox: Inbox) -> None:
    inbox.path = inbox.path / "not" / "yet"
    with capture_logs() as logs:
        inbox.start(settle_s=0.05)
        wait_until(lambda: _logged(logs, "file_folder_unavailable"), "it is missed")
        inbox.path.parent.mkdir()
        inbox.path.write_text("a file in its place")
        wait_until(lambda: len(_logged(logs, "file_folder_unavailable")) == 2, "it is no folder")
        inbox.path.unlink()
        inbox.path.mkdir()
        (inbox.path / "a.csv").write_text("x")
        inbox.expect("a.csv")
    reasons = [line["reason"] for line in _logged(logs, "file_folder_unavailable")]
    assert reasons == ["No such file or directory", "Not a directory"]


@pytest.mark.parametrize("name", ["", "sub"])
def test_folder_that_cannot_be_read(inbox: Inbox, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused (root never is, so scandir says it here): one line, marks kept, taken up when it can be read."""
    (inbox.path / "sub").mkdir()
    refused = str(inbox.path / name) if name else str(inbox.path)
    path = inbox.path / name / "a.csv"
    path.write_text("x")
    inbox.start(settle_s=0.05, rescan_s=0.1, recursive=True)
    inbox.expect(path.relative_to(inbox.path).as_posix())
    inbox.stop()
    locked, scandir = True, os.scandir

    def refuse(folder: Any) -> Any:
        if locked and os.fspath(folder) == refused:
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with capture_logs() as logs:
        inbox.start(settle_s=0.05, rescan_s=0.1, recursive=True)
        wait_until(lambda: [e for e in logs if e.get("reason") == "Permission denied"], "the refusal is logged")
        path.with_name("b.csv").write_text("x")
        if name:
            (inbox.path / "other.csv").write_text("x")
            wait_until(lambda: len(inbox.events) >= 2, "the rest of the folder is handled")
        assert str(path) in inbox.marks.marks
        locked = False
        wait_until(lambda: any(e.data["name"] == "b.csv" for e in inbox.events), "it is taken up")
        readable = "file_subfolder_readable" if name else "file_folder_watched"
        wait_until(lambda: len(_logged(logs, readable)) == 1, "that is logged")
    assert len([e for e in logs if e.get("reason") == "Permission denied"]) == 1
    assert [e.data["name"] for e in inbox.events].count("a.csv") == 1


@linux_only
def test_name_that_is_not_utf8_is_logged_and_left(inbox: Inbox) -> None:
    with capture_logs() as logs:
        inbox.start_watching(rescan_s=0.05)
        with open(os.fsencode(inbox.path) + b"/caf\xe9.csv", "w"):  # noqa: PTH123 - bytes
            pass
        (inbox.path / "café.csv").write_text("x")
        inbox.expect("café.csv")
        (inbox.path / "café.csv").unlink()
        wait_until(lambda: str(inbox.path / "café.csv") not in inbox.marks.marks, "a scan is through")
    assert len(_logged(logs, "file_name_not_utf8")) == 1
    assert inbox.subjects == ["café.csv"]


def test_symlink_loops(inbox: Inbox) -> None:
    (inbox.path / "sub").mkdir()
    (inbox.path / "sub/up").symlink_to(inbox.path)
    (inbox.path / "self").symlink_to(inbox.path / "self")
    (inbox.path / "nothing").symlink_to(inbox.path / "missing")
    os.mkfifo(inbox.path / "fifo")
    inbox.start(recursive=True, settle_s=0.05, rescan_s=0.1)
    (inbox.path / "sub/a.csv").write_text("x")
    inbox.expect("sub/a.csv")
    (inbox.path / "sub/a.csv").unlink()
    wait_until(lambda: not inbox.marks.marks, "a scan is through")
    assert inbox.subjects == ["sub/a.csv"]


@pytest.mark.parametrize("what", ["bus", "ledger"])
def test_outage_loses_nothing_and_marks_nothing(inbox: Inbox, what: str) -> None:
    with capture_logs() as logs:
        inbox.start_watching(settle_s=0.05, rescan_s=0.1)
        inbox.bus_down, inbox.marks.down = what == "bus", what == "ledger"
        names = [f"f{n}.csv" for n in range(20)]
        for name in names:
            (inbox.path / name).write_text("x")
        if what == "bus":
            wait_until(lambda: inbox.refused >= 3, "the trigger tries again")
        else:
            wait_until(lambda: _logged(logs, "file_trigger_waits"), "the trigger notices")
        assert inbox.marks.marks == {}
        inbox.bus_down = inbox.marks.down = False
        inbox.expect(*names)
    assert sorted(inbox.marks.writes) == sorted(str(inbox.path / name) for name in names)
    assert len(_logged(logs, "file_trigger_waits")) == 1
    assert len(_logged(logs, "file_trigger_goes_on")) == 1


def test_stop_during_an_outage_returns_and_leaves_no_marks(inbox: Inbox) -> None:
    inbox.start(settle_s=0.05)
    inbox.bus_down = True
    (inbox.path / "a.csv").write_text("x")
    wait_until(lambda: inbox.refused, "emit was refused")
    began = time.monotonic()
    inbox.stop()
    assert time.monotonic() - began < 3
    assert inbox.marks.marks == {}
    inbox.bus_down = False
    inbox.start(settle_s=0.05)
    inbox.expect("a.csv")


def test_error_that_nobody_expected_is_survived(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is found again by a scan."""
    monkeypatch.setattr(files, "_BACKOFF_S", (0.05, 0.1))
    real, failures = inbox.emit, iter([ValueError("a bug")])

    def emit(events: Sequence[Event]) -> None:
        for error in failures:
            raise error
        real(events)

    inbox.emit = emit  # type: ignore[method-assign]
    with capture_logs() as logs:
        inbox.start(settle_s=0.05)
        (inbox.path / "a.csv").write_text("x")
        inbox.expect("a.csv")
    assert len(_logged(logs, "file_trigger_crashed")) == 1


# ---------------------------------------------------------------- bursts


@linux_only
def test_burst_with_an_overflow_loses_nothing(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """7,000 files make more events than the kernel's queue holds while the reader stands still."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 20_000:
        pytest.skip("this machine's inotify queue is too long to run over")
    inbox.start_watching()
    gate, handle = threading.Event(), observation._Reader.handle_event

    def throttled(self: Any, event: Any) -> None:
        gate.wait(60)
        handle(self, event)

    monkeypatch.setattr(observation._Reader, "handle_event", throttled)
    code = "import sys\nfor n in range(7000):\n    with open(f'{sys.argv[1]}/f{n}', 'w') as f: f.write('x')"
    with capture_logs() as logs, caplog.at_level(logging.WARNING):
        subprocess.run([sys.executable, "-c", code, str(inbox.path)], check=True)
        gate.set()
        wait_until(lambda: len(inbox.events) >= 7000, "all files are seen", 40)
    assert "overflow" in caplog.text
    assert len(_logged(logs, "file_events_lost")) >= 1
    assert len(inbox.events) == len({event.subject for event in inbox.events}) == 7000
    wait_until(lambda: len(inbox.marks.marks) >= 7000, "all are marked")


@linux_only
def test_more_than_the_memory_is_given_is_left_to_scans(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_INBOX_MAX", 20)
    monkeypatch.setattr(files, "_PENDING_MAX", 50)
    for n in range(150):
        (inbox.path / f"old{n}").write_text("x")
    inbox.start(settle_s=0.05)
    for n in range(150):
        (inbox.path / f"new{n}").write_text("x")
    inbox.expect(*(f"{kind}{n}" for kind, n in itertools.product(("old", "new"), range(150))))


@linux_only
def test_dead_watchdog_is_replaced(inbox: Inbox) -> None:
    inbox.start_watching()
    loop = inbox.trigger._loop  # type: ignore[union-attr]
    first = loop._observation  # type: ignore[union-attr]
    first._reader.stop()  # type: ignore[union-attr]
    wait_until(lambda: loop._observation not in (None, first), "another one is made")  # type: ignore[union-attr]
    (inbox.path / "a.csv").write_text("x")
    inbox.expect("a.csv")


@linux_only
def test_no_inotify_to_be_had_means_polling(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise OSError(24, "inotify instance limit reached")

    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(observation._Reader, "_create_inotify_fd", staticmethod(refuse))
        inbox.start(settle_s=0.1)
        wait_until(lambda: _logged(logs, "file_watch_degraded"), "it is logged")
        (inbox.path / "a.csv").write_text("x")
        inbox.expect("a.csv")
        patch.undo()
        wait_until(lambda: _logged(logs, "file_watch_restored"), "inotify is tried again")
    assert len(_logged(logs, "file_watch_degraded")) == 1


# ---------------------------------------------------------------- polling, lifecycle


def test_polling(inbox: Inbox) -> None:
    """No inotify, no inode in the identity; growing files are waited for, rewritten ones are new."""
    with capture_logs():
        inbox.start(polling=True, settle_s=0.2, recursive=True)
        (inbox.path / "sub").mkdir()
        path = inbox.path / "sub/a.csv"
        for _ in range(6):
            with path.open("a") as again:
                again.write("x")
            next_at = time.monotonic() + 0.05
            wait_until(lambda at=next_at: time.monotonic() > at, "the next append")  # type: ignore[misc]
        inbox.expect("sub/a.csv")
        assert inbox.events[0].id == f"{path}:6:{path.stat().st_mtime_ns}"
        assert not [thread for thread in threading.enumerate() if "reader" in thread.name]
        copy = path.with_name("copy")
        copy.write_text("xxxxxx")
        os.utime(copy, ns=(0, path.stat().st_mtime_ns))
        copy.replace(path)  # another inode: the same file, to a network file system
        path.with_name("b.csv").write_text("y")
        wait_until(lambda: "sub/b.csv" in inbox.subjects, "the next is seen")
    assert inbox.subjects.count("sub/a.csv") == 1


def test_start_and_stop_fifty_times(inbox: Inbox) -> None:
    """Also stop before start, twice, and from many threads; the fixture sees that no thread is left."""
    inbox.start()
    trigger = inbox.trigger
    assert trigger is not None
    trigger.stop()
    trigger.stop()
    before, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def churn() -> None:
        for _ in range(10):
            trigger.start()
            trigger.start()
            trigger.stop()

    for _ in range(25):
        trigger.start()
        trigger.stop()
    threads = [threading.Thread(target=churn) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    trigger.stop()
    wait_until(lambda: threading.active_count() <= before, "no thread is left")
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2  # noqa: PTH208
    (inbox.path / "a.csv").write_text("x")
    trigger.start()
    inbox.expect("a.csv")


@linux_only
def test_idle_costs_nothing(inbox: Inbox) -> None:
    inbox.start_watching()
    began = time.process_time()
    threading.Event().wait(1.5)  # idle time is what is measured here
    assert time.process_time() - began < 0.05


# ---------------------------------------------------------------- who has it open


@linux_only
def test_writer_of(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x")
    assert writer_of(str(path), path.stat()) is Writer.NONE
    with path.open():
        assert writer_of(str(path), path.stat()) is Writer.NONE
    with writer(path, "more") as process:
        assert writer_of(str(path), path.stat()) is Writer.SOME
        close(process)
    assert writer_of(str(path), path.stat()) is Writer.NONE
    stale = path.stat()
    path.write_text("something else")
    assert writer_of(str(path), stale) is Writer.SOME
    with path.open("ab"), path.open() as reader:
        assert fcntl.fcntl(reader, fcntl.F_GETLEASE) == fcntl.F_UNLCK


@linux_only
@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file that is not ours")
def test_writer_of_a_file_that_is_not_ours_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x")
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from triggers.writers import writer_of
fd_stat = os.stat({str(path)!r})
os.chdir({str(tmp_path)!r})
os.setuid(65534)
print(writer_of("a", fd_stat).name)
"""
    path.chmod(stat.S_IRUSR | stat.S_IROTH)
    tmp_path.chmod(stat.S_IRWXU | stat.S_IROTH | stat.S_IXOTH)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "UNKNOWN\n"


@linux_only
def test_asking_does_no_harm_to_those_who_open_for_writing(tmp_path: Path) -> None:
    """Another process opens the file for writing all the time: never an error, no signal ends us."""
    path = tmp_path / "a"
    path.write_text("x")
    code = (
        "import os, sys, time\n"
        "end, worst = time.monotonic() + 1, 0\n"
        "while (began := time.monotonic()) < end:\n"
        "    os.close(os.open(sys.argv[1], os.O_WRONLY)); worst = max(worst, time.monotonic() - began)\n"
        "print(worst)"
    )
    assert signal.getsignal(signal.SIGIO) == signal.SIG_DFL
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    answers = {writer_of(str(path), path.stat())}
    while process.poll() is None:
        answers.add(writer_of(str(path), path.stat()))
    output, _ = process.communicate()
    assert process.returncode == 0
    assert float(output) < 1
    assert Writer.NONE in answers


def test_remote_devices() -> None:
    text = (
        "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "40 22 0:51 / /mnt/nfs rw shared:3 - nfs4 host:/x rw\n"
        "41 22 0:52 / /mnt/smb rw - cifs //host/x rw\n"
    )
    assert remote_devices(text) == {os.makedev(0, 51), os.makedev(0, 52)}


# ---------------------------------------------------------------- the verdict, without time


def _verdict(
    settling: Settling, now: float, *, size: int = 1, inode: int = 1, writer: Writer = Writer.NONE, known: bool = False
) -> Verdict | None:
    """Look once at the file "f", as the loop does; None if it is not due."""
    if settling.due(now, 10) != ["f"]:
        return None
    return settling.judge("f", now, Version(size, 0, inode), lambda: writer, known=known)


def _judge(settling: Settling, now: float, size: int = 1, writer: Writer = Writer.NONE) -> bool | None:
    verdict = _verdict(settling, now, size=size, writer=writer)
    return None if verdict is None else verdict is Verdict.NEW


def _closed(settle_s: float | None = None) -> Settling:
    """The file "f" has arrived: closed and NEW at 100.0."""
    settling = Settling(settle_s)
    settling.note("f", Sight.COMPLETE, 100.0)
    assert settling.judge(*settling.due(100.0, 10), 100.0, Version(1, 0, 1), lambda: Writer.NONE) is Verdict.NEW
    return settling


def test_closed_is_settled_at_once() -> None:
    settling = Settling(None)
    settling.note("f", Sight.CREATED, 0.0)
    settling.note("f", Sight.COMPLETE, 0.1)
    assert _judge(settling, 0.1)
    assert "f" not in settling


@pytest.mark.parametrize("sight", [Sight.FOUND, Sight.CREATED, Sight.MODIFIED])
def test_not_closed_is_settled_when_unchanged(sight: Sight) -> None:
    settling = Settling(None)
    settling.note("f", sight, 0.0)
    assert _judge(settling, 0.0) is False
    assert _judge(settling, 0.9) is None
    assert _judge(settling, 1.0, size=2) is False  # it has grown
    assert _judge(settling, 1.9, size=2) is None
    assert _judge(settling, 2.0, size=2) is True


def test_explicit_settle_counts_from_the_last_change_after_a_close() -> None:
    settling = Settling(5.0)
    settling.note("f", Sight.COMPLETE, 0.0)
    assert _judge(settling, 0.0) is False
    settling.note("f", Sight.COMPLETE, 3.0)
    assert _judge(settling, 3.0, size=2) is False
    assert _judge(settling, 7.9, size=2) is None
    assert _judge(settling, 8.0, size=2) is True


def test_open_file_is_looked_at_again_soon_then_seldom() -> None:
    settling = Settling(None)
    settling.note("f", Sight.COMPLETE, 0.0)
    looks, now = [], 0.0
    while now < 10:
        if (verdict := _judge(settling, now, writer=Writer.SOME)) is not None:
            assert verdict is False
            looks.append(now)
        now = settling.next_due()
    assert looks[1] == pytest.approx(0.002)
    assert looks[-1] - looks[-2] == pytest.approx(1.0)
    assert _judge(settling, now) is True


def test_where_the_kernel_does_not_tell_a_missing_close_is_waited_for() -> None:
    settling = Settling(None)
    settling.note("f", Sight.MODIFIED, 0.0)
    assert _judge(settling, 0.0) is False
    assert _judge(settling, 2.0, writer=Writer.UNKNOWN) is False
    settling.doubt()  # the close may have been among what was lost
    assert _judge(settling, 3.0, writer=Writer.UNKNOWN) is True
    settling.note("f", Sight.MODIFIED, 10.0)
    assert _judge(settling, 10.0) is False
    assert _judge(settling, 2000.0, writer=Writer.UNKNOWN) is True


def test_a_scan_does_not_undo_what_is_known() -> None:
    settling = Settling(None)
    settling.note("f", Sight.COMPLETE, 0.0)
    settling.note("f", Sight.FOUND, 0.1)
    assert _judge(settling, 0.1) is True


def test_attributes_set_within_two_seconds_of_the_close_are_the_same_arrival() -> None:
    settling = _closed()
    for at in (100.0, 101.0, 102.0):
        settling.note("f", Sight.ATTRIBUTES, at)
        assert _verdict(settling, at + 50) is Verdict.SAME  # however late the look


def test_attributes_set_later_make_a_new_event() -> None:
    settling = _closed()
    settling.note("f", Sight.ATTRIBUTES, 102.1)
    verdicts, now = [], 102.1
    while len(settling):
        verdicts.append(_verdict(settling, now))
        now = settling.next_due()
    assert verdicts[-1] is Verdict.NEW
    assert verdicts[:-1] == [Verdict.WAIT] * len(verdicts[:-1])


@pytest.mark.parametrize("other", [{"size": 2}, {"inode": 2}])
def test_another_size_or_inode_is_a_new_event(other: dict[str, int]) -> None:
    settling = _closed()
    settling.note("f", Sight.ATTRIBUTES, 100.5)
    assert _verdict(settling, 100.5, **other) is Verdict.WAIT  # a close may come
    assert _verdict(settling, 101.5, **other) is Verdict.NEW


@pytest.mark.parametrize("sight", [Sight.COMPLETE, Sight.REPLACED])
def test_closed_again_within_two_seconds_is_a_new_event(sight: Sight) -> None:
    settling = _closed()
    settling.note("f", Sight.ATTRIBUTES, 100.5)
    settling.note("f", sight, 100.6)
    assert _verdict(settling, 100.6) is Verdict.NEW


def test_modified_within_two_seconds_is_a_new_event() -> None:
    settling = _closed()
    settling.note("f", Sight.MODIFIED, 100.5)
    settling.note("f", Sight.ATTRIBUTES, 100.6)
    assert _verdict(settling, 100.6) is Verdict.WAIT
    assert _verdict(settling, 101.6) is Verdict.NEW


@pytest.mark.parametrize(
    ("sights", "at", "verdict"),
    [
        ([Sight.COMPLETE], 100.51, Verdict.NEW),  # touch
        ([Sight.COMPLETE], 101.5, Verdict.KNOWN),  # opened for writing, to lock it, say
        ([Sight.MODIFIED, Sight.COMPLETE], 105.0, Verdict.NEW),
        ([Sight.REPLACED], 105.0, Verdict.NEW),
        ([Sight.ATTRIBUTES], 105.0, Verdict.KNOWN),
    ],
)
def test_write_that_was_taken_for_attributes_still_counts(sights: list[Sight], at: float, verdict: Verdict) -> None:
    """What the look saw, and what is marked now, may be the work of a writer whose events come later."""
    settling = _closed()
    settling.note("f", Sight.ATTRIBUTES, 100.5)
    assert _verdict(settling, 100.5) is Verdict.SAME
    for sight in sights:
        settling.note("f", sight, at)
    assert _verdict(settling, at, known=True) is verdict
    settling.note("f", Sight.COMPLETE, at + 1)
    assert _verdict(settling, at + 1, known=True) is Verdict.KNOWN


def test_scan_waits_for_the_event_of_what_was_set() -> None:
    settling = _closed(0.0)
    settling.note("f", Sight.FOUND, 101.9)
    assert _verdict(settling, 101.9) is Verdict.WAIT
    settling.note("f", Sight.ATTRIBUTES, 101.95)
    assert _verdict(settling, 101.95) is Verdict.SAME
    assert len(settling) == 0


def test_scan_does_not_wait_for_ever() -> None:
    """The event may have been lost."""
    settling = _closed(0.0)
    settling.note("f", Sight.FOUND, 101.0)
    assert _verdict(settling, 101.0) is Verdict.WAIT
    assert _verdict(settling, 102.9) is None
    assert _verdict(settling, 103.0) is Verdict.NEW


def test_after_a_loss_nothing_is_taken_for_attributes_only() -> None:
    settling = _closed()
    settling.doubt()
    settling.note("f", Sight.ATTRIBUTES, 100.1)
    assert _verdict(settling, 100.1) is Verdict.WAIT
    assert _verdict(settling, 101.1) is Verdict.NEW


def test_writer_that_is_seen_to_go_has_closed() -> None:
    """The kernel counts it out before its close is told of."""
    settling = Settling(0.0)
    settling.note("f", Sight.FOUND, 0.0)
    assert _judge(settling, 0.0, writer=Writer.SOME) is False
    assert _judge(settling, 9.0) is True
    settling.note("f", Sight.ATTRIBUTES, 9.1)
    assert _verdict(settling, 9.1) is Verdict.SAME


def test_arrivals_are_forgotten() -> None:
    settling = Settling(None)
    for n in range(1000):
        settling.note(f"f{n}", Sight.COMPLETE, float(n))
        assert settling.judge(*settling.due(n, 10), n, Version(1, 0, 1), lambda: Writer.NONE) is Verdict.NEW
    assert len(settling._arrivals) < 15


def test_what_is_seen_before_a_look_adds_up() -> None:
    assert not Sight.ATTRIBUTES.adds_to(Sight.COMPLETE)
    assert Sight.ATTRIBUTES.adds_to(Sight.ATTRIBUTES)
    assert Sight.COMPLETE.adds_to(Sight.ATTRIBUTES)
    assert Sight.COMPLETE.after(Sight.MODIFIED) is Sight.REPLACED
    assert Sight.COMPLETE.after(Sight.ATTRIBUTES) is Sight.COMPLETE
    assert Sight.MODIFIED.after(Sight.REPLACED) is Sight.MODIFIED


def test_queue_stays_bounded_under_a_writer_that_never_rests() -> None:
    settling = Settling(600.0)
    for n in range(20_000):
        settling.note("f", Sight.MODIFIED, n / 1000)
        assert _judge(settling, n / 1000, size=n) is False
    assert len(settling._queue) < 2000
    assert _judge(settling, 700.0, size=n) is True


@pytest.mark.parametrize(
    ("glob", "path", "wanted"),
    [
        ("*", "a.csv", True),
        ("*", "sub/a.csv", True),
        ("*.csv", "sub/a.csv", True),
        ("*.csv", "a.CSV", False),
        ("[ab]?.csv", "b1.csv", True),
        ("sub/*.csv", "sub/a.csv", True),
        ("sub/*.csv", "sub/x/a.csv", False),
        ("sub/*.csv", "a.csv", False),
        ("**", "x/y/z", True),
        ("**/*.csv", "a.csv", True),
        ("**/*.csv", "x/y/a.csv", True),
        ("in/**/a.csv", "in/a.csv", True),
        ("in/**/a.csv", "in/x/y/a.csv", True),
        ("in/**", "in/x/y", True),
        ("in/**", "out/x", False),
        ("*", ".hidden", False),
        ("*", ".git/config", False),
        ("*.part", "a.part", False),
        ("*", "a.csv.done", False),
        ("*", "a.csv.DONE", True),
    ],
)
def test_names(glob: str, path: str, wanted: bool) -> None:
    assert Names(glob, recursive=True, marker=".done").wants(path) is wanted


def test_files_below_count_only_when_recursive() -> None:
    assert not Names().wants("sub/a.csv")


def _logged(logs: Sequence[Mapping[str, Any]], event: str) -> list[Mapping[str, Any]]:
    return [line for line in logs if line["event"] == event]


def _mtime_of(identity: str) -> int:
    return int(identity.split(":")[-2])
