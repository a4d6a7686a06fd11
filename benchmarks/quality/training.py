"""Training of one cell, and the record of what came out."""

from __future__ import annotations

import math
import time
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from benchmarks.machine import device_name
from benchmarks.quality.bags import ids_of_feature, in_batches, pooled, side_by_side
from benchmarks.quality.budgets import Budget, DoesNotFit
from benchmarks.quality.cells import Cell
from benchmarks.quality.embedder import Embedder, Tables
from benchmarks.quality.methods import METHODS
from benchmarks.quality.methods.hashed import FullTables
from benchmarks.quality.problems import PROBLEMS, Problem
from benchmarks.quality.rows import Training
from cce_torchrec.data import Dataset, Rows
from cce_torchrec.metrics import auc, log_loss
from cce_torchrec.recipe import is_rare
from cce_torchrec.versions import installed_versions

DENSE_RATE = 1e-3
"""Of Adam, for the network."""
UNCOMPRESSED = Training("rowwise_adagrad", 0.03)
"""Of the tables that no method compresses."""
EVALUATIONS_A_PASS = 4


@lru_cache(maxsize=2)
def dataset_of(name: str, split: int) -> Dataset:
    """The data set, kept: the cells of a process mostly come one split after the other."""
    return PROBLEMS[name].load(split)


def tables_of(
    problem: Problem, dataset: Dataset, cell: Cell, names: list[str], training: Training
) -> Tables:
    """The tables `names` of `dataset` as `cell` trains them."""
    sizes = [dataset.features[name] for name in names]
    compressed = names == dataset.compressed
    budget = Budget.parse(cell.group.budget) if compressed else Budget("none")
    steps = max(1, len(dataset.train) // problem.batch)
    columns = [list(dataset.features).index(name) for name in names]
    counts = [
        torch.bincount(ids_of_feature(dataset.train, column), minlength=size)
        for column, size in zip(columns, sizes, strict=True)
    ]
    examples = [float(own.sum()) / size for own, size in zip(counts, sizes, strict=True)]
    return Tables(
        names=names,
        sizes=sizes,
        shares=budget.shares(sizes, problem.dim),
        bounds=[problem.bound(size) for size in sizes],
        dim=problem.dim,
        seed=cell.seed,
        training=training,
        form=cell.form,
        counts=counts,
        steps=steps * cell.group.passes,
        passes=cell.group.passes,
        model=problem.model,
        all_rare=is_rare(max(examples, default=0.0), multiplies=problem.model == "gmf"),
    )


class Run:
    """The training of one cell."""

    def __init__(self, cell: Cell) -> None:
        group = cell.group
        self.cell, self.problem = cell, PROBLEMS[group.dataset]
        self.dataset = self.data()
        torch.manual_seed(cell.seed)
        # First, so that its start is the same whatever the method draws.
        self.network = self.problem.network(self.dataset)
        names = list(self.dataset.features)
        self.compressed = self.dataset.compressed
        self.others = [name for name in names if name not in self.compressed]
        other = tables_of(self.problem, self.dataset, cell, self.others, UNCOMPRESSED)
        self.other_tables = FullTables(other) if self.others else None
        own = Training(cell.optimizer, cell.rate)
        self.tables = tables_of(self.problem, self.dataset, cell, self.compressed, own)
        self.embedder = self.built()
        self.order = [names.index(name) for name in (*self.compressed, *self.others)]
        self.first = torch.tensor([*self.tables.first, *other.first])
        dense = list(self.network.parameters())
        self.optimizer = torch.optim.Adam(dense, lr=DENSE_RATE, fused=True) if dense else None
        self.curve: list[tuple[int, float, float]] = []

    def data(self) -> Dataset:
        """What is trained on and validated."""
        return dataset_of(self.cell.group.dataset, self.cell.split)

    def built(self) -> Embedder:
        """The compressed tables."""
        return METHODS[self.cell.group.method].embedder(self.tables)

    def ids_of(self, rows: Rows) -> torch.Tensor:
        """Ids [R, F] of the tables, compressed ones first, numbered on from table to table.

        R is the number of rows, and more where features have several ids a row (`side_by_side`).
        """
        return side_by_side(rows)[:, self.order] + self.first

    def logits(self, rows: Rows, training: bool) -> torch.Tensor:
        """Logits [B]."""
        ids, count = self.ids_of(rows), len(self.compressed)
        embeddings = self.embedder.lookup(ids[:, :count], training)
        if self.other_tables is not None:
            others = self.other_tables.lookup(ids[:, count:], training)
            embeddings = torch.cat([embeddings, others], dim=1)
        return self.network(rows.dense, pooled(embeddings, rows, self.order))

    def train(self) -> None:
        """All steps, with an evaluation every quarter pass and at the end."""
        train, batch, steps = self.dataset.train, self.problem.batch, self.tables.steps
        passes = self.cell.group.passes
        a_pass = steps // passes
        count = EVALUATIONS_A_PASS * passes
        due = {round(steps * (i + 1) / count) for i in range(count)}
        for step in range(steps):
            if step % a_pass == 0:
                batches = in_batches(train.take(self._order(step // a_pass)), batch)
            self._step(next(batches))
            if step + 1 in due:
                self.evaluate(step + 1, self.dataset.validation)
                if not math.isfinite(self.curve[-1][1]):
                    return  # a rate that is too high: what follows is not a number either
            self.embedder.after(step + 1)

    def _order(self, number: int) -> torch.Tensor:
        """The order of the training rows in a pass: the same for every method."""
        generator = torch.Generator().manual_seed(self.cell.seed * 1_000_003 + number + 1)
        return torch.randperm(len(self.dataset.train), generator=generator)

    def _step(self, rows: Rows) -> None:
        logits = self.logits(rows, training=True)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, rows.labels)
        penalty = self.embedder.penalty()
        (loss if penalty is None else loss + penalty).backward()
        self.embedder.step()
        if self.other_tables is not None:
            self.other_tables.step()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, step: int, rows: Rows) -> None:
        """Notes log loss and AUC of `rows` after `step` steps."""
        self.network.eval()
        self.embedder.before_evaluation()
        parts = in_batches(rows, 8192)
        logits = torch.cat([self.logits(part, training=False) for part in parts])
        self.network.train()
        self.curve.append((step, log_loss(logits, rows.labels), auc(logits, rows.labels)))


def record_of(cell: Cell) -> dict[str, Any]:
    """Trains `cell`; a cell whose budget is too small for its method says so instead."""
    group = cell.group
    record: dict[str, Any] = {
        "key": cell.key,
        "dataset": group.dataset,
        "passes": group.passes,
        "budget": group.budget,
        "method": group.method,
        "version": group.version,
        "split": cell.split,
        "seed": cell.seed,
        "optimizer": cell.optimizer,
        "rate": cell.rate,
        "form": cell.form,
    }
    began, began_cpu = time.perf_counter(), time.process_time()
    try:
        run = Run(cell)
        run.train()
    except DoesNotFit as error:
        return {**record, "does_not_fit": str(error)}
    took = {
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - began_cpu, 2),
    }
    return {**record, **results(run), **took}


def results(run: Run) -> dict[str, Any]:
    """The measured part of a record."""
    finite = [point for point in run.curve if math.isfinite(point[1])]
    best = min(finite, key=lambda point: point[1], default=(0, None, None))
    last = run.curve[-1][1]
    embedder = run.embedder
    return {
        "log_loss": best[1],
        "auc": best[2],
        "best_step": best[0],
        "final_log_loss": last if math.isfinite(last) else None,
        "curve": [[step, round(loss, 5), round(area, 5)] for step, loss, area in finite],
        "steps": run.tables.steps,
        "made": embedder.made,
        "table_bytes": embedder.table_bytes,
        "parameters": embedder.parameters,
        "stored_bytes": embedder.stored_bytes,
        "training_bytes": embedder.training_bytes,
        "device": device_name(torch.device("cpu")),
        "versions": installed_versions(),
    }
