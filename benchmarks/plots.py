"""One plot for all benchmarks: horizontal bars of ratios, with their goals."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def ratio_plot(bars: list[tuple[str, float, Any]], label: str, path: Path) -> None:
    """Writes a PNG of `bars` (name, ratio, goal or None)."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"no {path.name}: matplotlib is missing; pip install -e '.[benchmarks]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1 + 0.32 * len(bars)))
    axes.barh([name for name, _, _ in bars], [value for _, value, _ in bars], color="#4a7ebb")
    for y, (_, _, goal) in enumerate(bars):
        if goal is not None:
            axes.plot([goal, goal], [y - 0.4, y + 0.4], color="black")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel(f"{label} (black: goal)")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
