"""An SQS queue that somebody else fills, as a source of the queue trigger; through boto3, with its credentials' chain.

The URL is `sqs://[KEY:SECRET@][HOST:PORT][?region=...]`: without a host it is AWS, with one a store that speaks SQS,
over HTTPS unless it says `secure=false` or the host is this machine.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from triggers.queue_envelope import opened
from triggers.queue_source import Message

#: How long a message is taken for, and how long one request waits for messages at most.
TAKEN_S = 60
_WAIT_S = 5
_AT_ONCE = 10
_LOCAL = ("127.0.0.1", "localhost", "::1")


class SqsSource:
    """The queue `queue`, a name or a URL, of the account and region that `url` leads to."""

    def __init__(self, url: str, queue: str) -> None:
        self._client = client_of(url)
        self._url = queue
        if "://" not in queue:
            self._url = self._client.get_queue_url(QueueName=queue)["QueueUrl"]

    def take(self, wait_s: float) -> Sequence[Message]:
        answer = self._client.receive_message(
            QueueUrl=self._url, MaxNumberOfMessages=_AT_ONCE, WaitTimeSeconds=_WAIT_S, VisibilityTimeout=TAKEN_S,
            MessageAttributeNames=["All"],
        )  # fmt: skip
        return [_message(one) for one in answer.get("Messages", ())]

    def keep(self, messages: Sequence[Message]) -> None:
        self._set_visibility(messages, TAKEN_S)

    def settle(self, messages: Sequence[Message]) -> None:
        for entries in _entries(messages):
            # What is not deleted comes again under the same id, and is deleted then.
            self._client.delete_message_batch(QueueUrl=self._url, Entries=entries)

    def close(self, messages: Sequence[Message] = ()) -> None:
        with contextlib.suppress(Exception):
            self._set_visibility(messages, 0)
        self._client.close()

    def _set_visibility(self, messages: Sequence[Message], seconds: int) -> None:
        for entries in _entries(messages):
            timed = [entry | {"VisibilityTimeout": seconds} for entry in entries]
            self._client.change_message_visibility_batch(QueueUrl=self._url, Entries=timed)


def client_of(url: str) -> Any:
    """Return boto3's client for an `sqs://` URL."""
    import boto3  # 37 MB, for those who have such a queue
    from botocore.config import Config

    parts, options = urlsplit(url), {name: values[-1] for name, values in parse_qs(urlsplit(url).query).items()}
    endpoint = None
    if parts.hostname:
        is_secure = options.get("secure", "false" if parts.hostname in _LOCAL else "true") != "false"
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        endpoint = f"{'https' if is_secure else 'http'}://{host}{f':{parts.port}' if parts.port else ''}"
    credentials: dict[str, str] = {}
    if parts.username and parts.password:
        credentials = {
            "aws_access_key_id": unquote(parts.username), "aws_secret_access_key": unquote(parts.password)
        }  # fmt: skip
    config = Config(connect_timeout=5, read_timeout=_WAIT_S + 10, retries={"mode": "standard", "max_attempts": 2})
    session = boto3.session.Session(region_name=options.get("region"), **credentials)
    region = session.region_name or ("us-east-1" if endpoint else None)
    return session.client("sqs", endpoint_url=endpoint, region_name=region, config=config)


def _entries(messages: Sequence[Message]) -> list[list[dict[str, Any]]]:
    entries = [{"Id": str(n), "ReceiptHandle": one.handle} for n, one in enumerate(messages)]
    return [entries[lo : lo + _AT_ONCE] for lo in range(0, len(entries), _AT_ONCE)]


def _envelope(text: str) -> Any:
    """Return what may be kombu's envelope, which it puts in as it is, or in base64. Raises ValueError."""
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(base64.b64decode(text, validate=True))


def _message(one: dict[str, Any]) -> Message:
    """Return a message; its id is SQS's own, also where kombu has put in an envelope with another."""
    text, handle, id_ = one["Body"], one["ReceiptHandle"], one["MessageId"]
    headers = {name: value.get("StringValue") for name, value in one.get("MessageAttributes", {}).items()}
    with contextlib.suppress(ValueError):
        inner = opened(_envelope(text), id_=id_, handle=handle)
        return replace(inner, id=id_)
    return Message(id=id_, body=text.encode("utf-8", "surrogatepass"), headers=headers, handle=handle)
