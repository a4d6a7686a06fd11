"""Charts as SVG, lines over steps and histograms, drawn here: a page needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cce_torchrec.report.axes import (
    BOTTOM,
    HEIGHT,
    TOP,
    WIDTH,
    Axes,
    Format,
    grid_of,
    padded,
)
from cce_torchrec.report.html import Html, joined, tag
from cce_torchrec.report.numbers import short, whole

COLORS = 8
"""Colours there are, by number; the style sheet has them for light and dark."""
_MOST_POINTS = 400
"""Points of a line; of more, each is the mean of several."""
_FEW = 20
_MOST_HITS = 120
"""Points of a line that say their value."""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart."""

    name: str
    points: Sequence[Point]
    color: int
    style: str = "solid"
    """ "solid", "dashed", "dotted", or "faint"."""
    dots: bool = False
    """Whether each point is drawn."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A step at which something happened, of all lines or of those of one colour."""

    x: float
    label: str
    color: int | None = None


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A histogram: counts[i] of edges[i] to edges[i + 1]."""

    name: str
    edges: Sequence[float]
    counts: Sequence[float]
    color: int
    outline: bool = False
    """Drawn as its outline, in front of others."""


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    format: Format = short,
    unit: Format | None = None,
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
    late: bool = False,
    note: str = "",
    x_label: str = "step",
) -> Html | None:
    """A figure of lines over steps; None where no line has a point.

    Args:
        title: what is drawn.
        lines: those without points are left out.
        format: of the values, in what a point says.
        unit: how ticks are written, where they have a unit.
        marks: vertical lines.
        from_zero: the axis of values begins at 0.
        late: the axis has room for what comes after the first tenth of the steps, as losses fall
            fast at first, and runs differ by little at last.
        note: beside the title.
        x_label: what the other axis counts.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    thinned = [thin(line.points) for line in lines]
    axes = _axes_of(lines, thinned, marks, from_zero=from_zero, late=late)
    axes.format, axes.unit = format, unit
    parts = [grid_of(axes, x_label), _marks(axes, marks)]
    for line, points in zip(lines, thinned, strict=True):
        parts.append(_line(axes, line, _from_inside(points, axes.y)))
    if max(len(line.points) for line in lines) > _MOST_POINTS:
        note += " Each point is the mean of several."
    if not all(axes.y[0] <= y <= axes.y[1] for points in thinned for _, y in points):
        note += " The first steps are outside."
    said = note
    # Styles as well as colours, as not every reader tells colours apart.
    keys = [(line.name, line.color, line.style) for line in lines]
    return _figure(title, said.strip(), parts, keys)


def _axes_of(
    lines: Sequence[Line],
    thinned: Sequence[Sequence[Point]],
    marks: Sequence[Mark],
    *,
    from_zero: bool,
    late: bool,
) -> Axes:
    """Axes with room for what `line_chart` shows."""
    xs = [x for points in thinned for x, _ in points] + [mark.x for mark in marks]
    first, last = min(xs), max(xs)
    # Steps begin at 0, unless a run was resumed far from there.
    first = 0.0 if 0 < first < 0.2 * last else first
    every = [y for points in thinned for _, y in points]
    begin = first + (last - first) / 10 if late else first
    # Points that are drawn are never outside, nor lines of a few points.
    ys = [
        y
        for line, points in zip(lines, thinned, strict=True)
        for x, y in points
        if x >= begin or line.dots or len(points) < _FEW
    ]
    ys = ys or every
    return Axes((first, last), padded(min(ys), max(ys), from_zero))


def histogram_chart(
    title: str,
    layers: Sequence[Bars],
    *,
    x_label: str,
    note: str = "",
    equal_widths: bool = False,
) -> Html | None:
    """A figure of histograms over each other; None where there is nothing to count.

    Args:
        title: what is counted.
        layers: the first one is behind the others.
        x_label: what the bins are of.
        note: beside the title.
        equal_widths: bins are drawn equally wide, whatever their edges; these are the same for all.
    """
    layers = [layer for layer in layers if sum(layer.counts)]
    if not layers:
        return None
    if equal_widths:
        return _equal_bins(title, layers, x_label, note)
    low = min(layer.edges[0] for layer in layers)
    high = max(layer.edges[-1] for layer in layers)
    if low == high:  # all values are the same
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    most = max(max(layer.counts) for layer in layers)
    axes = Axes((low, high), (0, 1.08 * most), whole, whole_x=False)
    parts = [grid_of(axes, x_label)]
    parts += [_bars(axes, layer, layer.edges, _label(layer, short)) for layer in layers]
    return _figure(title, note, parts, _layer_keys(layers))


def _layer_keys(layers: Sequence[Bars]) -> list[tuple[str, int, str]]:
    """What a legend says of histograms: nothing of a single one."""
    return [(one.name, one.color, "bar") for one in layers] if len(layers) > 1 else []


def _equal_bins(title: str, layers: Sequence[Bars], x_label: str, note: str) -> Html:
    """Bins of whole numbers that grow, without those at both ends that are empty in all."""
    longest = max((layer.edges for layer in layers), key=len)
    used = [place for layer in layers for place, count in enumerate(layer.counts) if count]
    first, last = min(used), max(used) + 1
    most = max(max(layer.counts) for layer in layers)
    axes = Axes((first, last), (0, 1.08 * most), whole)
    parts = [
        grid_of(
            axes, x_label, labels=[(p + 0.5, _bin_name(longest, p)) for p in range(first, last)]
        )
    ]
    for layer in layers:
        cut = Bars(
            name=layer.name, edges=layer.edges[first : last + 1],
            counts=layer.counts[first:last], color=layer.color, outline=layer.outline,
        )  # fmt: skip
        places = [float(p) for p in range(first, first + len(cut.counts) + 1)]
        labels = [
            f"{layer.name}: {whole(count)} with {_bin_name(longest, first + place)}"
            for place, count in enumerate(cut.counts)
        ]
        parts.append(_bars(axes, cut, places, labels))
    return _figure(title, note, parts, _layer_keys(layers))


def _bin_name(edges: Sequence[float], place: int) -> str:
    low, high = edges[place], edges[place + 1] - 1
    return short(low) if high <= low else f"{short(low)}-{short(high)}"


def thin(points: Sequence[Point]) -> list[Point]:
    """At most so many points as a chart has room for, each the mean of those that follow."""
    size = -(-len(points) // _MOST_POINTS)
    if size <= 1:
        return list(points)
    blocks = [points[at : at + size] for at in range(0, len(points), size)]
    # The last step of a block, where its mean is known.
    return [(block[-1][0], sum(y for _, y in block) / len(block)) for block in blocks]


def _from_inside(points: Sequence[Point], room: tuple[float, float]) -> list[Point]:
    """Points from where a line that starts outside of the axis of values comes in."""
    low, high = room
    outside = [at for at, (_, y) in enumerate(points) if not low <= y <= high]
    inside = outside[-1] + 1 if outside else 0
    if not 0 < inside < len(points):
        return list(points[inside:])
    (x, y), (next_x, next_y) = points[inside - 1 : inside + 1]
    edge = high if y > high else low
    return [(x + (next_x - x) * (edge - y) / (next_y - y), edge), *points[inside:]]


def _marks(axes: Axes, marks: Sequence[Mark]) -> Html:
    parts = []
    for mark in marks:
        x, own = axes.left(mark.x), "" if mark.color is None else f" c{mark.color % COLORS}"
        title = tag("title", mark.label)
        line = tag("line", title, class_=f"mark{own}", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM)
        parts.append(line)
    return joined(parts)


def _line(axes: Axes, line: Line, points: Sequence[Point]) -> Html:
    # In tenths of a pixel, which keeps pages small.
    places = [(axes.left(x), axes.top(y)) for x, y in points]
    path = " ".join(f"{x:g},{y:g}" for x, y in places)
    color = f"c{line.color % COLORS}"
    parts = [tag("polyline", class_=f"line {line.style} {color}", points=path)]
    # Circles that nobody sees say what a point is, to a mouse and to a reader's voice.
    every = -(-len(points) // _MOST_HITS)
    shown = line.dots or len(points) == 1
    for (x, y), (at, value) in list(zip(places, points, strict=True))[::every]:
        title = tag("title", f"{line.name}, step {short(at)}: {axes.format(value)}")
        if shown:
            parts.append(tag("circle", title, class_=f"dot hit {color}", cx=x, cy=y, r=3))
        else:
            parts.append(tag("circle", title, class_=f"hit {color}", cx=x, cy=y, r=5))
    return tag("g", parts)


def _label(layer: Bars, format: Format) -> list[str]:
    pairs = zip(layer.edges, layer.edges[1:], layer.counts, strict=False)
    return [
        f"{layer.name}: {whole(count)} from {format(low)} to {format(high)}"
        for low, high, count in pairs
    ]


def _bars(axes: Axes, layer: Bars, places: Sequence[float], labels: Sequence[str]) -> Html:
    color, base = f"c{layer.color % COLORS}", axes.top(0)
    if places[0] == places[-1]:  # one value
        places = axes.x
    # The base on both sides, so that an outline is closed.
    parts, outline = [], [f"{axes.left(places[0])},{base}"]
    for low, high, count, label in zip(places, places[1:], layer.counts, labels, strict=False):
        left, right, top = axes.left(low), axes.left(high), axes.top(count)
        outline += [f"{left},{top}", f"{right},{top}"]
        if count or layer.outline:
            kind = "hit" if layer.outline else "bar hit"
            wide, high_ = max(0.5, right - left - 0.6), max(0.0, base - top)
            parts.append(
                tag("rect", tag("title", label), class_=f"{kind} {color}", x=left, y=top,
                    width=round(wide, 1), height=round(high_, 1))
            )  # fmt: skip
    if layer.outline:
        outline.append(f"{axes.left(places[-1])},{base}")
        parts.append(tag("polyline", class_=f"line {color}", points=" ".join(outline)))
    return tag("g", parts)


def _figure(
    title: str, note: str, parts: Sequence[Html], keys: Sequence[tuple[str, int, str]]
) -> Html:
    drawing = tag(
        "svg", tag("title", title), parts, class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img", aria_label=f"{title}. {note}".strip(),
    )  # fmt: skip
    legend = [
        tag("li", tag("span", class_=f"key {style} c{color % COLORS}"), name)
        for name, color, style in dict.fromkeys(keys)
    ]
    return tag(
        "figure",
        tag("figcaption", tag("b", title), tag("span", note) if note else None),
        drawing,
        # A single line that is called as the chart is needs no legend.
        tag("ul", legend, class_="legend")
        if [key[0] for key in keys] not in ([], [title])
        else None,
    )
