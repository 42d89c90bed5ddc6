"""Clients of S3 and SQS by boto3, which is imported (37 MB) once somebody has an `s3` entry."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from orchestrator.errors import one_line

_CONNECT_S, _READ_S = 5.0, 20.0
_ARN = re.compile(r"arn:(?P<partition>[a-z-]+):sqs:(?P<region>[a-z0-9-]+):(?P<account>\d{12}):(?P<name>.+)\Z")
#: A queue's host on AWS, by whichever endpoint (of a VPC, FIPS, the old form), and its region.
_AWS_HOST = re.compile(
    r"(?:.*\.)?(?:sqs(?:-fips)?\.(?P<region>[a-z0-9-]+)|(?P<legacy>[a-z0-9-]+)\.queue)\..*(?:amazonaws|api\.aws)"
)

#: What to do about it, by the code of an error.
_ADVICE = {
    "AccessDenied": "allow it in the policy of these credentials",
    "ExpiredToken": "renew the credentials",
    "InvalidAccessKeyId": "see to the credentials",
    "InvalidClientTokenId": "see to the credentials",
    "NoCredentialsError": "give boto3 some, as by AWS_PROFILE",
    "NoRegionError": "give the entry a `region`, or set AWS_DEFAULT_REGION",
    "NoSuchBucket": "make the bucket, or correct its name",
    "NonExistentQueue": "make the queue, or correct its name",
    "QueueDoesNotExist": "make the queue, or correct its name",
    "RequestTimeTooSkewed": "set this machine's clock",
    "SignatureDoesNotMatch": "see to the credentials",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """An SQS queue as a definition names it: its URL, its ARN, or its name, which is looked up."""

    name: str
    region: str | None = None
    endpoint_url: str | None = None


def s3_client(*, region: str | None, endpoint_url: str | None, patience: int = 2, read_s: float = _READ_S) -> Any:
    """Return a client of S3 with the credentials that boto3 finds now; the next one may find others."""
    return _client("s3", region, endpoint_url, patience, read_s)


def sqs_client(queue: Queue, *, patience: int = 2, read_s: float = _READ_S) -> Any:
    """Return a client for a queue, as `s3_client`. A URL and an ARN say themselves where the queue is."""
    region, endpoint_url = queue.region, queue.endpoint_url
    if arn := _ARN.match(queue.name):
        region = arn["region"]
    elif "://" in queue.name:
        parts = urlsplit(queue.name)
        endpoint_url = f"{parts.scheme}://{parts.netloc}"
        if aws := _AWS_HOST.match(parts.hostname or ""):
            region = aws["region"] or aws["legacy"]
    return _client("sqs", region, endpoint_url, patience, read_s)


def queue_url(client: Any, queue: Queue) -> str:
    """Return the URL of a queue."""
    if "://" in queue.name:
        return queue.name
    if arn := _ARN.match(queue.name):
        return str(client.get_queue_url(QueueName=arn["name"], QueueOwnerAWSAccountId=arn["account"])["QueueUrl"])
    return str(client.get_queue_url(QueueName=queue.name)["QueueUrl"])


def store_errors() -> tuple[type[Exception], ...]:
    """Return what the clients raise when S3 or SQS is away, refuses, or cannot be reached with what is configured."""
    from botocore.exceptions import BotoCoreError, ClientError

    return (BotoCoreError, ClientError, OSError)


def error_code(error: Exception) -> str:
    """Return the code that AWS gave an error, or the name of its class."""
    response = getattr(error, "response", None)
    code = str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
    return code.rpartition(".")[2] or type(error).__name__


def describe_error(error: Exception) -> str:
    """Say in one line what went wrong, and what to do about it where that is known."""
    advice = _ADVICE.get(error_code(error).removesuffix("Exception"))
    return one_line(str(error) or type(error).__name__) + (f"; {advice}" if advice else "")


def _client(service: str, region: str | None, endpoint_url: str | None, patience: int, read_s: float) -> Any:
    import boto3
    from botocore.config import Config

    # A session of its own: the one that boto3 shares keeps the credentials that it found first.
    session = boto3.session.Session(region_name=region)
    if session.region_name is None and endpoint_url is not None:
        session = boto3.session.Session(
            region_name="us-east-1"
        )  # for the signature, to which other stores give no heed
    config = Config(
        connect_timeout=_CONNECT_S,
        read_timeout=read_s,
        retries={"mode": "standard", "total_max_attempts": patience},
        max_pool_connections=16,
    )
    return session.client(service, endpoint_url=endpoint_url, config=config)
