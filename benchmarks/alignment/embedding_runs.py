"""Runs of the quality benchmark whose tables are compared: of other seeds, labels, sizes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from benchmarks.quality import cells
from benchmarks.quality.grid import chosen, group_of, tuned
from benchmarks.quality.options import RESULTS
from benchmarks.quality.problems import PROBLEMS
from benchmarks.quality.store import Store
from benchmarks.quality.training import Run, dataset_of
from cce_torchrec.data import Dataset, Rows

SPLIT = 0
"""No figure of the quality benchmark is of it."""
_LOOKED_UP = 16384
"""Ids whose vectors are read at once."""


@dataclass(frozen=True, order=True)
class Data:
    """What runs are trained on."""

    share: float = 1.0
    """Of the training examples, the same ones for all runs."""
    flipped: float = 0.0
    """Share of the labels that are turned around, others for each run."""
    halves: bool = False
    """Whether even runs have one half of the examples and odd ones the other."""

    def of(self, dataset: Dataset, run: int) -> Dataset:
        """What the run of this number has of `dataset`."""
        train = dataset.train
        g = torch.Generator().manual_seed(1)
        order = torch.randperm(len(train), generator=g)
        if self.halves:
            order = order[run % 2 :: 2]
        train = train.take(order[: round(self.share * len(order))].sort().values)
        if self.flipped:
            g = torch.Generator().manual_seed(1000 + run)
            turned = torch.rand(len(train), generator=g) < self.flipped
            train = replace(train, labels=torch.where(turned, 1 - train.labels, train.labels))
        return replace(dataset, train=train)


class TableRun(Run):
    """A run that goes back to where its validation loss was lowest, as if it had stopped there.

    Args:
        cell: of the quality benchmark, with the seed of this run.
        data: what it has of the training examples.
        number: of the run among those that are compared.
    """

    def __init__(self, cell: cells.Cell, data: Data, number: int) -> None:
        self._data, self._number = data, number
        self.vectors: dict[str, torch.Tensor] = {}
        """Vectors [N, D] of all ids of each compressed table."""
        self._rest: tuple[dict[str, Any], torch.Tensor | None] = {}, None
        super().__init__(cell)

    def data(self) -> Dataset:
        """See `Run`."""
        return self._data.of(super().data(), self._number)

    def evaluate(self, step: int, rows: Rows) -> None:
        """See `Run`; what is best so far is kept."""
        super().evaluate(step, rows)
        if self.curve[-1][1] == min(point[1] for point in self.curve):
            self.vectors = self.read_vectors()
            others = self.other_tables
            weight = None if others is None else others.rows.weight.detach().clone()
            self._rest = deepcopy(self.network.state_dict()), weight

    def go_back(self) -> None:
        """Gives the network, and the tables beside, the values that they had then."""
        state, weight = self._rest
        self.network.load_state_dict(state)
        if weight is not None and self.other_tables is not None:
            self.other_tables.rows.weight.data.copy_(weight)

    @torch.no_grad()
    def read_vectors(self) -> dict[str, torch.Tensor]:
        """Vectors [N, D] of all ids of each compressed table, as they are now."""
        tables, out = self.tables, {}
        for column, (name, size) in enumerate(zip(tables.names, tables.sizes, strict=True)):
            parts = []
            for ids in torch.arange(size).split(_LOOKED_UP):
                # The first id of every other table: lookups want one of each.
                rows = torch.tensor(tables.first).repeat(len(ids), 1)
                rows[:, column] += ids
                parts.append(self.embedder.lookup(rows, training=False)[:, column].clone())
            out[name] = torch.cat(parts)
        return out


@lru_cache(maxsize=1)
def _store() -> Store:
    return Store(RESULTS)


def cell_of(dataset: str, method: str, budget: str, seed: int) -> cells.Cell:
    """The cell with the rate and the form that the quality benchmark has chosen.

    Raises:
        ValueError: it has not, or the method does not fit the budget.
    """
    group = group_of(dataset, PROBLEMS[dataset].passes[0], method, budget)
    records = _store().records
    choice = chosen(group, records) if tuned(group, records) else None
    if choice is None:
        raise ValueError(f"no rate is chosen for {group}; run benchmarks.quality first")
    return replace(choice.cell, split=SPLIT, seed=seed)


def trained(cell: cells.Cell, data: Data, number: int) -> TableRun:
    """The run, trained, and back where its validation loss was lowest."""
    run = TableRun(cell, data, number)
    run.train()
    run.go_back()
    return run


def counts_of(dataset: str, data: Data) -> dict[str, torch.Tensor]:
    """Training examples [N] of each id of the compressed tables."""
    whole = dataset_of(dataset, SPLIT)
    train = data.of(whole, 0).train
    return {
        name: torch.bincount(train.ids[:, column], minlength=size)
        for column, (name, size) in enumerate(whole.features.items())
        if name in whole.compressed
    }
