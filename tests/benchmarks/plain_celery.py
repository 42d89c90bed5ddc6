"""The same work on plain Celery, as somebody who knows it would write it.

Redis is broker and result backend. Like ours, tasks are acknowledged late and a lost worker's task comes back. Of what
can be chosen for speed, the faster was taken: prefetch stays at Celery's default of 4 (with 1 it is a little slower),
logging is at WARNING, gossip and mingle are off. The worker is `celery -A plain_celery worker -c 2`.
"""

from __future__ import annotations

import os

from celery import Celery, chain, chord
from celery.canvas import Signature
from project import tasks

app = Celery("plain", broker=os.environ["BENCH_PLAIN_URL"], backend=os.environ["BENCH_PLAIN_URL"])
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=int(os.environ.get("BENCH_PLAIN_PREFETCH", "4")),
    broker_connection_retry_on_startup=True,
)

add_fib = app.task(tasks.add_fib)
noop = app.task(tasks.noop)
total = app.task(tasks.total)
increment = app.task(tasks.increment)
started = app.task(tasks.started)


def row(steps: int, n: int) -> Signature:
    """W1 and W2."""
    return chain(add_fib.s(0, n), *(add_fib.s(n) for _ in range(steps - 1)))


def fan(items: int) -> Signature:
    """W3."""
    return chord([noop.s(i) for i in range(items)], total.s())


def diamond(x: int) -> Signature:
    """W4."""
    return increment.s(x) | chord([increment.s(), increment.s()], total.s()) | increment.s()
