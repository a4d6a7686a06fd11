"""Part `clusterings`: what each clustering step does to the alignment of two runs' CCE tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from benchmarks.alignment.embedding_measures import cka, of_pairs, over_runs, shown
from benchmarks.alignment.embedding_plot import Axes, Line, draw
from benchmarks.alignment.embedding_runs import Data, TableRun, cell_of, counts_of
from benchmarks.alignment.parts import Part, Record
from benchmarks.quality import cells
from benchmarks.quality.methods.clustered import Clustered
from cce_torchrec.alignment import CodeCounts, adjusted_mutual_information
from cce_torchrec.codes.chunk_codes import local_codes

_METHOD = "CCE, frequent recipe"
_RUNS = 4
_SHOWN = 8
"""Rows of the table of each cell."""


class _WatchedRun(TableRun):
    """A run that keeps vectors before and after its clusterings, or at their steps without them."""

    def __init__(self, cell: cells.Cell, clusters: bool) -> None:
        super().__init__(cell, Data(), 0)
        self.steps: list[int] = []
        self.before: list[dict[str, torch.Tensor]] = []
        self.after: list[dict[str, torch.Tensor]] = []
        self.codes: list[dict[str, torch.Tensor]] = []
        if not isinstance(self.embedder, Clustered):
            raise ValueError(f"{cell.group.method} has no codes of its own for each table")
        self._tables, self._due = self.embedder, frozenset(self.embedder.clusterings)
        if not clusters:
            self._tables.clusterings = ()
        clustered = self.embedder.after

        def watched(step: int) -> None:
            if step not in self._due:
                return
            self.steps.append(step)
            self.before.append(self.read_vectors())
            clustered(step)
            self.after.append(self.read_vectors())
            self.codes.append({c.name: self._codes(c.name) for c in self._tables.configs})

        self.embedder.after = watched  # type: ignore[method-assign]  # of this run alone

    def _codes(self, name: str) -> torch.Tensor:
        """Main rows [c, N] of all ids."""
        size = self.tables.sizes[self.tables.names.index(name)]
        codes = local_codes(self._tables.collection.codes, name)
        return codes.main_rows(torch.arange(size)).clone()


@dataclass(frozen=True)
class ClusteringsCell:
    """Runs of CCE with seeds of their own, with clusterings or without."""

    dataset: str
    budget: str
    clusters: bool

    @property
    def key(self) -> str:
        """See `Cell`."""
        return (
            f"clusterings|{self.dataset}|{self.budget}|clusters={self.clusters}|runs={_RUNS}|"
            "version=1"
        )

    def measure(self) -> Record:
        """See `Cell`."""
        runs = []
        for seed in range(_RUNS):
            run = _WatchedRun(cell_of(self.dataset, _METHOD, self.budget, seed), self.clusters)
            run.train()
            runs.append(run)
        counts = counts_of(self.dataset, Data())
        watched = []
        for at, step in enumerate(runs[0].steps):
            row: list[float] = [step]
            for kept in ("before", "after"):
                snapshots = [getattr(run, kept)[at] for run in runs]
                tables = [
                    of_pairs(snapshots, name, own.nonzero()[:, 0], cka)
                    for name, own in counts.items()
                ]
                pairs = [
                    statistics.fmean(v for v in p if v is not None)
                    for p in zip(*tables, strict=True)
                ]
                row += [round(value, 4) for value in over_runs(pairs, _RUNS)]
            agreed = [
                statistics.fmean(_code_agreement(a.codes[at], b.codes[at]))
                for a, b in combinations(runs, 2)
            ]
            row += [round(value, 4) for value in over_runs(agreed, _RUNS)]
            watched.append(row)
        return {
            "on": self.dataset,
            "budget": self.budget,
            "clusters": self.clusters,
            "runs": _RUNS,
            "log_loss": [round(min(point[1] for point in run.curve), 5) for run in runs],
            # Step, CKA before, its interval, after, its interval, agreement of codes, its interval.
            "watched": watched,
        }


def _code_agreement(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[float]:
    """Adjusted mutual information of each chunk of each table."""
    found = []
    for name, codes in a.items():
        for own, other in zip(codes, b[name], strict=True):
            rows = int(own.max()) + 1, int(other.max()) + 1
            counts = CodeCounts(rows)
            counts.add(own, other)
            found.append(adjusted_mutual_information(counts))
    return found


def _cells(quick: bool) -> list[ClusteringsCell]:
    every = [
        ClusteringsCell("ml-1m", "bytes=104000", clusters=True),
        ClusteringsCell("ml-1m", "bytes=104000", clusters=False),
        ClusteringsCell("ml-1m", "bytes=300000", clusters=True),
    ]
    return every[:1] if quick else every


def _lines(records: Sequence[Record]) -> list[str]:
    out = [
        f"CKA (debiased) between runs of {_METHOD}, mean over users and items, ± half of a 95 % "
        f"interval over {_RUNS} runs. Codes: adjusted mutual information, mean over chunks.",
        "",
        "| data | bytes | step | CKA before the clustering | after it | codes | lowest log loss |",
        "| --- " * 7 + "|",
    ]
    for one in records:
        rows = one["watched"]
        every = max(1, -(-len(rows) // _SHOWN))
        for row in [*rows[: every * (_SHOWN - 1) : every], rows[-1]]:
            step, *values = row
            pairs = [shown((values[i], values[i + 1])) for i in (0, 2, 4)]
            if not one["clusters"]:
                pairs[1:] = ["not clustered", ""]
            loss = f"{statistics.fmean(one['log_loss']):.4f}"
            budget = one["budget"].removeprefix("bytes=")
            out.append(f"| {one['on']} | {budget} | {step} | {' | '.join(pairs)} | {loss} |")
    out.append("")
    for one in records:
        rises = [row[3] - row[1] for row in one["watched"]]
        if one["clusters"]:
            out.append(
                f"Of {len(rises)} clusterings at {one['budget'].removeprefix('bytes=')} bytes "
                f"{sum(rise > 0 for rise in rises)} raise CKA at once, by "
                f"{statistics.fmean(rises):+.4f} on average."
            )
    return out


def _draw(records: Sequence[Record], file: Path) -> None:
    vectors, codes = [], []
    for one in records:
        label = f"{one['on']}, {one['budget'].removeprefix('bytes=')} bytes"
        label += "" if one["clusters"] else ", never clustered"
        steps, *columns = zip(*one["watched"], strict=True)
        vectors.append(Line(label, steps, columns[2], columns[3]))
        if one["clusters"]:
            codes.append(Line(label, steps, columns[4], columns[5]))
    panels = [
        Axes("vectors", "step of a clustering", "debiased CKA after it", vectors),
        Axes("codes", "step of a clustering", "adjusted mutual information", codes),
    ]
    draw([panel for panel in panels if panel.lines], file)


PART = Part(
    name="clusterings",
    title="CCE before and after clusterings",
    cells=_cells,
    lines=_lines,
    draw=_draw,
)
