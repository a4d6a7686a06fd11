"""ROBE-Z: all tables share one array, read in blocks at hashes (Desai et al., MLSys 2022)."""

from __future__ import annotations

import torch

from benchmarks.quality.budgets import DoesNotFit
from benchmarks.quality.embedder import Tables
from benchmarks.quality.hashing import hashed_rows
from benchmarks.quality.methods.of_rows import RestartedRows
from benchmarks.quality.rows import Block, Rows, means


class Robe(RestartedRows):
    """Block j of id x of table t starts at a hash of (t, x, j) in an array that wraps around.

    The form is the number Z of values in a block.
    """

    def __init__(self, tables: Tables, *, restarts: bool) -> None:
        super().__init__(tables)
        self.restarts = restarts
        self.width = int(tables.form.removeprefix("Z="))
        self.length = sum(share.values() for share in tables.shares)
        if self.length < tables.dim:
            raise DoesNotFit(f"{self.length} values are fewer than an embedding of {tables.dim}")
        # One array: of the tables' bounds the mean, weighted by ids.
        pairs = zip(tables.bounds, tables.sizes, strict=True)
        bound = sum(bound * size for bound, size in pairs) / tables.num_ids
        self.rows = Rows([Block(self.length, bound)], 1, tables.training)
        self.start = self._start(0)

    def _start(self, drawn: int) -> torch.Tensor:
        """Where the blocks [N, blocks] of all ids start."""
        tables = self.tables
        return torch.cat(
            [
                torch.stack(
                    [
                        hashed_rows(
                            torch.arange(size),
                            self.length,
                            seed=tables.seed,
                            table=name,
                            chunk=block,
                            drawn=drawn,
                        )
                        for block in range(tables.dim // self.width)
                    ],
                    dim=1,
                )
                for name, size in zip(tables.names, tables.sizes, strict=True)
            ]
        )

    def _places(self, start: torch.Tensor) -> torch.Tensor:
        """Places [n, D] in the array of ids whose blocks start at `start` [n, blocks]."""
        places = start[:, :, None] + torch.arange(self.width)
        return (places % self.length).flatten(1)

    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """See `Embedder`."""
        places = self._places(self.start.index_select(0, ids.reshape(-1)))
        return self.rows.read(places, training).view(*ids.shape, self.tables.dim)

    def restarted(self) -> torch.Tensor:
        """Draws the hash anew; each value is the mean of all that now read it."""
        old = self.rows.weight[self._places(self.start)].view(-1, 1)
        self.start = self._start(1)
        return means(self._places(self.start).view(-1), old, self.length)
