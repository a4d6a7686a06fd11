"""A figure of curves with intervals: one panel for each setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Points of one line, in the order of x."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float]
    """Half the widths of intervals."""
    estimate: Sequence[float] = ()
    """Drawn dashed in the same colour; none: there is none."""


@dataclass(frozen=True)
class Panel:
    """Axes with curves."""

    title: str
    y_label: str
    curves: list[Curve] = field(default_factory=list)
    log_y: bool = False


def _powers_of_two(values: Sequence[float]) -> list[float]:
    """Those within the range of `values`."""
    low, high = (math.log2(of(values)) for of in (min, max))
    return [2.0**power for power in range(math.ceil(low), math.floor(high) + 1)]


def draw_panels(rows: Sequence[Sequence[Panel]], x_label: str, path: Path) -> None:
    """Writes a PNG of rows of panels with an axis x on a log scale, 1 being the threshold."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no curves: matplotlib is missing; pip install -e '.[benchmarks]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    width = max(map(len, rows))
    size = (5.5 * width, 4.2 * len(rows))
    figure, grid = plt.subplots(len(rows), width, figsize=size, squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        for panel, axes in zip(row, line, strict=False):
            colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(panel.curves)))
            for curve, color in zip(panel.curves, colors, strict=True):
                axes.errorbar(
                    curve.x,
                    curve.y,
                    curve.half,
                    color=color,
                    marker="o",
                    markersize=3,
                    linestyle="none" if curve.estimate else "-",
                    label=curve.label,
                )
                if curve.estimate:
                    axes.plot(curve.x, curve.estimate, "--", color=color, linewidth=1)
            axes.axvline(1, color="grey", linewidth=0.8)
            axes.set(xscale="log", title=panel.title, xlabel=x_label, ylabel=panel.y_label)
            axes.minorticks_off()
            ticks = _powers_of_two([x for curve in panel.curves for x in curve.x])
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            if panel.log_y:
                axes.set_yscale("log")
            axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
