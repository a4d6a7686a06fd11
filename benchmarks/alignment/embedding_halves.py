"""Part `halves`: what runs agree on because they saw the same examples, and what is beyond those.

Six full or compressed tables are trained with seeds of their own: three on one half of the training
examples and three on the other. Two runs on one half share the examples with their noise, two on
different halves share only what the examples are drawn from.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.alignment.embedding_measures import (
    BINS,
    cka,
    shared_neighbours,
    shown,
)
from benchmarks.alignment.embedding_plot import Axes, Line, draw
from benchmarks.alignment.embedding_runs import SPLIT, Data, cell_of, trained
from benchmarks.alignment.parts import Part, Record
from benchmarks.quality.training import dataset_of

RUNS = 6
_STUDENT = 2.571
"""97.5 % quantile for six runs."""
MIDDLE = {"flights": "bytes=420000", "ml-1m": "bytes=104000", "gowalla": "bytes=700000"}
PAIRS = list(combinations(range(RUNS), 2))
SAME = [(a, b) for a, b in PAIRS if (b - a) % 2 == 0]
OTHER = [(a, b) for a, b in PAIRS if (b - a) % 2]


@dataclass(frozen=True)
class HalvesCell:
    """Six runs of a method, even ones on one half of the examples and odd ones on the other."""

    dataset: str
    method: str
    share: float = 1.0

    @property
    def key(self) -> str:
        """See `Cell`."""
        return f"halves|{self.dataset}|{self.method}|share={self.share:g}|runs={RUNS}|version=1"

    def measure(self) -> Record:
        """See `Cell`."""
        budget = "none" if self.method == "full" else MIDDLE[self.dataset]
        data = Data(share=self.share, halves=True)
        runs = [
            trained(cell_of(self.dataset, self.method, budget, number), data, number)
            for number in range(RUNS)
        ]
        tables: dict[str, Any] = {}
        for name, (one, other) in _counts(self.dataset, data).items():
            known, mean = ((one > 0) & (other > 0)).nonzero()[:, 0], (one + other) / 2
            vectors = [run.vectors[name] for run in runs]
            tables[name] = {
                "ids": len(known),
                "cka": _both(vectors, known, cka),
                "neighbours": _both(vectors, known, shared_neighbours),
                "bins": _bins(vectors, known, mean),
            }
        return {
            "on": self.dataset,
            "method": self.method,
            "log_loss": [round(min(point[1] for point in run.curve), 5) for run in runs],
            "tables": tables,
        }


def _counts(dataset: str, data: Data) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Training examples [N] of each id, in either half."""
    whole = dataset_of(dataset, SPLIT)
    halves = [data.of(whole, number).train for number in (0, 1)]
    out = {}
    for column, (name, size) in enumerate(whole.features.items()):
        if name in whole.compressed:
            first, second = (torch.bincount(h.ids[:, column], minlength=size) for h in halves)
            out[name] = first, second
    return out


def over_halves(values: Mapping[tuple[int, int], float]) -> list[float]:
    """Mean and half its 95 % interval: of pairs on one half, on different halves, and between.

    Intervals are by leaving out each run once. The last two figures are how much lower the measure
    is between halves.

    Args:
        values: of each pair of runs.
    """

    def means(left_out: int | None) -> np.ndarray:
        same, other = (
            statistics.fmean(values[pair] for pair in pairs if left_out not in pair)
            for pairs in (SAME, OTHER)
        )
        return np.array([same, other, same - other])

    without = np.stack([means(run) for run in range(RUNS)])
    variance = (RUNS - 1) / RUNS * ((without - without.mean(0)) ** 2).sum(0)
    pairs = np.stack([means(None), _STUDENT * np.sqrt(variance)], axis=1)
    return [round(float(value), 4) for value in pairs.reshape(-1)]


def _both(
    vectors: Sequence[torch.Tensor],
    ids: torch.Tensor,
    measure: Callable[[torch.Tensor, torch.Tensor], float | None],
) -> list[float] | None:
    found = {(a, b): measure(vectors[a][ids], vectors[b][ids]) for a, b in PAIRS}
    whole = {pair: value for pair, value in found.items() if value is not None}
    return over_halves(whole) if len(whole) == len(PAIRS) else None


def _bins(
    vectors: Sequence[torch.Tensor], known: torch.Tensor, counts: torch.Tensor
) -> list[list[float]]:
    found = []
    for low, high in zip(BINS, (*BINS[1:], math.inf), strict=True):
        ids = known[(counts[known] >= low) & (counts[known] < high)]
        own = _both(vectors, ids, cka)
        if own is not None:
            found.append([low, len(ids), *own])
    return found


def _cells(quick: bool) -> list[HalvesCell]:
    if quick:
        return [HalvesCell("ml-1m", "full", 0.1)]
    return [HalvesCell(on, method) for on in MIDDLE for method in ("full", "ours")]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _three(found: Sequence[float] | None) -> list[str]:
    if found is None:
        return ["", "", ""]
    return [shown((found[i], found[i + 1])) for i in (0, 2, 4)]


def _tables(records: Sequence[Record]) -> list[str]:
    out = [
        _row("data", "method", "table", "ids", "CKA, same half", "other half", "lower by",
             "neighbours, same half", "other half", "lower by"),
        _row(*["---"] * 10),
    ]  # fmt: skip
    for one in records:
        for name, table in one["tables"].items():
            found = [*_three(table["cka"]), *_three(table["neighbours"])]
            out.append(_row(one["on"], one["method"], name, f"{table['ids']:,}", *found))
    return out


def _frequency(records: Sequence[Record]) -> list[str]:
    out = [
        _row("data", "method", "table", "examples an id, from", "ids", "CKA, same half",
             "other half", "lower by"),
        _row(*["---"] * 8),
    ]  # fmt: skip
    for one in records:
        for name, table in one["tables"].items():
            for low, ids, *found in table["bins"]:
                out.append(_row(one["on"], one["method"], name, low, f"{ids:,}", *_three(found)))
    return out


def _lines(records: Sequence[Record]) -> list[str]:
    return [
        f"{RUNS} runs with seeds of their own, three on each half of the training examples; ids "
        "that both halves have; ± half of a 95 % interval over runs.",
        "",
        *_tables(records),
        "",
        *_frequency(records),
    ]


def _draw(records: Sequence[Record], file: Path) -> None:
    panels = []
    for one in records:
        lines = []
        for name, table in one["tables"].items():
            for label, at in (("same half", 2), ("other half", 4)):
                x, y, half = ([b[i] for b in table["bins"]] for i in (0, at, at + 1))
                if len(x) > 1:
                    lines.append(Line(f"{name}, {label}", x, y, half))
        title = f"{one['on']}, {one['method']}"
        panels.append(Axes(title, "examples an id, from", "debiased CKA", lines, log_x=True))
    draw([panel for panel in panels if panel.lines], file)


PART = Part(
    name="halves",
    title="Tables of runs on the same half of the data, and on different ones",
    cells=_cells,
    lines=_lines,
    draw=_draw,
)
