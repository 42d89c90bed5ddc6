"""Reports: tells Sentry of the steps that will not be tried again.

What is reported is a dead letter, never an attempt that is retried. It is on a list in the ledger (written by whoever
made it a dead letter) until Sentry has taken it, and each episode of it is one event in Sentry, however often it is
sent: so neither a kill nor a Sentry that is away loses or doubles one.

An event is made of named fields alone: no inputs, no outputs, no local variables, nothing of the environment.
"""

from __future__ import annotations

import gzip
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

import sentry_sdk
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport

from orchestrator.engine import Engine
from orchestrator.errors import NotFoundError
from orchestrator.events import digest
from orchestrator.leading import LeadingService
from orchestrator.ledger import keys
from orchestrator.telemetry import Outage, get_logger

log = get_logger(__name__)

#: How long Sentry may take for one event.
TIMEOUT_S = 5.0
#: A Sentry that is away or refuses is left alone for this long: the first time, doubled each time, the longest.
_PAUSES_S = (5.0, 300.0)
#: Answers that are about the event: sent again, it would be refused again.
_REFUSALS = (400, 413, 414, 422)

_PERIOD_S = 1.0
_CHARACTERS = 2_000
_BREADCRUMBS = 50
#: Of a URL: user and password, and parameters by whose name they are secret.
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@:]*(?::[^\s@]*)?@")
_PARAMETERS = re.compile(r"(?i)([?&][\w.-]*(?:token|key|secret|passw|sig|auth|cred)[\w.-]*=)[^&\s'\"]+")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET, whose answer says nothing about the event."""

    def redirect_request(self, *_: object) -> None:
        return None


class _Transport(Transport):
    """Sends at once, and tells what came of it. (Sentry's own queues, and does not tell.)"""

    def __init__(self, dsn: str) -> None:
        super().__init__({"dsn": dsn})
        self._opener = urllib.request.build_opener(_NoRedirects)
        self.status = 0
        self.retry_after_s = 0.0

    def capture_envelope(self, envelope: Envelope) -> None:
        """Send it; `status` and `retry_after_s` tell the answer. Raises OSError or HTTPException if there is none."""
        assert self.parsed_dsn is not None
        auth = self.parsed_dsn.to_auth(f"orchestrator/{sentry_sdk.VERSION}")
        request = urllib.request.Request(  # noqa: S310 -- a DSN is http or https (settings.py)
            auth.get_api_url(),
            data=gzip.compress(envelope.serialize()),
            headers={
                "Content-Type": "application/x-sentry-envelope",
                "Content-Encoding": "gzip",
                "User-Agent": str(auth.client),
                "X-Sentry-Auth": auth.to_header(),
            },
        )
        self.status, self.retry_after_s = 0, 0.0
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as response:
                self.status = response.status
        except HTTPError as exc:
            with exc:
                self.status = exc.code
                after = exc.headers.get("Retry-After") or ""
                self.retry_after_s = float(after) if after.isdigit() else 0.0


class Reporter:
    """Reports dead letters to the Sentry of a DSN, one at a time. Not safe to share between threads."""

    def __init__(self, dsn: str, *, release: str = "", environment: str = "") -> None:
        self._dsn = dsn
        self._release = release
        self._environment = environment
        self._transport: _Transport | None = None
        self._client: sentry_sdk.Client | None = None
        self._sending: threading.Thread | None = None
        self._outage = Outage(log, "sentry")
        self._pause_s = _PAUSES_S[0]
        self._again_at = 0.0

    def report(self, letter: Mapping[str, Any]) -> bool:
        """Report a dead letter; True when Sentry has it, or has refused it for good, which is logged.

        False: it is to be reported again later. Takes at most TIMEOUT_S, and no time at all while Sentry is left alone
        because it was away. Never raises. A repeat is the same event in Sentry.
        """
        if time.monotonic() < self._again_at or (self._sending is not None and self._sending.is_alive()):
            return False
        try:
            event = event_of(letter)
        except Exception:  # a letter that no event can be made of must not keep the others back
            log.exception("letter_not_reported", letter=str(letter.get("id")))
            return True
        failure = self._send(event)
        transport = self._transport
        if failure or transport is None:
            retry_after_s = 0.0 if transport is None else min(transport.retry_after_s, _PAUSES_S[1])
            self._again_at = time.monotonic() + max(self._pause_s, retry_after_s)
            self._pause_s = min(self._pause_s * 2, _PAUSES_S[1])
            self._outage.begins(failure)
            return False
        self._pause_s = _PAUSES_S[0]
        self._outage.ends()
        if transport.status in _REFUSALS:
            log.error("letter_not_reported", letter=letter.get("id"), status=transport.status)
        return True

    def close(self) -> None:
        """Let go of what reporting needs. Idempotent; reporting afterwards is fine."""
        if self._client is not None:
            self._client.close(timeout=0)
        self._client = self._transport = None

    def _send(self, event: Any) -> str:
        """Send an event and return why Sentry does not have it; empty if it has, or has refused it for good."""
        failures: list[str] = []

        def send() -> None:
            try:
                if self._client is None:
                    self._client = self._connect()
                self._client.capture_event(event)
            except (OSError, HTTPException) as exc:
                failures.append(_cut(f"{type(exc).__name__}: {exc}"))
            except Exception as exc:  # whatever is wrong with it, dead letters are to be dealt with
                log.exception("report_failed")
                failures.append(type(exc).__name__)
            else:
                status = 0 if self._transport is None else self._transport.status
                is_answered = 200 <= status < 300 or status in _REFUSALS
                failures.append("" if is_answered else f"it answers with HTTP {status}")

        # A timeout of sockets bounds each read, and no look-up of a name: only a thread bounds the whole.
        self._sending = threading.Thread(target=send, name="report", daemon=True)
        self._sending.start()
        self._sending.join(TIMEOUT_S)
        return failures[0] if failures else f"no answer within {TIMEOUT_S:g} s"

    def _connect(self) -> sentry_sdk.Client:
        """Make a client of our own: nothing is installed in this process, and nothing is read from it or sent of it."""
        self._transport = _Transport(self._dsn)
        return sentry_sdk.Client(
            dsn=self._dsn,
            transport=self._transport,
            # Without these Sentry asks git, the environment and the host.
            release=self._release,
            environment=self._environment,
            server_name="",
            before_send=_without_empty,
            default_integrations=False,
            auto_enabling_integrations=False,
            auto_session_tracking=False,
            send_client_reports=False,
            enable_backpressure_handling=False,
            include_local_variables=False,
            include_source_context=False,
            max_request_body_size="never",
            spotlight=False,
            debug=False,
        )


def _without_empty(event: Any, _: object) -> Any:
    return {name: value for name, value in event.items() if value != ""}


def event_of(letter: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Sentry event of a dead letter: with the same id for the same letter and episode, and nothing secret.

    `letter` is what `dead-letters show` shows; what it does not have is left out.
    """
    error = letter.get("error") or {"type": letter.get("reason"), "message": letter.get("detail")}
    attempts = _attempts(letter)
    last = attempts[-1] if attempts else {}
    frames = [
        {"filename": file, "lineno": line, "function": function, "in_app": True}
        for file, line, function in error.get("frames") or (last.get("error") or {}).get("frames") or ()
    ]
    exception = {"type": error.get("type"), "value": error.get("message"), "stacktrace": {"frames": frames}}
    if not frames:
        del exception["stacktrace"]
    tags = {name: letter.get(name) for name in ("workflow", "run", "step", "event_id", "reason")}
    tags["pool"] = letter.get("pool") or _pool(letter.get("queue"))
    told = {name: letter.get(name) for name in ("id", "run", "index", "episode", "count", "losses", "first_at")}
    told |= {"attempts": len(attempts) or None, "code": last.get("code")}
    told["show"] = f"orchestrator dead-letters show {letter.get('id')}"
    event = {
        "event_id": digest("report", str(letter.get("id")), str(letter.get("episode")))[:32],
        "timestamp": _seconds(letter.get("last_at")),
        "level": "error",
        "fingerprint": [letter["fingerprint"]] if letter.get("fingerprint") else None,
        "exception": {"values": [exception]},
        "tags": _present(tags),
        "contexts": {"dead_letter": _present(told)},
        "breadcrumbs": {"values": _breadcrumbs(attempts, letter.get("loss_records") or ())},
        "server_name": last.get("worker"),
    }
    masked: dict[str, Any] = _masked(_present(event))
    return masked


def _attempts(letter: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    for name in ("attempt_records", "attempts"):
        found = letter.get(name)
        if isinstance(found, list):
            return found
    return ()


def _breadcrumbs(attempts: Sequence[Mapping[str, Any]], losses: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    crumbs: list[dict[str, Any]] = []

    def add(category: str, at: object, said: object, about: Mapping[str, object]) -> None:
        crumb = {"category": category, "level": "error", "timestamp": _seconds(at), "message": said}
        crumbs.append(_present(crumb | {"data": _present(about)}))

    for number, attempt in enumerate(attempts, 1):
        error = attempt.get("error") or {}
        said = f"{error.get('type')}: {error.get('message')}" if error else attempt.get("state")
        about = {"attempt": attempt.get("attempt", number), "worker": attempt.get("worker")}
        at = attempt.get("finished_at") or attempt.get("started_at")
        add("attempt", at, said, about)
    for loss in losses:
        add("loss", loss.get("at"), loss.get("reason"), {"worker": loss.get("worker")})
    return sorted(crumbs, key=lambda crumb: float(crumb.get("timestamp", 0)))[-_BREADCRUMBS:]


def _seconds(at: object) -> float | None:
    """Return a time, ms since the epoch or RFC 3339, as Sentry takes it."""
    if isinstance(at, int | float):
        return at / 1000
    return datetime.fromisoformat(str(at)).timestamp() if at else None


def _pool(queue: object) -> str | None:
    """Return the pool whose queue this is: `orchestrator.POOL.normal`."""
    parts = str(queue or "").split(".")
    return parts[1] if len(parts) == 3 else None


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, "", [], {})}


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return _cut(value)
    if isinstance(value, dict):
        return {name: _masked(element) for name, element in value.items()}
    if isinstance(value, list):
        return [_masked(element) for element in value]
    return value


def _cut(text: str) -> str:
    text = _PARAMETERS.sub(r"\1***", _CREDENTIALS.sub("***@", text))
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}…"


def drain_unreported(
    client: Any, get_letter: Callable[[str], Mapping[str, Any] | None], reporter: Reporter, limit: int = 100
) -> int:
    """Report up to `limit` of the dead letters that are still to be reported, the oldest first; answers how many were.

    A letter leaves the list only when Sentry has it; what is not to be had any more, too. Stops at the first that
    Sentry does not take now. `get_letter` returns None for what there is no letter of. Raises what the client and
    `get_letter` raise; a kill at any point, or another that does the same, has at most one event sent again.
    """
    reported = 0
    for _ in range(min(limit, client.llen(keys.UNREPORTED))):
        letter_id = client.lindex(keys.UNREPORTED, 0)
        if letter_id is None:
            break
        letter = get_letter(letter_id)
        if letter is None and client.zscore(keys.DEAD_LETTERS, letter_id) is not None:
            # Whoever makes it a letter is about to write it, or was killed and does it again.
            client.lmove(keys.UNREPORTED, keys.UNREPORTED, "LEFT", "RIGHT")
            continue
        if letter is not None:
            if not reporter.report(letter):
                break
            reported += 1
        client.lrem(keys.UNREPORTED, 1, letter_id)
    return reported


class ReportLoop(LeadingService):
    """Reports dead letters to Sentry, which may take its time; of several processes one is at work."""

    role = "reporter"

    def __init__(self, engine: Engine, reporter: Reporter) -> None:
        super().__init__(engine)
        self._reporter = reporter

    def stop(self) -> None:
        super().stop()
        self._reporter.close()

    def turn(self) -> float:
        if not self.lead()[0]:
            return _PERIOD_S
        # One at a time: the lead is shorter than what a slow Sentry may take for many.
        reported = drain_unreported(self._engine.ledger.client, self._letter, self._reporter, limit=1)
        return 0.0 if reported else _PERIOD_S

    def _letter(self, letter: str) -> Mapping[str, Any] | None:
        letters = self._engine.dead_letters
        try:
            return letters.show(letters.get(letter))
        except NotFoundError:
            return None
