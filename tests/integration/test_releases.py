"""The version handshake: who is of another version than the dispatcher does not start."""

from __future__ import annotations

import subprocess

import pytest

from orchestrator.engine import Engine
from orchestrator.errors import OrchestratorError
from orchestrator.ledger import keys
from orchestrator.releases import announce_release, check_release, release
from orchestrator.settings import Settings
from tests.conftest import command, on_servers


def test_who_is_of_the_version_in_force_starts(engine: Engine) -> None:
    check_release(engine.ledger, "worker")  # nobody has said anything
    announce_release(engine.ledger)
    check_release(engine.ledger, "worker")


def test_a_ledger_that_is_away_says_nothing_against_anybody(settings: Settings) -> None:
    away = Engine(settings.evolve(ledger_url="redis://127.0.0.1:1/0"), patience_s=0.0)
    check_release(away.ledger, "worker")
    away.close()


@pytest.mark.parametrize("role", ["worker", "gateway", "trigger", "beat"])
def test_another_version_is_refused_with_both_named(settings: Settings, engine: Engine, role: str) -> None:
    engine.ledger.client.set(keys.VERSION, "99.1.2")
    with pytest.raises(OrchestratorError, match=r"99\.1\.2"):
        check_release(engine.ledger, role)
    done = subprocess.run(
        [*command(role), "--project", str(settings.project)],
        env=on_servers(settings), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        f"error: this {role} is of version {release()}, and its dispatcher of version 99.1.2; "
        "deploy one version everywhere, the dispatcher first"
    )
