"""Secrets by reference, as they are now: a file that is replaced counts from then on."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.errors import SettingsError
from orchestrator.settings import read_secret
from orchestrator.subscriptions import secret_fault
from orchestrator.telemetry import Outage, get_logger

log = get_logger(__name__)

_Version = tuple[int, int, int] | None


class Secrets:
    """The secrets of one webhook, for any thread. Of the environment they are what they were when this was made."""

    def __init__(self, scheme: str, references: Sequence[str], named: Mapping[str, str]) -> None:
        self._scheme = scheme
        self._references = tuple(named.get(reference, reference) for reference in references)
        self._outages = {reference: Outage(log, "secret") for reference in self._references}
        self._versions: dict[str, _Version] = {}
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()
        self.current()

    def current(self) -> list[str]:
        """Return those that can be read now; of a file that is gone nothing is left."""
        with self._lock:
            self._read()
            return list(self._values.values())

    def _read(self) -> None:
        for reference in self._references:
            version = _version(reference)
            if reference in self._versions and version == self._versions[reference]:
                continue
            self._values.pop(reference, None)
            try:
                value = read_secret(reference)
                fault = secret_fault(self._scheme, value)
            except SettingsError as exc:
                fault = str(exc)
            except (ValueError, RuntimeError):  # no text, no path; the message would quote it
                fault = f"secret {reference}: is not text"
            if fault is None:
                self._values[reference] = value
                self._outages[reference].ends()
            else:
                self._outages[reference].begins(fault, secret=reference)
            self._versions[reference] = version


def _version(reference: str) -> _Version:
    kind, _, where = reference.partition(":")
    if kind != "file":
        return None
    try:
        stat = Path(where).expanduser().stat()
    except (OSError, ValueError, RuntimeError):
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
