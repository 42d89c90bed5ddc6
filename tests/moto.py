"""S3, SQS, SNS and EventBridge for tests: moto's server over HTTP, a process on a port of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.conftest import wait_until

REGION = "us-east-1"
ACCOUNT = "123456789012"
#: What any client takes for credentials.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": REGION}


class Moto:
    """A server; its port stays the same when it is stopped and started, what was in it does not."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with (self._directory / "moto.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
                stdout=log, stderr=log, env=os.environ | CREDENTIALS,
            )  # fmt: skip
        wait_until(self._answers, "moto answers")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def reset(self) -> None:
        """Empty it."""
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset", method="POST"), timeout=10):
            pass

    def client(self, service: str) -> Any:
        import boto3

        session = boto3.session.Session(aws_access_key_id="test", aws_secret_access_key="test", region_name=REGION)
        return session.client(service, endpoint_url=self.url)

    def bucket(self, name: str, *, queue: str | None = None, topic: str | None = None, events: bool = False) -> None:
        """Make a bucket that notifies a queue, a topic (ARNs), or EventBridge."""
        s3 = self.client("s3")
        s3.create_bucket(Bucket=name)
        told: dict[str, Any] = {}
        kinds = ["s3:ObjectCreated:*", "s3:ObjectRemoved:*"]
        if queue:
            told["QueueConfigurations"] = [{"QueueArn": queue, "Events": kinds}]
        if topic:
            told["TopicConfigurations"] = [{"TopicArn": topic, "Events": kinds}]
        if events:
            told["EventBridgeConfiguration"] = {}
        s3.put_bucket_notification_configuration(Bucket=name, NotificationConfiguration=told)

    def queue(self, name: str) -> str:
        """Make a queue and return its URL."""
        return str(self.client("sqs").create_queue(QueueName=name)["QueueUrl"])

    def depth(self, url: str) -> int:
        """Return how many messages a queue has, those in somebody's hands included."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self.client("sqs").get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
        return sum(int(found[name]) for name in names)

    def send(self, url: str, body: object) -> None:
        """Put a message on a queue, as text or as JSON."""
        text = body if isinstance(body, str) else json.dumps(body)
        self.client("sqs").send_message(QueueUrl=url, MessageBody=text)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._directory / "moto.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class Gate:
    """Forwards HTTP to a server, and refuses it as S3 and SQS do while `refusal` (status, code) is set."""

    def __init__(self, target: str) -> None:
        self.refusal: tuple[int, str] | None = None
        self.calls = 0
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                gate.calls += 1
                if gate.refusal is not None:
                    self._refuse(*gate.refusal)
                    return
                request = urllib.request.Request(f"{target}{self.path}", body or None, method=self.command)
                for name, value in self.headers.items():
                    request.add_header(name, value)
                try:
                    with urllib.request.urlopen(request, timeout=30) as answer:
                        self._answer(answer.status, dict(answer.headers), answer.read())
                except urllib.error.HTTPError as exc:
                    self._answer(exc.code, dict(exc.headers), exc.read())

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do  # noqa: N815 -- the names are the library's

            def _refuse(self, status: int, code: str) -> None:
                if "x-amz-target" in self.headers:
                    text = json.dumps({"__type": f"com.amazonaws.sqs#{code}", "message": "no"})
                else:
                    text = f"<Error><Code>{code}</Code><Message>no</Message></Error>"
                self._answer(status, {}, text.encode())

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, name="gate", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def arn(queue: str) -> str:
    """Return the ARN of a queue."""
    return f"arn:aws:sqs:{REGION}:{ACCOUNT}:{queue}"
