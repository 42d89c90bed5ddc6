"""What differs between brokers, beyond what kombu hides."""

from __future__ import annotations

from collections.abc import Iterable

import redis

from orchestrator.brokers.claims import Claims
from orchestrator.ledger.ledger import connect, unavailable
from orchestrator.settings import Settings


class Broker:
    """What the rescuer asks of a broker. This one looks after its messages itself and does not tell what is in work."""

    def tend(self) -> int:
        """Give back messages whose consumers are gone; answers how many. Raises UnavailableError."""
        return 0

    def empty(self, queues: Iterable[str]) -> set[str]:
        """Answer those of `queues` of which it is sure that no message waits or is in work. Raises UnavailableError."""
        return set()

    def close(self) -> None:
        """Close connections."""


class RedisBroker(Broker):
    """Redis, where claims run out although no worker may be there to notice."""

    def __init__(self, url: str) -> None:
        self._client = connect(url, decode_responses=False)
        self._claims = Claims(self._client)

    def tend(self) -> int:
        try:
            return self._claims.tend()
        except redis.RedisError as exc:
            raise unavailable(self._client, exc) from exc

    def empty(self, queues: Iterable[str]) -> set[str]:
        try:
            return self._claims.empty(queues)
        except redis.RedisError as exc:
            raise unavailable(self._client, exc) from exc

    def close(self) -> None:
        self._client.close()


def broker_of(settings: Settings) -> Broker:
    """Return the broker of `settings`; connects when asked something."""
    return RedisBroker(settings.broker_url) if settings.has_redis_broker else Broker()
