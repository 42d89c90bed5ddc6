"""`orchestrator costs`: what workflows have taken."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.access import DataDirOption, JsonOption, ProjectOption, engine_of, settings_of
from orchestrator.cli.output import print_json, print_table


def costs(
    since: Annotated[str, typer.Option(help="Runs made since then: as 7d, or a time with its zone.")] = "30d",
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the steps of each workflow have taken: time, processor time, and memory for as long as it took."""
    from orchestrator.operations import costs as costs_of

    with engine_of(settings_of(project, data_dir)) as engine:
        found = costs_of(engine, since=since)
    if as_json:
        print_json(found)
        return
    rows = [
        (one["workflow"], one["runs"], f"{one['wall_s']:.2f}", f"{one['cpu_s']:.2f}", f"{one['gb_s']:.3f}")
        for one in [*found["items"], {"workflow": "total", **found["total"]}]
    ]
    print_table(["workflow", "runs", "step seconds", "CPU seconds", "GB-seconds"], rows)
