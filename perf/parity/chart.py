"""Two small pictures in SVG, drawn by hand: lines on a logarithmic scale, and bars of shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 190, 56, 118, 10, 26
# Told apart without colour too: each has a dash of its own.
STYLES = (("#0b4f9e", ""), ("#8a8f98", "5 3"), ("#b3261e", "2 3"))


def lines(names: Sequence[str], rows: Mapping[str, Sequence[float]]) -> Markup:
    """One line per row over the names, logarithmic; what is zero or not finite is left out."""
    shown = [value for row in rows.values() for value in row if 0 < value < math.inf]
    if not shown:
        return Markup('<p class="small">No difference at all.</p>')
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    high = max(high, low + 1)

    def y(value: float) -> float:
        return TOP + (high - math.log10(value)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    every = max(1, math.ceil((high - low) / 5))
    drawn = [_rule(y(10.0**power), f"1e{power}") for power in range(low, high + 1, every)]
    drawn += _names(names)
    heights = []
    for (name, row), (colour, dash) in zip(rows.items(), STYLES, strict=False):
        points = [(_x(place, len(names)), y(value)) for place, value in enumerate(row) if 0 < value < math.inf]
        if not points:
            continue
        path = " ".join(f"{x:.1f},{height:.1f}" for x, height in points)
        style = f'stroke="{colour}" stroke-width="2" fill="none" stroke-dasharray="{dash}"'
        drawn.append(f'<polyline points="{path}" {style}/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{height:.1f}" r="2.4" fill="{colour}"/>' for x, height in points]
        heights.append((points[-1][1], name, colour))
    return _svg(drawn + _legend(heights))


def bars(names: Sequence[str], shares: Sequence[float]) -> Markup:
    """One bar per share, 0 to 1; the scale begins just below the lowest."""
    low = min(0.9, math.floor(min(shares) * 10) / 10)

    def y(share: float) -> float:
        return TOP + (1 - share) / (1 - low) * (HEIGHT - TOP - BOTTOM)

    drawn = [_rule(y(low + step * (1 - low) / 2), f"{low + step * (1 - low) / 2:.0%}") for step in range(3)]
    drawn += _names(names)
    width = min(26.0, 0.6 * (WIDTH - LEFT - RIGHT) / len(names))
    for place, share in enumerate(shares):
        top = y(max(share, low))
        box = f'x="{_x(place, len(names)) - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}"'
        drawn.append(f'<rect {box} height="{max(HEIGHT - BOTTOM - top, 0):.1f}" fill="{STYLES[0][0]}"/>')
    return _svg(drawn)


def _x(place: int, count: int) -> float:
    return LEFT + (place + 0.5) * (WIDTH - LEFT - RIGHT) / count


def _rule(y: float, label: str) -> str:
    line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d5d8dd"/>'
    return line + f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'


def _names(names: Sequence[str]) -> list[str]:
    every = math.ceil(len(names) / 16)
    return [
        f'<text x="{_x(place, len(names)):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(name)}</text>'
        for place, name in enumerate(names)
        if place % every == 0
    ]


def _legend(heights: list[tuple[float, str, str]]) -> list[str]:
    """The rows' names at their lines' ends, moved apart where they would overlap."""
    drawn, last = [], -math.inf
    for y, name, colour in sorted(heights):
        last = max(y, last + 13)
        drawn.append(f'<text x="{WIDTH - RIGHT + 8}" y="{last + 4:.1f}" fill="{colour}">{escape(name)}</text>')
    return drawn


def _svg(drawn: Sequence[str]) -> Markup:
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(drawn)}</svg>')
