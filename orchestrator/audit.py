"""Audit log: who asked for which change by the API, when, and what came of it.

An entry is written before the change is made and completed after it: a process that is killed in between leaves one
without an outcome, and what cannot be written down is not done.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import NotFoundError
from orchestrator.ledger import Ledger, keys
from orchestrator.runs import rfc3339

#: So many entries are kept, the latest ones: about 30 MB.
MAXIMUM = 100_000


class Audit:
    """The audit log of a ledger. Every call raises UnavailableError if it is away."""

    def __init__(self, ledger: Ledger, *, maximum: int = MAXIMUM) -> None:
        self._client = ledger.client
        self._guard = ledger.guard
        self._maximum = maximum

    def begin(self, entry: Mapping[str, Any], now_ms: int) -> str:
        """Write down that a change was asked for (`who`, `action`, `target`, ...) and return the entry's id."""
        entry_id = f"{now_ms:013d}-{uuid.uuid4().hex[:12]}"

        with self._client.pipeline(transaction=True) as pipe:
            pipe.hset(keys.AUDIT_ENTRIES, entry_id, json.dumps({"at": now_ms, **entry}))
            pipe.zadd(keys.AUDIT, {entry_id: now_ms})
            pipe.zrange(keys.AUDIT, 0, -self._maximum - 1)
            old = self._guard(pipe.execute)[2]
        if old:
            with self._client.pipeline(transaction=True) as pipe:
                pipe.zrem(keys.AUDIT, *old)
                pipe.hdel(keys.AUDIT_ENTRIES, *old)
                self._guard(pipe.execute)
        return entry_id

    def complete(self, entry_id: str, entry: Mapping[str, Any]) -> None:
        """Write down what came of a change, in the place of what `begin` wrote."""
        at = int(entry_id.partition("-")[0])
        text = json.dumps({"at": at, **entry})
        self._guard(lambda: self._client.hset(keys.AUDIT_ENTRIES, entry_id, text))

    def list(self, *, limit: int = 50, after: str | None = None) -> tuple[list[dict[str, Any]], str | None]:
        """Return entries, newest first, and the cursor of the next page."""
        start = 0
        if after is not None:
            rank = self._guard(lambda: self._client.zrevrank(keys.AUDIT, after))
            if rank is None:
                raise NotFoundError(f"--after {after}: no such cursor; begin without it")
            start = int(rank) + 1
        ids = self._guard(lambda: self._client.zrange(keys.AUDIT, start, start + limit, desc=True))
        texts = self._guard(lambda: self._client.hmget(keys.AUDIT_ENTRIES, ids)) if ids else []
        found = [
            {"id": one} | json.loads(text) | {"at": rfc3339(json.loads(text)["at"])}
            for one, text in list(zip(ids, texts, strict=True))[:limit]
            if text
        ]
        return found, ids[limit - 1] if len(ids) > limit else None
