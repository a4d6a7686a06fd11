"""Curves of log loss and AUC against bytes and against parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.budgets import Budget
from benchmarks.quality.methods import METHODS
from benchmarks.quality.summary import Row

_X = {"table_bytes": "bytes of the compressed tables", "parameters": "trained values"}
OURS, RESTARTED = "ours", " restarted"
OVERVIEW = (
    OURS, "CE", "CE restarted", "ROBE restarted", "QR", "hash", "CAFE", "CCE, as published",
    "TT-Rec", "low rank", "DHE", "product quantisation",
)  # fmt: skip
"""What the picture of all data sets shows."""
_Y = {"log_loss": "validation log loss", "auc": "validation AUC"}


def write_curves(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes a PNG for each data set and number of passes, one of all; none without matplotlib.

    Restarted methods have the colour of those that are not, and broken lines; dotted lines are of
    methods that hold the full table while they train.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no curves: matplotlib is missing; pip install -e '.[benchmarks]'")
        return []
    matplotlib.use("Agg")
    out = []
    known = sorted((row for row in rows if row.records), key=_title)
    parts = {title: list(part) for title, part in itertools.groupby(known, key=_title)}
    for (dataset, passes), part in parts.items():
        file = folder / f"{dataset}-{passes}.png"
        _plot(part, f"{dataset}, {passes} passes", file)
        out.append(file)
    several = {title: part for title, part in parts.items() if len(_budgets(part)) > 1}
    if several:
        out.append(folder / "overview.png")
        _overview(several, out[-1])
    return out


def _title(row: Row) -> tuple[str, int]:
    return row.group.dataset, row.group.passes


def _in_bytes(row: Row) -> bool:
    """Whether the budget is one of bytes: by parameters, codes are free and many are bought."""
    return row.group.budget.startswith(("bytes", "none"))


def _family(method: str) -> str:
    return method.removesuffix(RESTARTED)


def _draw(axes: Any, rows: Sequence[Row], x: str, y: str, methods: Iterable[str]) -> None:
    """A line for each of `methods`, by which colours go."""
    from matplotlib import pyplot as plt

    families = list(dict.fromkeys(_family(method) for method in methods if method != OURS))
    colors = plt.get_cmap("tab10" if len(families) <= 10 else "tab20").colors
    for method in methods:
        own = [row for row in rows if row.group.method == method]
        if x == "table_bytes":
            own = [row for row in own if _in_bytes(row)]
        points = sorted((row.mean(x), row.mean(y)) for row in own)
        if not points:
            continue
        dashes = "--" if method.endswith(RESTARTED) else "-"
        ours = method == OURS
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=5 if ours else 3,
            linewidth=2.5 if ours else 1.2,
            linestyle=":" if own[0].holds_full else dashes,
            color="black" if ours else colors[families.index(_family(method)) % len(colors)],
            label=method,
        )
    axes.set_xscale("log")
    axes.set_xlabel(_X[x])
    axes.set_ylabel(_Y[y])


def _plot(rows: list[Row], title: str, file: Path) -> None:
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(13, 10), squeeze=False)
    for y, line in zip(_Y, grid, strict=True):
        for x, axes in zip(_X, line, strict=True):
            _draw(axes, rows, x, y, METHODS)
    figure.suptitle(title)
    _save(figure, file)


def _overview(parts: Mapping[tuple[str, int], Sequence[Row]], file: Path) -> None:
    """Log loss by bytes of every data set, of well-known methods; full tables as a line."""
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(1, len(parts), figsize=(4.2 * len(parts), 4.2), squeeze=False)
    for ((dataset, passes), rows), axes in zip(parts.items(), grid[0], strict=True):
        _draw(axes, rows, "table_bytes", "log_loss", OVERVIEW)
        for row in rows:
            if row.group.method == "full":
                axes.axhline(row.mean("log_loss"), color="gray", linewidth=1, label="full tables")
        budgets = _budgets(rows)
        axes.set_xticks(budgets, [f"{amount / 1000:,.0f} kB" for amount in budgets])
        axes.minorticks_off()
        axes.set_title(f"{dataset}, {passes} pass{'es' if passes > 1 else ''}")
    _save(figure, file)


def _budgets(rows: Iterable[Row]) -> list[float]:
    """Those of bytes, rising."""
    budgets = {row.group.budget for row in rows if row.group.budget.startswith("bytes")}
    return sorted(Budget.parse(budget).amount for budget in budgets)


def _save(figure: Any, file: Path) -> None:
    """With one legend of all lines, below."""
    from matplotlib import pyplot as plt

    lines = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        lines |= dict(zip(labels, handles, strict=True))
    figure.tight_layout()
    figure.legend(
        lines.values(),
        lines,
        fontsize=9,
        ncols=7,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
    )
    figure.savefig(file, dpi=100, bbox_inches="tight")
    plt.close(figure)
