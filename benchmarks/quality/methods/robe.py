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
        # Of each id: where the array of its table starts, and how long it is.
        sizes = torch.tensor(tables.sizes)
        self.first = torch.tensor(self.rows.first).repeat_interleave(sizes)[:, None]
        self.length = torch.tensor(self.lengths).repeat_interleave(sizes)[:, None]
        self.start = self._start()

    def _start(self) -> torch.Tensor:
        """Where in the array of its table the blocks [N, blocks] of each id start."""
        tables, out = self.tables, []
        for name, size, length in zip(tables.names, tables.sizes, self.lengths, strict=True):
            ids = torch.arange(size)
            columns = [
                hashed_rows(
                    ids, length, seed=tables.seed, table=name, chunk=block, drawn=self.drawn
                )
                for block in range(tables.dim // self.width)
            ]
            out.append(torch.stack(columns, dim=1))
        return torch.cat(out)

    def _places(self, ids: torch.Tensor) -> torch.Tensor:
        """Places [n, D] of what `ids` [n] read, in the arrays of all tables."""
        blocks = self.start[ids][:, :, None] + torch.arange(self.width)
        return self.first[ids] + blocks.flatten(1) % self.length[ids]

    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """See `Embedder`."""
        places = self._places(ids.reshape(-1))
        return self.rows.read(places, training).view(*ids.shape, self.tables.dim)

    def restarted(self) -> torch.Tensor:
        """Draws the hash anew; each value is the mean of all that now read it."""
        every = torch.arange(self.tables.num_ids)
        old = self.rows.weight[self._places(every)].view(-1, 1)
        self.start = self._start()
        return means(self._places(every).view(-1), old, len(self.rows.weight))
