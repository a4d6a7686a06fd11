"""Row lookups: full tables, the hashing trick, CE, and their restart.

The hashing trick: Weinberger et al., ICML 2009. CE, compositional embeddings by concatenation:
Tsang and Ahle, NeurIPS 2023, section 2.
"""

from __future__ import annotations

import torch

from benchmarks.quality.embedder import Tables
from benchmarks.quality.hashing import hashed_rows
from benchmarks.quality.methods.of_rows import OfRows, RestartedRows
from benchmarks.quality.rows import Block, Rows, means


class FullTables(OfRows):
    """A row for every id."""

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables)
        blocks = [Block(n, b) for n, b in zip(tables.sizes, tables.bounds, strict=True)]
        self.rows = Rows(blocks, tables.dim, tables.training)

    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """See `Embedder`."""
        return self.rows.read(ids, training)


class HashedRows(RestartedRows):
    """An embedding is `num_chunks` hashed rows side by side: CE, or with one the hashing trick.

    The form may name another number of chunks.

    With `restarts` the hash is drawn anew (`Tables.restart_steps`): each new row is the mean, over
    all ids that now share it, of what they had, and its optimizer state a tenth of the old mean.
    """

    def __init__(self, tables: Tables, *, num_chunks: int, restarts: bool) -> None:
        super().__init__(tables)
        self.restarts = restarts
        self.num_chunks = int(tables.form.removesuffix(" chunks")) if tables.form else num_chunks
        self.counts = [
            min(size, share.rows(tables.dim))
            for size, share in zip(tables.sizes, tables.shares, strict=True)
        ]
        """Rows of each table, in each chunk."""
        # Table after table, and in each chunk after chunk: blocks are a chunk of a table.
        self.rows = Rows(
            [
                Block(rows, bound)
                for rows, bound in zip(self.counts, tables.bounds, strict=True)
                for _ in range(self.num_chunks)
            ],
            tables.dim // self.num_chunks,
            tables.training,
        )
        self.index = self._index()

    def _index(self) -> torch.Tensor:
        """Rows [N, c] of all ids."""
        tables, out = self.tables, []
        for t, (name, size, rows) in enumerate(
            zip(tables.names, tables.sizes, self.counts, strict=True)
        ):
            ids = torch.arange(size)
            columns = [
                self.rows.first[t * self.num_chunks + chunk]
                + hashed_rows(
                    ids, rows, seed=tables.seed, table=name, chunk=chunk, drawn=self.drawn
                )
                for chunk in range(self.num_chunks)
            ]
            out.append(torch.stack(columns, dim=1))
        return torch.cat(out)

    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """See `Embedder`."""
        rows = self.index.index_select(0, ids.reshape(-1))
        return self.rows.read(rows, training).view(*ids.shape, self.tables.dim)

    def restarted(self) -> torch.Tensor:
        """See `RestartedRows`, and the class."""
        old, self.index = self.index, self._index()
        weight = torch.zeros_like(self.rows.weight)
        # Rows of a chunk only ever come from rows of the same chunk.
        for own, before in zip(self.index.unbind(1), old.unbind(1), strict=True):
            weight += means(own, self.rows.weight[before], len(weight))
        return weight
