"""TriggerSupervisor: keeps the triggers that the definitions in force ask for running, and no others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Protocol

from orchestrator.workflows import Workflow


class Trigger(Protocol):
    """Something that emits events, in threads of its own, from `start` to `stop`; both are idempotent."""

    def start(self) -> None:
        """Begin; returns at once."""

    def stop(self) -> None:
        """End; returns when nothing will be emitted any more."""


#: What a kind of trigger is to the supervisor: from the definitions, what to run, by a key that says all about it.
Kind = Callable[[Iterable[Workflow]], Mapping[Hashable, Callable[[], Trigger]]]


class TriggerSupervisor:
    """Starts and stops triggers as definitions come and go. Not safe to share between threads."""

    def __init__(self, kinds: Iterable[Kind]) -> None:
        self._kinds = tuple(kinds)
        self._running: dict[Hashable, Trigger] = {}

    def apply(self, workflows: Iterable[Workflow]) -> None:
        """Make what runs what `workflows` ask for; a trigger whose key has not changed goes on undisturbed."""
        known = tuple(workflows)
        wanted: dict[Hashable, Callable[[], Trigger]] = {}
        for kind in self._kinds:
            wanted |= kind(known)
        for key in [key for key in self._running if key not in wanted]:
            self._running.pop(key).stop()
        for key in wanted.keys() - self._running.keys():
            self._running[key] = wanted[key]()
            self._running[key].start()

    def start(self) -> None:
        """Do nothing: what `apply` asks for runs at once."""

    def stop(self) -> None:
        """Stop every trigger; returns when they have stopped."""
        self.apply(())
