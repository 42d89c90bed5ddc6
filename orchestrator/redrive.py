"""Redrive: sends dead letters back, in a measured way: some first (the canaries), the rest if these succeed, at a rate.

A step goes on in its own run, which opens a new episode for it; an event goes on the bus again, a message on its queue.
It stops by itself when a canary fails, or when one of those that it has sent fails as it did before.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any

from kombu import Queue

from orchestrator.bus import EventBus
from orchestrator.celery_app import CONFIRM_TIMEOUT_S, broker_errors, publishing
from orchestrator.deadletters import DeadLetter, DeadLetters
from orchestrator.engine import Engine
from orchestrator.errors import InFlightError, InputError, NotFoundError, UnavailableError
from orchestrator.events import Event
from orchestrator.messages import fault_of, message_of
from orchestrator.resume import redrive as redrive_run
from orchestrator.runs import STEP_RUN_MOVES, StepRunState
from orchestrator.settings import mask_url

_POLL_S = 0.2
_ENDED = frozenset(str(state) for state in StepRunState if not STEP_RUN_MOVES[state])


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to redrive. `mended` replaces an event, or is laid over the arguments of steps; `rate` is letters a second, 0
    as fast as it goes; `canary` is how many go first; `timeout_s` is how long to wait for a run that is going on.
    """

    mended: Any = None
    rate: float = 0.0
    canary: int = 0
    timeout_s: float = 30.0


@dataclass(slots=True)
class Summary:
    """What came of a redrive, by ids of letters. `stopped` says why it did not go on; empty if it did.

    `succeeded` are canaries; `skipped` has why they were not sent; `left` were not tried.
    """

    sent: list[str] = field(default_factory=list)
    succeeded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    stopped: str = ""

    @property
    def worked(self) -> bool:
        """Whether all were sent."""
        return not (self.stopped or self.skipped or self.left)

    def to_json(self) -> dict[str, Any]:
        return {
            "sent": self.sent, "succeeded": self.succeeded, "skipped": self.skipped, "left": self.left,
            "stopped": self.stopped or None,
        }  # fmt: skip


#: Letters that go in one call: the steps of one run, or a single event or message.
_Batch = list[DeadLetter]


class Redrive:
    """One redrive; `run` does it."""

    def __init__(
        self,
        engine: Engine,
        letters: DeadLetters,
        options: Options,
        *,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._engine = engine
        self._letters = letters
        self._options = options
        self._say = say
        self._summary = Summary()
        self._sent: dict[str, DeadLetter] = {}
        self._next_at = 0.0
        #: From here on (ms) the list is looked at for letters that came back.
        self._watched_ms = 0

    def run(self, letters: Iterable[DeadLetter]) -> Summary:
        """Send these letters back; blocks until they are sent, the canaries have ended, or it was stopped.

        Raises InputError if what was asked for makes no sense for them, UnavailableError if a server is away.
        """
        chosen = list({letter.id: letter for letter in letters}.values())
        self._check(chosen)
        self._watched_ms = self._letters.now_ms()
        canaries = _canaries(chosen, self._options.canary)
        rest = [letter for letter in chosen if letter.id not in {one.id for one in canaries}]
        if canaries:
            self._send_all(canaries)
            self._await(canaries)
        if not self._summary.stopped:
            self._send_all(rest, paced=True)
        done = {*self._summary.sent, *self._summary.skipped}
        self._summary.left = [letter.id for letter in chosen if letter.id not in done]
        return self._summary

    def _check(self, chosen: Sequence[DeadLetter]) -> None:
        kinds = {letter.kind for letter in chosen}
        mended = self._options.mended
        if self._options.canary and kinds - {"step"}:
            raise InputError("--canary waits for steps; redrive messages and events without it")
        if mended is None:
            return
        if kinds == {"event"} and len(chosen) > 1:
            raise InputError(f"--input is one event, and there are {len(chosen)}; redrive them one by one")
        if kinds == {"step"}:
            if not isinstance(mended, dict):
                raise InputError("--input must be a JSON object, which is laid over the arguments of the step")
        elif kinds != {"event"}:
            raise InputError("--input mends steps or an event, not messages, and not several kinds at once")
        else:
            Event.from_json(mended)

    # Sending

    def _send_all(self, letters: Sequence[DeadLetter], *, paced: bool = False) -> None:
        """Send letters, those of one run together; a run that is going on is tried again after the others."""
        waiting: deque[tuple[float, _Batch]] = deque()
        for batch in _batches(letters):
            if paced and self._comes_back():
                return
            if paced:
                self._pace(len(batch))
            if not self._send(batch):
                waiting.append((time.monotonic() + self._options.timeout_s, batch))
        while waiting:
            until, batch = waiting.popleft()
            if paced and self._comes_back():
                return
            if self._send(batch):
                continue
            if time.monotonic() < until:
                waiting.append((until, batch))
                time.sleep(_POLL_S / len(waiting))
                continue
            why = f"run {batch[0].run} is going on; try again when it has ended, or give it longer with --timeout"
            self._skip(batch, why)

    def _pace(self, letters: int) -> None:
        if self._options.rate <= 0:
            return
        now = time.monotonic()
        if self._next_at > now:
            time.sleep(self._next_at - now)
        self._next_at = max(self._next_at, now) + letters / self._options.rate

    def _send(self, batch: _Batch) -> bool:
        """Send one batch and take it off the list; False if its run is going on."""
        if batch[0].kind == "step":
            return self._send_steps(batch)
        (letter,) = batch
        try:
            if letter.kind == "event":
                EventBus(self._engine.app).publish([self._event(letter)])
            else:
                self._publish(letter)
        except InputError as exc:
            self._skip(batch, str(exc))
            return True
        self._note([letter])
        return True

    def _send_steps(self, batch: _Batch) -> bool:
        run = str(batch[0].run)
        try:
            answer = redrive_run(self._engine, run, {letter.slot: self._options.mended for letter in batch})
        except InFlightError:
            return False
        except NotFoundError:
            self._skip(batch, f"run {run} is gone, past its retention; discard the letter")
            return True
        except InputError as exc:  # one run that cannot go on does not hold up the others
            self._skip(batch, str(exc))
            return True
        sent, skipped = set(answer.slots), []
        self._note([letter for letter in batch if letter.slot in sent])
        for letter in batch:
            if letter.slot not in sent:
                self._skip([letter], answer.skipped.get(letter.slot, "it was not sent"))
                skipped.append(letter)
        # Somebody else has sent them, and was killed before they were off the list.
        states = self._letters.states(run, [letter.slot for letter in skipped])
        self._letters.forget(letter for letter in skipped if states[letter.slot] != "failed")
        return True

    def _event(self, letter: DeadLetter) -> Event:
        if self._options.mended is not None:
            return Event.from_json(self._options.mended)
        try:
            return Event.from_json(json.loads(self._letters.raw(letter.id) or b""))
        except (ValueError, RecursionError, InputError) as exc:
            why = str(exc).partition(", not ")[0] if isinstance(exc, InputError) else "it is not JSON"
            raise InputError(
                f"{why}; it would come back at once; give the mended event with --input, or see its bytes with "
                f"`dead-letters show {letter.id} --raw`"
            ) from exc

    def _publish(self, letter: DeadLetter) -> None:
        """Put a message back on its queue, if a worker would take it now."""
        try:
            message = message_of(self._letters.raw(letter.id) or b"")
            fault = fault_of(message)
        except ValueError as exc:
            fault = ("", str(exc))
        if fault is None and not letter.queue:
            fault = ("", "it is not known on which queue it was")
        if fault is not None:
            raise InputError(
                f"{fault[1]}; it would come back at once; discard it, or see its bytes with "
                f"`dead-letters show {letter.id} --raw`"
            )
        headers = {name: value for name, value in message.headers.items() if name != "compression"}
        app = self._engine.app
        try:
            with publishing(app) as producer:
                producer.publish(
                    message.body, content_type=message.content_type, content_encoding=message.content_encoding,
                    headers=headers, correlation_id=headers["id"], exchange="", routing_key=letter.queue,
                    declare=[Queue(letter.queue, routing_key=letter.queue)], delivery_mode=2,
                    confirm_timeout=CONFIRM_TIMEOUT_S,
                )  # fmt: skip
        except broker_errors(app) as exc:
            where = mask_url(self._engine.settings.broker_url)
            raise UnavailableError(f"the broker at {where} cannot take messages: {exc}; see to it") from exc

    def _note(self, letters: Sequence[DeadLetter]) -> None:
        self._letters.forget(letters)
        self._summary.sent += [letter.id for letter in letters]
        self._sent |= {letter.id: letter for letter in letters}

    def _skip(self, letters: Iterable[DeadLetter], why: str) -> None:
        self._summary.skipped |= dict.fromkeys((letter.id for letter in letters), why)

    # Watching

    def _await(self, canaries: Sequence[DeadLetter]) -> None:
        """Wait until the canaries that were sent have ended; stops the redrive if one has not succeeded."""
        waiting = [letter for letter in canaries if letter.id in self._sent]
        if not waiting:
            self._summary.stopped = "no canary could be sent"
        else:
            self._say(f"waiting for {len(waiting)} canaries")
        while waiting and not self._summary.stopped:
            going = []
            for batch in _batches(waiting):
                states = self._letters.states(str(batch[0].run), [letter.slot for letter in batch])
                for letter in batch:
                    state = states[letter.slot]
                    if state == "succeeded":
                        self._summary.succeeded.append(letter.id)
                    elif not state or state in _ENDED:
                        self._summary.stopped = self._verdict(letter, state)
                    else:
                        going.append(letter)
            waiting = going
            if waiting and not self._summary.stopped:
                time.sleep(_POLL_S)

    def _verdict(self, letter: DeadLetter, state: str) -> str:
        what = f"canary {letter.id} ({letter.slot} of run {letter.run})"
        if state != "failed":
            return f"{what} is {state or 'gone'}"
        if self._letters.last_fingerprint(str(letter.run), letter.slot) == letter.fingerprint:
            return f"{what} failed as before: fingerprint {letter.fingerprint} came back"
        return f"{what} failed in another way than before; see `runs show {letter.run}`"

    def _comes_back(self) -> bool:
        """Tell whether something that was sent has failed again as it did before; then it is also noted as stopped."""
        while self._sent:
            come = self._letters.come_since(self._watched_ms)
            for letter in come:
                before = self._sent.get(letter.id)
                if before and letter.fingerprint == before.fingerprint and letter.last_at > before.last_at:
                    again = f"fingerprint {letter.fingerprint} came back"
                    self._summary.stopped = f"{letter.slot} of run {letter.run} failed as before: {again}"
                    return True
            if not come or come[-1].last_at <= self._watched_ms:
                return False
            self._watched_ms = come[-1].last_at
        return False


def _batches(letters: Iterable[DeadLetter]) -> Iterable[_Batch]:
    """Put the steps of one run together, where its first one stands; every other letter stands alone."""
    found: dict[str, _Batch] = {}
    for letter in letters:
        found.setdefault(f"run {letter.run}" if letter.kind == "step" else letter.id, []).append(letter)
    return found.values()


def _canaries(letters: Sequence[DeadLetter], count: int) -> list[DeadLetter]:
    """Choose letters over as many runs as possible."""
    rounds = zip_longest(*_batches(letters)) if count else ()
    return list(islice((letter for one in rounds for letter in one if letter is not None), count))
