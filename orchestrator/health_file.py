"""A file that a role touches as long as its loop turns: if it grows old, the process hangs.

For health checks of roles that serve no HTTP: to look at the age of a file costs nothing, to start Python would cost
more than the role itself.
"""

from __future__ import annotations

import time
from pathlib import Path

from orchestrator.errors import SettingsError

_EVERY_S = 1.0


class HealthFile:
    """The file of one process; none if its path is empty. Making one touches it: raises SettingsError if it cannot."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._touch_at = time.monotonic() + _EVERY_S
        if self._path is not None:
            try:
                self._path.touch()
            except OSError as exc:
                raise SettingsError(f"health_file {path} cannot be written: {exc.strerror}; set it to another") from exc

    def touch(self) -> None:
        """Say that the loop turns; at most once a second. A disk that is full then says the contrary, as it should."""
        now = time.monotonic()
        if self._path is not None and now >= self._touch_at:
            self._touch_at = now + _EVERY_S
            try:
                self._path.touch()
            except OSError:
                return
