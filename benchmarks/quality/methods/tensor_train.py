"""TT-Rec: a table as a product of three small cores (Yin et al., MLSys 2021)."""

from __future__ import annotations

import math

import torch
from torch import nn

from benchmarks.quality.budgets import DoesNotFit
from benchmarks.quality.module_embedder import ModuleEmbedder

_WHOLE = 128
"""Times fewer ids in a batch than in the table, up to which the whole table is computed."""


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
        (n1, n2, n3), (d1, d2, d3) = self.sizes, self.dims
        i, j, k = ids // (n2 * n3), ids // n3 % n2, ids % n3
        if n1 * n2 * n3 <= _WHOLE * len(ids):
            first = (i[:, None] * d1 + torch.arange(d1)) * n2 + j[:, None]
            second = (first[:, :, None] * d2 + torch.arange(d2)) * n3 + k[:, None, None]
            return self._whole().index_select(0, second.view(-1)).view(len(ids), -1)
        cores = zip((i, j, k), self.cores, strict=True)
        a, b, c = (core.index_select(0, at) for at, core in cores)
        ab = torch.bmm(a.view(-1, d1, self.rank), b.view(-1, self.rank, d2 * self.rank))
        abc = torch.bmm(ab.view(-1, d1 * d2, self.rank), c.view(-1, self.rank, d3))
        return abc.view(len(ids), -1)

    def _whole(self) -> torch.Tensor:
        """The table [n1 d1 n2 d2 n3, d3]: two products for all ids, not two for each."""
        (n1, n2, n3), (d1, d2, d3), r = self.sizes, self.dims, self.rank
        first, second, third = self.cores
        ab = first.view(n1 * d1, r) @ second.view(n2, r, d2 * r).transpose(0, 1).reshape(r, -1)
        abc = ab.view(-1, r) @ third.view(n3, r, d3).transpose(0, 1).reshape(r, -1)
        return abc.view(-1, d3)


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
