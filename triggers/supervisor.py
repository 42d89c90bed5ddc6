"""TriggerSupervisor: keeps the triggers that the definitions in force ask for running, and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from orchestrator.dispatcher import file_source
from orchestrator.events import Event
from orchestrator.workflows import OnFile, Workflow
from triggers.files import FileTrigger, FileWatch, Marks


class TriggerSupervisor:
    """Starts and stops triggers as definitions come and go. Not safe to share between threads."""

    def __init__(self, *, marks: Marks, emit: Callable[[Sequence[Event]], None], rescan_s: float) -> None:
        self._marks = marks
        self._emit = emit
        self._rescan_s = rescan_s
        self._running: dict[FileWatch, FileTrigger] = {}

    def apply(self, workflows: Iterable[Workflow]) -> None:
        """Make what runs what `workflows` ask for; a watch that has not changed goes on undisturbed."""
        wanted = {watch for workflow in workflows for watch in _watches(workflow)}
        for watch in [watch for watch in self._running if watch not in wanted]:
            self._running.pop(watch).stop()
        for watch in wanted - self._running.keys():
            trigger = FileTrigger(watch, marks=self._marks, emit=self._emit, rescan_s=self._rescan_s)
            self._running[watch] = trigger
            trigger.start()

    def stop(self) -> None:
        """Stop every trigger; returns when they have stopped."""
        self.apply(())

    @property
    def watches(self) -> list[FileWatch]:
        return list(self._running)


def _watches(workflow: Workflow) -> list[FileWatch]:
    return [
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
        for on in workflow.on
        if isinstance(on, OnFile)
    ]
