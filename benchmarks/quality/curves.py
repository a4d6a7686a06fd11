"""Curves of log loss and AUC against bytes and against parameters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.summary import Row

_X = {"table_bytes": "bytes of the compressed tables", "parameters": "trained values"}
_Y = {"log_loss": "validation log loss", "auc": "validation AUC"}


def write_curves(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes a PNG for each data set and number of passes; none without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no curves: matplotlib is missing; pip install -e '.[benchmarks]'")
        return []
    matplotlib.use("Agg")
    out = []
    known = [row for row in rows if row.records]
    by = sorted(known, key=lambda row: (row.group.dataset, row.group.passes))
    for (dataset, passes), part in itertools.groupby(
        by, key=lambda row: (row.group.dataset, row.group.passes)
    ):
        file = folder / f"{dataset}-{passes}.png"
        _plot(list(part), f"{dataset}, {passes} passes", file)
        out.append(file)
    return out


def _in_bytes(row: Row) -> bool:
    """Whether the budget is one of bytes: by parameters, codes are free and many are bought."""
    return row.group.budget.startswith(("bytes", "none"))


def _plot(rows: list[Row], title: str, file: Path) -> None:
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(13, 10), squeeze=False)
    methods = list(dict.fromkeys(row.group.method for row in rows))
    colors = plt.get_cmap("tab20").colors
    for (y, label), line in zip(_Y.items(), grid, strict=True):
        for (x, below), axes in zip(_X.items(), line, strict=True):
            for number, method in enumerate(methods):
                own = [
                    row
                    for row in rows
                    if row.group.method == method and (x != "table_bytes" or _in_bytes(row))
                ]
                if not own:
                    continue
                points = sorted((row.mean(x), row.mean(y)) for row in own)
                axes.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=3,
                    # Dashed: training holds the full table.
                    linestyle="--" if own[0].holds_full else "-",
                    color=colors[number % len(colors)],
                    label=method,
                )
            axes.set_xscale("log")
            axes.set_xlabel(below)
            axes.set_ylabel(label)
    grid[0][1].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
