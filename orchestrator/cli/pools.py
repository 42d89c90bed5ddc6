"""`orchestrator pools ...`."""

from __future__ import annotations

from contextlib import closing
from typing import Any

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
from orchestrator.errors import InputError

app = typer.Typer(help="Look at pools, and set their sizes by hand.", no_args_is_help=True)


@app.command("list")
def pools_list(
    limit: LimitOption = 1000,
    after: AfterOption = None,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """List pools: their size, what waits for them, and what the autoscaler decided last and why."""
    from orchestrator.sizes import Sizes

    with engine_of(settings_of(project, data_dir)) as engine, closing(Sizes(engine)) as sizes:
        pools, following, autoscaler = sizes.page(limit, after)
    if as_json:
        print_json({"items": pools, "next": following, "autoscaler": autoscaler})
        return
    _print(pools)
    if autoscaler["fault"]:
        print(autoscaler["fault"])


@app.command()
def show(name: str, project: ProjectOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show a pool and its workers."""
    from orchestrator.sizes import Sizes

    with engine_of(settings_of(project, data_dir)) as engine, closing(Sizes(engine)) as sizes:
        pool = sizes.show(name)
    if as_json:
        print_json(pool)
        return
    _print([pool])
    print_table(
        ["worker", "size", "target", "busy", "at most", "started", "code", ""],
        [
            (one["worker"], one["size"], _target(one["target"]), one["busy"], one["ceiling"], one["started_at"],
             one["code"][:8], one["fault"] or ("draining" if one["is_draining"] else ""))
            for one in pool["members"]
        ],
    )  # fmt: skip


@app.command()
def scale(
    name: str,
    size: str,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set the size of a pool by hand, whatever its min and max; `auto` has the autoscaler decide again."""
    from orchestrator.sizes import Sizes

    if size != "auto" and not (size.isascii() and size.isdecimal()):
        raise InputError(f"the size of a pool is a whole number, or auto, not {size!r}")
    with engine_of(settings_of(project, data_dir)) as engine, closing(Sizes(engine)) as sizes:
        pool = sizes.scale(name, None if size == "auto" else int(size))
    if as_json:
        print_json(pool)
    elif pool["pinned"] is None:
        print(f"the autoscaler decides the size of pool {name}")
    else:
        print(f"pool {name} is to have {pool['pinned']} processes, until `pools scale {name} auto`")


def _print(pools: list[dict[str, Any]]) -> None:
    columns = [
        "pool", "size", "busy", "workers", "backlog", "oldest", "arrivals/s", "served/s", "desired", "why", "clears in"
    ]  # fmt: skip
    rows = [
        (
            one["name"], one["size"], one["busy"], one["workers"], one["backlog"], _seconds(one["oldest_age_s"]),
            _rate(one["arrival_rate"]), _rate(one["service_rate"]), one["desired"],
            f"{one['why']} (since {one['decided_at']})" if one["decided_at"] else "",
            _seconds(one["clears_in_s"]) if one["backlog"] else "",
        )
        for one in pools
    ]  # fmt: skip
    print_table(columns, rows)
    for one in pools:
        for fault in one["faults"]:
            print(f"{one['name']}: {fault}")


def _target(target: int | None) -> str:
    return "" if target is None else "stands by" if target < 0 else str(target)


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g} s" if value < 100 else f"{int(value // 60)} min {int(value % 60)} s"
