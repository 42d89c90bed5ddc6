"""The shape of the entries of `on:` in a definition: a model for each kind, which makes the domain's form of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.recurrence import OnSchedule
from orchestrator.shapes import Bytes, Model, Seconds, Timeout
from orchestrator.subscriptions import (
    On,
    OnEvent,
    OnFile,
    OnQueue,
    OnRun,
    OnS3,
    OnWebhook,
    Verification,
)


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


_Texts = Annotated[list[str], BeforeValidator(_one_or_more, json_schema_input_type=str | list[str])]
_S3Event = Literal["created", "removed"]
_RunEnd = Literal["succeeded", "failed", "cancelled"]
_Pattern = Annotated[
    dict[str, Any] | None,
    Field(default=None, description="EventBridge-style pattern that the events must match besides."),
]


class FileTrigger(Model):
    """Start a run for each file that has arrived in a folder."""

    path: str = Field(min_length=1, description="Folder to watch; relative to the project. `~` is your home.")
    glob: str = Field(default="*", min_length=1, description="Which file names count, such as `*.csv`.")
    recursive: bool = Field(default=False, description="Whether folders within the folder are watched too.")
    settle: Seconds = Field(default=None, description="How long a file must stay as it is: seconds, 500ms, 1s, 5m.")
    min_size: Bytes = Field(default=0, description="Least size: bytes, or 10KB (10 000), 10KiB (10 240), 1MB, ...")
    marker: str | None = Field(
        default=None, min_length=1, description="With `.done`, x.csv counts once x.csv.done exists."
    )
    polling: bool = Field(default=False, description="List the folder instead of being told; for network drives.")
    pattern: _Pattern = None

    def build(self) -> OnFile:
        """Return the domain's form of it."""
        return OnFile(**self.model_dump(exclude={"settle"}), settle_s=self.settle)


class S3Trigger(Model):
    """Start a run for each object that is made in a bucket, or removed from it."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": [key]} for key in ("queue", "poll")]})

    bucket: str = Field(min_length=1, description="Name of the bucket.")
    prefix: str = Field(default="", description="Only keys that begin so.")
    suffix: str = Field(default="", description="Only keys that end so.")
    events: Annotated[
        list[_S3Event],
        BeforeValidator(_one_or_more, json_schema_input_type=_S3Event | list[_S3Event]),
        Field(default=["created"], min_length=1, description="What counts: `created`, `removed`."),
    ]
    queue: str | None = Field(
        default=None, min_length=1, description="SQS queue that the bucket's notifications go to: its URL, name or ARN."
    )
    poll: Timeout = Field(default=None, description="List the bucket that often, where nothing notifies: 30s.")
    reconcile: Timeout = Field(
        default=3600.0, description="How often to look for objects that no notification told of."
    )
    existing: Literal["start", "skip"] = Field(
        default="start", description="What becomes of objects that are there at the very first look."
    )
    region: str | None = Field(default=None, min_length=1, description="AWS region; else as boto3 finds it.")
    endpoint_url: str | None = Field(default=None, min_length=1, description="For stores that only speak S3.")
    pattern: _Pattern = None

    def build(self) -> OnS3:
        """Return the domain's form of it."""
        given = self.model_dump(exclude={"events", "poll", "reconcile"})
        return OnS3(
            **given, events=tuple(dict.fromkeys(self.events)), poll_s=self.poll, reconcile_s=self.reconcile or 0.0
        )


class Signed(Model):
    """How a sender signs."""

    secrets: _Texts = Field(
        min_length=1, description="`env:NAME`, `file:PATH` or a name of [secrets]; several while one is replaced."
    )
    tolerance: Seconds = Field(default=300.0, description="How old a delivery may be, where its time is signed.")


class Hmac(Signed):
    """How a sender signs that is none of the known ones."""

    header: str = Field(min_length=1, description="The header that has the signature.")
    algorithm: Literal["sha1", "sha256", "sha384", "sha512"] = Field(default="sha256", description="The digest.")
    encoding: Literal["hex", "base64"] = Field(default="hex", description="How the signature is written.")
    prefix: str = Field(default="", description="What comes before it, such as `sha256=`.")
    timestamp_header: str | None = Field(default=None, min_length=1, description="The header that has the time.")
    payload: str = Field(default="{body}", min_length=1, description="What is signed, such as `{timestamp}.{body}`.")
    id_header: str | None = Field(default=None, min_length=1, description="The header that has the delivery's id.")


def _secrets_only(value: object) -> object:
    return {"secrets": value} if isinstance(value, str | list) else value


_Signed = Annotated[
    Signed | None, BeforeValidator(_secrets_only, json_schema_input_type=str | list[str] | Signed), Field(default=None)
]


class Verify(Model):
    """How deliveries are verified: one of the schemes."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    github: _Signed = None
    gitlab: _Signed = None
    stripe: _Signed = None
    slack: _Signed = None
    standard: _Signed = None
    hmac: Hmac | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Verify:
        if len(self._given()) != 1:  # and never none, with which anybody could deliver
            raise PydanticCustomError("one_scheme", "must have one scheme: " + ", ".join(type(self).model_fields))
        return self

    def _given(self) -> list[tuple[str, Any]]:
        return [(name, value) for name in type(self).model_fields if (value := getattr(self, name)) is not None]

    def build(self) -> Verification:
        """Return the domain's form of it."""
        ((scheme, how),) = self._given()
        values = how.model_dump(exclude={"secrets", "tolerance"})
        return Verification(scheme=scheme, secrets=tuple(how.secrets), tolerance_s=how.tolerance or 0.0, **values)


class WebhookTrigger(Model):
    """Start a run for each delivery to /hooks/{path}."""

    path: str = Field(min_length=1, description="The path below /hooks/; unique in the project.")
    methods: _Texts = Field(default=["POST"], min_length=1, description="HTTP methods that are taken.")
    verify: Verify | None = Field(default=None, description="How a delivery shows who sent it.")
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="JSON Schema of the body.")
    respond: Literal["async", "sync"] = Field(
        default="async", description="`async`: 202 at once; `sync`: the run's output, if it ends within `timeout`."
    )
    timeout: Timeout = Field(default=30.0, description="How long a `sync` answer waits for the run.")
    max_bytes: Bytes = Field(default=1_000_000, description="Largest body: bytes, or 1MB.")
    rate: float | None = Field(default=None, gt=0, description="How many deliveries a second are taken.")
    raw: bool = Field(default=False, description="Keep the body as the text that it came as, also if it is JSON.")
    pattern: _Pattern = None

    def build(self) -> OnWebhook:
        """Return the domain's form of it."""
        return OnWebhook(
            path=self.path.strip("/").removeprefix("hooks/"),
            methods=tuple(method.upper() for method in self.methods),
            verify=self.verify.build() if self.verify is not None else None,
            schema=self.schema_,
            respond=self.respond,
            timeout_s=self.timeout or 0.0,
            max_bytes=self.max_bytes,
            rate=self.rate,
            raw=self.raw,
            pattern=self.pattern,
        )


def _one_recurrence(schema: dict[str, Any]) -> None:
    keys = (["cron"], ["every"], ["at"], ["solar", "latitude", "longitude"])
    schema["oneOf"] = [{"required": required} for required in keys]


class ScheduleTrigger(Model):
    """Start a run at due times."""

    model_config = ConfigDict(json_schema_extra=_one_recurrence)

    name: str = Field(default="", min_length=1, description="Tells several schedules of one workflow apart.")
    cron: str | None = Field(default=None, min_length=1, description="Five or six fields, or @hourly and the like.")
    every: Timeout = Field(default=None, description="An interval, counted from `start` or the epoch.")
    solar: str | None = Field(default=None, min_length=1, description="sunrise, sunset and the like.")
    at: _Texts = Field(default=[], description="Times: RFC 3339.")
    latitude: float | None = Field(default=None, description="Of `solar`; degrees, north is positive.")
    longitude: float | None = Field(default=None, description="Of `solar`; degrees, east is positive.")
    timezone: str = Field(default="UTC", min_length=1, description="IANA name, such as Europe/Paris.")
    jitter: Seconds = Field(default=0.0, description="Each is put off by chance, up to that long.")
    start: str | None = Field(default=None, min_length=1, description="Nothing is due before: RFC 3339.")
    end: str | None = Field(default=None, min_length=1, description="Nothing is due after: RFC 3339.")
    catchup: Literal["none", "latest", "all"] = Field(
        default="none", description="Which of those are made up for that fell into a downtime."
    )

    def build(self) -> OnSchedule:
        """Return the domain's form of it."""
        given = self.model_dump(exclude={"every", "jitter", "at"})
        return OnSchedule(**given, every_s=self.every, jitter_s=self.jitter or 0.0, at=tuple(self.at))


class QueueTrigger(Model):
    """Start a run for each message of a queue that somebody else fills."""

    url: str = Field(min_length=1, description="URL of its broker: redis, amqp or sqs; or env:NAME, file:PATH.")
    queue: str = Field(min_length=1, description="Name of the queue.")
    format: Literal["json", "cloudevents"] = Field(default="json", description="What the messages are.")
    pattern: _Pattern = None

    def build(self) -> OnQueue:
        """Return the domain's form of it."""
        return OnQueue(**self.model_dump())


class RunTrigger(Model):
    """Start a run when a run of another workflow has ended."""

    workflow: _Texts = Field(min_length=1, description="Which workflow, or workflows.")
    state: Annotated[
        list[_RunEnd],
        BeforeValidator(_one_or_more, json_schema_input_type=_RunEnd | list[_RunEnd]),
        Field(default=["succeeded"], min_length=1, description="How it ended."),
    ]
    pattern: _Pattern = None

    def build(self) -> OnRun:
        """Return the domain's form of it."""
        return OnRun(workflow=tuple(self.workflow), state=tuple(dict.fromkeys(self.state)), pattern=self.pattern)


class OnEntry(Model):
    """One thing that starts runs."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    file: FileTrigger | None = Field(default=None, description=(FileTrigger.__doc__ or ""))
    event: dict[str, Any] | None = Field(default=None, description="EventBridge-style pattern of events.")
    s3: S3Trigger | None = Field(default=None, description=(S3Trigger.__doc__ or ""))
    webhook: WebhookTrigger | None = Field(default=None, description=(WebhookTrigger.__doc__ or ""))
    schedule: ScheduleTrigger | None = Field(default=None, description=(ScheduleTrigger.__doc__ or ""))
    queue: QueueTrigger | None = Field(default=None, description=(QueueTrigger.__doc__ or ""))
    run: RunTrigger | None = Field(default=None, description=(RunTrigger.__doc__ or ""))

    def build(self) -> On | None:
        """Return the domain's form of it; None unless exactly one kind is given."""
        given = [value for name in type(self).model_fields if (value := getattr(self, name)) is not None]
        if len(given) != 1:
            return None
        return OnEvent(pattern=given[0]) if isinstance(given[0], Mapping) else given[0].build()


KINDS: Mapping[str, type[Model]] = {
    "file": FileTrigger,
    "s3": S3Trigger,
    "webhook": WebhookTrigger,
    "schedule": ScheduleTrigger,
    "queue": QueueTrigger,
    "run": RunTrigger,
}


def on_model(place: tuple[str, ...]) -> type[BaseModel]:
    """Return the model of what stands at a place such as `on.0.webhook.verify`."""
    if len(place) < 3 or place[2] not in KINDS:
        return OnEntry
    if place[3:4] == ("verify",):
        return Verify if len(place) == 4 else Hmac if place[4] == "hmac" else Signed
    return KINDS[place[2]]
