"""`orchestrator tokens`: who may use the API."""

from __future__ import annotations

import getpass
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.access import DataDirOption, JsonOption, ProjectOption, engine_of, settings_of
from orchestrator.cli.output import print_json, print_table
from orchestrator.errors import InputError, NotFoundError, OrchestratorError
from orchestrator.tokens import Scope, Tokens

app = typer.Typer(help="Make, list and revoke the bearer tokens of the API.", no_args_is_help=True)


@contextmanager
def _changing(engine: Any, action: str, name: str, **about: Any) -> Iterator[Tokens]:
    """Give the tokens for a change, which is put into the audit log."""
    from orchestrator.audit import Audit

    try:
        who = getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        who = "somebody"
    audit = Audit(engine.ledger)
    entry = {"who": f"command line ({who})", "address": "", "action": action, "target": name, "about": about}
    entry_id = audit.begin(entry | {"status": None}, time.time_ns() // 1_000_000)
    try:
        yield Tokens(engine.ledger)
    except OrchestratorError as exc:
        audit.complete(entry_id, entry | {"status": 404 if isinstance(exc, NotFoundError) else 422})
        raise
    audit.complete(entry_id, entry | {"status": 200})


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What the audit log calls who has it.")],
    scope: Annotated[Scope, typer.Option(help="read, run (and cancel, resume, emit), or admin.")] = Scope.READ,
    expires: Annotated[str | None, typer.Option(help="After how long it is worthless, as 90d.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Keep it in this file, which you alone can read; if a good one is there, leave it."),
    ] = None,
    project: ProjectOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token and print it; it is shown this once. From the first one on, the API asks for tokens.

    With --file it is made at most once: a token of that name that is not the one in the file is replaced.
    """
    from orchestrator.shapes import parse_timeout

    now_ms = time.time_ns() // 1_000_000
    try:
        expires_at = None if expires is None else now_ms + round(parse_timeout(expires) * 1000)
    except ValueError as exc:
        raise InputError(f"--expires {exc}") from exc
    with engine_of(settings_of(project, data_dir)) as engine:
        if file is not None and _is_kept(Tokens(engine.ledger), file, name, scope, now_ms):
            print(f"a good token {name} is in {file}")
            return
        if file is not None and any(one.name == name for one in Tokens(engine.ledger).list()):
            with _changing(engine, "revoke_token", name) as tokens:
                tokens.revoke(name)
        with _changing(engine, "create_token", name, scope=str(scope)) as tokens:
            token = tokens.create(name, scope, now_ms=now_ms, expires_at=expires_at)
            if file is not None:
                _keep(file, token)
    if file is not None:
        print(f"made token {name}; it is in {file}")
    elif as_json:
        print_json({"name": name, "scope": str(scope), "token": token})
    else:
        print(token)


def _is_kept(tokens: Tokens, file: Path, name: str, scope: Scope, now_ms: int) -> bool:
    """Tell whether the token in a file is good, and is the one that is asked for."""
    try:
        found = tokens.check(file.read_text().strip(), now_ms)[1]
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"--file {file} cannot be read: {exc}") from exc
    return found is not None and (found.name, found.scope) == (name, scope)


def _keep(file: Path, token: str) -> None:
    """Write a token to a file that its owner alone can read, whole or not at all."""
    draft = file.with_name(f"{file.name}.new")
    try:
        draft.unlink(missing_ok=True)
        draft.touch(mode=0o600)
        draft.write_text(f"{token}\n")
        draft.replace(file)
    except OSError as exc:
        raise InputError(
            f"--file {file} cannot be written: {exc.strerror}; when it can, try again: that makes another token"
        ) from exc


@app.command("list")
def list_(project: ProjectOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """List the tokens; not what they are."""
    with engine_of(settings_of(project, data_dir)) as engine:
        items = [token.to_json() for token in Tokens(engine.ledger).list()]
    if as_json:
        print_json({"items": items, "next": None})
        return
    columns = ["name", "scope", "created_at", "expires_at"]
    print_table(columns, [[one[column] for column in columns] for one in items])


@app.command()
def revoke(name: str, project: ProjectOption = None, data_dir: DataDirOption = None) -> None:
    """Make a token worthless, from now on."""
    with engine_of(settings_of(project, data_dir)) as engine:
        with _changing(engine, "revoke_token", name) as tokens:
            tokens.revoke(name)
            is_last = not tokens.list()
    print(f"revoked {name}")
    if is_last:
        print("that was the last one: on loopback the API is open to this machine again, elsewhere to nobody")
