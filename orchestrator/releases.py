"""The version handshake: all processes on one ledger are of one version, which is that of the dispatcher.

What travels between them (plans, records, messages) is theirs alone and changes with versions; a worker image of
another one would fail steps, or worse, run them wrongly. So it does not start.
"""

from __future__ import annotations

from importlib.metadata import version

from orchestrator.errors import OrchestratorError, UnavailableError
from orchestrator.ledger import Ledger, keys


def release() -> str:
    """Return the version of this installation."""
    return version("orchestrator")


def announce_release(ledger: Ledger) -> None:
    """Put the version of this installation in force; the dispatcher does. Raises UnavailableError."""
    ledger.guard(lambda: ledger.client.set(keys.VERSION, release()))


def check_release(ledger: Ledger, role: str) -> None:
    """Raise OrchestratorError, which names both versions, if another one than ours is in force.

    A ledger that is away says nothing against us: the role waits for it by itself.
    """
    try:
        in_force = ledger.guard(lambda: ledger.client.get(keys.VERSION))
    except UnavailableError:
        return
    if in_force is not None and in_force != release():
        raise OrchestratorError(
            f"this {role} is of version {release()}, and its dispatcher of version {in_force}; "
            "deploy one version everywhere, the dispatcher first"
        )
