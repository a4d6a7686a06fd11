"""Plots of how embedding tables agree: panels of lines with intervals, or of points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Line:
    """Points of one line, in the order of x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float] = ()
    """Half the widths of intervals; none: points without a line."""


@dataclass(frozen=True)
class Axes:
    """A panel."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line] = field(default_factory=list)
    log_x: bool = False


def draw(panels: Sequence[Axes], path: Path) -> None:
    """Writes a PNG; none without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no curves: matplotlib is missing; pip install -e '.[benchmarks]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False)
    for panel, axes in zip(panels, grid.flat, strict=False):
        for line in panel.lines:
            if line.half:
                axes.errorbar(
                    line.x, line.y, line.half, marker="o", markersize=3, capsize=2, label=line.label
                )
            else:
                axes.plot(line.x, line.y, "o", markersize=4, label=line.label)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        if panel.log_x:
            axes.set_xscale("log")
        axes.grid(linewidth=0.3)
        axes.legend(fontsize=7)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
