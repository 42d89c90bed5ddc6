"""What the steps do, on both sides: the workflows here and the Celery tasks in plain_celery.py call these functions."""

import time


def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)


def add_fib(total, n):
    return total + fib(n)


def noop(x):
    return x


def total(values):
    return sum(values)


def increment(x):
    return x + 1


def started(path):
    """Return when this was called, and the path by which the caller knows that it is his."""
    return {"at": time.time(), "path": path}
