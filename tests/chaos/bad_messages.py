"""Bad messages: what somebody may push on a queue, by hand and by hypothesis, and what must come of each.

Each is a `Bad`: its parts as a client publishes them, or bytes that are no message at all, which only a Redis broker
can hold. None of them is a message that a worker or the dispatcher could take, but for those that are `odd`: in order
as messages, and nonsense; of these a letter may come or none.
"""

from __future__ import annotations

import base64
import json
import pickle
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from amqp.basic_message import Message
from hypothesis import strategies as st

from orchestrator.celery_app import STEP_TASK
from orchestrator.workflows import END

JSON = "application/json"
PICKLE = "application/x-python-serialize"
#: So many come from hypothesis; what is beyond that is made of them.
_POOL = 1500
_BIG = 10_000_000


@dataclass(frozen=True, slots=True)
class Bad:
    """One message: its parts, or only `raw`. `odd`: a letter may come of it, or none."""

    body: bytes = b""
    headers: Mapping[str, Any] = field(default_factory=dict)
    content_type: Any = JSON
    content_encoding: Any = "utf-8"
    properties: Mapping[str, Any] = field(default_factory=dict)
    raw: bytes | None = None
    odd: bool = False

    def envelope(self) -> bytes:
        """Return it as it lies in a queue on Redis."""
        if self.raw is not None:
            return self.raw
        whole = {
            "body": base64.b64encode(self.body).decode(), "content-type": self.content_type,
            "content-encoding": self.content_encoding, "headers": self.headers,
            "properties": {"body_encoding": "base64", "delivery_info": {}} | self.properties,
        }  # fmt: skip
        return json.dumps(whole).encode()


def letters_of(envelope: bytes) -> tuple[bytes, ...]:
    """Return what a letter may have as the bytes of an event on Redis: all of it, or the body that was published."""
    allowed = [envelope]
    try:
        whole = json.loads(envelope)
        body = whole["body"]
        if whole["properties"].get("body_encoding") == "base64":
            body = base64.b64decode(body)
        allowed.append(body if isinstance(body, bytes) else body.encode(whole.get("content-encoding") or "utf-8"))
    except Exception:  # noqa: BLE001 -- it is made of anything
        pass
    return tuple(allowed)


def is_amqp(bad: Bad) -> bool:
    """Tell whether AMQP has words for the parts of a message."""
    if bad.raw is not None:
        return False
    try:
        Message(
            bad.body, content_type=bad.content_type or "", content_encoding=bad.content_encoding or "",
            application_headers=dict(bad.headers),
        )._serialize_properties()  # fmt: skip
        json.dumps(bad.headers, allow_nan=False)  # RabbitMQ closes the connection of whoever sends one
    except Exception:  # noqa: BLE001 -- whatever it says of it
        return False
    return not bad.properties


def _deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


class _Touch:
    """Pickled; whoever unpickles it makes a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self._path, "w")


OURS = {"task": STEP_TASK, "id": "1", "eta": None, "expires": None, "timelimit": [None, None]}
CALL = b'[["r", "a"], {}, {}]'


def by_hand(mark: str, runs: Sequence[str] = ()) -> list[Bad]:
    """Return the nasty ones: unpickling one makes the file `mark`; some say to be of these runs."""
    evil = pickle.dumps(_Touch(mark))
    bare = [
        b"", b"\x00", b" ", b"\n", b"\xff\xfe\x00", b"null", b"true", b"5", b'"text"', b"[]", b"{}", b"NaN", b"{",
        b"[" * 200_000, b'{"a":' * 50_000, b"9" * 10_000, b"-1e999", b"\xef\xbb\xbf{}", b"\x80\x04\x95pickle", evil,
        b'{"properties": 5}', b'{"properties": {}}', b'{"properties": null}', b'{"properties": {}, "headers": [1]}',
        b'{"properties": {}, "body": "\\ud800"}', b'{"properties": {"x": 1e999}}', b'{"properties": {}, "body": 5}',
        b'{"properties": {}, "body": {"a": 1}}', b'{"properties": {"body_encoding": "base64"}, "body": "%%%"}',
        b'{"properties": {"body_encoding": "rot13"}, "body": "x"}', b"x" * _BIG,
        b'{"properties": {"delivery_info": 5, "delivery_tag": {}}, "headers": {}, "body": ""}',
        b"*3\r\n$5\r\nLPUSH\r\n", b"<xml/>", b"\x1f\x8b\x08gzip", b'{"task": "orchestrator.step", "args": ["r", "a"]}',
        # Celery's first protocol, and a bell's content.
        b'{"id": "1", "task": "orchestrator.step", "args": ["r", "a"], "kwargs": {}, "retries": 0, "eta": null}', b"1",
    ]  # fmt: skip
    headers: list[dict[str, Any]] = [
        {"task": "another.task"}, {"task": ""}, {"task": None}, {"task": 5}, {"task": ["a"]}, {"task": {}},
        {"task": "celery.backend_cleanup"}, {"task": "celery.chord_unlock"}, {"task": "orchestrator.step.v9"},
        {"id": None}, {"id": ""}, {"id": 5}, {"id": ["a"]}, {"id": _deep(700)}, {"id": "\ud800"}, {"id": "x" * 100_000},
        {"eta": "2999-01-01T00:00:00"}, {"eta": "tomorrow"}, {"eta": 5}, {"eta": {}},
        {"expires": "2001-01-01T00:00:00"}, {"expires": "2999-01-01T00:00:00"}, {"expires": 5}, {"expires": "never"},
        {"timelimit": 7}, {"timelimit": "ab"}, {"timelimit": [5, 3]}, {"timelimit": [1, 1]},
        {"stamped_headers": 5}, {"stamped_headers": ["x"], "stamps": 5}, {"compression": "unheard-of"},
        {"compression": "zlib"}, {"chord": {"task": "x"}}, {"callbacks": [{"task": "x"}]}, {"errbacks": [5]},
        {"chain": [5]}, {"deep": _deep(700)}, {"deep": _deep(20)},
    ]  # fmt: skip
    bodies = [
        b"", b"null", b"5", b"{}", b"[]", b"[[]]", b"[[], {}, {}]", b'[["r"], {}, {}]', b'[["r", "a"], {}]', b"\xff",
        b'[["r", "a"], {"x": 1}, {}]', b'[["r", "a"], [], {}]', b'[["r", "a"], {}, []]', b'[["r", "a"], {}, null]',
        b'[["r", 5], {}, {}]', b'[[null, "a"], {}, {}]', b'[["", "a"], {}, {}]', b'[["r\\u0000", "a"], {}, {}]',
        b'[["\\ud800", "a"], {}, {}]', b'["ra", {}, {}]', b'[["r", "a", 0], {}, {}]', b'[["r", "a", 1, 0], {}, {}]',
        b'[["r", "a", -1, 1], {}, {}]', b'[["r", "a", 0, 1.5], {}, {}]', b'[["r", "a", true, 2], {}, {}]',
        b'[["r", "a", 0, 1' + b"0" * 400 + b"], {}, {}]", b'[["r", "a", 0, 99999999999], {}, {}]',
        b'[["r", "a"], {}, {"chain": 5}]', b'[["r", "a"], {}, {"chain": [5]}]', b'[["r", "a"], {}, {"id": 5}]',
        b'[["r", "a"], {}, {"chain": [{"task": "x", "args": []}]}]', b'[["r", "a"], {}, {"chord": {"task": "x"}}]',
        b'[["r", "a"], {}, {"callbacks": [{"task": "x"}]}]', b'[["r", "a"], {}, {"errbacks": [{"task": "x"}]}]',
        b"{" * 100_000, b"[" * 100_000, b"9" * 5000, b"NaN", b'{"specversion": "1.0"}', CALL + CALL, evil,
        b'"' + b"x" * _BIG + b'"', b'{"specversion": "1.0", "id": "\\ud800", "source": "s", "type": "t"}',
        b'{"specversion": "1.0", "id": "i", "source": "s", "type": "t", "data": NaN}',
        b'{"specversion": "9.0", "id": "i", "source": "s", "type": "t"}',
        b'{"specversion": "1.0", "id": {"password": "hunter2"}, "source": "s", "type": "t"}',
        b'{"specversion": "1.0", "id": ' + b"[" * 900 + b"]" * 900 + b"}",
    ]  # fmt: skip
    kinds: list[dict[str, Any]] = [
        {"content_type": PICKLE, "body": evil}, {"content_type": PICKLE, "content_encoding": "binary", "body": evil},
        {"content_type": None}, {"content_type": ""}, {"content_type": "text/plain"},
        {"content_type": "application/x-msgpack"}, {"content_type": "application/json; charset=utf-8"},
        {"content_encoding": None, "body": b"\xe9"}, {"content_encoding": "latin-1", "body": b"\xe9"},
        {"content_encoding": "no-such", "body": b"\xe9"},
        {"content_encoding": "binary", "body": b"\xff"}, {"content_encoding": "utf-16", "body": b"\xff"},
    ]  # fmt: skip
    # In Redis alone, where a client may say of parts what it wants.
    shapes: list[dict[str, Any]] = [
        {"content-type": ["a"]}, {"content-type": 5}, {"content-encoding": 7}, {"content-encoding": {}},
        {"headers": None}, {"headers": "x"}, {"headers": 5}, {"body": None}, {"body": [1]}, {"body": 5},
        {"properties": {"delivery_info": "x", "body_encoding": "base64"}},
    ]  # fmt: skip
    whole = json.loads(Bad(CALL, OURS).envelope())
    spoilt = [json.dumps(whole | shape).encode() for shape in shapes]
    return [
        *(Bad(raw=raw) for raw in (*bare, *spoilt)),
        *(Bad(CALL, OURS | one) for one in headers),
        *(Bad(body, OURS) for body in bodies),
        *(Bad(body, {}) for body in bodies[:6]),
        *(Bad(**{"body": CALL, "headers": OURS} | one) for one in kinds),
        *_odd(runs),
    ]


def _odd(runs: Sequence[str]) -> Iterator[Bad]:
    """Yield what is in order as a message: for runs, steps and items that are not there, or not at the moment."""
    for run in ("no-such-run", "{x}", "a:b", "*", *runs):
        for args in ([run, "no-such-step"], [run, END], [run, "^ended"], [run, "!a"], [run, "~a"], [run, "$deadline"],
                     [run, "a/b"], [run, "a", 0, 1], [run, "f", 0, 2**31 - 1], [run, "f", 2**30, 2**30 + 1],
                     [run, "f/0-2"], [run, "g", 0, 1],
                     [run, "f/0"], [run, "n:f"], [run, "d:f"], [run, "u:b"], [run, "w:a"]):  # fmt: skip
            yield Bad(json.dumps([args, {}, {"chain": None}]).encode(), OURS, odd=True)
        chain = [{"task": STEP_TASK, "args": [run, name]} for name in ("c", "no", "a")]
        yield Bad(json.dumps([[run, "b"], {}, {"chain": chain}]).encode(), OURS, odd=True)
    names = ("retries root_id parent_id group group_index origin argsrepr kwargsrepr shadow "
             "replaced_task_nesting ignore_result stamps lang reply_to hostname")  # fmt: skip
    for name in names.split():
        for value in ("x", [1], {"a": [1]}, -1, 10**30, 1.5, True):
            yield Bad(CALL, OURS | {name: value}, odd=True)
    yield Bad(
        CALL, OURS, properties={"priority": "x", "correlation_id": [1], "reply_to": {}, "expiration": "x"}, odd=True
    )


_numbers = st.integers() | st.integers(-(10**60), 10**60) | st.floats()
_texts = st.text(max_size=40) | st.text(st.characters(categories=["Cs", "Cc", "Lu"]), max_size=10)
_values = st.recursive(
    st.none() | st.booleans() | _numbers | _texts,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_texts, inner, max_size=5),
    max_leaves=20,
)
_json = _values.map(lambda value: json.dumps(value).encode())
_bytes = st.binary(max_size=300)
_plain = st.dictionaries(st.text(max_size=20), _values, max_size=5).map(
    lambda headers: {name: value for name, value in headers.items() if name != "task"}
)
_parts = st.one_of(
    st.builds(Bad, body=_json | _bytes, headers=st.just(OURS)),
    st.builds(Bad, body=_json | _bytes | st.just(CALL), headers=_plain),
    st.builds(
        Bad,
        body=_bytes.map(lambda body: b"\x80" + body),
        headers=st.just(OURS),
        content_type=st.text(max_size=30) | st.sampled_from([PICKLE, JSON, "application/data"]),
        content_encoding=st.sampled_from(["utf-8", "binary", "ascii", "utf-16", "x"]),
    ),
    st.builds(
        Bad,
        body=st.just(CALL),
        headers=st.builds(
            lambda name, value: OURS | {name: value},
            st.sampled_from(["task", "id", "eta", "expires", "timelimit"]),
            _values.filter(lambda value: value and not isinstance(value, str) and value != [None, None]),
        ),
    ),
)
_raw = st.one_of(
    st.builds(Bad, raw=_bytes | _json),
    st.builds(
        lambda bad, size: Bad(raw=bad.envelope()[: max(1, len(bad.envelope()) * size // 100)][:-1]),
        _parts,
        st.integers(1, 99),
    ),
)


def by_hypothesis(count: int, seed: int, *, parts_only: bool) -> list[Bad]:
    """Return what hypothesis thinks of; the same for the same seed."""
    found: list[Bad] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(_parts if parts_only else _parts | _raw)
    def collect(bad: Bad) -> None:
        found.append(bad)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collect()
    return found


def messages(
    count: int, seed: int, mark: str, queues: Sequence[str], runs: Sequence[str] = (), *, for_amqp: bool = False
) -> Iterator[tuple[str, Bad]]:
    """Yield so many with their queue, in an order by chance: those by hand for every queue (what is large or odd for
    one), hypothesis's, and more that are made of these.

    `for_amqp`: only those for which AMQP has words.
    """
    chance = random.Random(seed)
    hand = [bad for bad in by_hand(mark, runs) if is_amqp(bad) or not for_amqp]
    first = [
        (queue, bad)
        for bad in hand
        for queue in (queues if _size(bad) < _BIG and not bad.odd else [chance.choice(queues)])
    ]
    made = by_hypothesis(max(100, min(_POOL, count - len(first))), seed, parts_only=for_amqp)
    made = [bad for bad in made if is_amqp(bad) or not for_amqp]
    first = [*first, *((chance.choice(queues), bad) for bad in made)][:count]
    chance.shuffle(first)
    yield from first
    small = [bad for bad in (*hand, *made) if not bad.odd and _size(bad) < 5000]
    for number in range(count - len(first)):
        yield chance.choice(queues), _varied(chance.choice(small), chance, number, parts_only=for_amqp)


def _size(bad: Bad) -> int:
    return len(bad.raw if bad.raw is not None else bad.body)


def _varied(bad: Bad, chance: random.Random, number: int, *, parts_only: bool) -> Bad:
    """Return another one that cannot be in order either: cut off, behind or before something else, or with noise."""
    noise = chance.randbytes(chance.randrange(1, 200))
    which = chance.randrange(5)
    if parts_only or which == 0:
        return Bad(chance.choice([b"\xff" + noise, json.dumps(number).encode(), bad.body[:-1] + b"\x80"]), OURS)
    envelope = bad.envelope()
    if which == 1:
        return Bad(raw=envelope[: chance.randrange(max(1, len(envelope)))])
    if which == 2:
        return Bad(raw=noise + b"\x00" + envelope)
    if which == 3:
        return Bad(raw=envelope + b"," + noise)
    return Bad(CALL, {"number": number, "id": bad.headers.get("id")})
