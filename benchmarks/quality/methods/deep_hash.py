"""DHE: a network computes an embedding from many hashes of the id (Kang et al., KDD 2021)."""

from __future__ import annotations

import math

import torch
from torch import nn

from benchmarks.quality.budgets import DoesNotFit
from benchmarks.quality.hashing import hashed_rows
from benchmarks.quality.module_embedder import ModuleEmbedder

HASHES = 1024
"""As published."""
LAYERS = 2
"""Hidden ones."""
_KEPT_VALUES = 2**27
"""Hashes of all ids are kept up to so many of them, and computed in each step beyond."""
_SCALE = 2**15


class DeepHash(nn.Module):
    """Hashes uniform in (-1, 1), hidden layers with batch normalisation and Mish, a linear one."""

    def __init__(self, size: int, dim: int, hashes: int, width: int, name: str, seed: int) -> None:
        super().__init__()
        self.hashes, self.name, self.seed = hashes, name, seed
        self.kept = self._encoded(torch.arange(size)) if size * hashes <= _KEPT_VALUES else None
        widths = [hashes, *[width] * LAYERS]
        layers: list[nn.Module] = []
        for i in range(LAYERS):
            layers += [nn.Linear(widths[i], widths[i + 1]), nn.BatchNorm1d(width), nn.Mish()]
        self.decoder = nn.Sequential(*layers, nn.Linear(width, dim))

    def _encoded(self, ids: torch.Tensor) -> torch.Tensor:
        """Hashes [n, k] between -1 and 1."""
        out = torch.empty(len(ids), self.hashes)
        for h in range(self.hashes):
            hashed = hashed_rows(ids, 2 * _SCALE, seed=self.seed, table=self.name, chunk=h)
            out[:, h] = hashed
        return out.sub_(_SCALE - 0.5).div_(_SCALE)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [n, D]."""
        # Popular ids repeat in a batch, and the network is the cost of a step.
        own, inverse = torch.unique(ids, return_inverse=True)
        encoded = self._encoded(own) if self.kept is None else self.kept.index_select(0, own)
        return self.decoder(encoded).index_select(0, inverse)


def values_of(hashes: int, width: int, dim: int) -> int:
    """Values of a network: weights, biases, and four a width for each batch normalisation."""
    hidden = (hashes + 1) * width + (LAYERS - 1) * (width + 1) * width
    return hidden + LAYERS * 4 * width + (width + 1) * dim


class DHE(ModuleEmbedder):
    """The widest network that fits.

    The form is the number of hashes: "1024" as published, or "wide", as many as the network is
    wide, without which a small budget would be spent on the first layer alone.
    """

    def module(self, table: int) -> nn.Module:
        """See `ModuleEmbedder`."""
        values, dim = self.tables.shares[table].values(), self.tables.dim
        wide = self.tables.form == "wide"

        def fits(width: int) -> bool:
            return values_of(min(HASHES, width) if wide else HASHES, width, dim) <= values

        width = 0
        for bit in reversed(range(math.ceil(math.log2(values + 2)))):
            width += 1 << bit if fits(width + (1 << bit)) else 0
        if width < 1:
            raise DoesNotFit(
                f"a table has {values:,} values, and a network of width 1 has "
                f"{values_of(1 if wide else HASHES, 1, dim):,}"
            )
        size, name = self.tables.sizes[table], self.tables.names[table]
        hashes = min(HASHES, width) if wide else HASHES
        return DeepHash(size, dim, hashes, width, name, self.tables.seed)
