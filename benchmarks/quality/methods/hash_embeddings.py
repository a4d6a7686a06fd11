"""Hash embeddings: sums of hashed rows with importance weights (Svenstrup et al., NeurIPS 2017)."""

from __future__ import annotations

import torch

from benchmarks.quality.budgets import FLOAT_BYTES, DoesNotFit
from benchmarks.quality.embedder import Tables
from benchmarks.quality.hashing import hashed_rows
from benchmarks.quality.least_squares import fitted_rows
from benchmarks.quality.methods.of_rows import Restarted
from benchmarks.quality.rows import Block, Rows

HASHES = 2
"""As published."""
_WEIGHTS_PART = 8
"""Of the hash that finds an id's importance weights."""


class HashEmbeddings(Restarted):
    """An embedding is the sum of two rows of one table, each times a weight of the id's own.

    Where the weights of all ids would take more than the share that the form names, ids share them
    by another hash, as the paper's D1 has it. They start at 1, so that every id starts as a sum of
    hashed rows.
    """

    def __init__(self, tables: Tables, *, restarts: bool) -> None:
        super().__init__(tables)
        self.restarts = restarts
        weights_share = float(tables.form.removeprefix("weights="))
        self.buckets, self.counts = [], []
        for size, share in zip(tables.sizes, tables.shares, strict=True):
            values = share.values()
            buckets = min(size, int(weights_share * values) // HASHES)
            rows = min(size, (values - HASHES * buckets) // tables.dim)
            if buckets < 1 or rows < 1:
                raise DoesNotFit(f"{values} values hold no row of {tables.dim} beside its weights")
            self.buckets.append(buckets)
            self.counts.append(rows)
        # A sum of two independent rows would have twice the variance of one.
        bounds = [bound / HASHES**0.5 for bound in tables.bounds]
        self.rows = Rows(
            [Block(n, bound) for n, bound in zip(self.counts, bounds, strict=True)],
            tables.dim,
            tables.training,
        )
        blocks = [Block(n, 0.0, middle=1.0) for n in self.buckets]
        self.weights = Rows(blocks, HASHES, tables.training)
        self.index = self._index()
        self.weights_of = self._weights_of()

    def _index(self) -> torch.Tensor:
        """Rows [N, 2] of all ids."""
        tables = self.tables
        return torch.cat(
            [
                torch.stack(
                    [
                        self.rows.first[t]
                        + hashed_rows(
                            torch.arange(size),
                            self.counts[t],
                            seed=tables.seed,
                            table=name,
                            part=part,
                            drawn=self.drawn,
                        )
                        for part in range(HASHES)
                    ],
                    dim=1,
                )
                for t, (name, size) in enumerate(zip(tables.names, tables.sizes, strict=True))
            ]
        )

    def _weights_of(self) -> torch.Tensor:
        """Rows [N] of the importance weights of all ids."""
        tables, out = self.tables, []
        for t, (name, size) in enumerate(zip(tables.names, tables.sizes, strict=True)):
            ids, count = torch.arange(size), self.buckets[t]
            own = (
                ids
                if count == size
                else hashed_rows(ids, count, seed=tables.seed, table=name, part=_WEIGHTS_PART)
            )
            out.append(self.weights.first[t] + own)
        return torch.cat(out)

    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """See `Embedder`."""
        flat = ids.reshape(-1)
        parts = self.rows.read(self.index.index_select(0, flat), training)
        weights = self.weights.read(self.weights_of.index_select(0, flat), training)
        return (parts * weights[:, :, None]).sum(1).view(*ids.shape, self.tables.dim)

    def step(self) -> None:
        """See `Embedder`."""
        self.rows.step()
        self.weights.step()

    def restart(self) -> None:
        """Draws the hashes of the rows anew; the new rows fit the embeddings of all ids.

        The importance weights stay as they are.
        """
        weights = self.weights.weight.detach()[self.weights_of]
        targets = (self.rows.weight[self.index] * weights[:, :, None]).sum(1)
        self.index = self._index()
        self.rows.weight.copy_(fitted_rows(self.index, weights, targets, len(self.rows.weight)))
        self.rows.forget_state()

    @property
    def parameters(self) -> int:
        """See `Embedder`."""
        return self.rows.weight.numel() + self.weights.weight.numel()

    @property
    def training_bytes(self) -> int:
        """See `Embedder`."""
        state = self.rows.state_values + self.weights.state_values
        return FLOAT_BYTES * (self.parameters + state)
