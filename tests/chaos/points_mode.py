"""Deterministic mode: for each named point, a fresh system, one run, and one process killed there."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from orchestrator.embedded import EmbeddedServer
from orchestrator.engine import Engine
from orchestrator.errors import UnavailableError
from tests.chaos import checks, record
from tests.chaos.acts import KILLED
from tests.chaos.load import Load, settings_of
from tests.chaos.points import SCENARIOS, Scenario
from tests.chaos.processes import Role, System, environment, is_ready, wait_for
from tests.chaos.report import Report, console
from tests.chaos.sources import Sources
from tests.chaos.workload import RECORD, TRIGGERED, Expected, write_project

#: A run that has not gone on for so long is stuck.
_END_S = 90.0
#: Its next step has begun after this: 15 s by guarantee G5, and what a process that is started again takes on a busy
#: machine.
NEXT_S = 20.0
#: What a process has taken off an SQS queue comes back after this, besides.
_TAKEN_S = {"object": 15.0, "removed": 15.0, "queued": 60.0}
#: Roles that a kind needs besides those that all need.
_ALSO = {"hooked": ("gateway",), "answered": ("gateway",), "posted": ("gateway",), "tick": ("beat",)}
_LATER_S = 10.0


def run(names: Sequence[str], *, parallel: int) -> Report:
    """Do all scenarios, or those with these names."""
    began = time.monotonic()
    unknown = set(names) - {scenario.name for scenario in SCENARIOS}
    if unknown:
        raise SystemExit(f"no such point: {', '.join(sorted(unknown))}; there are:\n" + "\n".join(_names()))
    wanted = [scenario for scenario in SCENARIOS if not names or scenario.name in names]
    report = Report("points", 0, "python -m tests.chaos points")
    base = Path(tempfile.mkdtemp(prefix="orchestrator-chaos-"))
    report.logs = str(base)
    console.print(f"{len(wanted)} points, logs in {base}", style="dim")
    kills: Counter[str] = Counter()
    repeated: Counter[str] = Counter()
    with ThreadPoolExecutor(parallel) as pool:
        for scenario, row in zip(wanted, pool.map(lambda one: _guarded(one, base), wanted), strict=True):
            report.points.append(row)
            report.faults |= {
                f"{scenario.name}: {name}": faults for name, faults in row.pop("faults").items() if faults
            }
            report.bodies += row.pop("bodies")
            repeated.update(row.pop("repeated"))
            kills.update(row.pop("kills"))
            console.print(f"{scenario.name}: {'ok' if row['ok'] else 'FAILED'}", style="dim")
    report.kills, report.repeated = dict(kills), dict(repeated)
    report.runs = dict(Counter(scenario.kind for scenario in wanted))
    report.seconds = time.monotonic() - began
    failed = [row["name"] for row in report.points if not row["ok"]]
    report.again += "".join(f" '{name}'" for name in failed)
    return report


def _names() -> list[str]:
    return [scenario.name for scenario in SCENARIOS]


def _guarded(scenario: Scenario, base: Path) -> dict[str, Any]:
    try:
        return _Place(scenario, base).run()
    except Exception as exc:  # noqa: BLE001 -- the other points are to be reached all the same
        faults = {"harness": ["".join(traceback.format_exception(exc))]}
        return {
            "name": scenario.name, "killed": "-", "next": None, "end": None, "ok": False, "bodies": 0, "repeated": {},
            "kills": {}, "faults": faults,
        }  # fmt: skip


class _Place:
    """One system with its arms."""

    def __init__(self, scenario: Scenario, base: Path) -> None:
        self._scenario = scenario
        self._work = base / scenario.name.replace(", ", "_").replace(" ", "_")
        self._data_dir = self._work / "data"
        self._system = System(self._work)
        self._env = {
            "CHAOS_WORK": str(self._work),
            "CHAOS_ARMS": json.dumps(self._arms()),
            "CHAOS_PAUSES": json.dumps(
                [{"point": point, "role": role, "seconds": s} for point, role, s in self._scenario.pauses]
            ),
        }
        kind = self._scenario.kind
        write_project(self._work / "project", {kind} & set(TRIGGERED))
        self._data_dir.mkdir()
        self._sources = Sources(self._work, {kind})

    def run(self) -> dict[str, Any]:
        try:
            self._start()
            hand = _CommandLine(self._work, self._data_dir, self._env)
            load = Load(
                self._work, self._data_dir, random.Random(0), hand, self._sources,
                follows=self._scenario.kind == "after", ticks=self._scenario.kind == "tick",
            )  # fmt: skip
            load.ready = self._is_at_work
            try:
                return self._judge(load)
            finally:
                load.close()
        finally:
            self._system.stop(timeout_s=15)
            self._sources.close()

    def _start(self) -> None:
        server = Role("server", EmbeddedServer(self._data_dir, fsync="always").prepare(), started=self._note_server)
        self._system.start(server)
        self._sources.join(self._system)
        place = ("--project", str(self._work / "project"), "--data-dir", str(self._data_dir))
        for name in ("dispatcher", "trigger", "worker", *_ALSO.get(self._scenario.kind, ())):
            command = [sys.executable, "-P", "-m", "tests.chaos.role", name, *place]
            self._system.start(Role(name, command, self._env | self._sources.env))
        wait_for(lambda: is_ready(self._data_dir), "the definitions are in force")

    def _note_server(self, pid: int) -> None:
        (self._work / "server.pid").write_text(str(pid))

    def _is_at_work(self, expected: Expected) -> bool:
        """Tell whether a run is so far that something of everything is at work."""
        return f" {expected.run}/s1 " in (self._work / RECORD).read_text()

    def _arms(self) -> list[dict[str, Any]]:
        arms: list[dict[str, Any]] = []
        for number, strike in enumerate(self._scenario.strikes):
            marker = str(self._work / f"marker-{number}")
            after = arms[-1]["marker"] if arms else ""
            arms.append(
                {"point": strike.point, "role": strike.role, "nth": strike.nth, "marker": marker, "after": after}
            )
        return arms

    def _begin(self, load: Load) -> None:
        scenario = self._scenario
        if scenario.kind == "take":
            load.drop(scenario.x, 0.0)
        elif scenario.kind == "after":
            load.emit("chain", x=scenario.x)
        elif scenario.kind == "tick":
            self._wait_for_strikes()
            load.end_schedule()
        elif scenario.kind in TRIGGERED:
            load.send(scenario.kind)
        else:
            load.emit(scenario.kind, scenario.will, x=scenario.x, **scenario.params)
        if scenario.litter:
            load.throw()

    def _wait_for_strikes(self) -> None:
        _until(lambda: len(record.read_harms(self._work / "harms.jsonl")) >= len(self._scenario.strikes), _LATER_S)

    def _wait_for_end(self, load: Load) -> float | None:
        """Wait until nothing is in flight and return when that was; None if nothing has gone on for too long."""
        seen, since = -1, time.monotonic()
        while True:
            load.refresh()
            now, size = time.monotonic(), (self._work / "record").stat().st_size
            if not load.in_flight:
                return now
            if size != seen:
                seen, since = size, now
            elif now - since > _END_S:
                return None
            time.sleep(0.05)

    def _judge(self, load: Load) -> dict[str, Any]:
        faults: dict[str, list[str]] = {}
        self._begin(load)
        ended = self._wait_for_end(load)
        self._wait_for_strikes()  # what is no part of the run may come a moment later
        harms = record.read_harms(self._work / "harms.jsonl")
        bodies = record.parse((self._work / "record").read_text().splitlines())
        if ended is None:
            faults["progress"] = [f"the run has not gone on for {_END_S:g} s"]
            state = checks.state_of(load.engine, load.open)
            (self._work / "stuck.json").write_text(json.dumps(state, indent=1))
        if len(harms) != len(self._scenario.strikes):
            faults["reached"] = [f"only {len(harms)} of {len(self._scenario.strikes)} strikes were made"]
        found, seen = checks.check_all(load, bodies, harms)
        faults |= found
        struck = harms[-1].at if harms else None
        later = [
            e.begin for slots in bodies.values() for es in slots.values() for e in es if struck and e.begin > struck
        ]
        waited = min(later) - struck if struck and later else None
        total = ended - struck if struck and ended else None
        took = waited if waited is not None else total
        if took is not None and took > NEXT_S + _TAKEN_S.get(self._scenario.kind, 0.0):
            faults["recovery"] = [f"it went on after {took:.1f} s"]
        return {
            "name": self._scenario.name,
            "killed": ", ".join(f"{harm.target} {harm.pid}" for harm in harms) or "-",
            "next": waited,
            "end": total,
            "ok": not any(faults.values()),
            "bodies": sum(len(executions) for slots in bodies.values() for executions in slots.values()),
            "repeated": checks.repeats(seen),
            "kills": Counter(harm.target for harm in harms),
            "faults": faults,
        }


class _CommandLine:
    """Asks for things by `orchestrator ...`, in a process that may be killed at a point."""

    def __init__(self, work: Path, data_dir: Path, env: Mapping[str, str]) -> None:
        self._work = work
        self._place = ("--project", str(work / "project"), "--data-dir", str(data_dir))
        self._env = env
        self._engine = Engine(settings_of(work / "project", data_dir))

    def cancel(self, run: str) -> str:
        told = self._run("runs", "cancel", run)
        return told if told == KILLED or "nothing to cancel" not in told else "nothing to cancel"

    def resume(self, run: str) -> str:
        return self._run("runs", "resume", run)

    def redrive(self, runs: list[str], mended: Any) -> str:
        chosen = [letter.id for letter in self._engine.dead_letters.all() if letter.run in runs]
        options = () if mended is None else ("--input", json.dumps(mended))
        return self._run("dead-letters", "redrive", *chosen, *options) if chosen else "nothing to redrive"

    def _run(self, *arguments: str) -> str:
        command = [sys.executable, "-P", "-m", "tests.chaos.role", *arguments, *self._place]
        done = subprocess.run(
            command, cwd=self._work, env=environment(**self._env), stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_END_S, check=False,
        )  # fmt: skip
        if done.returncode == -signal.SIGKILL:
            return KILLED
        if any(words in done.stdout for words in ("cannot be used", "does not answer", "the ledger failed")):
            raise UnavailableError(done.stdout)
        return done.stdout


def _until(predicate: Callable[[], bool], timeout_s: float) -> float | None:
    """Poll until it holds and return when that was; None if it never does."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if predicate():
            return time.monotonic()
        time.sleep(0.05)
    return None
