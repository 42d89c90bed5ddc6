"""Random mode: a mixed load on real processes, and kills at random from a seed."""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import UnavailableError
from tests.chaos import checks, record, recovery
from tests.chaos.killer import Killer, Parts
from tests.chaos.load import Load
from tests.chaos.processes import Role, System, is_ready, orchestrator, server_url, wait_for
from tests.chaos.report import Report, console, slowest, summarise
from tests.chaos.sources import Sources
from tests.chaos.workload import TRIGGERED, write_project

#: No progress for so long, with nobody killed any more, means that something is lost.
STUCK_S = 120.0
#: Rounds start while fewer runs of events and files than this are in flight.
_IN_FLIGHT = 18
#: Between two cuts of the connections to the store, on average; half of them let nothing through for up to so long.
_CUT_S, _SILENT_S = 8.0, 6.0
#: Between two changes of the pool's size by hand, on average, and what it is set to.
_SIZE_S, _SIZES = 3.0, (None, None, None, 0, 1, 2, 3, 6)


def run(*, kills: int, seed: int, minutes: float, every_s: float) -> Report:
    """Run until so many were killed, or for so long; wait until all has ended; check. Keeps its directory."""
    began = time.monotonic()
    report = Report("random", seed, f"make chaos KILLS={kills} SEED={seed}")
    work = Path(tempfile.mkdtemp(prefix="orchestrator-chaos-"))
    report.logs = str(work)
    console.print(f"seed {seed}, logs in {work}", style="dim")
    project, data_dir = work / "project", work / "data"
    write_project(project, TRIGGERED)
    system, sources = System(work), Sources(work, TRIGGERED)
    place = ("--project", str(project), "--data-dir", str(data_dir))
    try:
        sources.join(system)
        system.start(Role("up", orchestrator("up", *place), sources.env))
        wait_for(lambda: is_ready(data_dir), "`up` is ready")
        for name in ("dispatcher", "trigger", "beat", "autoscaler", "worker"):
            system.start(Role(name, orchestrator(name, *place), sources.env))
        system.start(_second_gateway(work, sources))
        load = Load(work, data_dir, random.Random(seed), sources=sources, follows=True, ticks=True)
        killer = Killer(Parts(system), work, random.Random(seed + 1))
        starter = threading.Thread(target=load.run, args=(_IN_FLIGHT,), name="load")
        starter.start()
        try:
            _strike(killer, load, sources, kills, began + minutes * 60, every_s, random.Random(seed + 2))
        finally:
            _size(load, None)
            load.stop.set()
            starter.join()
            killer.close()
        report.kills, report.stops, report.cuts = dict(killer.counts), dict(killer.stops), sources.cuts
        load.end_schedule()
        console.print(f"{killer.kills} killed; {load.in_flight} of {len(load.roots)} runs are in flight", style="dim")
        if not _settle(load, work):
            state = checks.state_of(load.engine, load.open)
            (work / "stuck.json").write_text(json.dumps(state, indent=1))
            report.faults["progress"] = [f"{len(load.open)} runs had no progress for {STUCK_S:g} s: {_some(load)}"]
        _judge(report, load, work)
        load.close()
    finally:
        codes = system.stop()
        sources.close()
    if codes["up"] != 0:
        report.faults["stop"] = [f"`up` ended with exit code {codes['up']}"]
    report.seconds = time.monotonic() - began
    return report


def _second_gateway(work: Path, sources: Sources) -> Role:
    """Return a gateway beside that of `up`, with a data directory of its own, where it writes down its address."""
    url = server_url(work / "data")
    assert url is not None
    env = {**sources.env, "ORCHESTRATOR_BROKER_URL": url, "ORCHESTRATOR_LEDGER_URL": url}
    place = ("--project", str(work / "project"), "--data-dir", str(work / "gateway"))
    return Role("gateway", orchestrator("gateway", *place), env)


def _strike(
    killer: Killer, load: Load, sources: Sources, kills: int, until: float, every_s: float, chance: random.Random
) -> None:
    said = strike_at = cut_at = size_at = time.monotonic()
    while killer.kills < kills and time.monotonic() < until:
        time.sleep(0.02)
        killer.wake(time.monotonic())
        if time.monotonic() >= strike_at:
            killer.strike()
            strike_at = time.monotonic() + chance.uniform(0.2, 1.8) * every_s
        if time.monotonic() >= cut_at:
            sources.cut(max(0.0, chance.uniform(-_SILENT_S, _SILENT_S)))
            cut_at = time.monotonic() + chance.uniform(0.2, 1.8) * _CUT_S
        if time.monotonic() >= size_at:
            _size(load, chance.choice(_SIZES))
            size_at = time.monotonic() + chance.uniform(0.2, 1.8) * _SIZE_S
        if time.monotonic() - said > 30:
            said = time.monotonic()
            console.print(f"{killer.kills} killed, {load.in_flight} of {len(load.roots)} runs in flight", style="dim")


def _size(load: Load, size: int | None) -> None:
    """Have the pool grow or shrink to a size; None: to what its autoscaler thinks right."""
    with suppress(UnavailableError):  # it keeps the one before
        load.engine.pools.pin("default", size)


def _settle(load: Load, work: Path) -> bool:
    """Wait until all has ended; False if there was no progress for too long."""
    seen, since = (0, 0), time.monotonic()
    while load.in_flight:
        load.refresh()
        now = (load.in_flight, (work / "record").stat().st_size)
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > STUCK_S:
            return False
        time.sleep(0.2)
    return True


def _some(load: Load) -> str:
    return ", ".join(f"{one.run} ({one.kind.name})" for one in list(load.open.values())[:8])


def _judge(report: Report, load: Load, work: Path) -> None:
    bodies = record.parse((work / "record").read_text().splitlines())
    harms = record.read_harms(work / "harms.jsonl")
    found, seen = checks.check_all(load, bodies, harms)
    report.faults |= {name: faults for name, faults in found.items() if faults}
    report.runs = dict(Counter(one.kind.name for one in seen.expected))
    report.acts = dict(Counter(act.what for act in seen.acts))
    report.bodies = sum(len(executions) for slots in bodies.values() for executions in slots.values())
    report.repeated = dict(checks.repeats(seen))
    pausing = {one.run for one in seen.expected if one.kind.pauses}
    recoveries = recovery.measure(bodies, harms, pausing)
    report.recovery = summarise(recoveries)
    report.slowest = slowest(recoveries)
