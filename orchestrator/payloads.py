"""Values as they are kept and as they travel: JSON text, or, when large, a reference to a blob (claim check).

A *payload* is a string: JSON, or `@` and the key of a blob that holds the JSON. JSON never begins with `@`, so nothing
that a user or an event brings can be taken for a reference.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import date, datetime
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, Protocol

from pydantic import BaseModel

from orchestrator.errors import OrchestratorError, PayloadError, UnavailableError

#: Values whose JSON is longer than this many bytes go to the blob store.
INLINE_BYTES = 64 * 1024

_KEY = re.compile(r"[A-Za-z0-9_$.-]+(/[A-Za-z0-9_$.-]+)*\Z")


class BlobNotFound(OrchestratorError):  # noqa: N818  -- says the state, as RunNotFound would
    """No blob has that key (it was deleted, or its retention has passed)."""


class BlobStore(Protocol):
    """Where large values are kept. Keys are relative paths of `[A-Za-z0-9_$.-]` parts."""

    def put(self, key: str, content: bytes) -> None:
        """Store content durably and atomically; a repeat overwrites. Raises UnavailableError (disk full, ...)."""

    def get(self, key: str) -> bytes:
        """Return the content. Raises BlobNotFound."""

    def size(self, key: str) -> int:
        """Return how many bytes a blob has; 0 if there is none."""

    def delete(self, prefix: str) -> None:
        """Delete every blob below a prefix; none there is fine."""


class FileBlobs:
    """Blobs as files below a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def _path(self, key: str) -> Path:
        if not _KEY.match(key) or ".." in key.split("/"):
            raise ValueError(f"not a blob key: {key!r}")
        return self._root / key

    def put(self, key: str, content: bytes) -> None:
        path = self._path(key)
        draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except OSError as exc:
            with suppress(OSError):
                draft.unlink()
            raise UnavailableError(f"cannot write {path}: {exc.strerror}; free space or fix its permissions") from exc

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError as exc:
            raise BlobNotFound(f"blob {key} is not in {self._root}") from exc

    def size(self, key: str) -> int:
        try:
            return self._path(key).stat().st_size
        except OSError:
            return 0

    def delete(self, prefix: str) -> None:
        shutil.rmtree(self._path(prefix), ignore_errors=True)


def dumps(value: object) -> str:
    """Return `value` as compact JSON.

    Dataclasses, pydantic models, dates and times (ISO 8601), Decimal, Path and UUID (text), enums (their value) and
    NumPy scalars are converted; tuples become lists. Raises PayloadError that names the type and where it stands.
    """
    try:
        return json.dumps(value, default=_convert, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as exc:
        place, culprit = _find_culprit(value, "", 0)
        what = f"{place or 'the value'} is {culprit}" if culprit else str(exc)
        raise PayloadError(f"not JSON: {what}; return JSON values, dataclasses or pydantic models") from exc


def _convert(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, datetime | date | time_of_day):
        return value.isoformat()
    if isinstance(value, Decimal | PurePath | uuid.UUID):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__}")


def _find_culprit(value: object, place: str, depth: int) -> tuple[str, str]:
    """Find the first part of a value that JSON cannot say: (where, what)."""
    if depth > 50:
        return "", "nested too deeply, or contains itself"
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return place, f"the number {value}, which JSON does not have"
    if value is None or isinstance(value, str | int | float):
        return "", ""
    if isinstance(value, dict):
        for key, element in value.items():
            if not isinstance(key, str | int | float | bool | None):
                return place, f"a mapping with a key of type {type(key).__qualname__}"
            found = _find_culprit(element, f"{place}[{key!r}]", depth + 1)
            if found[1]:
                return found
        return "", ""
    if isinstance(value, list | tuple):
        for index, element in enumerate(value):
            found = _find_culprit(element, f"{place}[{index}]", depth + 1)
            if found[1]:
                return found
        return "", ""
    try:
        return _find_culprit(_convert(value), place, depth + 1)
    except TypeError as exc:
        name = str(exc).removeprefix("builtins.")
        return place, f"of type {name}"


class Payloads:
    """Packs values for the ledger and unpacks them."""

    def __init__(self, blobs: BlobStore, *, inline_bytes: int = INLINE_BYTES) -> None:
        self._blobs = blobs
        self._inline_bytes = inline_bytes

    def pack(self, value: object, key: str) -> str:
        """Return the payload of a value; a large one is stored as blob `key` first. Raises PayloadError."""
        return self.pack_text(dumps(value), key)

    def pack_text(self, text: str, key: str) -> str:
        """Do as `pack` with JSON text."""
        if len(text) <= self._inline_bytes:
            return text
        self._blobs.put(key, text.encode())
        return "@" + key

    def unpack(self, payload: str) -> Any:
        """Return the value of a payload; the empty payload is None. Raises BlobNotFound, PayloadError."""
        if not payload:
            return None
        text: str | bytes = self._blobs.get(payload[1:]) if payload[0] == "@" else payload
        try:
            return json.loads(text)
        except ValueError as exc:
            raise PayloadError(f"a stored value is not JSON: {exc}") from exc

    def size(self, payload: str) -> int:
        """Return about how many bytes the value of a payload has; 0 if its blob is lost."""
        return self._blobs.size(payload[1:]) if payload[:1] == "@" else len(payload)

    def unpack_or_none(self, payload: str) -> Any:
        """Do as `unpack`; None if its blob is lost: the rest is still to be seen."""
        try:
            return self.unpack(payload)
        except BlobNotFound:
            return None

    def unpack_all(self, payloads: Sequence[str]) -> list[Any]:
        """Return the values of many payloads, in order."""
        if any(payload[:1] == "@" for payload in payloads):
            return [self.unpack(payload) for payload in payloads]
        values: list[Any] = json.loads("[" + ",".join(payload or "null" for payload in payloads) + "]")
        return values

    def pack_items(self, values: Sequence[object], key: str) -> tuple[int, list[str]]:
        """Pack a long list in chunks: (items per chunk, payload of each chunk), each near the inline size or below."""
        texts = [dumps(value) for value in values]
        per = max(1, len(texts) * self._inline_bytes // max(1, sum(map(len, texts)) + len(texts)))
        return per, [
            self.pack_text("[" + ",".join(texts[lo : lo + per]) + "]", f"{key}-{lo // per}")
            for lo in range(0, len(texts), per)
        ]

    def delete(self, prefix: str) -> None:
        """Delete the blobs below a prefix, as `runs/RUN`; none there is fine."""
        self._blobs.delete(prefix)
