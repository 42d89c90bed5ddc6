"""The ledger: the record of runs in Redis, and the only place where run state is decided."""

from orchestrator.ledger.ledger import Answer, Ledger, Taken

__all__ = ["Answer", "Ledger", "Taken"]
