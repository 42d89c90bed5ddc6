"""Payloads: what can be kept, how it is kept, and what is refused."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import pathlib
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from orchestrator.errors import PayloadError, UnavailableError
from orchestrator.payloads import BlobNotFound, FileBlobs, Payloads, dumps

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.fixture
def payloads(tmp_path: Path) -> Payloads:
    return Payloads(FileBlobs(tmp_path / "blobs"), inline_bytes=100)


@dataclasses.dataclass
class Point:
    x: int


class Model(BaseModel):
    when: datetime.date


class Colour(enum.Enum):
    RED = "red"


class Scalar:
    """Stands for a NumPy scalar, which need not be installed."""

    ndim = 0

    def item(self) -> int:
        return 7


Scalar.__module__ = "numpy"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Point(1), '{"x":1}'),
        (Model(when=datetime.date(2026, 1, 2)), '{"when":"2026-01-02"}'),
        (datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), '"2026-01-02T00:00:00+00:00"'),
        (decimal.Decimal("1.10"), '"1.10"'),
        (pathlib.PurePosixPath("/a"), '"/a"'),
        (uuid.UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (Colour.RED, '"red"'),
        (Scalar(), "7"),
        ((1, 2), "[1,2]"),
    ],
)
def test_common_types_are_converted(value: object, text: str) -> None:
    assert dumps(value) == text


@pytest.mark.parametrize(
    ("value", "where", "what"),
    [
        (object(), "the value", "of type object"),
        ({"a": [1, {2, 3}]}, "['a'][1]", "of type set"),
        ({"a": b"x"}, "['a']", "of type bytes"),
        ([float("nan")], "[0]", "the number nan"),
        ({"a": {(1, 2): 3}}, "['a']", "a mapping with a key of type tuple"),
        (Point(object()), "['x']", "of type object"),  # type: ignore[arg-type]
    ],
)
def test_anything_else_is_an_error_that_says_what_and_where(value: object, where: str, what: str) -> None:
    with pytest.raises(PayloadError) as error:
        dumps(value)
    assert f"{where} is {what}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_value_that_contains_itself_is_an_error() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(PayloadError, match="nested too deeply, or contains itself"):
        dumps(value)


@given(value=JSON)
def test_every_json_value_comes_back_as_it_was(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    payloads = Payloads(FileBlobs(tmp_path_factory.getbasetemp() / "blobs"), inline_bytes=20)
    assert payloads.unpack(payloads.pack(value, f"runs/{uuid.uuid4().hex}/a-1")) == value


@given(values=st.lists(JSON, max_size=30))
def test_items_come_back_from_their_chunks(values: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    payloads = Payloads(FileBlobs(tmp_path_factory.getbasetemp() / "blobs"), inline_bytes=50)
    per, chunks = payloads.pack_items(values, f"runs/{uuid.uuid4().hex}/a-1")
    back = [payloads.unpack(chunk) for chunk in chunks]
    assert [value for chunk in back for value in chunk] == values
    assert all(len(chunk) == per for chunk in back[:-1])


def test_what_looks_like_a_reference_is_data(payloads: Payloads) -> None:
    assert payloads.unpack(payloads.pack("@runs/x/secret", "runs/r/a-1")) == "@runs/x/secret"


def test_a_large_value_is_a_blob_and_a_missing_one_is_told(payloads: Payloads) -> None:
    payload = payloads.pack("x" * 200, "runs/r/a-1")
    assert payload == "@runs/r/a-1"
    assert payloads.unpack_all([payload, "", "1"]) == ["x" * 200, None, 1]
    payloads.delete("runs/r")
    with pytest.raises(BlobNotFound):
        payloads.unpack(payload)


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "a//b", "", "a b"])
def test_a_key_cannot_leave_the_store(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="not a blob key"):
        FileBlobs(tmp_path).get(key)


def test_a_disk_that_takes_nothing_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("a file where the directory should be")
    with pytest.raises(UnavailableError, match=r"cannot write .*; free space or fix its permissions"):
        FileBlobs(tmp_path / "blobs").put("runs/r/a-1", b"x")
