"""Bearer tokens of the API: who may read, start runs, or do anything; kept as digests, never as themselves.

A token is `orc.NAME.SECRET` with 256 random bits, which its SHA-256 protects well enough; it is shown once, when it is
made. Its name is how the audit log calls who holds it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Container, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from typing import Any

from orchestrator.errors import InputError, NotFoundError, SettingsError
from orchestrator.ledger import Ledger, keys
from orchestrator.runs import rfc3339
from orchestrator.settings import Settings

PREFIX = "orc"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,50}\Z")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::\d{1,5})?\Z", re.ASCII)
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
_SECRET_BYTES = 32
_LONGEST = 200


class Scope(StrEnum):
    """What a token allows; each allows what stands before it, too."""

    READ = "read"
    RUN = "run"
    ADMIN = "admin"

    def covers(self, wanted: Scope) -> bool:
        """Tell whether who has this scope may do what asks for that one."""
        order = list(Scope)
        return order.index(self) >= order.index(wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What is known of a token; `expires_at` is None if it lives until it is revoked. Times are ms."""

    name: str
    scope: Scope
    created_at: int
    expires_at: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "scope": str(self.scope),
            "created_at": rfc3339(self.created_at),
            "expires_at": rfc3339(self.expires_at),
        }


class Tokens:
    """The tokens of a ledger. Every call raises UnavailableError if it is away."""

    def __init__(self, ledger: Ledger) -> None:
        self._client = ledger.client
        self._guard = ledger.guard

    def create(self, name: str, scope: Scope, *, now_ms: int, expires_at: int | None = None) -> str:
        """Make a token and return it; it cannot be read again. Raises InputError for a name that is taken or odd."""
        if not _NAME.match(name):
            raise InputError(f"a token's name is of letters, digits, `_` and `-`, at most 50, and not {name!r}")
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        record = {"scope": scope, "digest": _digest(secret), "created_at": now_ms, "expires_at": expires_at}
        if not self._guard(lambda: self._client.hsetnx(keys.TOKENS, name, json.dumps(record))):
            raise InputError(f"there is a token {name!r}; revoke it first, or take another name")
        return f"{PREFIX}.{name}.{secret}"

    def list(self) -> list[Token]:
        """Return all tokens by name; those that have expired, too."""
        rows = self._guard(lambda: self._client.hgetall(keys.TOKENS))
        return [_token(name, json.loads(text)) for name, text in sorted(rows.items())]

    def revoke(self, name: str) -> None:
        """Make a token worthless from now on. Raises NotFoundError."""
        if not self._guard(lambda: self._client.hdel(keys.TOKENS, name)):
            raise NotFoundError(f"token {name!r} is not known; see `orchestrator tokens list`")

    def check(self, token: str, now_ms: int) -> tuple[bool, Token | None]:
        """Return whether there are any tokens, and what is known of this one; None if it is worthless.

        How long it takes says nothing of the secret.
        """
        name, secret = _parts(token)

        with self._client.pipeline(transaction=False) as pipe:
            pipe.hlen(keys.TOKENS)
            pipe.hget(keys.TOKENS, name)
            count, text = self._guard(pipe.execute)
        record: dict[str, Any] = json.loads(text) if text else {"digest": _digest(""), "expires_at": 0}
        is_right = hmac.compare_digest(record["digest"], _digest(secret))
        is_alive = record["expires_at"] is None or now_ms < record["expires_at"]
        return bool(count), _token(name, record) if text and is_right and is_alive else None


def _token(name: str, record: dict[str, Any]) -> Token:
    return Token(
        name=name, scope=Scope(record["scope"]), created_at=record["created_at"], expires_at=record["expires_at"]
    )


def _parts(token: str) -> tuple[str, str]:
    prefix, _, rest = token.partition(".")
    name, _, secret = rest.partition(".")
    is_one = len(token) <= _LONGEST and prefix == PREFIX and _NAME.match(name) and secret
    return (name, secret) if is_one else ("", "")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def is_loopback(host: str) -> bool:
    """Tell whether an address, or `localhost`, is this machine alone."""
    try:
        return host.lower() == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def stranger_of(hosts: Sequence[str], origins: Sequence[str], fetch_site: str, names: Container[str]) -> str:
    """Return by what a request to this machine alone shows that it is no such thing; empty if by nothing.

    `host`: it names another host (DNS rebinding); `proxy`: somebody forwards it; `site`: a page of another site asks.
    Given are its headers Host, Origin and Sec-Fetch-Site (`none` if it has none), and the names of all, in lower case.
    """
    named = _HOST.match(hosts[0]) if len(hosts) == 1 else None
    if named is None or not is_loopback(named[1]):
        return "host"
    if any(name in names for name in _FORWARDED):
        return "proxy"
    is_cross = any(origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}") for origin in origins)
    return "site" if is_cross or fetch_site not in ("none", "same-origin") else ""


def check_exposure(settings: Settings, tokens: Tokens) -> None:
    """Raise SettingsError if the gateway's address is for others, too, and no token keeps them out."""
    if not is_loopback(settings.host) and not tokens.list():
        raise SettingsError(
            f"host {settings.host} is not this machine alone, and there are no tokens: anybody could start runs; start "
            "it with host 127.0.0.1, make one with `orchestrator tokens create NAME --scope admin`, and start it again"
        )
