"""Where a command finds its project, settings and servers."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.embedded import EmbeddedServer
from orchestrator.errors import InputError, UnavailableError
from orchestrator.modules import python_command
from orchestrator.pools import DEFAULT_POOL
from orchestrator.project import Project, find_project, load_in_subprocess
from orchestrator.settings import FILE_NAME, Settings

ProjectOption = Annotated[
    Path | None, typer.Option("--project", help="The project's directory; else the nearest one upwards.")
]
DataDirOption = Annotated[Path | None, typer.Option("--data-dir", help="Where state is kept (default: .orchestrator).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, help="How many at most.")]
AfterOption = Annotated[str | None, typer.Option("--after", help="The cursor `next` of the page before.")]


def settings_of(project: Path | None, data_dir: Path | None = None, **flags: Any) -> Settings:
    """Return the settings of the project that was named, else of the nearest one upwards."""
    root = project.resolve() if project is not None else find_project(Path.cwd())
    if not root.is_dir():
        raise UnavailableError(f"{root} is not a directory; give the project's directory with --project")
    return Settings.load(root, data_dir=data_dir.absolute() if data_dir else None, **flags)


def cli_command(*arguments: str) -> list[str]:
    """Return the command that runs `orchestrator ...` in a new process."""
    return python_command("from orchestrator.cli import main; main()", *arguments)


def load(settings: Settings, *, with_secrets: bool = True) -> Project:
    """Load the definitions of a project, in a process of their own; `with_secrets`: are those of webhooks there?"""
    secrets = settings.secrets if with_secrets else None
    return load_in_subprocess(
        settings.project, pools=settings.declared_pools, defaults=settings.defaults, secrets=secrets
    )


def used_pools(project: Project) -> set[str]:
    """Return the pools of the steps of a project."""
    from orchestrator.plan import Plan

    return {pool for workflow in project.workflows.values() for pool in Plan.of(workflow).pools}


def warnings_of(settings: Settings, project: Project) -> list[str]:
    """Say what is no fault of a project, and hardly intended."""
    unused = sorted(set(settings.pools) - used_pools(project) - {DEFAULT_POOL}) if project.workflows else []
    return [f"{FILE_NAME}: pools.{pool}: no step uses it" for pool in unused]


def for_role(role: str, project: Path | None, data_dir: Path | None, **flags: Any) -> Settings:
    """Return the settings of a process of its own, whose servers are there and whose version is the one in force."""
    from orchestrator.ledger import Ledger
    from orchestrator.ledger.ledger import connect
    from orchestrator.releases import check_release

    settings = with_servers(settings_of(project, data_dir, **flags))
    ledger = Ledger(connect(settings.ledger_url))
    try:
        check_release(ledger, role)
    finally:
        ledger.client.close()
    return settings


def with_servers(settings: Settings) -> Settings:
    """Fill in the URLs of the embedded server of a data directory, where no others are set.

    Raises UnavailableError if there never was one.
    """
    if not settings.is_embedded:
        return settings
    url = EmbeddedServer.url_of(settings.data_dir)
    if url is None:
        raise UnavailableError(
            f"nothing has been started in {settings.data_dir}; run `orchestrator up --project {settings.project}`, "
            "or set broker_url"
        )
    return settings.evolve(broker_url=url, ledger_url=url)


@contextmanager
def engine_of(settings: Settings) -> Any:
    """Give an Engine on servers that answer; raises UnavailableError, in one line, if they do not."""
    from orchestrator.engine import Engine

    connected = with_servers(settings)
    engine = Engine(connected, patience_s=0.0)
    if not engine.ledger.is_up():
        where = connected.ledger_url.rpartition("@")[2].removeprefix("redis://")
        hint = (
            f"run `orchestrator up --project {settings.project}`"
            if settings.is_embedded
            else "start it, or set ledger_url"
        )
        raise UnavailableError(f"the ledger at redis://{where} does not answer; {hint}")
    try:
        yield engine
    finally:
        engine.close()


def read_json(option: str, text: str) -> Any:
    """Return the value of an option that is JSON or @FILE. Raises InputError, also for what no event can carry."""
    try:
        value = json.loads(Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text)
        # Python reads more than JSON says: NaN, numbers beyond all bounds, halves of surrogate pairs.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except OSError as exc:
        raise InputError(f"{option} {text}: {exc.strerror}") from exc
    except UnicodeEncodeError as exc:
        raise InputError(f"{option} is not JSON: it holds text that is not Unicode (a lone surrogate)") from exc
    except ValueError as exc:
        raise InputError(f"{option} is not JSON: {exc}") from exc
    except RecursionError as exc:
        raise InputError(f"{option} is nested too deeply") from exc
    return value
