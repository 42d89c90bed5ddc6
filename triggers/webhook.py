"""Webhooks: deliveries to /hooks/{path} become events, and are answered once the bus has them.

    path, method, rate, size, encoding      404 405 429 413 415   before the body is read
    the body, in time                       408                   cli/http_server.py
    who sent it                             401                   verification.py; the same answer whatever the reason
    what it is                              400 422               delivery.py, json_schemas.py
    on the bus                              503, or 202           group_commit.py

The event's id is the sender's delivery id, so that a delivery which comes again is the same event and starts nothing,
whatever becomes of this process between the bus and the answer.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from orchestrator.asgi import Header, Message, Receive, Scope, Send, answer, problem, reply
from orchestrator.errors import InputError, OrchestratorError, UnavailableError
from orchestrator.events import Event
from orchestrator.json_schemas import checker
from orchestrator.payloads import Payloads
from orchestrator.runs import RunState, run_id
from orchestrator.subscriptions import OnWebhook
from orchestrator.telemetry import get_logger
from orchestrator.workflows import Workflow
from triggers.delivery import Delivery, cloud_events, joined, parsed, read_json, received
from triggers.group_commit import GroupCommit
from triggers.rotation import Secrets
from triggers.run_ends import RunEnds
from triggers.verification import delivery_id, refusal, secret_headers, signs_time

log = get_logger(__name__)

#: What the paths of webhooks begin with.
HOOKS = "/hooks/"
#: Senders that are known to send no CloudEvents: headers that claim otherwise are not theirs, and not signed.
_PLAIN_SENDERS = ("github", "gitlab", "stripe", "slack")
#: Bodies of all deliveries in work, together.
_BODY_BYTES = 256 * 1024 * 1024
#: What takes longer than others should wait is done in a thread.
_LARGE_BYTES = 64 * 1024
_LOOK_EVERY_S = 1.0
_COME_AGAIN: Header = (b"retry-after", b"5")
_REFUSALS_TOLD_EVERY_S = 10.0


class _AnswerError(Exception):
    """A delivery is answered with what is wrong."""

    def __init__(self, status: int, detail: str, *headers: Header) -> None:
        super().__init__(detail)
        self.messages = problem(status, detail, *headers)


class _Rate:
    """So many deliveries a second, and as many of one second at once; None: any number."""

    def __init__(self, rate: float | None, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._left = self._most = max(1.0, rate or 0.0)
        self._at = clock()

    def check(self, *, take: bool) -> None:
        """Raise _AnswerError unless one more is in order; `take` counts it."""
        if self._rate is None:
            return
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1.0:
            wait_s = math.ceil((1.0 - self._left) / self._rate)
            raise _AnswerError(429, f"more than {self._rate:g} a second", (b"retry-after", b"%d" % wait_s))
        if take:
            self._left -= 1.0


class _Hook:
    """One webhook of the definitions in force."""

    def __init__(
        self, workflow: str, on: OnWebhook, named: Mapping[str, str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.workflow = workflow
        self.on = on
        self.rate = _Rate(on.rate, clock)
        self.check = checker(on.schema) if on.schema is not None else None
        self.allowed: Header = (b"allow", ", ".join([*on.methods, "OPTIONS"]).encode())
        self._secrets = Secrets(on.verify.scheme, on.verify.secrets, named) if on.verify is not None else None
        self._refused = 0
        self._tell_at = 0.0
        self._clock = clock

    def verify(self, delivery: Delivery, now_s: float) -> None:
        """Raise _AnswerError unless the delivery is its sender's."""
        if self.on.verify is None or self._secrets is None:
            return
        secrets = self._secrets.current()
        if not secrets:
            raise _AnswerError(503, "deliveries cannot be verified at present", _COME_AGAIN)
        reason = refusal(self.on.verify, secrets, delivery.headers, delivery.body, now_s)
        if reason is not None:
            self._note(reason)
            raise _AnswerError(401, "the delivery could not be verified", (b"www-authenticate", b"Signature"))

    def _note(self, reason: str) -> None:
        self._refused += 1
        if self._clock() >= self._tell_at:
            log.warning("webhook_refused", path=self.on.path, reason=reason, deliveries=self._refused)
            self._refused = 0
            self._tell_at = self._clock() + _REFUSALS_TOLD_EVERY_S

    def challenge(self, value: object) -> str | None:
        """Return what a verified delivery asks to hear back, if it is one that does (Slack's url_verification)."""
        if self.on.verify is None or self.on.verify.scheme != "slack" or not isinstance(value, Mapping):
            return None
        found = value.get("challenge")
        return found if value.get("type") == "url_verification" and isinstance(found, str) else None

    def events(self, delivery: Delivery, value: object, moment: str) -> tuple[list[Event], bool]:
        """Return the events of a verified delivery, and whether their ids are the sender's. Raises _AnswerError."""
        on = self.on
        try:
            if delivery.is_cloud_event and (on.verify is None or on.verify.scheme not in _PLAIN_SENDERS):
                if delivery.is_binary and on.verify is not None and signs_time(on.verify):
                    raise InputError(
                        "attributes of a CloudEvent in headers (binary mode) are not signed; send it in structured mode"
                    )
                events = cloud_events(on.path, delivery, time=moment)
                self._check([event.data for event in events])
                return events, True
            if self.check is not None:
                self._check([read_json(delivery.body) if value is None else value])
            found = delivery_id(on.verify, delivery.headers, value, delivery.body)
            event = received(
                on.path, delivery, value, delivery_id=found or str(uuid.uuid4()), time=moment, raw=on.raw,
                hidden=secret_headers(on.verify),
            )  # fmt: skip
            return [event], found is not None
        except InputError as exc:
            raise _AnswerError(400, str(exc)) from exc
        except ValueError as exc:  # NotJsonError
            raise _AnswerError(400, f"the body is not JSON: {exc}") from exc

    def _check(self, values: Iterable[object]) -> None:
        for value in values if self.check is not None else ():
            assert self.check is not None
            reason = self.check(value)
            if reason is not None:
                raise _AnswerError(422, f"the body does not fit the schema: {reason}")


@dataclass(frozen=True, slots=True)
class _Taken:
    """A delivery that was read and verified."""

    events: Sequence[Event]
    is_identified: bool
    size: int
    challenge: str | None = None


class Hooks:
    """The application that takes deliveries. `apply`, `start` and `stop` are for another thread than it runs in."""

    def __init__(
        self,
        *,
        publish: Callable[[Sequence[Event]], None],
        known: Callable[[Sequence[Event]], list[bool]],
        ends: RunEnds,
        payloads: Payloads,
        secrets: Mapping[str, str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._commits = GroupCommit(publish, known)
        self._known = known
        self._ends = ends
        self._payloads = payloads
        self._named = secrets
        self._clock = clock
        self._hooks: Mapping[str, _Hook] = {}
        self._held = 0

    def apply(self, workflows: Iterable[Workflow]) -> None:
        """Put definitions in force for the deliveries that come from now on; what has not changed goes on as it was."""
        hooks: dict[str, _Hook] = {}
        for workflow in workflows:
            for on in workflow.on:
                if isinstance(on, OnWebhook):
                    old = self._hooks.get(on.path)
                    same = old is not None and old.on == on and old.workflow == workflow.name
                    hooks[on.path] = old if old is not None and same else _Hook(workflow.name, on, self._named)
        self._hooks = hooks

    def start(self) -> None:
        """Begin; returns at once."""
        self._commits.start()
        self._ends.start()

    def release(self) -> None:
        """Have deliveries that wait for runs answered without."""
        self._ends.release()

    def stop(self) -> None:
        """End; returns when what was taken is on the bus, or refused."""
        self._commits.stop()
        self._ends.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        try:
            messages = await self._respond(scope, receive)
        except _AnswerError as exc:
            messages = exc.messages
        except UnavailableError:  # the log says why, and strangers need not know what is where
            messages = problem(503, "the delivery cannot be stored at present; deliver it again", _COME_AGAIN)
        except asyncio.CancelledError:  # the server cannot wait any longer
            messages = problem(503, "the gateway stops; deliver it again", _COME_AGAIN)
        await reply(send, messages)

    async def _respond(self, scope: Scope, receive: Receive) -> tuple[Message, Message]:
        hook = self._hooks.get(scope["path"].removeprefix(HOOKS).rstrip("/"))
        if hook is None:
            raise _AnswerError(404, "there is no webhook at this address")
        headers = joined(scope["headers"])
        if scope["method"] == "OPTIONS":
            return _permission(hook, headers)
        if scope["method"] not in hook.on.methods:
            raise _AnswerError(405, f"this webhook takes {', '.join(hook.on.methods)}", hook.allowed)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise _AnswerError(415, "send the body as it is, not compressed", (b"accept-encoding", b"identity"))
        hook.rate.check(take=False)
        body = bytearray()
        try:
            await self._fill(body, hook.on.max_bytes, headers, receive)
            delivery = Delivery(method=scope["method"], query=scope["query_string"], headers=headers, body=bytes(body))
            is_long = len(body) > _LARGE_BYTES or hook.check is not None  # of some schemas a small body is enough
            taken = await asyncio.to_thread(self._read, hook, delivery) if is_long else self._read(hook, delivery)
            if taken.challenge is not None:
                return answer(200, taken.challenge.encode(), content_type=b"text/plain; charset=utf-8")
            hook.rate.check(take=True)
            if hook.on.respond == "sync" and len(taken.events) == 1:
                return await self._run(hook, taken, receive)
            return _accepted(taken, await self._commits.commit(taken.events, taken.size))
        finally:
            self._held -= len(body)

    async def _fill(self, body: bytearray, maximum: int, headers: Mapping[str, str], receive: Receive) -> None:
        """Read the body of a request, and count it as held. Raises _AnswerError."""
        length = headers.get("content-length", "")
        too_large = _AnswerError(413, f"the body is larger than {maximum} bytes")
        if length.isdigit() and int(length) > maximum:
            raise too_large
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _AnswerError(400, "the body is not whole")  # which nobody will read
            chunk = message.get("body", b"")
            if len(body) + len(chunk) > maximum:
                raise too_large
            if self._held + len(chunk) > _BODY_BYTES:
                raise _AnswerError(503, "too much is being delivered; deliver it again", _COME_AGAIN)
            self._held += len(chunk)
            body += chunk
            more = message.get("more_body", False)

    def _read(self, hook: _Hook, delivery: Delivery) -> _Taken:
        now_s = self._clock()
        hook.verify(delivery, now_s)
        value = parsed(delivery)
        challenge = hook.challenge(value)
        if challenge is not None:
            return _Taken([], False, 0, challenge)
        moment = datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return _Taken(*hook.events(delivery, value, moment), len(delivery.body))

    # Who waits for the run

    async def _run(self, hook: _Hook, taken: _Taken, receive: Receive) -> tuple[Message, Message]:
        (event,) = taken.events
        run = run_id(hook.workflow, event.source, event.id)
        with self._ends.expect(run) as ended:
            known = await self._commits.commit(taken.events, taken.size)
            until = asyncio.get_running_loop().time() + hook.on.timeout_s
            gone = asyncio.ensure_future(receive())
            either: set[asyncio.Future[Any]] = {ended, gone}
            try:
                if known[0]:
                    outcome = await asyncio.to_thread(self._outcome, run)
                    if outcome is not None:
                        return outcome
                while (left := until - asyncio.get_running_loop().time()) > 0:
                    await asyncio.wait(either, timeout=min(left, _LOOK_EVERY_S), return_when=asyncio.FIRST_COMPLETED)
                    if ended.done():  # or it has, and goes on again already
                        return await asyncio.to_thread(self._outcome, run) or _accepted(taken, known, run=run)
                    if gone.done() or (hook.on.pattern is not None and await self._starts_nothing(run, event)):
                        return _accepted(taken, known)
            except OrchestratorError:  # of the ledger: the delivery was accepted all the same
                pass
            finally:
                gone.cancel()
        return _accepted(taken, known, run=run)

    async def _starts_nothing(self, run: str, event: Event) -> bool:
        """Tell whether the event was dealt with and did not match."""

        def look() -> bool:
            return self._known([event])[0] and not self._ends.state(run)

        return await asyncio.to_thread(look)

    def _outcome(self, run: str) -> tuple[Message, Message] | None:
        """Return the answer that tells how a run ended; None if it has not."""
        state, output, error = self._ends.outcome(run)
        if not state or not RunState(state).is_end:
            return None
        body: dict[str, object] = {"run": run, "state": state}
        if state == RunState.SUCCEEDED:
            return answer(200, _json(body | {"output": self._payloads.unpack(output)}))
        if error:
            reason = json.loads(error)
            body["error"] = {"type": reason.get("type"), "message": reason.get("message")}
        return answer(502, _json(body), _address(run))


def _permission(hook: _Hook, headers: Mapping[str, str]) -> tuple[Message, Message]:
    """Answer who asks whether it may deliver (CloudEvents, HTTP 1.1 Web Hooks, "abuse protection")."""
    origin = headers.get("webhook-request-origin")
    if origin is None:
        return answer(200, b"", hook.allowed)
    rate = b"*" if hook.on.rate is None else b"%d" % max(1, int(hook.on.rate * 60))  # a minute
    asked = (b"webhook-allowed-rate", rate)
    return answer(
        200, b"", hook.allowed, (b"webhook-allowed-origin", origin.encode("latin-1")),
        *([asked] if "webhook-request-rate" in headers or hook.on.rate is not None else []),
    )  # fmt: skip


def _accepted(taken: _Taken, known: Sequence[bool], *, run: str | None = None) -> tuple[Message, Message]:
    items: list[dict[str, object]] = []
    for event, again in zip(taken.events, known, strict=True):
        duplicate = {"duplicate": True} if again and taken.is_identified else {}
        items.append({"id": event.id, "source": event.source, **duplicate})
    body: dict[str, object] = items[0] if len(items) == 1 else {"items": items}
    if run is None:
        return answer(202, _json(body))
    return answer(202, _json(body | {"run": run}), _address(run))


def _address(run: str) -> Header:
    return b"location", f"/api/v1/runs/{run}".encode()


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
