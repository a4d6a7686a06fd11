"""The axes of a chart: where numbers are on it, and the lines and labels beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cce_torchrec.report.html import Html, joined, tag
from cce_torchrec.report.numbers import short, tick_label, ticks

WIDTH, HEIGHT = 520, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40
"""Room beside the drawing for labels."""

Format = Callable[[float], str]


@dataclass
class Axes:
    """Where numbers are on a chart."""

    x: tuple[float, float]
    y: tuple[float, float]
    format: Format = field(default=short)
    unit: Format | None = None
    """How ticks are written, where they have a unit."""
    whole_x: bool = True

    def left(self, value: float) -> float:
        """Where a number is from left to right."""
        low, high = self.x
        share = (value - low) / (high - low) if high > low else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def top(self, value: float) -> float:
        """Where a number is from the top down."""
        low, high = self.y
        share = (value - low) / (high - low) if high > low else 0.5
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def padded(low: float, high: float, from_zero: bool) -> tuple[float, float]:
    """The ends of an axis with some room around what it shows."""
    if from_zero and low >= 0:
        return 0.0, high * 1.08 or 1.0
    room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return low - room, high + room


def grid_of(axes: Axes, x_label: str, labels: Sequence[tuple[float, str]] | None = None) -> Html:
    """Lines and labels of both axes."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    # Steps, epochs, ids: there is nothing between whole numbers of them.
    across = [x for x in ticks(*axes.x, 6) if not axes.whole_x or x == round(x)]
    up = ticks(*axes.y, 6)
    parts = []
    for value in up:
        y = axes.top(value)
        parts.append(tag("line", class_="grid", x1=LEFT, x2=right, y1=y, y2=y))
        label = axes.unit(value) if axes.unit and value else tick_label(value, up)
        parts.append(tag("text", label, x=LEFT - 7, y=y + 4, text_anchor="end"))
    named = [(value, tick_label(value, across)) for value in across] if labels is None else labels
    # As many as have room; names of bins are longer than numbers.
    every = -(-len(named) // (8 if labels is None else 6))
    for value, label in named[::every]:
        x = axes.left(value)
        parts.append(tag("text", label, x=x, y=bottom + 17, text_anchor="middle"))
    parts.append(tag("line", class_="axis", x1=LEFT, x2=right, y1=bottom, y2=bottom))
    middle = (LEFT + right) / 2
    parts.append(tag("text", x_label, x=middle, y=HEIGHT - 5, text_anchor="middle", class_="name"))
    return joined(parts)
