"""`orchestrator dead-letters`: look at what will not be tried again by itself, send it back, or drop it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
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
from orchestrator.cli.output import one_line, print_json, print_table
from orchestrator.errors import InputError

app = typer.Typer(
    help="Look at what will not be tried again by itself, send it back, or drop it.", no_args_is_help=True
)

IdsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="ID", help="Ids, or their first 4 or more characters.")
]
WorkflowOption = Annotated[str | None, typer.Option("--workflow", help="Only steps of this workflow.")]
StepOption = Annotated[str | None, typer.Option("--step", help="Only this step.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Only with this reason.")]
FingerprintOption = Annotated[str | None, typer.Option("--fingerprint", help="Only with this fingerprint.")]
SinceOption = Annotated[str | None, typer.Option("--since", help="Only those since: 2h ago, or a time with its zone.")]
RunOption = Annotated[str | None, typer.Option("--run", help="Only steps of this run.")]
AllOption = Annotated[bool, typer.Option("--all", help="All of them.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def _letters_of(engine: Any) -> Any:
    from orchestrator.deadletters import DeadLetters

    return DeadLetters(engine.ledger, engine.payloads, engine.settings)


@app.command("list")
def list_(
    workflow: WorkflowOption = None,
    step: StepOption = None,
    reason: ReasonOption = None,
    fingerprint: FingerprintOption = None,
    since: SinceOption = None,
    run: RunOption = None,
    group: Annotated[bool, typer.Option("--group", help="One line for each fingerprint, that is, cause.")] = False,
    limit: LimitOption = 50,
    after: AfterOption = None,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, newest first."""
    from orchestrator.operations import filter_of

    which = filter_of(workflow=workflow, step=step, reason=reason, fingerprint=fingerprint, since=since, run=run)
    with engine_of(settings_of(project, data_dir)) as engine:
        letters = _letters_of(engine)
        if group:
            if after is not None:
                raise InputError("--after does not go with --group, which has no pages")
            found, cursor = letters.groups(which)[:limit], None
        else:
            found, cursor = letters.list(which, limit, after)
    items = [one.to_json() for one in found]
    if as_json:
        print_json({"items": items, "next": cursor})
        return
    if group:
        columns = ["fingerprint", "count", "reason", "workflow", "step", "first", "last", "detail", "example"]
        names = ["fingerprint", "count", "reason", "workflow", "step", "first_at", "last_at", "detail", "example"]
        for one, group_ in zip(items, found, strict=True):
            if group_.example.kind == "step":
                one |= {name: one[name] or "several" for name in ("workflow", "step")}
        print_table(columns, [[one[name] for name in names] for one in items])
        return
    columns = ["id", "reason", "where", "run", "last", "count", "detail"]
    rows = [
        [one["id"], one["reason"], _where(one), one["run"], one["last_at"], one["count"], one["detail"]]
        for one in items
    ]
    print_table(columns, rows)
    if cursor:
        print(f"more: --after {cursor}")


def _where(letter: Mapping[str, Any]) -> str:
    if letter["kind"] != "step":
        return f"{letter['kind']} on {letter['queue'] or 'a queue'}"
    item = "" if letter["index"] is None else f"/{letter['index']}"
    return f"{letter['workflow']} {letter['step']}{item}"


@app.command()
def show(
    letter_id: Annotated[str, typer.Argument(metavar="ID")],
    raw: Annotated[bool, typer.Option("--raw", help="Only the bytes of a message or event, as they came.")] = False,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a dead letter with all that is known: every attempt and loss of a step, the bytes of a message."""
    with engine_of(settings_of(project, data_dir)) as engine:
        letters = _letters_of(engine)
        found = letters.get(letter_id)
        if raw:
            if found.kind == "step":
                raise InputError(f"dead letter {found.id} is a step, which has no bytes; leave --raw out")
            sys.stdout.flush()
            sys.stdout.buffer.write(letters.raw(found.id) or b"")
            sys.stdout.buffer.flush()
            return
        known = letters.show(found)
    if as_json:
        print_json(known)
    else:
        _print(known)


def _print(letter: Mapping[str, Any]) -> None:
    print(f"dead letter {letter['id']}: {letter['reason']}: {letter['detail']}")
    print(f"{_where(letter)}; first {letter['first_at']}, last {letter['last_at']}, {letter['count']} time(s)")
    print(f"fingerprint {letter['fingerprint']}")
    if letter["kind"] != "step":
        size = len(letter["raw"] or "")
        print(f"{size} bytes; see them with: orchestrator dead-letters show {letter['id']} --raw")
        return
    print(f"run {letter['run']} ({letter['run_state'] or 'past its retention'}), episode {letter['episode']}")
    print(f"attempts {letter['attempts']}, losses {letter['losses']}")
    if letter["event"]:
        event = letter["event"]
        print(f"event {event.get('id')}: {event.get('type')} from {event.get('source')}")
    if letter["input"] is not None:
        print(f"input: {one_line(letter['input'], 1000)}")
    for one in letter["loss_records"]:
        print(f"lost at {one.get('at')}: {one.get('reason')} ({one.get('worker')})")
    for one in letter["attempt_records"]:
        print(f"attempt {one['attempt']}: {one.get('state')} at {one.get('finished_at')} ({one.get('worker')})")
        error = one.get("error") or {}
        for line in (error.get("traceback") or f"{error.get('type')}: {error.get('message')}").splitlines():
            print(f"  {line}")


@app.command()
def redrive(
    ids: IdsArgument = None,
    workflow: WorkflowOption = None,
    step: StepOption = None,
    reason: ReasonOption = None,
    fingerprint: FingerprintOption = None,
    since: SinceOption = None,
    run: RunOption = None,
    everything: AllOption = False,
    mended: Annotated[
        str | None,
        typer.Option("--input", help="JSON or @FILE: laid over the arguments of the steps; or the mended event."),
    ] = None,
    rate: Annotated[str | None, typer.Option(help="How many a second at most, as 10/s.")] = None,
    canary: Annotated[
        int, typer.Option(min=0, help="Send that many steps first, and the rest only if these succeed.")
    ] = 0,
    timeout: Annotated[str, typer.Option(help="How long to wait for a run that is going on.")] = "30s",
    yes: YesOption = False,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> int:
    """Send dead letters back: steps go on in their runs. Exit code 0 if all of them were sent and no canary failed."""
    from orchestrator.durations import parse_duration
    from orchestrator.operations import choose_letters, filter_of, parse_rate
    from orchestrator.redrive import Options, Redrive

    which = filter_of(workflow=workflow, step=step, reason=reason, fingerprint=fingerprint, since=since, run=run)
    try:
        timeout_s = parse_duration(timeout).total_seconds()
    except ValueError as exc:
        raise InputError(f"--timeout {exc}") from exc
    options = Options(
        mended=None if mended is None else read_json("--input", mended),
        rate=parse_rate(rate),
        canary=canary,
        timeout_s=timeout_s,
    )
    with engine_of(settings_of(project, data_dir)) as engine:
        letters = _letters_of(engine)
        chosen = choose_letters(letters, ids or (), which, everything=everything)
        if not chosen:
            print("no dead letter matches", file=sys.stderr)
        if not ids and chosen and sys.stdin.isatty() and not yes:
            typer.confirm(f"redrive {len(chosen)} dead letter(s)?", abort=True, err=True)
        work = Redrive(engine, letters, options, say=lambda line: print(line, file=sys.stderr))
        summary = work.run(chosen)
    if as_json:
        print_json(summary.to_json())
        return 0 if summary.worked else 1
    for letter, why in summary.skipped.items():
        print(f"skipped {letter}: {why}")
    if summary.stopped:
        print(f"stopped: {summary.stopped}", file=sys.stderr)
    canaries = f" ({len(summary.succeeded)} canaries succeeded)" if canary else ""
    print(f"sent {len(summary.sent)}{canaries}, skipped {len(summary.skipped)}, left {len(summary.left)}")
    return 0 if summary.worked else 1


@app.command()
def discard(
    ids: IdsArgument = None,
    workflow: WorkflowOption = None,
    step: StepOption = None,
    reason: ReasonOption = None,
    fingerprint: FingerprintOption = None,
    since: SinceOption = None,
    run: RunOption = None,
    everything: AllOption = False,
    yes: YesOption = False,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> int:
    """Drop dead letters, with the bytes of messages; runs stay as they are. Asks first."""
    from orchestrator.operations import choose_letters, filter_of

    which = filter_of(workflow=workflow, step=step, reason=reason, fingerprint=fingerprint, since=since, run=run)
    with engine_of(settings_of(project, data_dir)) as engine:
        letters = _letters_of(engine)
        chosen = [one.id for one in choose_letters(letters, ids or (), which, everything=everything)]
        if chosen and not yes:
            if not sys.stdin.isatty():
                raise InputError(
                    f"this discards {len(chosen)} dead letter(s), and nobody is there to be asked; add --yes"
                )
            typer.confirm(f"discard {len(chosen)} dead letter(s)?", abort=True, err=True)
        count = letters.discard(chosen)
    if as_json:
        print_json({"discarded": count})
    else:
        print(f"discarded {count}")
    return 0
