"""Where queues are, by what a definition says of them."""

from __future__ import annotations

import pytest

from tests.moto import CREDENTIALS
from triggers.aws import Queue, sqs_client


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("queue", "region", "endpoint"),
    [
        (Queue(name="q"), "us-east-1", "https://sqs.us-east-1.amazonaws.com"),
        (Queue(name="q", region="eu-west-3"), "eu-west-3", "https://sqs.eu-west-3.amazonaws.com"),
        (Queue(name="q", endpoint_url="http://h:1"), "us-east-1", "http://h:1"),
        (
            Queue(name="arn:aws:sqs:eu-west-1:123456789012:q"),
            "eu-west-1",
            "https://sqs.eu-west-1.amazonaws.com",
        ),
        (
            Queue(name="https://sqs.eu-west-1.amazonaws.com/123456789012/q", endpoint_url="http://h:1"),
            "eu-west-1",
            "https://sqs.eu-west-1.amazonaws.com",
        ),
        (
            Queue(name="https://vpce-1-2.sqs.eu-west-2.vpce.amazonaws.com/123456789012/q"),
            "eu-west-2",
            "https://vpce-1-2.sqs.eu-west-2.vpce.amazonaws.com",
        ),
        (
            Queue(name="https://eu-west-2.queue.amazonaws.com/123456789012/q"),
            "eu-west-2",
            "https://eu-west-2.queue.amazonaws.com",
        ),
        (
            Queue(name="https://sqs.cn-north-1.amazonaws.com.cn/123456789012/q"),
            "cn-north-1",
            "https://sqs.cn-north-1.amazonaws.com.cn",
        ),
        (Queue(name="http://localhost:4566/000000000000/q"), "us-east-1", "http://localhost:4566"),
    ],
)
def test_where_a_queue_is(queue: Queue, region: str, endpoint: str) -> None:
    client = sqs_client(queue)
    assert (client.meta.region_name, client.meta.endpoint_url) == (region, endpoint)
