"""What the models of definitions are made of: sizes, durations, and a base that knows no other keys."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainValidator, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from orchestrator.durations import parse_duration

_SIZE = re.compile(r"(\d+)\s*(B|[KMG]i?B|)\Z", re.IGNORECASE | re.ASCII)
_SIZE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(size: str | int) -> int:
    """Return a number of bytes: 10KB is 10 000, 10KiB is 10 240. Raises ValueError for anything else."""
    match = _SIZE.match(size) if isinstance(size, str) else None
    if match:
        return int(match[1]) * _SIZE_UNITS[match[2].lower()]
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"must be a number of bytes, or text such as 10KB or 1MiB, not {size!r}")
    return size


def parse_timeout(value: str | float) -> float:
    """Return the seconds of a timeout. Raises ValueError for what is no duration, and for 0."""
    seconds = parse_duration(value).total_seconds()
    if not seconds:
        raise ValueError(f"must be more than 0, not {value!r}")
    return seconds


DURATION_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^[0-9.]+ *(ms|[smhd])?$"}]
}
SIZE_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9]+ *([kKmMgG]i?)?[bB]?$"}]
}
Seconds = Annotated[
    float | None,
    PlainValidator(lambda value: parse_duration(value).total_seconds()),
    WithJsonSchema(DURATION_SCHEMA),
]
Bytes = Annotated[int, PlainValidator(parse_size), WithJsonSchema(SIZE_SCHEMA)]
Timeout = Annotated[float | None, PlainValidator(parse_timeout), WithJsonSchema(DURATION_SCHEMA)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _has_value(cls, value: object, info: Any) -> object:
        if value is None and info.field_name != "output":
            raise PydanticCustomError("no_value", "has no value; give it one, or take the key away")
        return value
