"""The outside record: what bodies wrote, and what was done to processes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

#: What a body says last, if it comes to that.
_ENDS = ("end", "fail")


@dataclass(slots=True)
class Execution:
    """One run of a body. `end` is None if it never came to its end.

    `how` is the last it said of itself: `end`, `fail` (it raised, or was told to stop) or `crash`.
    """

    slot: str
    attempt: int
    pid: int
    begin: float
    end: float | None = None
    how: str = "end"

    @property
    def is_whole(self) -> bool:
        """Whether it came to its end and returned something."""
        return self.end is not None and self.how == "end"


@dataclass(frozen=True, slots=True)
class Harm:
    """What was done to a process: killed, or stopped until `until`. Times are of `time.monotonic`.

    `family` are the processes that suffer with it: the children of a worker, which cannot live without their parent.
    """

    at: float
    what: str
    target: str
    pid: int
    family: tuple[int, ...] = ()
    until: float = float("inf")

    def hit(self, pid: int, since: float, to: float) -> bool:
        """Tell whether it struck this process between two moments."""
        return (pid == self.pid or pid in self.family) and self.at <= to and self.until >= since


def parse(lines: Iterable[str]) -> dict[str, dict[str, list[Execution]]]:
    """Read the record: run -> slot -> its executions, in order of their beginning."""
    found: dict[str, dict[str, list[Execution]]] = {}
    for line in lines:
        fields = whole(line)
        if fields is None:
            continue
        word, key, attempt, pid, moment = fields
        run, _, slot = key.partition("/")
        executions = found.setdefault(run, {}).setdefault(slot, [])
        if word == "begin":
            executions.append(Execution(slot, int(attempt), int(pid), float(moment)))
            continue
        for one in reversed(executions):
            if one.pid == int(pid) and one.end is None:
                one.how = word
                if word in _ENDS:
                    one.end = float(moment)
                break
        else:
            raise ValueError(f"an end without a beginning in the record: {line!r}")
    return found


def whole(line: str) -> list[str] | None:
    """Return the fields of a line of the record; None of one that a kill has torn."""
    *fields, end = line.split() or [""]
    return fields if len(fields) == 5 and end == "." else None


class Journal:
    """Lines of JSON in a file, each on disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    def write(self, entry: object) -> None:
        os.write(self._file, (json.dumps(entry) + "\n").encode())
        os.fsync(self._file)

    def harm(self, harm: Harm) -> None:
        self.write(asdict(harm))

    def close(self) -> None:
        os.close(self._file)


def read_harms(path: Path) -> list[Harm]:
    """Return what was done to processes, in order."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted((Harm(**(row | {"family": tuple(row["family"])})) for row in rows), key=lambda harm: harm.at)


class Tail:
    """Follows the record while it is written: which processes are in a body, or were a moment ago."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self._last: dict[int, tuple[str, float]] = {}

    @property
    def size(self) -> int:
        return self._path.stat().st_size

    def busy(self, within_s: float = 0.5) -> tuple[set[int], set[int]]:
        """Return the processes that are in a body or ended one a moment ago; and those that are in a long one."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = self._rest + file.read()
            self._offset = file.tell()
        lines = text.split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            fields = whole(line.decode())
            if fields is not None:
                word, _, _, pid, moment = fields
                self._last[int(pid)] = (word, float(moment))
        now = time.monotonic()
        inside = {pid for pid, (word, _) in self._last.items() if word not in _ENDS}
        recent = {pid for pid, (_, moment) in self._last.items() if now - moment < within_s}
        return inside | recent, inside - recent
