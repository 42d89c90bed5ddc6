"""Webhook senders' signatures: the vectors of their own documentation, and everything that must be refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import Any

import pytest

from orchestrator.subscriptions import Verification
from triggers.verification import delivery_id, refusal, secret_headers

# https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries, "Testing the webhook payload"
GITHUB = {
    "how": Verification(scheme="github", secrets=("env:S",)),
    "secrets": ["It's a Secret to Everybody"],
    "headers": {
        "x-hub-signature-256": "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17",
        "x-github-delivery": "72d3162e-cc78-11e3-81ab-4c9367dc0958",
    },
    "body": b"Hello, World!",
    "now_s": 0.0,
}
# https://docs.slack.dev/authentication/verifying-requests-from-slack, "Validating a request"
SLACK = {
    "how": Verification(scheme="slack", secrets=("env:S",)),
    "secrets": ["8f742231b10e8888abcd99yyyzzz85a5"],
    "headers": {
        "x-slack-request-timestamp": "1531420618",
        "x-slack-signature": "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503",
    },
    "body": (
        b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V"
        b"&channel_name=foobar&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text="
        b"&response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN"
        b"&trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c"
    ),
    "now_s": 1531420618.0,
}
# https://github.com/standard-webhooks/standard-webhooks, libraries' reference vector
STANDARD = {
    "how": Verification(scheme="standard", secrets=("env:S",)),
    "secrets": ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
    "headers": {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    },
    "body": b'{"test": 2432232314}',
    "now_s": 1614265330.0,
}
# https://docs.stripe.com/webhooks#verify-manually: the scheme; Stripe publishes no secret with its example
_STRIPE_BODY = b'{"id": "evt_1MqqbKLt4dXK03v5qaIbiNCC", "object": "event"}'
STRIPE = {
    "how": Verification(scheme="stripe", secrets=("env:S",)),
    "secrets": ["whsec_test_secret"],
    "headers": {
        "stripe-signature": "t=1492774577,v1="
        + hmac.new(b"whsec_test_secret", b"1492774577." + _STRIPE_BODY, hashlib.sha256).hexdigest()
        + ",v0=6ffbb59b2300aae63f272406069a9788598b792a944a07aba816edb039989a39"
    },
    "body": _STRIPE_BODY,
    "now_s": 1492774577.0,
}
# https://docs.gitlab.com/user/project/integrations/webhooks/: a token as such, or a signing token as Standard Webhooks
GITLAB_TOKEN = {
    "how": Verification(scheme="gitlab", secrets=("env:S",)),
    "secrets": ["a-token"],
    "headers": {"x-gitlab-token": "a-token", "idempotency-key": "f5e5f430-f57b-4e6e-9fac-d9128cd7232f"},
    "body": b"{}",
    "now_s": 0.0,
}
GITLAB_SIGNED = STANDARD | {"how": Verification(scheme="gitlab", secrets=("env:S",))}
HMAC = {
    "how": Verification(
        scheme="hmac", secrets=("env:S",), header="X-Signature", algorithm="sha512", encoding="base64", prefix="v1=",
        timestamp_header="X-Time", payload="{timestamp}.{body}", id_header="X-Id",
    ),
    "secrets": ["s3cret"],
    "headers": {
        "x-time": "1700000000",
        "x-id": "42",
        "x-signature": "v0=zzz, v1="
        + base64.b64encode(hmac.new(b"s3cret", b"1700000000.{timestamp}{body}", hashlib.sha512).digest()).decode(),
    },
    "body": b"{timestamp}{body}",
    "now_s": 1700000000.0,
}  # fmt: skip
ALL: dict[str, dict[str, Any]] = {
    "github": GITHUB, "slack": SLACK, "standard": STANDARD, "stripe": STRIPE, "gitlab-token": GITLAB_TOKEN,
    "gitlab-signed": GITLAB_SIGNED, "hmac": HMAC,
}  # fmt: skip
TIMED = [name for name in ALL if name not in ("github", "gitlab-token")]


def _refusal(given: dict[str, Any], **changes: Any) -> str | None:
    given = given | changes
    return refusal(given["how"], given["secrets"], given["headers"], given["body"], given["now_s"])


@pytest.mark.parametrize("name", ALL)
def test_a_genuine_delivery_is_taken(name: str) -> None:
    assert _refusal(ALL[name]) is None


@pytest.mark.parametrize("name", ALL)
def test_several_secrets_may_be_in_force(name: str) -> None:
    """The old and the new one, in any order."""
    (secret,) = ALL[name]["secrets"]
    other = "whsec_" + base64.b64encode(b"other").decode()
    assert _refusal(ALL[name], secrets=[other, secret]) is None
    assert _refusal(ALL[name], secrets=[secret, other]) is None


@pytest.mark.parametrize("name", ALL)
def test_another_secret_or_none_is_refused(name: str) -> None:
    assert _refusal(ALL[name], secrets=["whsec_" + base64.b64encode(b"other").decode()])
    assert _refusal(ALL[name], secrets=[])


@pytest.mark.parametrize("name", [name for name in ALL if name != "gitlab-token"])
@pytest.mark.parametrize("body", [b"", b"\x00", b"\xff\xfe", b"other"])
def test_another_body_is_refused(name: str, body: bytes) -> None:
    assert _refusal(ALL[name], body=body)


@pytest.mark.parametrize("name", ALL)
def test_any_header_changed_or_missing_is_refused(name: str) -> None:
    """But for those that only identify."""
    headers = ALL[name]["headers"]
    for header in headers.keys() - {"x-github-delivery", "idempotency-key", "x-id"}:
        assert _refusal(ALL[name], headers={key: value for key, value in headers.items() if key != header}), header
        for value in ("", "x", "v1,", "v1", ",,,,", "t=1", "sha256=", "é\xff", "1" * 400, "-1", "1e9", "１２３", "nan"):
            assert _refusal(ALL[name], headers=headers | {header: value}), (header, value)


@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize("seconds", [-301, 301, 10**9, -(10**9)])
def test_a_delivery_outside_the_window_is_refused(name: str, seconds: float) -> None:
    reason = _refusal(ALL[name], now_s=ALL[name]["now_s"] + seconds)
    assert reason == "its time is more than 300 s away"


@pytest.mark.parametrize("name", TIMED)
def test_a_delivery_at_the_edge_of_the_window_is_taken(name: str) -> None:
    assert _refusal(ALL[name], now_s=ALL[name]["now_s"] + 300) is None
    assert _refusal(ALL[name], now_s=ALL[name]["now_s"] - 300) is None


def test_a_time_that_was_not_signed_does_not_help() -> None:
    """An overheard delivery cannot be given another time."""
    late = 1492774577 + 1000
    old = STRIPE["headers"]["stripe-signature"]
    for forged in (old.replace("t=1492774577", f"t={late}"), f"t={late},{old}", f"{old},t={late}"):
        assert _refusal(STRIPE, headers={"stripe-signature": forged}, now_s=float(late))
    assert _refusal(SLACK, headers=SLACK["headers"] | {"x-slack-request-timestamp": str(late)}, now_s=float(late))


def test_a_known_weaker_scheme_of_the_same_sender_does_not_do() -> None:
    sha1 = "sha1=" + hmac.new(b"It's a Secret to Everybody", b"Hello, World!", "sha1").hexdigest()
    assert _refusal(GITHUB, headers={"x-hub-signature": sha1})
    token = STANDARD["secrets"][0]
    assert _refusal(GITLAB_SIGNED, headers={"x-gitlab-token": token})
    v0 = STRIPE["headers"]["stripe-signature"].replace("v1=", "v0=")
    assert _refusal(STRIPE, headers={"stripe-signature": v0})
    assert _refusal(STANDARD, headers=STANDARD["headers"] | {"webhook-signature": "v1a,g0hM9SsE+OTPJTGt="})


@pytest.mark.parametrize("digest", ["sha1", "sha256", "sha384", "sha512"])
@pytest.mark.parametrize("prefix", ["", "x="])
def test_hmac_takes_hex_of_either_case(digest: str, prefix: str) -> None:
    how = Verification(scheme="hmac", secrets=(), header="X-Sig", algorithm=digest, prefix=prefix)
    signature = prefix + hmac.new(b"k", b"body", digest).hexdigest().upper()
    assert refusal(how, ["k"], {"x-sig": signature}, b"body", 0.0) is None
    assert refusal(how, ["k"], {"x-sig": f"other {signature}"}, b"body", 0.0) is None
    assert refusal(how, ["k"], {"x-sig": signature[:-1]}, b"body", 0.0)


@pytest.mark.parametrize("moment", ["1700000000", "1700000000000", "2023-11-14T22:13:20Z", "2023-11-14T23:13:20+01:00"])
def test_hmac_takes_times_in_the_usual_forms(moment: str) -> None:
    signature = base64.b64encode(hmac.new(b"s3cret", f"{moment}.b".encode(), "sha512").digest()).decode()
    headers = {"x-time": moment, "x-signature": f"v1={signature}"}
    assert _refusal(HMAC, headers=headers, body=b"b") is None
    assert _refusal(HMAC, headers=headers, body=b"b", now_s=1700000301.0)


@pytest.mark.parametrize(
    ("name", "parsed", "expected"),
    [
        ("github", None, "72d3162e-cc78-11e3-81ab-4c9367dc0958"),
        ("gitlab-token", None, "f5e5f430-f57b-4e6e-9fac-d9128cd7232f"),
        ("gitlab-signed", None, "msg_p5jXN8AQM9LWM0D4loKWxJek"),
        ("standard", None, "msg_p5jXN8AQM9LWM0D4loKWxJek"),
        ("stripe", {"id": "evt_1"}, "evt_1"),
        ("slack", {"event_id": "Ev123"}, "Ev123"),
        ("hmac", None, "42"),
    ],
)
def test_each_sender_has_its_own_delivery_id(name: str, parsed: object, expected: str) -> None:
    given = ALL[name]
    assert delivery_id(given["how"], given["headers"], parsed, given["body"]) == expected


def test_idempotency_key_is_for_senders_without_an_id_of_their_own() -> None:
    assert delivery_id(None, {"idempotency-key": "k"}, None, b"") == "k"
    assert delivery_id(None, {}, None, b"") is None
    assert delivery_id(None, {"idempotency-key": ""}, {"id": "x"}, b"") is None
    assert delivery_id(GITHUB["how"], {"x-github-delivery": "", "idempotency-key": "k"}, None, b"") == "k"


def test_what_was_signed_with_its_time_is_the_identity_where_there_is_no_id() -> None:
    """So an overheard delivery starts nothing a second time within the window."""
    how, headers, body = SLACK["how"], SLACK["headers"], SLACK["body"]
    first = delivery_id(how, headers, None, body)
    assert first == delivery_id(how, headers | {"x-other": "1"}, None, body)
    assert first != delivery_id(how, headers | {"x-slack-request-timestamp": "1531420619"}, None, body)
    assert first != delivery_id(how, headers, None, body + b"x")
    assert delivery_id(STRIPE["how"], STRIPE["headers"], {"id": 5}, b"x") is not None


def test_tokens_are_hidden_and_signatures_are_not() -> None:
    assert "x-gitlab-token" in secret_headers(GITLAB_TOKEN["how"])
    assert {"authorization", "cookie"} <= secret_headers(None)
    assert "x-hub-signature-256" not in secret_headers(GITHUB["how"])
