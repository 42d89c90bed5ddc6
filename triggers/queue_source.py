"""What the queue trigger asks of a broker; one module for each has what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

#: Messages that are taken at once.
BATCH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message that was taken. `id` is its own, the same when it comes again; `handle` is for its source alone.

    `headers` are JSON. `body` is as it was put in.
    """

    id: str
    body: bytes
    headers: Mapping[str, Any] = field(default_factory=dict)
    content_type: str = ""
    handle: Any = None


class Source(Protocol):
    """A connection to a queue. All but `close` raise what the broker's client does when something is wrong."""

    def take(self, wait_s: float) -> Sequence[Message]:
        """Return what is there, or nothing after `wait_s`. A message that is not settled comes again, to anybody."""

    def keep(self, messages: Sequence[Message]) -> None:
        """Keep messages from coming again for a while yet; blocks no longer than a round trip."""

    def settle(self, messages: Sequence[Message]) -> None:
        """Have messages never come again."""

    def close(self, messages: Sequence[Message] = ()) -> None:
        """End the connection, and let messages that were not settled come again soon. Never raises."""
