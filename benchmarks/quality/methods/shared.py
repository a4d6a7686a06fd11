"""All tables as one: rows, codes and networks that a method would have for each are shared.

ROBE shares its array over tables by its nature. So that no method loses by the division of a budget
alone, each has its tables both ways, and the tuning split chooses (`SHARED` in the form).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.quality.budgets import Share
from benchmarks.quality.embedder import Embedder, Tables

SHARED = "shared"
"""What the form of such a cell begins with; what follows is the form of the method itself."""


def shared(form: str) -> str:
    """`form` with shared tables."""
    return f"{SHARED}, {form}" if form else SHARED


def built(build: Callable[[Tables], Embedder], tables: Tables) -> Embedder:
    """The method that `build` makes, of one table for all where the form says so."""
    first, _, form = tables.form.partition(", ")
    return _SharedTables(build, replace(tables, form=form)) if first == SHARED else build(tables)


class _SharedTables(Embedder):
    """A method whose one table has the ids of all `tables`, one table's after another's."""

    def __init__(self, build: Callable[[Tables], Embedder], tables: Tables) -> None:
        super().__init__(tables)
        pairs = zip(tables.bounds, tables.sizes, strict=True)
        share = Share(sum(s.amount for s in tables.shares), tables.shares[0].counts_bytes)
        one = replace(
            tables,
            names=["all"],
            sizes=[tables.num_ids],
            shares=[share],
            bounds=[sum(bound * size for bound, size in pairs) / tables.num_ids],
            counts=[torch.cat(tables.counts)],
        )
        self.one = build(one)

    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """See `Embedder`."""
        return self.one.lookup(ids.reshape(-1, 1), training).view(*ids.shape, self.tables.dim)

    def step(self) -> None:
        """See `Embedder`."""
        self.one.step()

    def after(self, step: int) -> None:
        """See `Embedder`."""
        self.one.after(step)

    def before_evaluation(self) -> None:
        """See `Embedder`."""
        self.one.before_evaluation()

    def penalty(self) -> torch.Tensor | None:
        """See `Embedder`."""
        return self.one.penalty()

    @property
    def parameters(self) -> int:
        """See `Embedder`."""
        return self.one.parameters

    @property
    def stored_bytes(self) -> int:
        """See `Embedder`."""
        return self.one.stored_bytes

    @property
    def training_bytes(self) -> int:
        """See `Embedder`."""
        return self.one.training_bytes
