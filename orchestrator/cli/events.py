"""`orchestrator events`: what arrived, what came of it and why, and events of one's own."""

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
    read_json,
    settings_of,
)
from orchestrator.cli.output import print_json, print_table
from orchestrator.errors import InputError, unknown

app = typer.Typer(help="Look at events and what came of them, and emit your own.", no_args_is_help=True)


@app.command("list")
def events_list(
    verdict: Annotated[str | None, typer.Option(help="Only those that came to this.")] = None,
    type_: Annotated[str | None, typer.Option("--type", help="Only events of this type.")] = None,
    limit: LimitOption = 50,
    after: AfterOption = None,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """List events, newest first, with what came of them."""
    from orchestrator.eventlog import VERDICTS

    if verdict is not None and verdict not in VERDICTS:
        raise InputError(f"--verdict: {unknown('verdict', verdict, VERDICTS)}; there are {', '.join(VERDICTS)}")
    with engine_of(settings_of(project, data_dir)) as engine:
        found, cursor = engine.events.page(limit=limit, after=after, verdict=verdict, type_=type_)
    if as_json:
        print_json({"items": found, "next": cursor})
        return
    rows = []
    for one in found:
        event = one["event"] or {}
        runs = "; ".join(f"{name}: {found['run']}" for name, found in one["verdicts"].items() if found["run"])
        again = f"{one['duplicates']} x" if one["duplicates"] else ""
        rows.append(
            (one["accepted_at"], event.get("type"), event.get("subject"), one["verdict"], runs, again, event.get("id"))
        )
    print_table(["accepted", "type", "subject", "verdict", "runs", "again", "id"], rows)
    if cursor:
        print(f"more: --after {cursor}")


@app.command("show")
def events_show(
    event_id: str, project: ProjectOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Show an event and the runs that it started."""
    with engine_of(settings_of(project, data_dir)) as engine:
        found = engine.events.get(event_id)
    if as_json:
        print_json(found)
        return
    print_json(found["event"])
    _print_summary(found)
    _print_verdicts(found["verdicts"])


@app.command("explain")
def events_explain(
    event_id: Annotated[str | None, typer.Argument(metavar="[ID]")] = None,
    workflow: Annotated[str | None, typer.Option(help="What the events of late were to this workflow.")] = None,
    since: Annotated[str, typer.Option(help="With --workflow: how far back, as 1h, or a time.")] = "1h",
    limit: LimitOption = 50,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say why an event started what it did and nothing else; or why a workflow did not start."""
    from orchestrator.deadletters import parse_since

    if (event_id is None) == (workflow is None):
        raise InputError("give the id of an event, or --workflow NAME")
    with engine_of(settings_of(project, data_dir)) as engine:
        if event_id is not None:
            found = engine.events.explain(event_id)
            if as_json:
                print_json(found)
                return
            _print_summary(found)
            _print_verdicts(found["verdicts"])
            return
        assert workflow is not None
        known = engine.ledger.workflows()
        since_ms = parse_since(since, engine.ledger.now_ms())
        items = engine.events.explain_workflow(workflow, since_ms=since_ms, limit=limit)
    if as_json:
        print_json({"items": items, "next": None})
        return
    if workflow not in known:
        print(f"{unknown('workflow', workflow, known)}: it is not in force now")
    print_table(
        ["accepted", "type", "subject", "verdict", "run or reason", "id"],
        [
            (one["accepted_at"], one["type"], one["subject"], one["verdict"], _why(one), one["event_id"])
            for one in items
        ],
    )
    if not items:
        print(f"no event has come since {since}; see `orchestrator doctor`")


def _print_summary(found: dict[str, Any]) -> None:
    again = f"; it came {found['duplicates']} x again, last at {found['duplicate_at']}" if found["duplicates"] else ""
    print(f"accepted at {found['accepted_at']}: {found['verdict']}{again}")


def _print_verdicts(verdicts: dict[str, Any]) -> None:
    rows = [(name, one["verdict"], _why(one)) for name, one in verdicts.items()]
    print_table(["workflow", "verdict", "run or reason"], rows)


def _why(one: dict[str, Any]) -> str:
    return ": ".join(filter(None, (one["run"] and f"run {one['run']}", one["reason"])))


@app.command("replay")
def events_replay(
    event_id: str, project: ProjectOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> None:
    """Have an event dealt with anew, by the definitions in force now: it starts new runs."""
    from orchestrator.operations import replay_event

    with engine_of(settings_of(project, data_dir)) as engine:
        event = replay_event(engine, event_id)
    if as_json:
        print_json(event.to_json())
    else:
        print(event.id)


@app.command("emit")
def events_emit(
    type_: Annotated[str, typer.Option("--type", help="What happened, as shop.order.placed.")],
    source: Annotated[str | None, typer.Option(help="Who says so (orchestrator:emit).")] = None,
    data: Annotated[str | None, typer.Option(help="The data as JSON, or @FILE.")] = None,
    subject: Annotated[str | None, typer.Option(help="What it happened to.")] = None,
    event_id: Annotated[str | None, typer.Option("--id", help="Identity within the source; else a new one.")] = None,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put an event of your own on the bus."""
    from orchestrator.operations import read_event

    said = {"type": type_, "source": source, "id": event_id, "subject": subject}
    given = None if data is None else read_json("--data", data)
    event = read_event({name: text for name, text in said.items() if text is not None} | {"data": given})
    with engine_of(settings_of(project, data_dir)) as engine:
        engine.bus.publish([event])
    if as_json:
        print_json(event.to_json())
    else:
        print(event.id)
