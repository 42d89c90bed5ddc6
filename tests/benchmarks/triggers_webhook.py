"""How many webhook deliveries the gateway accepts a second, and how long each waits for its 202.

    python -m tests.benchmarks.triggers_webhook [--clients 32] [--seconds 10]

The gateway is a process on an embedded server, as are the clients, each with one connection that it keeps; deliveries
are signed, 1 kB, and have an id. Prints one JSON object. Nothing here is a test: no figure fails.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from orchestrator.cli.addresses import addresses
from orchestrator.engine import Engine
from orchestrator.events import digest
from tests.benchmarks.bench import process
from tests.benchmarks.triggers import embedded, percentile

SECRET = "It's a Secret to Everybody"
BODY = json.dumps({"action": "opened", "text": "x" * 970}).encode()
DEFINITION = """
workflow: hooked
on:
  - webhook: {path: hooked, verify: {github: env:HOOK_SECRET}}
steps:
  s: {task: "tasks:f"}
"""


async def _client(host: str, port: int, name: str, until: float, took: list[float]) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    signature = hmac.new(SECRET.encode(), BODY, hashlib.sha256).hexdigest()
    n = 0
    while time.monotonic() < until:
        n += 1
        began = time.perf_counter()
        writer.write(
            b"POST /hooks/hooked HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"X-Hub-Signature-256: sha256={signature}\r\nX-GitHub-Delivery: {name}-{n}\r\n".encode()
            + b"Content-Length: %d\r\n\r\n" % len(BODY)
            + BODY
        )
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        await reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 202"):
            raise RuntimeError(head.decode())
        took.append(time.perf_counter() - began)
    writer.close()


async def _deliver(host: str, port: int, clients: int, seconds: float, prefix: str) -> list[float]:
    took: list[float] = []
    until = time.monotonic() + seconds
    await asyncio.gather(*(_client(host, port, f"{prefix}{n}", until, took) for n in range(clients)))
    return took


def measure(clients: int = 32, seconds: float = 10.0) -> dict[str, Any]:
    """Return the figures: `accepted_per_s`, `p50_ms`, `p99_ms`, ..."""
    with tempfile.TemporaryDirectory() as made, embedded(Path(made)) as settings:
        (settings.project / "workflows").mkdir()
        (settings.project / "workflows" / "hooked.yaml").write_text(DEFINITION)
        (settings.project / "tasks.py").write_text("def f(): pass\n")
        env = {
            "HOOK_SECRET": SECRET,
            "ORCHESTRATOR_BROKER_URL": settings.broker_url,
            "ORCHESTRATOR_LEDGER_URL": settings.ledger_url,
            "ORCHESTRATOR_DATA_DIR": str(settings.data_dir),
        }
        command = [sys.executable, "-P", "-m", "orchestrator", "gateway", "--project", str(settings.project)]
        with process(command, Path(made) / "gateway.log", **env):
            host, port = _wait_for(settings.data_dir)
            asyncio.run(_deliver(host, port, clients, 1.0, "warm"))
            # In a process of their own: here is nothing that their time would be taken from.
            load = ["--deliver", host, str(port), "--clients", str(clients), "--seconds", str(seconds)]
            sent = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.triggers_webhook", *load],
                capture_output=True, check=True, text=True,
            )  # fmt: skip
        took = json.loads(sent.stdout)
        engine = Engine(settings)
        on_bus = engine.ledger.client.llen("orchestrator.events")
        engine.close()
    return {
        "clients": clients,
        "accepted_per_s": round(len(took) / seconds),
        "p50_ms": round(percentile(took, 0.5) * 1000, 1),
        "p99_ms": round(percentile(took, 0.99) * 1000, 1),
        "accepted": len(took),
        "on_bus": on_bus,
    }


def _wait_for(data_dir: Path) -> tuple[str, int]:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        host, _, port = addresses(data_dir).get("url", "").removeprefix("http://").rpartition(":")
        try:
            if host and asyncio.run(_answers(host, int(port))):
                return host, int(port)
        except OSError:
            pass
        time.sleep(0.05)
    raise RuntimeError("the gateway does not answer")


async def _answers(host: str, port: int) -> bool:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET /hooks/hooked HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer.startswith(b"HTTP/1.1 405")


def main() -> None:
    """Measure, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--deliver", nargs=2, metavar=("HOST", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.deliver:
        host, port = options.deliver
        run = digest(str(time.time()))[:8]
        print(json.dumps(asyncio.run(_deliver(host, int(port), options.clients, options.seconds, run))))
    else:
        print(json.dumps(measure(options.clients, options.seconds)))


if __name__ == "__main__":
    main()
