"""TT-Rec: a table as a product of three small cores (Yin et al., MLSys 2021)."""

from __future__ import annotations

import math

import torch
from torch import nn

from benchmarks.quality.budgets import DoesNotFit
from benchmarks.quality.module_embedder import ModuleEmbedder


class TensorTrain(nn.Module):
    """Row (i, j, k) of a table is G1[i] G2[j] G3[k], of ranks (1, r, r, 1)."""

    def __init__(self, sizes: list[int], dims: list[int], rank: int, bound: float) -> None:
        super().__init__()
        self.sizes, self.dims, self.rank = sizes, dims, rank
        # Products of three normal values, summed over both ranks, are as varied as a full table.
        sigma = (bound**2 / 3 / rank**2) ** (1 / 6)
        self.cores = nn.ParameterList(
            nn.Parameter(sigma * torch.randn(size, left * dim * right))
            for size, left, dim, right in zip(
                sizes, (1, rank, rank), dims, (rank, rank, 1), strict=True
            )
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [n, D]."""
        _, n2, n3 = self.sizes
        d1, d2, d3 = self.dims
        places = (ids // (n2 * n3), ids // n3 % n2, ids % n3)
        a, b, c = (
            nn.functional.embedding(at, core) for at, core in zip(places, self.cores, strict=True)
        )
        ab = torch.bmm(a.view(-1, d1, self.rank), b.view(-1, self.rank, d2 * self.rank))
        abc = torch.bmm(ab.view(-1, d1 * d2, self.rank), c.view(-1, self.rank, d3))
        return abc.view(len(ids), -1)


class TTRec(ModuleEmbedder):
    """The largest rank that fits, of cores as equal as can be."""

    def module(self, table: int) -> nn.Module:
        """See `ModuleEmbedder`."""
        size, values = self.tables.sizes[table], self.tables.shares[table].values()
        sizes, dims = thirds(size), factors(self.tables.dim)
        rank = 0
        while _values(sizes, dims, rank + 1) <= values:
            rank += 1
        if rank < 1:
            raise DoesNotFit(
                f"a table of {size:,} ids has {values:,} values and needs "
                f"{_values(sizes, dims, 1):,}"
            )
        return TensorTrain(sizes, dims, rank, self.tables.bounds[table])


def _values(sizes: list[int], dims: list[int], rank: int) -> int:
    (n1, n2, n3), (d1, d2, d3) = sizes, dims
    return n1 * d1 * rank + n2 * d2 * rank * rank + n3 * d3 * rank


def thirds(size: int) -> list[int]:
    """Three numbers, as equal as can be, whose product is at least `size`."""
    first = math.ceil(size ** (1 / 3) - 1e-9)
    second = math.ceil((size / first) ** 0.5 - 1e-9)
    return [first, second, math.ceil(size / (first * second))]


def factors(dim: int) -> list[int]:
    """Three factors of `dim`, a power of two, the last ones the largest."""
    bits = dim.bit_length() - 1
    if dim != 1 << bits:
        raise ValueError(f"dimension {dim} is no power of two, and has no three even factors")
    return [1 << (bits + i) // 3 for i in range(3)]
