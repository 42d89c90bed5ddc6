"""What the system tells of a folder, through watchdog: which files were created, written, closed, moved in, touched."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from watchdog.events import (
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.api import BaseObserver

from triggers.folder import as_prefix
from triggers.settling import Sight

if sys.platform == "linux":
    from watchdog.observers.inotify import InotifyFullEmitter
    from watchdog.observers.inotify_c import InotifyConstants, InotifyEvent, InotifyFD, Mask
else:
    from watchdog.observers import Observer

_STOP_S = 10.0
_SIGHTS: dict[type[FileSystemEvent], Sight] = {
    FileCreatedEvent: Sight.CREATED,
    FileModifiedEvent: Sight.MODIFIED,  # IN_MODIFY; IN_ATTRIB is the next
    FileAttribEvent: Sight.ATTRIBUTES,
    FileClosedEvent: Sight.COMPLETE,
    FileMovedEvent: Sight.REPLACED,
}

if sys.platform == "linux":

    class _Reader(InotifyFD):
        """Tells of a queue that ran over, which watchdog itself only logs."""

        def __init__(self, lost: Callable[[], None]) -> None:
            # watchdog 7.1 meets a nested folder twice, in its walk and by its event, and warns of itself;
            # where warnings are errors, that ended this thread.
            warnings.filterwarnings("ignore", "Callback with id .* already exists", RuntimeWarning)
            super().__init__()
            self._lost = lost

        def handle_event(self, event: InotifyEvent) -> None:
            super().handle_event(event)
            if event.is_queue_overflow:
                self._lost()

    class _Emitter(InotifyFullEmitter):  # "full": what is moved in is a FileMovedEvent, not a FileCreatedEvent
        def get_event_mask_from_filter(self) -> Mask:
            """Leave out what we never look at.

            watchdog keeps a MOVED_FROM for 0.5 s, and everything behind it, in case its MOVED_TO comes; only to
            follow folders through renames is that worth it.
            """
            mask = super().get_event_mask_from_filter()
            return mask if self.watch.is_recursive else Mask(mask & ~InotifyConstants.IN_MOVED_FROM)


class Observation(FileSystemEventHandler):
    """A running watchdog on a folder that exists. Raises OSError if that cannot be had (limits of inotify)."""

    def __init__(
        self, folder: str, source: str, see: Callable[[str, Sight], None], lost: Callable[[], None], *, recursive: bool
    ) -> None:
        self._see = see
        # Events carry the path that was scheduled: not behind a symlink, which inotify would not follow.
        self._real = as_prefix(str(Path(folder).resolve()))
        self._shown = as_prefix(folder)
        self._threads: list[threading.Thread] = []
        if sys.platform == "linux":
            self._reader = _Reader(lost)  # one for each watch: what runs over in one folder is not another's loss
            self._reader.start()
            self._threads.append(self._reader)
            self._observer = BaseObserver(_Emitter, inotify_fd=self._reader)
        else:
            self._observer = Observer()
        self._observer.schedule(self, self._real[:-1] or "/", recursive=recursive, event_filter=list(_SIGHTS))
        try:
            self._observer.start()
        except BaseException:
            self.stop()
            raise
        self._threads += [self._observer, *self._observer.emitters]
        for thread in self._threads:
            thread.name = f"file-trigger-{type(thread).__name__.strip('_').lower()}:{source}"

    def dispatch(self, event: FileSystemEvent) -> None:
        moved = isinstance(event, FileMovedEvent)
        path = os.fsdecode(event.dest_path if moved else event.src_path)
        if event.is_directory or not path.startswith(self._real):
            return
        self._see(self._shown + path[len(self._real) :], _SIGHTS[type(event)])

    def is_alive(self) -> bool:
        """False also once the folder was deleted: its emitter ends then."""
        return all(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        self._observer.stop()
        with suppress(RuntimeError):  # it was never started
            self._observer.join(_STOP_S)
        if sys.platform == "linux":
            self._reader.stop()
            self._reader.join(_STOP_S)
