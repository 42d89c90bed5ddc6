"""`orchestrator schedules ...`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from orchestrator.cli.access import (
    AfterOption,
    DataDirOption,
    JsonOption,
    LimitOption,
    ProjectOption,
    engine_of,
    settings_of,
)
from orchestrator.cli.output import print_json, print_table

app = typer.Typer(help="Look at schedules, pause them, and make up for the past.", no_args_is_help=True)


@app.command("list")
def schedules_list(
    limit: LimitOption = 1000,
    after: AfterOption = None,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the schedules in force, with the next five times at which each is due (UTC)."""
    from orchestrator.schedules import Schedules

    with engine_of(settings_of(project, data_dir)) as engine:
        rows, following = Schedules(engine).page(limit, after)
    if as_json:
        print_json({"items": rows, "next": following})
        return
    print_table(
        ["schedule", "workflow", "when", "state", "last due", "next due"],
        [
            (row["name"], row["workflow"], _when(row["spec"]), "paused" if row["paused"] else "", row["last_due_at"],
             "\n".join(row["next_due_at"]) or "never")
            for row in rows
        ],
    )  # fmt: skip


@app.command()
def show(name: str, project: ProjectOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show a schedule and its backfills."""
    from orchestrator.schedules import Schedules

    with engine_of(settings_of(project, data_dir)) as engine:
        _print(Schedules(engine).show(name), as_json=as_json)


@app.command()
def pause(
    name: str, project: ProjectOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Have a schedule start nothing until it is resumed."""
    from orchestrator.schedules import Schedules

    with engine_of(settings_of(project, data_dir)) as engine:
        _print(Schedules(engine).pause(name), as_json=as_json)


@app.command()
def resume(
    name: str, project: ProjectOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Have a paused schedule go on from now; what was due meanwhile is not made up for."""
    from orchestrator.schedules import Schedules

    with engine_of(settings_of(project, data_dir)) as engine:
        _print(Schedules(engine).resume(name), as_json=as_json)


@app.command()
def backfill(
    name: str,
    start: Annotated[str, typer.Option("--from", help="First time, or date: RFC 3339.")] = "",
    end: Annotated[str, typer.Option("--to", help="Last time, or date: RFC 3339.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run.")] = False,
    max_parallel: Annotated[
        int | None, typer.Option("--max-parallel", help="How many of these runs are in flight at most (100).")
    ] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Stop the backfills of this schedule instead.")] = False,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a workflow for each time at which its schedule was due, with low priority; none that has run already."""
    from orchestrator.errors import InputError
    from orchestrator.schedules import Schedules

    if not cancel and not (start and end):
        raise InputError("backfill needs --from and --to, or --cancel")
    with engine_of(settings_of(project, data_dir)) as engine:
        schedules = Schedules(engine)
        if cancel:
            result: dict[str, Any] = {"schedule": name, "cancelled": schedules.cancel_backfill(name)}
        else:
            result = schedules.backfill(name, start, end, dry_run=dry_run, max_parallel=max_parallel)
    if as_json:
        print_json(result)
    elif cancel:
        print(f"{result['cancelled']} backfill(s) of {name} stopped; runs that have started go on")
    elif dry_run:
        print(f"{result['due']} time(s) due, {result['known']} of which ran already; to run: {result['to_run']}")
        for at in result["due_at"]:
            print(f"  {at}")
        if result["to_run"] > len(result["due_at"]):
            print(f"  ... and {result['to_run'] - len(result['due_at'])} more")
    else:
        print(f"backfill {result['id']} of {name}, {result['from']} to {result['to']}: see `schedules show {name}`")


def _when(spec: dict[str, Any]) -> str:
    from orchestrator.recurrence import describe_recurrence
    from orchestrator.subscriptions import on_from_json

    on: Any = on_from_json({"schedule": spec})
    return describe_recurrence(on) + (f" ({on.timezone})" if on.timezone != "UTC" else "")


def _print(row: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(row)
        return
    print(f"{row['name']} of {row['workflow']}: {_when(row['spec'])}{', paused' if row['paused'] else ''}")
    print(f"last due: {row['last_due_at'] or 'never'}")
    print(f"next due: {', '.join(row['next_due_at']) or 'never'}")
    for one in row["backfills"]:
        state = f"finished at {one['finished_at']}" if one["finished_at"] else f"{one['in_flight']} in flight"
        print(
            f"backfill {one['id']}: {one['from']} to {one['to']}: {one['released']} released, "
            f"{one['known']} known before, {state}"
        )
