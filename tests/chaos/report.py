"""What is told in the end: printed, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.recovery import Recovery

#: What guarantee G5 says of a dead worker's steps.
LIMIT_S = 15.0

console = Console(highlight=False)


@dataclass(slots=True)
class Report:
    """One run of the harness."""

    mode: str
    seed: int
    again: str
    seconds: float = 0.0
    kills: dict[str, int] = field(default_factory=dict)
    stops: dict[str, int] = field(default_factory=dict)
    cuts: int = 0
    runs: dict[str, int] = field(default_factory=dict)
    acts: dict[str, int] = field(default_factory=dict)
    bodies: int = 0
    repeated: dict[str, int] = field(default_factory=dict)
    recovery: dict[str, dict[str, float]] = field(default_factory=dict)
    slowest: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)
    logs: str = ""

    @property
    def ok(self) -> bool:
        return not any(self.faults.values())

    def write(self, path: Path) -> None:
        body = {name: getattr(self, name) for name in self.__slots__}
        path.write_text(json.dumps(body | {"ok": self.ok}, indent=1))

    def show(self) -> None:
        """Print it."""
        table = Table(title=f"chaos, {self.mode}, seed {self.seed}", title_justify="left", show_header=False)
        table.add_row("time", f"{self.seconds:.0f} s")
        table.add_row("kills", f"{sum(self.kills.values())}: {_counts(self.kills)}")
        table.add_row("stops past the lease", f"{sum(self.stops.values())}: {_counts(self.stops)}")
        table.add_row("connections cut", f"{self.cuts} times")
        table.add_row("runs", f"{sum(self.runs.values())}: {_counts(self.runs)}")
        table.add_row("asked for", _counts(self.acts))
        table.add_row("bodies run", f"{self.bodies}, of which again {sum(self.repeated.values())}")
        table.add_row("again because of", _counts(self.repeated))
        console.print(table)
        if self.recovery:
            times = Table("recovery after", "count", "p50", "p95", "max", f"over {LIMIT_S:g} s")
            for name, row in self.recovery.items():
                figures = (f"{row[key]:.2f} s" for key in ("p50", "p95", "max"))
                times.add_row(name, f"{row['count']:g}", *figures, f"{row['over']:g}")
            console.print(times)
        if self.points:
            reached = Table("point", "killed", "next step", "end of the run", "")
            for row in self.points:
                cells = (f"{row[key]:.2f} s" if row[key] is not None else "-" for key in ("next", "end"))
                reached.add_row(row["name"], row["killed"], *cells, "ok" if row["ok"] else "[red]failed")
            console.print(reached)
        for name, faults in self.faults.items():
            for fault in faults[:20]:
                console.print(f"{name}: {fault}", style="red", markup=False)
            if len(faults) > 20:
                console.print(f"{name}: {len(faults) - 20} more", style="red")
        if self.ok:
            console.print("every check holds", style="green")
        else:
            console.print(f"repeat with: {self.again}\nlogs, record and kills: {self.logs}", markup=False)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def summarise(recoveries: Sequence[Recovery]) -> dict[str, dict[str, float]]:
    """Return p50, p95 and max by what was done and what had to go on."""
    groups: dict[str, list[float]] = {}
    for one in recoveries:
        if one.server_too:
            groups.setdefault("any of these, and the server killed", []).append(one.seconds)
            continue
        groups.setdefault(f"{one.harm.what} {one.harm.target}: {one.of}", []).append(one.seconds)
        if one.of != "all" and one.harm.what == "kill":
            groups.setdefault(f"kill child or worker: {one.of}", []).append(one.seconds)
    found = {}
    for name, times in sorted(groups.items()):
        times.sort()
        found[name] = {
            "count": len(times), "p50": _quantile(times, 0.5), "p95": _quantile(times, 0.95), "max": times[-1],
            "over": sum(1 for seconds in times if seconds > LIMIT_S),
        }  # fmt: skip
    return found


def slowest(recoveries: Sequence[Recovery], count: int = 10) -> list[dict[str, Any]]:
    """Return the longest recoveries, to be looked into."""
    longest = sorted((one for one in recoveries if one.of != "all"), key=lambda one: -one.seconds)[:count]
    return [
        {"seconds": round(one.seconds, 2), "harm": f"{one.harm.what} {one.harm.target}", "pid": one.harm.pid,
         "at": one.harm.at, "of": one.of, "run": one.run, "slot": one.slot, "server_too": one.server_too}
        for one in longest
    ]  # fmt: skip


def _quantile(times: Sequence[float], share: float) -> float:
    return times[min(len(times) - 1, math.ceil(share * len(times)) - 1)]
