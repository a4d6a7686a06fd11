"""ROBE-Z: tables are one array, read in blocks at hashes (Desai et al., MLSys 2022)."""

from __future__ import annotations

import torch

from benchmarks.quality.budgets import DoesNotFit
from benchmarks.quality.embedder import Tables
from benchmarks.quality.hashing import hashed_rows
from benchmarks.quality.methods.of_rows import RestartedRows
from benchmarks.quality.rows import Block, Rows, means


class Robe(RestartedRows):
    """Block j of id x starts at a hash of (x, j) in the array of its table, which wraps around.

    The form is the number Z of values in a block; as published all tables share one array.
    """

    def __init__(self, tables: Tables, *, restarts: bool) -> None:
        super().__init__(tables)
        self.restarts = restarts
        self.width = int(tables.form.removeprefix("Z="))
        self.lengths = [share.values() for share in tables.shares]
        if min(self.lengths) < tables.dim:
            raise DoesNotFit(
                f"{min(self.lengths)} values are fewer than an embedding of {tables.dim}"
            )
        pairs = zip(self.lengths, tables.bounds, strict=True)
        self.rows = Rows([Block(n, bound) for n, bound in pairs], 1, tables.training)
        self.places = self._places()

    def _places(self) -> torch.Tensor:
        """Places [N, D] of what each id reads, in the arrays of all tables."""
        tables, out = self.tables, []
        for name, size, length, first in zip(
            tables.names, tables.sizes, self.lengths, self.rows.first, strict=True
        ):
            ids = torch.arange(size)
            columns = [
                hashed_rows(
                    ids, length, seed=tables.seed, table=name, chunk=block, drawn=self.drawn
                )
                for block in range(tables.dim // self.width)
            ]
            blocks = torch.stack(columns, dim=1)[:, :, None] + torch.arange(self.width)
            out.append(first + blocks.flatten(1) % length)
        return torch.cat(out)

    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """See `Embedder`."""
        places = self.places.index_select(0, ids.reshape(-1))
        return self.rows.read(places, training).view(*ids.shape, self.tables.dim)

    def restarted(self) -> torch.Tensor:
        """Draws the hash anew; each value is the mean of all that now read it."""
        old = self.rows.weight.index_select(0, self.places.view(-1))
        self.places = self._places()
        return means(self.places.view(-1), old, len(self.rows.weight))
