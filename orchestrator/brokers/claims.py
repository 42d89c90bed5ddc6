"""Message claims on a Redis broker: each verb is one atomic script (claims.lua) and one round trip.

Redis knows no acknowledgements. Whoever takes a message holds a *claim* on it, which it renews while the message is in
work; `tend`, which every consumer and the rescuer call, gives back what nobody has renewed in time. The server's clock
is the only clock.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from orchestrator.ledger import keys

#: How long a claim holds without being renewed, and how often consumers renew theirs and look for lost ones.
CLAIM_MS = 10_000
TEND_S = 1.0

#: Names of their own, because the format differs from that of kombu, which somebody may use on the same server.
UNACKED = "orchestrator.unacked"
UNACKED_INDEX = "orchestrator.unacked_index"
_RESTORED_AT_ONCE = 1000


@lru_cache(maxsize=1)
def _text() -> str:
    return resources.files("orchestrator.brokers").joinpath("claims.lua").read_text()


def bell(queue: str) -> str:
    """Return the list on which the consumers of a queue wait."""
    return f"{queue}.bell"


def ring(pipeline: Any, queue: str) -> None:
    """Add to a pipeline what wakes a consumer of a queue; a ring that is lost costs a second."""
    pipeline.lpush(bell(queue), "1")
    pipeline.ltrim(bell(queue), 0, 0)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that was taken. `tag` is of this delivery alone; `raw` is what was published."""

    tag: str
    queue: str
    raw: bytes


class Claims:
    """The claims of one consumer on the broker of `client` (redis-py, answers in bytes).

    No verb blocks but for the server. Raises redis.RedisError.
    """

    def __init__(self, client: Any) -> None:
        self._script = client.register_script(_text())
        self._consumer = uuid.uuid4().hex
        self._next = 0

    def _call(self, *argv: str | int | bytes) -> Any:
        return self._script(keys=[UNACKED, UNACKED_INDEX], args=argv)

    def fetch(self, queues: Sequence[str], limit: int) -> list[Delivery]:
        """Take up to `limit` messages, those of the first queue first."""
        number = self._next
        self._next += limit
        flat = self._call("fetch", CLAIM_MS, limit, self._consumer, number, *queues)
        return [
            Delivery(tag.decode(), queue.decode(), raw)
            for tag, queue, raw in zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        ]

    def ack(self, tag: str) -> None:
        """Forget a message; one that was given back meanwhile stays where it is."""
        self._call("ack", tag)

    def give_back(self, tag: str) -> bool:
        """Put a message back as the next of its queue; False if this delivery no longer holds it."""
        return bool(self._call("give_back", tag))

    def tend(self, tags: Iterable[str] = ()) -> int:
        """Renew the claims of `tags`, and give back whatever claim has run out; answers how many."""
        return int(self._call("tend", CLAIM_MS, _RESTORED_AT_ONCE, *tags))

    def set_aside(self, delivery: Delivery, detail: str, now_ms: int) -> None:
        """Keep a message whose envelope cannot be read, with its bytes and why, where nobody fetches it."""
        record = keys.set_aside_record(delivery.raw, "envelope", now_ms, detail=detail, queue=delivery.queue)
        self._call("set_aside", delivery.tag, keys.SET_ASIDE, record)

    def empty(self, queues: Iterable[str]) -> set[str]:
        """Answer those of `queues` of which no message waits and none is in work."""
        names = list(queues)
        tags, lengths = self._call("held", *names)
        in_work = {tag.decode().rpartition("|")[0] for tag in tags}
        return {name for name, length in zip(names, lengths, strict=True) if not length and name not in in_work}


def parse(raw: bytes) -> dict[str, Any]:
    """Return the envelope of a message. Raises ValueError, which says what is wrong with it."""
    try:
        envelope = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"its envelope is not JSON ({type(exc).__name__})") from exc
    if not isinstance(envelope, dict) or not isinstance(envelope.get("properties"), dict):
        raise ValueError("its envelope has no properties")
    return envelope
