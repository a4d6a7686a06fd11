"""Low rank: a table [N, D] as a product [N, r] x [r, D]."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.quality.budgets import DoesNotFit
from benchmarks.quality.module_embedder import ModuleEmbedder


class LowRankTable(nn.Module):
    """A factorised table of `size` ids."""

    def __init__(self, size: int, dim: int, rank: int, bound: float) -> None:
        super().__init__()
        # A product of uniform values, summed over the rank, is then as varied as a full table.
        self.left = nn.Parameter(torch.empty(size, rank).uniform_(-1.0, 1.0))
        self.right = nn.Parameter(torch.empty(rank, dim).uniform_(-1.0, 1.0))
        with torch.no_grad():
            self.right.mul_(bound * (3 / rank) ** 0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [n, D]."""
        return self.left.index_select(0, ids) @ self.right


class LowRank(ModuleEmbedder):
    """The largest rank that fits; at least 1, a value for every id."""

    def module(self, table: int) -> nn.Module:
        """See `ModuleEmbedder`."""
        tables = self.tables
        size, values = tables.sizes[table], tables.shares[table].values()
        rank = values // (size + tables.dim)
        if rank < 1:
            raise DoesNotFit(f"a table of {size:,} ids has {values:,} values and needs one an id")
        return LowRankTable(size, tables.dim, min(rank, tables.dim), tables.bounds[table])
