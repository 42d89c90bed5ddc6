"""The launcher where somebody else starts workers: Compose, systemd, a person. It only hears what is wanted."""

from __future__ import annotations

from collections.abc import Sequence

from workers.launchers import Launched, Launcher


class NoLauncher(Launcher):
    """Starts nothing, so nothing of it is there; what is wanted is in `pools list`."""

    place = "none"
    starts_workers = False

    def scale(self, pool: str, count: int, leave: Sequence[str] = ()) -> None:
        return

    def renew(self, generation: str) -> None:
        return

    def look(self) -> list[Launched]:
        return []

    def close(self) -> None:
        return
