"""Plots of a simulation as SVG, drawn by hand: small, and the same bytes for the same figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from .arrivals import Pattern
from .pool import Figures

COLOURS = {"Orchestrator": "#1f6feb", "Celery --autoscale": "#d9730d", "KEDA": "#2da44e"}
WIDTH, LEFT, RIGHT = 760, 52, 12
#: Top and height of the panels: processes, and waits.
SIZES, WAITS = (40, 124), (196, 90)
BINS = 240
WAIT_DECADES = (-1, 3)
TICKS = (60, 120, 300, 600, 1800, 3600, 7200, 10800)


def plot(pattern: Pattern, figures: Mapping[str, Figures], maximum: int, within_s: float) -> str:
    """Draw how many processes there were over time, and how long what began then had waited at most."""
    end_s = pattern.horizon_s
    width = end_s / BINS
    most = max(size for name in COLOURS for _, size in figures[name].sizes)
    top = max(4, math.ceil(min(most, maximum) / 4) * 4)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 320" font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="320" fill="#fff"/>',
        f'<text x="{LEFT}" y="16" font-size="13">{pattern.title}</text>',
    ]
    for x, (name, colour) in zip((500, 592, 716), COLOURS.items(), strict=True):
        lines.append(f'<text x="{x}" y="16" fill="{colour}">{name}</text>')
    lines += [_level(f"{level}", _y(level / top, SIZES)) for level in (0, top // 2, top)]
    lines += [_text("processes", SIZES), _text("longest wait", WAITS)]
    for decade in range(WAIT_DECADES[0], WAIT_DECADES[1] + 1):
        lines.append(_level(f"{10.0**decade:g} s", _wait_y(10.0**decade)))
    step_s = next(step for step in TICKS if end_s / step < 10)
    for at in range(int(end_s / step_s) + 1):
        x = LEFT + (WIDTH - LEFT - RIGHT) * at * step_s / end_s
        anchor = "end" if x > WIDTH - 2 * RIGHT else "middle"
        lines.append(f'<text x="{x:.0f}" y="302" text-anchor="{anchor}">{_moment(at * step_s, end_s)}</text>')
    load = _averages(_load(pattern), width)
    area = "".join(f"L{_x(index)} {_y(min(1, each / top), SIZES):.0f}h{_step()}" for index, each in enumerate(load))
    base = _y(0, SIZES)
    lines.append(f'<path fill="#ddd" d="M{LEFT} {base:.0f}{area}V{base:.0f}z"/>')
    for name, colour in COLOURS.items():
        sizes = _averages(figures[name].sizes, width)
        lines.append(_line(((index, _y(min(1, each / top), SIZES)) for index, each in enumerate(sizes)), colour))
        longest: dict[int, float] = {}
        for at_s, wait_s in figures[name].begun:
            index = int(at_s / width)
            longest[index] = max(longest.get(index, 0.0), wait_s)
        shown = ((index, _wait_y(wait)) for index, wait in sorted(longest.items()) if index < BINS)
        lines.append(_line(shown, colour))
    y = _wait_y(within_s)
    lines.append(f'<path stroke="#c00" stroke-dasharray="4 3" d="M{LEFT} {y:.0f}H{WIDTH - RIGHT}"/>')
    lines.append("</svg>\n")
    return "\n".join(lines)


def _load(pattern: Pattern) -> list[tuple[float, int]]:
    """Return how many messages would be in work if each began at once."""
    turns = sorted([(at, 1) for at, _ in pattern.messages] + [(at + held, -1) for at, held in pattern.messages])
    count, load = 0, [(0.0, 0)]
    for at_s, change in turns:
        count += change
        load.append((at_s, count))
    return load


def _averages(steps: Sequence[tuple[float, int]], width: float) -> list[float]:
    """Return the average of a step function in each bin."""
    sums = [0.0] * BINS
    for (from_s, level), (to_s, _) in zip(steps, [*steps[1:], (BINS * width, 0)], strict=True):
        at_s, end_s = from_s, min(to_s, BINS * width)
        while level and at_s < end_s:
            index = min(BINS - 1, int(at_s / width + 1e-9))
            until_s = min(end_s, (index + 1) * width)
            if until_s <= at_s:
                break
            sums[index] += level * (until_s - at_s)
            at_s = until_s
    return [each / width for each in sums]


def _line(points: Iterable[tuple[int, float]], colour: str) -> str:
    path, last = "", None
    for index, y in points:
        path += f"L{_x(index)} {y:.0f}h{_step()}" if index - 1 == last else f"M{_x(index)} {y:.0f}h{_step()}"
        last = index
    return f'<path fill="none" stroke="{colour}" stroke-width="1.3" d="{path}"/>'


def _level(name: str, y: float) -> str:
    line = f'<path stroke="#eee" d="M{LEFT} {y:.0f}H{WIDTH - RIGHT}"/>'
    return f'{line}<text x="{LEFT - 5}" y="{y + 4:.0f}" text-anchor="end">{name}</text>'


def _text(name: str, panel: tuple[int, int]) -> str:
    return f'<text x="{LEFT}" y="{panel[0] - 6}" fill="#666">{name}</text>'


def _x(index: int) -> str:
    return f"{LEFT + (WIDTH - LEFT - RIGHT) * index / BINS:.1f}"


def _step() -> str:
    return f"{(WIDTH - LEFT - RIGHT) / BINS:.1f}"


def _y(share: float, panel: tuple[int, int]) -> float:
    return panel[0] + panel[1] * (1 - share)


def _wait_y(wait_s: float) -> float:
    low, high = WAIT_DECADES
    decade = min(high, max(low, math.log10(max(wait_s, 1e-9))))
    return _y((decade - low) / (high - low), WAITS)


def _moment(moment_s: float, end_s: float) -> str:
    if not moment_s:
        return "0"
    return f"{moment_s / 3600:.3g} h" if end_s > 7200 else f"{moment_s / 60:.3g} min"
