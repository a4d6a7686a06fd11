"""A run of the quality benchmark whose vectors and codes are read while it trains."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from benchmarks.alignment.embedding_runs import Data, TableRun
from benchmarks.quality import cells
from benchmarks.quality.embedder import Embedder
from benchmarks.quality.methods.clustered import Clustered
from benchmarks.quality.methods.shared import Joined
from cce_torchrec import ClusteringSchedule
from cce_torchrec.codes.chunk_codes import local_codes
from cce_torchrec.data import Rows

NUMBERS = (1, 2, 4, 8, 16)
"""Clusterings around which tables are read, beside the last."""


@dataclass(frozen=True)
class Snapshot:
    """What the tables of a run were at a time."""

    vectors: dict[str, torch.Tensor]
    """[N, D] of each feature."""
    codes: dict[str, torch.Tensor]
    """[chunks, N] of each table with clusters, which may be one of all features; of seen ids."""


def clustering_steps(run: TableRun) -> list[int]:
    """The steps after which CCE with the recipe for frequent ids clusters."""
    passes = run.tables.passes
    schedule = ClusteringSchedule.for_training(passes, run.tables.steps // passes)
    return sorted(schedule.steps)


def watched(steps: list[int]) -> dict[int, int]:
    """The steps around which tables are read, each with the number of its clustering."""
    numbers = [*(n for n in NUMBERS if n < len(steps)), len(steps)]
    return {steps[number - 1]: number for number in numbers}


class WatchedRun(TableRun):
    """A run that is read at its start, before and after some clusterings, and at its end.

    Args:
        cell: of the quality benchmark.
        data: what it has of the training examples.
        number: of the run among those that are compared.
        clusters: whether its clusterings take place.
    """

    def __init__(self, cell: cells.Cell, data: Data, number: int, *, clusters: bool) -> None:
        super().__init__(cell, data, number)
        if not clusters:
            for part in clustered_parts(self.embedder):
                part.clusterings = frozenset()
        self._due = watched(clustering_steps(self))
        self._done = 0
        self.snapshots: dict[str, Snapshot] = {}

    def train(self) -> None:
        """See `Run`; fills `snapshots`, by "start", "before 1", "after 1", ... and "end"."""
        self._keep("start")
        super().train()
        self._keep("end")

    def _step(self, rows: Rows) -> None:
        # `Run.train` clusters between two steps.
        if self._done in self._due:
            self._keep(f"after {self._due[self._done]}")
        super()._step(rows)
        self._done += 1
        if self._done in self._due:
            self._keep(f"before {self._due[self._done]}")

    def _keep(self, when: str) -> None:
        self.snapshots[when] = Snapshot(self.read_vectors(), codes_of(self.embedder))


def clustered_parts(embedder: Embedder) -> Collection[Clustered]:
    """All CCE tables of a method, which may have one for several features."""
    parts = [part for _, part in embedder.parts] if isinstance(embedder, Joined) else [embedder]
    return [part for part in parts if isinstance(part, Clustered)]


def codes_of(embedder: Embedder) -> dict[str, torch.Tensor]:
    """Codes [chunks, N] of the N seen ids of each CCE table."""
    out = {}
    for part in clustered_parts(embedder):
        for config, counts in zip(part.configs, part.tables.counts, strict=True):
            seen = counts.nonzero()[:, 0]
            codes = local_codes(part.collection.codes, config.name)
            out[config.name] = codes.main_rows(seen).clone()
    return out
