"""The commands. What takes time to import is imported where it is used, so that every command answers at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.access import (
    AfterOption,
    DataDirOption,
    JsonOption,
    LimitOption,
    ProjectOption,
    engine_of,
    for_role,
    load,
    read_json,
    settings_of,
    warnings_of,
    with_servers,
)
from orchestrator.cli.audit import audit
from orchestrator.cli.costs import costs
from orchestrator.cli.deadletters import app as dead_letters
from orchestrator.cli.events import app as events
from orchestrator.cli.output import confirm, duration, one_line, print_json, print_table, survive_any_text
from orchestrator.cli.pools import app as pools
from orchestrator.cli.schedules import app as schedules
from orchestrator.cli.tokens import app as tokens
from orchestrator.errors import DefinitionError, InputError, NotFoundError, UnavailableError, describe, one_of
from orchestrator.pools import size_text
from orchestrator.workflows import Workflow, unknown

app = typer.Typer(
    name="orchestrator",
    help="An event-driven, serverless workflow orchestrator on message queues.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
#: A part of `up` ends when the `up` with this pid is no longer its parent.
UpPidOption = Annotated[int, typer.Option("--up-pid", hidden=True)]
HostOption = Annotated[str | None, typer.Option(help="Address of the gateway.")]
PortOption = Annotated[int | None, typer.Option(help="Port of the gateway; else a free one, and then always it.")]

runs = typer.Typer(help="Look at runs, stop them, and go on with them.", no_args_is_help=True)
workflows = typer.Typer(help="Look at workflows.", no_args_is_help=True)
app.add_typer(runs, name="runs")
app.add_typer(events, name="events")
app.add_typer(workflows, name="workflows")
app.add_typer(dead_letters, name="dead-letters")
app.add_typer(tokens, name="tokens")
app.command()(audit)
app.command()(costs)
app.add_typer(schedules, name="schedules")
app.add_typer(pools, name="pools")


# Definitions


@app.command()
def init(directory: Path) -> None:
    """Make a small project that runs as it is."""
    from orchestrator.cli.scaffold import make_project

    make_project(directory)
    print(f"made {directory}; now run: orchestrator up --project {directory}")


@app.command()
def validate(project: ProjectOption = None, as_json: JsonOption = False) -> int:
    """Check every definition; print every fault as file:line: field: what is wrong. Exit code 1 if there is one."""
    settings = settings_of(project)
    loaded = load(settings)
    warnings = [] if loaded.faults else warnings_of(settings, loaded)
    if as_json:
        faults = [{"file": f.file, "line": f.line, "field": f.field, "message": f.message} for f in loaded.faults]
        names = sorted(loaded.workflows)
        print_json({"ok": not faults, "faults": faults, "warnings": warnings, "workflows": names})
        return 1 if faults else 0
    for fault in loaded.faults:
        print(fault)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not loaded.faults:
        print(f"{len(loaded.workflows)} workflow(s), no faults: {', '.join(sorted(loaded.workflows))}")
    return 1 if loaded.faults else 0


@app.command()
def schema() -> None:
    """Print the JSON Schema of workflow files, for editors."""
    from orchestrator.definitions import json_schema

    print_json(json_schema())


@app.command()
def graph(
    name: str,
    project: ProjectOption = None,
    form: Annotated[str, typer.Option("--format", help="tree, mermaid or dot.")] = "tree",
) -> None:
    """Draw a workflow."""
    from orchestrator import drawing
    from orchestrator.plan import Plan

    forms = {"tree": drawing.tree, "mermaid": drawing.mermaid, "dot": drawing.dot}
    if form not in forms:
        raise InputError(f"--format: {unknown('format', form, forms)}; there are {', '.join(forms)}")
    print(forms[form](Plan.of(_defined(project, name))))


@app.command()
def build(name: str, project: ProjectOption = None) -> None:
    """Print the Celery canvases that a run of a workflow publishes."""
    from orchestrator import canvas
    from orchestrator.celery_app import make_app
    from orchestrator.plan import Plan

    plan = Plan.of(_defined(project, name))
    celery = make_app(settings_of(project))
    for when, built in canvas.build(celery, plan):
        print(f"# {when}\n{built!r}\n")


def _defined(project: Path | None, name: str) -> Workflow:
    loaded = load(settings_of(project), with_secrets=False)
    found = loaded.workflows.get(name)
    if found is not None:
        return found
    if loaded.faults:
        raise DefinitionError(loaded.faults)
    raise NotFoundError(f"{unknown('workflow', name, loaded.workflows)} (there are: {', '.join(loaded.workflows)})")


@workflows.command("list")
def workflows_list(project: ProjectOption = None, as_json: JsonOption = False) -> None:
    """List the workflows of the project, and what starts them."""
    from orchestrator.cli.listening import describe_on
    from orchestrator.subscriptions import kind_of_on

    loaded = load(settings_of(project), with_secrets=False)
    if loaded.faults:
        raise DefinitionError(loaded.faults)
    if as_json:
        from orchestrator.operations import shown

        items = [shown(workflow.to_json()) for workflow in loaded.workflows.values()]
        print_json({"items": items, "next": None})
        return
    rows = [
        (w.name, len(w.steps), "\n".join(f"{kind_of_on(on)} {describe_on(w.name, on)}" for on in w.on), w.description)
        for w in loaded.workflows.values()
    ]
    print_table(["workflow", "steps", "on", "description"], rows)


# Running


@app.command()
def up(
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    host: HostOption = None,
    port: PortOption = None,
    flower: Annotated[bool, typer.Option("--flower", help="Run the monitor (Flower), too.")] = False,
) -> int:
    """Run everything on this machine: the embedded server, the control process and a worker for each pool."""
    from orchestrator.cli.up import Up

    settings = settings_of(project, data_dir, host=host, port=port)
    return Up(settings, with_monitor=flower).run()


@app.command(hidden=True)
def control(
    up_pid: UpPidOption,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    host: HostOption = None,
    port: PortOption = None,
) -> int:
    """Run dispatcher, rescuer, triggers, gateway and autoscaler in one process, as a part of `up`."""
    from orchestrator.cli.control import Control

    return Control(with_servers(settings_of(project, data_dir, host=host, port=port)), up_pid=up_pid).run()


@app.command()
def dispatcher(project: ProjectOption = None, data_dir: DataDirOption = None) -> int:
    """Run the dispatcher and the rescuer, in production."""
    from orchestrator.cli.control import Control

    return Control(with_servers(settings_of(project, data_dir)), roles=["dispatcher"]).run()


@app.command()
def trigger(project: ProjectOption = None, data_dir: DataDirOption = None) -> int:
    """Run the triggers, in production."""
    from orchestrator.cli.control import Control

    return Control(for_role("trigger", project, data_dir), roles=["trigger"]).run()


@app.command()
def gateway(
    project: ProjectOption = None, data_dir: DataDirOption = None, host: HostOption = None, port: PortOption = None
) -> int:
    """Run the gateway: webhooks, the API, health and metrics, in production."""
    from orchestrator.cli.control import Control

    return Control(for_role("gateway", project, data_dir, host=host, port=port), roles=["gateway"]).run()


@app.command()
def beat(project: ProjectOption = None, data_dir: DataDirOption = None) -> int:
    """Run the beat, which emits what schedules ask for, in production; one of several leads."""
    from orchestrator.cli.control import Control

    return Control(for_role("beat", project, data_dir), roles=["beat"]).run()


@app.command()
def monitor(
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    host: Annotated[str | None, typer.Option(help="Address of the monitor.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the monitor (default: 5555).")] = None,
    up_pid: UpPidOption = 0,
) -> int:
    """Run Flower, which shows workers and steps, and cancels a step when it is to revoke one."""
    from orchestrator.cli.monitor import run_monitor

    settings = for_role("monitor", project, data_dir, monitor_host=host, monitor_port=port)
    return run_monitor(settings, up_pid=up_pid or None)


@app.command()
def worker(
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    pool: Annotated[str, typer.Option(help="The pool whose steps it takes.")] = "default",
    concurrency: Annotated[int | None, typer.Option(min=1, help="How many steps at a time.")] = None,
    up_pid: UpPidOption = 0,
    words_fd: Annotated[int | None, typer.Option("--words-fd", hidden=True)] = None,
) -> int:
    """Run a worker of one pool, in production."""
    from orchestrator.telemetry import configure_logging
    from workers.launchers.parts import leave_words

    with leave_words(words_fd):
        from workers.worker import run_worker

        configure_logging(role="worker", pool=pool)
        settings = for_role("worker", project, data_dir)
        return run_worker(settings, pool, concurrency=concurrency, up_pid=up_pid or None)


@app.command()
def autoscaler(
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    launcher: Annotated[
        str, typer.Option(help="What starts workers: none (somebody else does), or process (they are processes here).")
    ] = "none",
) -> int:
    """Run the autoscaler, which says how large pools are to be, in production; one of several leads."""
    from orchestrator.cli.control import Control
    from orchestrator.cli.launching import launcher_of

    settings = for_role("autoscaler", project, data_dir)
    return Control(settings, roles=["autoscaler"], launcher=launcher_of(launcher, settings)).run()


@app.command()
def demo(keep: Annotated[bool, typer.Option(help="Keep the temporary directory.")] = False) -> int:
    """Run the examples in a temporary directory and show what happens. Exit code 0 only if all went as it should."""
    from orchestrator.cli.demo import run_demo

    return run_demo(keep=keep)


@app.command()
def run(
    name: str,
    text: Annotated[str | None, typer.Option("--input", help="The input as JSON, or @FILE.")] = None,
    key: Annotated[str | None, typer.Option(help="The same key never starts the workflow twice.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the end; the exit code is 0 if the run succeeded.")
    ] = False,
    timeout: Annotated[str, typer.Option(help="How long to wait, as 60s or 5m.")] = "1h",
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> int:
    """Start a workflow by hand."""
    from orchestrator.operations import start_run

    given = _read_input(text)
    seconds = _seconds(timeout)
    settings = settings_of(project, data_dir)
    with engine_of(settings) as engine:
        run_key, event = start_run(engine, name, given, key=key)
        if not wait:
            if as_json:
                print_json({"id": run_key, "workflow": name, "event_id": event.id})
            else:
                print(run_key)
            return 0
        return _wait(engine, run_key, seconds, as_json=as_json)


def _read_input(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    given = read_json("--input", text)
    if not isinstance(given, dict):
        raise InputError(f"--input must be a JSON object with the workflow's params, not {type(given).__name__}")
    return given


def _seconds(timeout: str) -> float:
    from orchestrator.durations import parse_duration

    try:
        return parse_duration(timeout).total_seconds()
    except ValueError as exc:
        raise InputError(f"--timeout {exc}") from exc


def _wait(engine: Any, run_id: str, seconds: float, *, as_json: bool) -> int:
    """Wait for the end of a run, print it, and return the exit code by its state."""
    from orchestrator.ledger import keys
    from orchestrator.ledger.queries import Queries
    from orchestrator.runs import RunState

    until = time.monotonic() + seconds
    ended = {str(state) for state in RunState if state.is_end}
    with engine.ledger.client.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe(keys.RUN_ENDED)
        while engine.ledger.outcome(run_id)[0] not in ended:
            left = until - time.monotonic()
            if left <= 0:
                raise UnavailableError(f"run {run_id} has not ended within {seconds:g} s; it goes on")
            # Any end wakes us; the second is for one that was told before we listened.
            listener.get_message(timeout=min(left, 1.0))
    found = Queries(engine.ledger, engine.payloads).run(run_id)
    if as_json:
        print_json(found.to_json())
    else:
        _print_run(found)
    return 0 if found.state is RunState.SUCCEEDED else 1


def _print_steps(steps: Sequence[Any], **more: Sequence[object]) -> None:
    """Print steps or items as a table: `more` are columns, the first of which comes first; empty ones are left out."""
    columns: dict[str, Sequence[object]] = {
        "state": [str(one.state) for one in steps],
        "attempts": [f"{one.attempts}" if one.attempts else "" for one in steps],
        "lost": [one.losses or "" for one in steps],
        "took": [duration(one.started_at, one.finished_at) for one in steps],
        "waited": [f"{one.usage['queued_s']:.2f} s" if one.usage else "" for one in steps],
        "CPU": [f"{used:.2f} s" if (used := _cpu_of(one)) is not None else "" for one in steps],
        "peak": [_peak_of(one) for one in steps],
        "due": [one.due_at or "" for one in steps],
        "run": [one.run or "" for one in steps],
    }
    first = next(iter(more))
    columns = {first: more[first]} | columns | more
    columns["error"] = [describe(one.error) if one.error else "" for one in steps]
    shown = {name: cells for name, cells in columns.items() if name in (first, "state") or any(cells)}
    print_table(list(shown), list(zip(*shown.values(), strict=True)))


def _cpu_of(step: Any) -> float | None:
    """Return the processor time of all attempts of a step, or of the last one of an item."""
    used = step.cost or step.usage
    return None if used is None or not used["wall_s"] else float(used["cpu_s"])


def _peak_of(step: Any) -> str:
    memory = (step.usage or {}).get("memory")
    return size_text(memory // 10**6 * 10**6) if memory else ""


def _print_run(found: Any) -> None:
    print(
        f"run {found.id} of {found.workflow}: {found.state} ({duration(found.created_at, found.finished_at) or '...'})"
        + (f", episode {found.episode}" if found.episode > 1 else "")
        + (", being cancelled" if found.cancel_requested and found.finished_at is None else "")
    )
    if found.error:
        where = f" in step {found.error['step']}" if found.error.get("step") else ""
        print(f"error{where}: {describe(found.error)}")
    if found.parent:
        print(f"nested in run {found.parent['run']}, step {found.parent['step']}")
    cost = found.cost
    if cost["wall_s"]:
        print(f"took {cost['wall_s']:.2f} s in steps, {cost['cpu_s']:.2f} CPU-s, {cost['gb_s']:.3f} GB-s")
    _print_steps(
        found.steps,
        step=[one.id for one in found.steps],
        items=[", ".join(f"{n} {state}" for state, n in sorted((one.items or {}).items())) for one in found.steps],
    )
    if found.output is not None:
        print(f"output: {one_line(found.output, 400)}")


# Runs


@runs.command("list")
def runs_list(
    workflow: Annotated[str | None, typer.Option(help="Only runs of this workflow.")] = None,
    state: Annotated[str | None, typer.Option(help="Only runs in this state.")] = None,
    limit: LimitOption = 50,
    after: AfterOption = None,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """List runs, newest first."""
    from orchestrator.ledger.queries import Queries
    from orchestrator.runs import RunState

    if state is not None and state not in list(RunState):
        raise InputError(f"--state {one_of(RunState, state)}")
    with engine_of(settings_of(project, data_dir)) as engine:
        found, cursor = Queries(engine.ledger, engine.payloads).runs(
            limit=limit, after=after, workflow=workflow, state=state
        )
    if as_json:
        print_json({"items": [one.to_json(with_steps=False) for one in found], "next": cursor})
        return
    rows = [
        (one.id, one.workflow, str(one.state), one.created_at, duration(one.created_at, one.finished_at))
        for one in found
    ]
    print_table(["run", "workflow", "state", "created", "took"], rows)
    if cursor:
        print(f"more: --after {cursor}")


@runs.command("show")
def runs_show(
    run_id: str,
    step: Annotated[str | None, typer.Option(help="Show this step; of a fan-out, its items.")] = None,
    limit: LimitOption = 50,
    after: AfterOption = None,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a run with its steps, or a step with its items."""
    from orchestrator.ledger.queries import Queries

    with engine_of(settings_of(project, data_dir)) as engine:
        queries = Queries(engine.ledger, engine.payloads)
        if step is None:
            found = queries.run(run_id)
            if as_json:
                print_json(found.to_json())
            else:
                _print_run(found)
            return
        one = queries.step(run_id, step)
        items, cursor = queries.items(run_id, step, limit=limit, after=after) if one.items is not None else ([], None)
    if as_json:
        print_json(
            one.to_json() if one.items is None else {"items": [item.to_json() for item in items], "next": cursor}
        )
        return
    if one.items is None:
        _print_steps([one], step=[one.id], output=[one_line(one.output)])
        if one.error:
            print(one.error.get("traceback") or f"{one.error['type']}: {one.error['message']}")
        return
    _print_steps(items, item=[str(one.index) for one in items], output=[one_line(one.output) for one in items])
    if cursor:
        print(f"more: --after {cursor}")


@runs.command("wait")
def runs_wait(
    run_id: str,
    timeout: Annotated[str, typer.Option(help="How long to wait, as 60s or 5m.")] = "1h",
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> int:
    """Wait for the end of a run and exit with 0 if it succeeded."""
    seconds = _seconds(timeout)
    with engine_of(settings_of(project, data_dir)) as engine:
        engine.ledger.plan_of(run_id)
        return _wait(engine, run_id, seconds, as_json=as_json)


@runs.command("cancel")
def runs_cancel(
    run_ids: Annotated[list[str], typer.Argument(metavar="ID...")],
    step: Annotated[
        str | None, typer.Option(metavar="STEP[/INDEX]", help="Cancel only this step of one run, or item of a step.")
    ] = None,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> int:
    """Cancel runs and those nested in them: what has not begun never will, and steps at work are told to stop."""
    from orchestrator.operations import cancel_runs, cancel_step
    from orchestrator.runs import RunState

    if step is not None and len(run_ids) != 1:
        raise InputError("--step is of one run; give one ID")
    which = None if step is None else _read_step(step)
    with engine_of(settings_of(project, data_dir)) as engine:
        if which is not None:
            return _say_cancelled(cancel_step(engine, run_ids[0], *which), as_json=as_json)
        told = cancel_runs(engine, run_ids)
    if as_json:
        print_json({"items": told, "next": None})
        return 0
    for one in told:
        is_going_on = not RunState(one["state"]).is_end
        if one["cancelled"]:
            print(f"{one['id']}: {'is being cancelled' if is_going_on else one['state']}")
        else:
            nothing = f"nothing to cancel; it is {one['state']}"
            print(f"{one['id']}: {'is being cancelled already' if is_going_on else nothing}")
    return 0


def _read_step(text: str) -> tuple[str, int | None]:
    name, slash, index = text.partition("/")
    if slash and not (index.isdecimal() and index.isascii()):
        raise InputError(f"--step must be STEP, or STEP/INDEX with an item's number from 0, not {text!r}")
    return name, int(index) if slash else None


def _say_cancelled(told: dict[str, Any], *, as_json: bool) -> int:
    from orchestrator.runs import StepRunState

    if as_json:
        print_json(told)
        return 0
    name = told["step"] if told["index"] is None else f"{told['step']}/{told['index']}"
    is_going_on = not StepRunState(told["state"]).is_end
    if told["cancelled"]:
        print(f"{told['id']} {name}: {'is being cancelled' if is_going_on else told['state']}")
    else:
        nothing = f"nothing to cancel; it is {told['state']}"
        print(f"{told['id']} {name}: {'is being cancelled already' if is_going_on else nothing}")
    return 0


@runs.command("resume")
def runs_resume(
    run_id: str,
    keep_definition: Annotated[
        bool, typer.Option("--keep-definition", help="Go on with the definition that the run has, if it changed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be kept and what would run.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask when the definition has changed.")] = False,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> int:
    """Go on with a run that failed or was cancelled, from the steps on that failed or never ended."""
    from orchestrator.resume import check, resume

    with engine_of(settings_of(project, data_dir)) as engine:
        found = check(engine, run_id, keep_definition=keep_definition)
        if not as_json:
            _print_check(found)
        if dry_run:
            if as_json:
                print_json(found.to_json())
            return 0
        if found.definition_changed and not yes:
            confirm("the definition has changed; go on with the one in force?", "--yes, or --keep-definition")
        episode = resume(engine, run_id, keep_definition=keep_definition, episode=found.episode)
    if as_json:
        print_json(found.to_json() | {"episode": episode})
    else:
        print(f"run {run_id} goes on in episode {episode}")
    return 0


def _print_check(found: Any) -> None:
    rows = [(step, "kept", "") for step in found.keeps]
    rows += [(step, "runs again", why) for step, why in found.again.items()]
    rows += [(step, "gone", "no longer in the definition") for step in found.gone]
    if found.definition_changed:
        print(f"the definition of {found.workflow} has changed")
    print_table(["step", "what", "because"], rows)


@runs.command("rerun")
def runs_rerun(
    run_id: str, project: ProjectOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False
) -> int:
    """Start a new run of the same event, with the definition in force."""
    from orchestrator.resume import rerun

    with engine_of(settings_of(project, data_dir)) as engine:
        new = rerun(engine, run_id)
    if as_json:
        print_json({"id": new, "rerun_of": run_id})
    else:
        print(new)
    return 0


@runs.command("logs")
def runs_logs(
    run_id: str,
    step: Annotated[str | None, typer.Option(help="Only this step.")] = None,
    index: Annotated[int | None, typer.Option(help="Only this item of the step.")] = None,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each attempt of a run's steps printed and logged, and the tracebacks of those that failed."""
    from orchestrator.ledger.queries import Queries
    from orchestrator.operations import read_logs

    with engine_of(settings_of(project, data_dir)) as engine:
        found, _ = read_logs(Queries(engine.ledger, engine.payloads), run_id, step, index)
    if as_json:
        print_json({"items": found, "next": None})
        return
    for one in found:
        slot = one["step"] if one["index"] is None else f"{one['step']}/{one['index']}"
        for line in one["text"].splitlines():
            print(f"{slot} #{one['attempt']} | {line}")
        if one["error"]:
            for line in (one["error"].get("traceback") or describe(one["error"])).splitlines():
                print(f"{slot} #{one['attempt']} ! {line}")


@app.command()
def doctor(
    secrets: Annotated[bool, typer.Option("--secrets", help="Show passwords.")] = False,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check that definitions, servers and directories are in order. Exit code 1 if something is not."""
    from orchestrator.cli.doctor import examine

    report = examine(settings_of(project, data_dir), show_secrets=secrets)
    if as_json:
        print_json(report)
    else:
        for name in ("broker_url", "ledger_url", "blobs_url"):
            print(f"{name}: {report[name]}")
        print_table(
            ["check", "ok", "detail"],
            [(check["name"], "yes" if check["ok"] else "NO", check["detail"]) for check in report["checks"]],
        )
    return 0 if report["ok"] else 1


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        sys.stdout.write(version("orchestrator") + "\n")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    survive_any_text()
