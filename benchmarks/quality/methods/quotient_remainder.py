"""QR: a row of an id's remainder times one of its quotient (Shi et al., KDD 2020).

Of the published operations, the product was better than the sum at every rate on flights.
"""

from __future__ import annotations

import torch

from benchmarks.quality.budgets import DoesNotFit
from benchmarks.quality.embedder import Tables
from benchmarks.quality.methods.of_rows import RestartedRows
from benchmarks.quality.rows import Block, Rows, means

_SPREAD = 0.1
"""Rows of quotients start so far around 1, and products as varied as the rows of remainders."""


class QuotientRemainder(RestartedRows):
    """Remainders by as large a divisor as the budget allows: the finest hash has most rows.

    A restart renumbers the ids at random, as a hash is drawn anew. Rows of remainders become the
    means of the embeddings that now share them, and rows of quotients 1.
    """

    def __init__(self, tables: Tables, *, restarts: bool) -> None:
        super().__init__(tables)
        self.restarts = restarts
        self.divisors = [
            _divisor(size, share.rows(tables.dim, at_least=2))
            for size, share in zip(tables.sizes, tables.shares, strict=True)
        ]
        blocks = []
        for size, divisor, bound in zip(tables.sizes, self.divisors, tables.bounds, strict=True):
            blocks += [Block(divisor, bound), Block(-(-size // divisor), _SPREAD, middle=1.0)]
        self.rows = Rows(blocks, tables.dim, tables.training)
        self.index = self._index()

    def _index(self) -> torch.Tensor:
        """Rows [N, 2] of all ids: that of the remainder, then that of the quotient."""
        out = []
        for t, (size, divisor) in enumerate(zip(self.tables.sizes, self.divisors, strict=True)):
            seed = 1000 * self.tables.seed + 100 * t + self.drawn
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(size, generator=generator)
            fine, coarse = self.rows.first[2 * t], self.rows.first[2 * t + 1]
            out.append(torch.stack([fine + order % divisor, coarse + order // divisor], dim=1))
        return torch.cat(out)

    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """See `Embedder`."""
        parts = self.rows.read(self.index.index_select(0, ids.reshape(-1)), training)
        return (parts[:, 0] * parts[:, 1]).view(*ids.shape, self.tables.dim)

    def restarted(self) -> torch.Tensor:
        """Renumbers the ids; see the class."""
        rows = self.rows
        targets = rows.weight[self.index[:, 0]] * rows.weight[self.index[:, 1]]
        self.index = self._index()
        new = means(self.index[:, 0], targets, len(rows.weight))
        new[self.index[:, 1]] = 1.0
        return new


def _divisor(size: int, rows: int) -> int:
    """The largest divisor whose remainders and quotients are at most `rows` in all."""
    for divisor in range(min(size, rows - 1), 0, -1):
        if divisor + -(-size // divisor) <= rows:
            return divisor
    raise DoesNotFit(
        f"{rows} rows are fewer than remainders and quotients of {size:,} ids can have, about "
        f"{2 * size**0.5:.0f}"
    )
