"""How a webhook's delivery shows who sent it: the schemes of known senders, and HMAC in general.

Signatures are over the body as it came, compared in constant time, with every secret in force, of which several may be
while one is replaced. Where the time is signed, a delivery counts only within a window around now, both ways. Why one
was refused is for our log alone.

| scheme   | sender's headers                                     | signed                  | delivery id       |
|----------|------------------------------------------------------|-------------------------|-------------------|
| github   | X-Hub-Signature-256                                  | body                    | X-GitHub-Delivery |
| gitlab   | X-Gitlab-Token, or as standard (`whsec_` secrets)    | nothing, or as standard | Idempotency-Key   |
| stripe   | Stripe-Signature                                     | time, body              | `id` of the body  |
| slack    | X-Slack-Signature, X-Slack-Request-Timestamp         | version, time, body     | `event_id`        |
| standard | webhook-id, webhook-timestamp, webhook-signature     | id, time, body          | webhook-id        |
| hmac     | as configured                                        | as configured           | as configured     |
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from standardwebhooks import Webhook

from orchestrator.events import digest
from orchestrator.subscriptions import SIGNING_PREFIX, Verification
from triggers.delivery import NotJsonError, read_json

_SECONDS = re.compile(r"[0-9]{1,11}\Z")
_MILLISECONDS = re.compile(r"[0-9]{12,14}\Z")
_PLACEHOLDER = re.compile(r"(\{body\}|\{timestamp\})")
_IDEMPOTENCY_KEY = "idempotency-key"


def refusal(
    how: Verification, secrets: Sequence[str], headers: Mapping[str, str], body: bytes, now_s: float
) -> str | None:
    """Say why a delivery is not its sender's; None if it is. `headers` have lower-case names; no secret: refused."""
    return _SCHEMES[how.scheme](how, secrets, headers, body, now_s)


def delivery_id(how: Verification | None, headers: Mapping[str, str], parsed: object, body: bytes) -> str | None:
    """Return what tells a delivery from others and stays the same when it is sent again; None if nothing does.

    `parsed` is the body's JSON, or None. Where the time is signed and there is no id, what was signed is the identity:
    else a delivery that somebody has overheard could be sent again within the window. For the same reason nothing that
    is not signed counts with senders who put their ids into the body: no other header, and not the content type.
    """
    found: object = None
    scheme = how.scheme if how is not None else None
    match scheme:
        case "github":
            found = headers.get("x-github-delivery")
        case "gitlab" | "standard":
            found = headers.get("webhook-id")
        case "stripe" | "slack":
            found = _member(body if parsed is None else parsed, "id" if scheme == "stripe" else "event_id")
        case "hmac" if how is not None and how.id_header:
            found = headers.get(how.id_header.lower())
    if not (isinstance(found, str) and found):
        found = headers.get(_IDEMPOTENCY_KEY) if scheme not in ("stripe", "slack") else None
    if not found and how is not None and (moment := _signed_time(how, headers)):
        found = digest(moment, body.hex())
    return found or None


def _member(body: object, name: str) -> object:
    """Return a member of a body, which is JSON whatever its sender called it; None if there is none."""
    try:
        value = read_json(body) if isinstance(body, bytes) else body
    except NotJsonError:
        return None
    return value.get(name) if isinstance(value, Mapping) else None


def signs_time(how: Verification) -> bool:
    """Tell whether deliveries are signed with their time, so that those which were overheard soon count no more."""
    return how.scheme in ("stripe", "slack", "standard") or how.timestamp_header is not None


def _signed_time(how: Verification, headers: Mapping[str, str]) -> str | None:
    """Return the time that a delivery is signed with, as it was sent."""
    if how.scheme == "stripe":
        return dict(_pairs(headers.get("stripe-signature", ""))).get("t")
    if how.scheme == "slack":
        return headers.get("x-slack-request-timestamp")
    return headers.get(how.timestamp_header.lower()) if how.timestamp_header else None


def secret_headers(how: Verification | None) -> frozenset[str]:
    """Return the names of the headers that hold a secret as such, and are for nobody to see."""
    return _CREDENTIALS | ({"x-gitlab-token"} if how is not None and how.scheme == "gitlab" else set())


_CREDENTIALS = frozenset({"authorization", "proxy-authorization", "cookie"})


# The schemes


def _github(
    how: Verification, secrets: Sequence[str], headers: Mapping[str, str], body: bytes, now_s: float
) -> str | None:
    given = headers.get("x-hub-signature-256", "")
    return _unless(_fits(["sha256=" + _hex(secret, body) for secret in secrets], [given]))


def _gitlab(
    how: Verification, secrets: Sequence[str], headers: Mapping[str, str], body: bytes, now_s: float
) -> str | None:
    token = headers.get("x-gitlab-token", "")
    tokens = [secret for secret in secrets if not secret.startswith(SIGNING_PREFIX)]
    if _fits(tokens, [token]):
        return None
    signing = [secret for secret in secrets if secret.startswith(SIGNING_PREFIX)]
    return _standard(how, signing, headers, body, now_s) if signing else "its token is none of the secrets"


def _stripe(
    how: Verification, secrets: Sequence[str], headers: Mapping[str, str], body: bytes, now_s: float
) -> str | None:
    pairs = _pairs(headers.get("stripe-signature", ""))
    times = [value for name, value in pairs if name == "t"]
    if len(times) != 1 or not _SECONDS.match(times[0]):
        return "it has no time"
    given = [value for name, value in pairs if name == "v1"]
    signed = times[0].encode() + b"." + body
    expected = [_hex(secret, signed) for secret in secrets]
    return _unless(_fits(expected, given)) or _outside(how, times[0], now_s)


def _slack(
    how: Verification, secrets: Sequence[str], headers: Mapping[str, str], body: bytes, now_s: float
) -> str | None:
    moment = headers.get("x-slack-request-timestamp", "")
    if not _SECONDS.match(moment):
        return "it has no time"
    given = headers.get("x-slack-signature", "")
    signed = b"v0:" + moment.encode() + b":" + body
    genuine = _fits(["v0=" + _hex(secret, signed) for secret in secrets], [given])
    return _unless(genuine) or _outside(how, moment, now_s)


def _standard(
    how: Verification, secrets: Sequence[str], headers: Mapping[str, str], body: bytes, now_s: float
) -> str | None:
    sent, moment = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not sent or not _SECONDS.match(moment):
        return "it has no id or no time"
    try:
        text, about = body.decode(), datetime.fromtimestamp(int(moment), UTC)
    except (ValueError, OverflowError, OSError):
        return "its body is not UTF-8, or its time is none"
    given = headers.get("webhook-signature", "").split()
    # The library's `verify` has the time of day and its own window built in; its `sign` is what defines the signature.
    expected = [Webhook(secret).sign(sent, about, text) for secret in secrets]
    return _unless(_fits(expected, given)) or _outside(how, moment, now_s)


def _hmac(
    how: Verification, secrets: Sequence[str], headers: Mapping[str, str], body: bytes, now_s: float
) -> str | None:
    moment = ""
    if how.timestamp_header:
        moment = headers.get(how.timestamp_header.lower(), "")
        if _time_of(moment) is None:
            return "it has no time"
    parts = {"{body}": body, "{timestamp}": moment.encode("latin-1", "replace")}
    signed = b"".join(parts.get(part, part.encode()) for part in _PLACEHOLDER.split(how.payload))
    given = [
        value.removeprefix(how.prefix)
        for value in re.split(r"[,\s]+", headers.get(how.header.lower(), ""))
        if value and value.startswith(how.prefix)
    ]
    digests = [hmac.digest(secret.encode(), signed, how.algorithm) for secret in secrets]
    if how.encoding == "hex":
        genuine = _fits([one.hex() for one in digests], [value.lower() for value in given])
    else:
        encoded = [base64.b64encode(one).decode().rstrip("=") for one in digests]
        genuine = _fits(encoded, [value.rstrip("=") for value in given])
    return _unless(genuine) or (_outside(how, moment, now_s) if how.timestamp_header else None)


_Scheme = Callable[[Verification, Sequence[str], Mapping[str, str], bytes, float], str | None]
_SCHEMES: Mapping[str, _Scheme] = {
    "github": _github, "gitlab": _gitlab, "stripe": _stripe, "slack": _slack, "standard": _standard, "hmac": _hmac,
}  # fmt: skip


def _unless(is_genuine: bool) -> str | None:  # noqa: FBT001 -- a private word of this module
    return None if is_genuine else "its signature fits none of the secrets"


def _hex(secret: str, signed: bytes) -> str:
    return hmac.digest(secret.encode(), signed, "sha256").hex()


def _fits(expected: Sequence[str], given: Sequence[str]) -> bool:
    """Tell whether any of those given is any of those expected, in a time that does not say which or how nearly."""
    found = False
    for one in expected:
        for value in given:
            found |= hmac.compare_digest(one.encode(), value.encode("utf-8", "replace"))
    return found


def _pairs(header: str) -> list[tuple[str, str]]:
    return [(name.strip(), value.strip()) for name, _, value in (part.partition("=") for part in header.split(","))]


def _time_of(text: str) -> float | None:
    """Return a time as seconds since the epoch: in seconds, in milliseconds, or RFC 3339."""
    if _SECONDS.match(text):
        return int(text)
    if _MILLISECONDS.match(text):
        return int(text) / 1000
    try:
        moment = datetime.fromisoformat(text)
        return moment.timestamp() if moment.tzinfo is not None else None
    except (ValueError, OverflowError):
        return None


def _outside(how: Verification, moment: str, now_s: float) -> str | None:
    found = _time_of(moment)
    if found is None or abs(now_s - found) > how.tolerance_s:
        return f"its time is more than {how.tolerance_s:g} s away"
    return None
