"""`orchestrator audit`: who has changed what by the API."""

from __future__ import annotations

from orchestrator.cli.access import (
    AfterOption,
    DataDirOption,
    JsonOption,
    LimitOption,
    ProjectOption,
    engine_of,
    settings_of,
)
from orchestrator.cli.output import one_line, print_json, print_table


def audit(
    limit: LimitOption = 50,
    after: AfterOption = None,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """List who asked for which change by the API, and what came of it, newest first."""
    from orchestrator.audit import Audit

    with engine_of(settings_of(project, data_dir)) as engine:
        items, cursor = Audit(engine.ledger).list(limit=limit, after=after)
    if as_json:
        print_json({"items": items, "next": cursor})
        return
    columns = ["at", "who", "address", "action", "target", "status", "about"]
    rows = [[one[name] for name in columns[:-1]] + [one_line(one["about"]) if one["about"] else ""] for one in items]
    print_table(columns, rows)
    if cursor:
        print(f"more: --after {cursor}")
