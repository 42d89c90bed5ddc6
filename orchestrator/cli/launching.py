"""Which command starts a worker, and which launcher does it."""

from __future__ import annotations

import os

from orchestrator.cli.access import cli_command
from orchestrator.cli.output import say
from orchestrator.errors import InputError, one_of
from orchestrator.settings import Settings
from workers.launchers import Launcher
from workers.launchers.none import NoLauncher
from workers.launchers.process import ProcessLauncher
from workers.machine import Machine

LAUNCHERS = ("none", "process")


def part_command(settings: Settings, *arguments: str) -> list[str]:
    """Return the command of a part of this process, which ends when this process is gone."""
    place = ("--project", str(settings.project), "--data-dir", str(settings.data_dir))
    return cli_command(*arguments, "--up-pid", str(os.getpid()), *place)


def process_launcher(settings: Settings) -> ProcessLauncher:
    """Return the launcher that has workers as processes of this machine, and parts of this process."""
    machine = Machine.look()

    return ProcessLauncher(
        lambda pool, words: part_command(settings, "worker", "--pool", pool, "--words-fd", str(words)),
        grace_s=settings.grace_s,
        say=say,
        most=lambda pool: machine.workers(settings.pool(pool)),
    )


def launcher_of(name: str, settings: Settings) -> Launcher:
    """Return a launcher by its name. Raises InputError."""
    if name not in LAUNCHERS:
        raise InputError(f"--launcher {one_of(LAUNCHERS, name)}")
    return process_launcher(settings) if name == "process" else NoLauncher()
