"""W1 and W2: steps in a row, each with the sum of those before."""

import tasks

from orchestrator import task, workflow

add_fib = task(tasks.add_fib)


@workflow
def row_of_40():
    total = 0
    for _ in range(40):
        total = add_fib(total, n=10)
    return total


@workflow
def row_of_10():
    total = 0
    for _ in range(10):
        total = add_fib(total, n=30)
    return total
