"""What comes: messages with the moment at which each is published and the seconds for which it holds a process.

All of it is drawn from a fixed seed, so that figures and plots come out the same each time.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = 6
#: (published_s, held_s)
Message = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """Messages in the order in which they come, and for how long one looks at least."""

    name: str
    title: str
    messages: Sequence[Message]
    horizon_s: float

    @property
    def work_s(self) -> float:
        """For how long one process would work on all of them."""
        return sum(held_s for _, held_s in self.messages)

    @property
    def mean_load(self) -> float:
        """How many processes would be at work on average while messages come."""
        return self.work_s / max(1.0, self.messages[-1][0] - self.messages[0][0])


def held(rng: random.Random, mean_s: float) -> float:
    """Draw how long a message takes: most are near to the mean, few take several times as long."""
    return rng.lognormvariate(math.log(mean_s) - 0.125, 0.5)


def poisson(rng: random.Random, rate: Callable[[float], float], most: float, end_s: float) -> list[float]:
    """Draw moments at a rate that changes with time and is never above `most`."""
    moments, now_s = [], 0.0
    while (now_s := now_s + rng.expovariate(most)) < end_s:
        if rng.random() * most < rate(now_s):
            moments.append(now_s)
    return moments


def steady() -> Pattern:
    rng = random.Random(SEED)
    messages = [(at_s, held(rng, 0.5)) for at_s in poisson(rng, lambda _: 10, 10, 600)]
    return Pattern(name="steady", title="steady: 10 a second, 0.5 s each", messages=messages, horizon_s=900)


def burst() -> Pattern:
    rng = random.Random(SEED)
    messages = [(at_s, held(rng, 0.5)) for at_s, count in ((30, 100), (630, 300), (1230, 1000)) for _ in range(count)]
    return Pattern(
        name="burst", title="bursts: 100, 300 and 1,000 at once, 0.5 s each", messages=messages, horizon_s=1800
    )


def on_off() -> Pattern:
    rng = random.Random(SEED)
    messages = [(at_s, held(rng, 0.5)) for at_s in poisson(rng, lambda at_s: 10 * (at_s % 120 < 20), 10, 1200)]
    return Pattern(name="on-off", title="on-off: 20 s of 10 a second, 100 s of none", messages=messages, horizon_s=1500)


def daily() -> Pattern:
    rng = random.Random(SEED)

    def rate(at_s: float) -> float:
        return 4 * max(0.0, math.sin(math.pi * (at_s / 3600 - 6) / 12)) ** 2

    messages = [(at_s, held(rng, 2.0)) for at_s in poisson(rng, rate, 4, 86400)]
    return Pattern(
        name="daily", title="a day: none at night, 4 a second at noon, 2 s each", messages=messages, horizon_s=86400
    )


def long_among_short() -> Pattern:
    rng = random.Random(SEED)
    moments = poisson(rng, lambda _: 5, 5, 2400)[:10_000]
    messages = [(at_s, 7200.0 if index == 2000 else held(rng, 0.5)) for index, at_s in enumerate(moments)]
    return Pattern(name="long", title="one step of 2 hours among 10,000 of 0.5 s", messages=messages, horizon_s=8400)


def long_after_short() -> Pattern:
    rng = random.Random(SEED)
    short = [(30 + index / 100, held(rng, 0.02)) for index in range(5000)]
    long = [(200 + index / 10, held(rng, 60)) for index in range(20)]
    return Pattern(name="change", title="5,000 of 20 ms, then 20 of a minute", messages=[*short, *long], horizon_s=900)


def mixed() -> Pattern:
    rng = random.Random(SEED)
    moments = poisson(rng, lambda _: 1, 1, 3600)
    messages = [(at_s, held(rng, 60 if rng.random() < 0.1 else 0.2)) for at_s in moments]
    return Pattern(
        name="mixed", title="1 a second; one in ten takes a minute, others 0.2 s", messages=messages, horizon_s=4500
    )


def trickle() -> Pattern:
    rng = random.Random(SEED)
    messages = [(at_s, held(rng, 2.0)) for at_s in poisson(rng, lambda _: 1 / 300, 1 / 300, 6 * 3600)]
    return Pattern(name="trickle", title="one each five minutes, 2 s", messages=messages, horizon_s=6 * 3600)


def recorded() -> Pattern:
    body = json.loads((Path(__file__).parent / "recorded.json").read_text())
    messages = [(at_ms / 1000, held_ms / 1000) for at_ms, held_ms in body["messages"]]
    return Pattern(name="recorded", title=body["title"], messages=messages, horizon_s=body["horizon_s"])


PATTERNS = (steady, burst, on_off, daily, long_among_short, long_after_short, mixed, trickle, recorded)
